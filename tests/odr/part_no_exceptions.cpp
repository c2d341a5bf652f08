// SPDX-License-Identifier: Apache-2.0
//
// Compiled with -fno-exceptions.
#include <kv1/kv1.hpp>

#include "part.hpp"

#include <span>
#include <typeinfo>

static_assert(KV1_EXCEPTIONS == 0);

namespace part_no_exceptions {
#include "body.inl"
}

outcome run_no_exceptions() { return part_no_exceptions::run(); }
