// SPDX-License-Identifier: Apache-2.0
//
// The kernels of the test program, compiled once: its other translation units define KV1_EXTERNAL_KERNELS.
#include <kv1/kernels.hpp>
