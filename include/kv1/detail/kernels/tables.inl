// SPDX-License-Identifier: Apache-2.0
//
// The tables of kernels that a target provides. They are templates, since a table compiles every kernel in it. Parsed
// once per target, last.

KV1_LAZY const target_kernels& kernels() noexcept {
    static constexpr target_kernels table{
        load_floats, store_floats, store_outputs, encode_affine,  encode_scaled_binary, encode_binary,
        pack,        unpack,       insert_codes,  append_affine2, encode_vectors,       add_multiples,
        turn_mean,   enter_basis,  leave_basis,   rotate,         attend_rows<false>};
    return table;
}

template <class Format>
inline const format_kernels& kernels_for() noexcept {
    using shared = typename kernel_format<Format>::type;
    if constexpr (!std::is_same_v<Format, shared>) {
        return kernels_for<shared>();
    } else if constexpr (traits_of(kv_format_of<Format>).code_bits == 0) {
        static constexpr format_kernels table{{key_scores_exact<Format>, key_scores_exact<Format>},
                                              nullptr,
                                              {value_sums_exact<Format>, value_sums_exact<Format>}};
        return table;
    } else {
        static constexpr format_kernels table{
            {key_scores_fast<Format, single_dots>, key_scores_exact<Format>},
            key_scores_fast<Format, single_dots>,
            {value_sums_fast<Format>, value_sums_exact<Format>}};
        return table;
    }
}

// The tables with keys of 2 bits by channel pairs, on targets that can do that.
#if defined(KV1_ISA_PAIRS)
KV1_LAZY const target_kernels& pair_kernels() noexcept {
    static constexpr target_kernels table{
        load_floats, store_floats, store_outputs, encode_affine,  encode_scaled_binary, encode_binary,
        pack,        unpack,       insert_codes,  append_affine2, encode_vectors,       add_multiples,
        turn_mean,   enter_basis,  leave_basis,   rotate,         attend_rows<true>};
    return table;
}

template <class Format>
inline const format_kernels& pair_kernels_for() noexcept {
    using shared = typename kernel_format<Format>::type;
    if constexpr (!takes_pairs(traits_of(kv_format_of<Format>))) {
        return kernels_for<Format>();
    } else if constexpr (!std::is_same_v<Format, shared>) {
        return pair_kernels_for<shared>();
    } else {
        static constexpr format_kernels table{{key_scores_fast<Format, pair_dots>, key_scores_exact<Format>},
                                              key_scores_fast<Format, single_dots>,
                                              {value_sums_fast<Format>, value_sums_exact<Format>}};
        return table;
    }
}
#else
KV1_LAZY const target_kernels& pair_kernels() noexcept { return kernels(); }
template <class Format>
inline const format_kernels& pair_kernels_for() noexcept {
    return kernels_for<Format>();
}
#endif

// All that the registry asks of a target.
struct tables {
    KV1_LAZY static const target_kernels& common() noexcept { return kernels(); }
    template <class Format>
    static const format_kernels& of_format() noexcept {
        return kernels_for<Format>();
    }
};
struct pair_tables {
    KV1_LAZY static const target_kernels& common() noexcept { return pair_kernels(); }
    template <class Format>
    static const format_kernels& of_format() noexcept {
        return pair_kernels_for<Format>();
    }
};
