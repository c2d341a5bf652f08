// SPDX-License-Identifier: Apache-2.0
//
// The codes, bytes and values that storing a vector must give, from the quantizers' definitions and the
// bit-by-bit packing.
#pragma once

#include "packed_model.hpp"

#include <kv1/format.hpp>
#include <kv1/quantizers/affine.hpp>
#include <kv1/quantizers/binary.hpp>
#include <kv1/quantizers/codebook.hpp>
#include <kv1/quantizers/compact.hpp>
#include <kv1/quantizers/scaled_binary.hpp>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <stdexcept>
#include <vector>

namespace kv1_test {

struct reference_row {
    std::vector<std::uint8_t> codes; // none for plain formats
    std::vector<std::byte> packed;   // row format
    std::uint16_t scale = 0, minimum = 0;
    std::vector<float> values; // dequantized
};

template <class Q>
reference_row quantized_row(std::span<const float> x) {
    reference_row row;
    row.codes.resize(x.size());
    typename Q::metadata m{};
    if (!Q::quantize(x, row.codes, m))
        throw std::runtime_error("the reference refuses the vector");
    row.packed = packed_model(row.codes, Q::bits);
    if constexpr (requires { m.scale; })
        row.scale = m.scale.bits();
    if constexpr (requires { m.minimum; })
        row.minimum = m.minimum.bits();
    for (const std::uint8_t c : row.codes)
        row.values.push_back(Q::dequantize(c, m));
    return row;
}

template <class T>
reference_row plain_row(std::span<const float> x) {
    reference_row row;
    row.packed.resize(x.size() * sizeof(T));
    for (std::size_t i = 0; i < x.size(); ++i) {
        const T stored(x[i]);
        std::memcpy(row.packed.data() + i * sizeof(T), &stored, sizeof(T));
        row.values.push_back(static_cast<float>(stored));
    }
    return row;
}

inline reference_row make_reference_row(kv1::kv_format f, std::span<const float> x) {
    switch (f) {
    case kv1::kv_format::fp32:
        return plain_row<float>(x);
    case kv1::kv_format::fp16:
        return plain_row<kv1::float16>(x);
    case kv1::kv_format::affine8:
        return quantized_row<kv1::affine<8>>(x);
    case kv1::kv_format::affine4:
        return quantized_row<kv1::affine<4>>(x);
    case kv1::kv_format::affine3:
        return quantized_row<kv1::affine<3>>(x);
    case kv1::kv_format::affine2:
        return quantized_row<kv1::affine<2>>(x);
    case kv1::kv_format::scaled_binary:
        return quantized_row<kv1::scaled_binary>(x);
    case kv1::kv_format::binary:
        return quantized_row<kv1::binary>(x);
    case kv1::kv_format::compact4:
        return quantized_row<kv1::compact<4>>(x);
    case kv1::kv_format::compact3:
        return quantized_row<kv1::compact<3>>(x);
    case kv1::kv_format::compact2:
        return quantized_row<kv1::compact<2>>(x);
    case kv1::kv_format::codebook2:
        return quantized_row<kv1::codebook2>(x);
    }
    throw std::runtime_error("unknown format");
}

} // namespace kv1_test
