// SPDX-License-Identifier: Apache-2.0
//
// The codes, bytes and values that storing a vector must give, from the quantizers' definitions and the
// bit-by-bit packing.
#pragma once

#include "formats.hpp"
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
    return with_type_of(f, [&]<class F>() {
        if constexpr (kv1::info_of(kv1::kv_format_of<F>).code_bits == 0)
            return plain_row<typename F::value_type>(x);
        else
            return quantized_row<F>(x);
    });
}

} // namespace kv1_test
