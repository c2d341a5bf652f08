// SPDX-License-Identifier: Apache-2.0
//
// Compiled with -march=x86-64-v3: entered on processors that have it only.
#include <kv1/kv1.hpp>

#include "part.hpp"

#include <span>
#include <typeinfo>

namespace part_v3 {
#include "body.inl"
}

outcome run_v3() { return part_v3::run(); }
