// SPDX-License-Identifier: Apache-2.0
//
// The cache of kernels.hpp, compiled as this program is.
#include <kv1/detail/external_caches.hpp>
