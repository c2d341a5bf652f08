// SPDX-License-Identifier: Apache-2.0
//
// In which arithmetic attention is computed.
#pragma once

#include <kv1/detail/config.hpp>

#include <cstdint>

namespace kv1::inline KV1_ABI {

/// How attention computes over coded formats. Plain formats use fp32 arithmetic in either case.
enum class precision : std::uint8_t {
    fast,  ///< dot products of codes with queries and weights of 8 bits, in integers
    exact, ///< fp32 arithmetic on the decoded values
};

} // namespace kv1::inline KV1_ABI
