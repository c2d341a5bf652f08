// SPDX-License-Identifier: Apache-2.0
#include <kv1/kv1.hpp>

#include "part.hpp"

#include <span>
#include <typeinfo>

namespace part_default {
#include "body.inl"
}

outcome run_default() { return part_default::run(); }
