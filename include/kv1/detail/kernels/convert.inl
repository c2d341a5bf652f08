// SPDX-License-Identifier: Apache-2.0
//
// Converts fp16 and bf16 to and from fp32. Parsed once per target. A register takes one load, one conversion and one
// store.

KV1_LAZY inline void load_floats(scalar_type type, const void* source, std::size_t n, float* out) noexcept {
    std::size_t i = 0;
    switch (type) {
    case scalar_type::fp32:
        if (source != out)
            std::memcpy(out, source, n * sizeof(float));
        return;
    case scalar_type::fp16: {
        const auto* p = static_cast<const std::uint16_t*>(source);
        for (; i + lanes <= n; i += lanes) {
#if KV1_ISA_GENERIC
            for (std::size_t k = 0; k < lanes; ++k)
                out[i + k] = detail::half_to_float(p[i + k]); // the lane form takes finite values only
#else
            load_half(p + i).store_unaligned(out + i);
#endif
        }
        for (; i < n; ++i)
            out[i] = detail::half_to_float(p[i]);
        return;
    }
    case scalar_type::bf16: {
        const auto* p = static_cast<const std::uint16_t*>(source);
        for (; i + lanes <= n; i += lanes)
            xs::bitwise_cast<float>(load_u16(p + i) << 16).store_unaligned(out + i);
        for (; i < n; ++i)
            out[i] = bfloat_to_float(p[i]);
        return;
    }
    }
}

template <bool Saturates>
inline void store_scalars(scalar_type type, const float* source, std::size_t n, void* out) noexcept {
    std::size_t i = 0;
    switch (type) {
    case scalar_type::fp32:
        std::memcpy(out, source, n * sizeof(float));
        return;
    case scalar_type::fp16: {
        auto* p = static_cast<std::uint16_t*>(out);
        for (; i + lanes <= n; i += lanes) {
            f32 x = f32::load_unaligned(source + i);
            if constexpr (Saturates) {
                const f32 largest(largest_half);
                x = xs::select(x > largest, largest, xs::select(x < -largest, -largest, x)); // NaN stays NaN
            }
            store_half(x, p + i);
        }
        for (; i < n; ++i)
            p[i] = float_to_half(Saturates ? saturated(source[i], largest_half) : source[i]);
        return;
    }
    case scalar_type::bf16: {
        auto* p = static_cast<std::uint16_t*>(out);
        for (; i < n; ++i)
            p[i] = float_to_bfloat(Saturates ? saturated(source[i], largest_bfloat) : source[i]);
        return;
    }
    }
}

KV1_LAZY inline void store_floats(scalar_type type, const float* source, std::size_t n, void* out) noexcept {
    store_scalars<false>(type, source, n, out);
}
// Converts outputs of attention: a finite number past the type's largest becomes the largest.
KV1_LAZY inline void store_outputs(scalar_type type, const float* source, std::size_t n, void* out) noexcept {
    store_scalars<true>(type, source, n, out);
}
