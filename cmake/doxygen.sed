# SPDX-License-Identifier: Apache-2.0
1s|^// SPDX.*|/// @file|
1s|^/\* SPDX.*|/** @file|
1,/^#pragma once/ {
    s|^//   |///       |
    s|^//\([^/]\)|///\1|
    s|^//$|///|
}
s/kv1::inline KV1_ABI/kv1/
/#include <kv1.*\.inl>/d
# Doxygen takes a specialization in std for a stray definition.
/^template <int Bits, class Byte>$/ {
    N
    /std::ranges/d
}
