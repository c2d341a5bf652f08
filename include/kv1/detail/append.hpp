// SPDX-License-Identifier: Apache-2.0
//
// Quantizing and inserting new tokens: the loop over KV heads and tokens around the target's kernels.
#pragma once

#include <kv1/detail/kernels/interface.hpp>
#include <kv1/executor.hpp>
#include <kv1/quantizer.hpp>
#include <kv1/tensor.hpp>

#include <atomic>
#include <cstring>
#include <limits>

namespace kv1::inline KV1_ABI::detail {

struct append_job {
    const target_kernels* kernels;
    const page_layout* layout;
    const std::byte* arena; // written to through a cast: the caller owns it
    std::size_t block_bytes;
    const std::uint32_t* block_table;
    std::size_t first_token; // position of the first new token
    tensor_view keys, values;
};

// One plain vector into its lanes; refuses what is not finite or not representable.
inline encode_result insert_plain(const section_layout& s, std::byte* page, std::size_t token,
                                  const float* x) noexcept {
    if (const std::size_t bad = first_non_finite({x, s.channels}); bad != s.channels)
        return {errc::non_finite, rule_finite, bad, {}};
    const bool half = s.format == kv_format::fp16;
    if (half)
        for (std::size_t c = 0; c < s.channels; ++c)
            if (!is_finite(float16(x[c])))
                return {errc::not_representable, rule_fp16_value, c, {}};
    for (std::size_t c = 0; c < s.channels; ++c)
        store_code(s, page, token, c, half ? float_to_half(x[c]) : std::bit_cast<std::uint32_t>(x[c]));
    return {};
}

inline encode_result insert_vector(const target_kernels& kernels, const section_layout& s, std::byte* page,
                                   std::size_t token, const float* x, std::uint8_t* codes) noexcept {
    const format_traits t = s.traits();
    if (t.code_bits == 0)
        return insert_plain(s, page, token, x);
    encode_result encoded;
    switch (t.metadata) {
    case metadata_kind::scale_and_minimum:
        encoded = kernels.encode_affine(x, s.channels, t.code_bits, codes);
        break;
    case metadata_kind::scale:
        encoded = kernels.encode_scaled_binary(x, s.channels, codes);
        break;
    case metadata_kind::none:
        encoded = kernels.encode_binary(x, s.channels, codes);
        break;
    }
    if (encoded.code != errc::ok)
        return encoded;
    kernels.insert_codes(s, page, token, codes);
    store_metadata(s, page, token, encoded.metadata);
    return encoded;
}

// All new tokens of one KV head.
inline status append_head(const append_job& job, std::size_t head) noexcept {
    alignas(64) float converted[max_head_dim];
    alignas(64) std::uint8_t codes[max_head_dim] = {}; // zero past the channels
    const page_layout& layout = *job.layout;
    const std::size_t page_tokens = layout.page_tokens();
    for (const section_layout* s : {&layout.keys(), &layout.values()}) {
        const tensor_view& source = s->keys ? job.keys : job.values;
        std::memset(codes, 0, round_up(s->channels, 32));
        for (std::size_t i = 0; i < source.tokens(); ++i) {
            const std::size_t token = job.first_token + i;
            auto* page = const_cast<std::byte*>(job.arena) +
                         static_cast<std::size_t>(job.block_table[token / page_tokens]) * job.block_bytes +
                         head * layout.bytes();
            const void* x = source.at(i, head);
            if (source.type() != scalar_type::fp32) {
                job.kernels->load_floats(source.type(), x, s->channels, converted);
                x = converted;
            }
            const encode_result r = insert_vector(*job.kernels, *s, page, token % page_tokens,
                                                  static_cast<const float*>(x), codes);
            if (r.code != errc::ok) {
                error_location where{.kv_head = static_cast<std::int64_t>(head),
                                     .token = static_cast<std::int64_t>(i)};
                if (r.code == errc::non_finite || r.rule == rule_fp16_value)
                    where.channel = static_cast<std::int64_t>(r.channel);
                return {r.code, r.rule, where};
            }
        }
    }
    return {};
}

template <executor E>
status append_heads(const append_job& job, std::size_t kv_heads, E& run) noexcept {
    std::atomic<std::size_t> first_failed{kv_heads};
    auto task = [&](std::size_t head) {
        if (append_head(job, head))
            return;
        std::size_t seen = first_failed.load(std::memory_order_relaxed);
        while (head < seen && !first_failed.compare_exchange_weak(seen, head, std::memory_order_relaxed)) {
        }
    };
    run(kv_heads, task_view(task));
    const std::size_t failed = first_failed.load(std::memory_order_relaxed);
    return failed == kv_heads ? status{} : append_head(job, failed); // once more, for its reason
}

} // namespace kv1::inline KV1_ABI::detail
