// SPDX-License-Identifier: Apache-2.0
//
// Kernels stay within the memory they are given, and attention changes none of a cache's.
#if defined(__unix__)
#include "compare.hpp"
#include "guarded_memory.hpp"
#include "random.hpp"
#include "targets.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/convert.hpp>
#include <kv1/kv_cache.hpp>
#include <kv1/packed_span.hpp>
#include <kv1/row.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

using kv1::kv_format;
using kv1_test::guarded_array;
using kv1_test::guarded_end;

namespace {

using guarded_cache = kv1::basic_kv_cache<kv1::all_formats, kv1_test::guarded_allocator<std::byte>>;

constexpr std::array both_ends{guarded_end::front, guarded_end::back};

struct shape {
    std::size_t key_dim, value_dim, kv_heads, group, tokens, page_tokens;
    std::size_t key_group = 0, value_group = 0; // channels that share metadata
    bool values_in_keys = false;
};

// Fills a cache to the last token of its last page, and attends to it.
void fill_and_attend(const shape& s, kv_format key, kv_format value, guarded_end end) {
    const std::size_t heads = s.kv_heads * s.group;
    INFO(to_string(key) << " x " << to_string(value) << ", dims " << s.key_dim << " and " << s.value_dim
                        << ", " << s.kv_heads << " x " << s.group << " heads, " << s.tokens
                        << " tokens, pages of " << s.page_tokens
                        << (end == guarded_end::front ? ", front" : ", back"));
    kv1_test::guarded_arenas arenas{end, {}};
    kv1::layer_description layer{s.kv_heads, s.key_dim, s.value_dim, key, value};
    layer.key_group = s.key_group;
    layer.value_group = s.value_group;
    layer.values_in_keys = s.values_in_keys;
    guarded_cache cache(kv1::uniform_cache(1, layer, s.tokens, s.page_tokens),
                        kv1_test::guarded_allocator<std::byte>(arenas));
    const kv1::sequence_id id = cache.create_sequence();
    kv1_test::generator g(1);
    // one token, then the rest at once
    for (const std::size_t n : {std::size_t{1}, s.tokens - 1}) {
        if (n == 0)
            continue;
        const guarded_array<float> k(kv1_test::normal_values(g, n * s.kv_heads * s.key_dim), end);
        if (s.values_in_keys) {
            cache.append(id, 0, {k.data(), n, s.kv_heads, s.key_dim});
            continue;
        }
        const guarded_array<float> v(kv1_test::normal_values(g, n * s.kv_heads * s.value_dim), end);
        cache.append(id, 0, {k.data(), n, s.kv_heads, s.key_dim}, {v.data(), n, s.kv_heads, s.value_dim});
    }
    arenas.read_only(true);
    for (const std::size_t queries : {std::size_t{1}, std::size_t{3}}) {
        if (queries > s.tokens)
            continue;
        const guarded_array<float> q(kv1_test::normal_values(g, queries * heads * s.key_dim), end);
        const guarded_array<float> fast(queries * heads * s.value_dim, end), exact(fast.span(), end);
        const guarded_array<float> lse(queries * heads, end);
        for (const kv1::precision mode : {kv1::precision::fast, kv1::precision::exact})
            cache.attend(id, 0, {q.data(), queries, heads, s.key_dim},
                         {(mode == kv1::precision::fast ? fast : exact).data(), queries, heads, s.value_dim},
                         {.mode = mode, .log_sum_exp = lse.span()});
        // weights of 8 bits: a sign that what was read is what was stored, not a bound
        REQUIRE(std::ranges::equal(fast.span(), exact.span(),
                                   [](float a, float b) { return std::abs(a - b) < 0.5f; }));
    }
    arenas.read_only(false);
}

template <int Bits>
void pack_and_unpack(std::span<const float> x, guarded_end end) {
    using quantizer = kv1::affine<Bits>;
    const guarded_array<std::uint8_t> codes(x.size(), end), again(x.size(), end);
    const guarded_array<std::byte> packed(kv1::packed_size<Bits>(x.size()), end), row(packed.span(), end);
    typename quantizer::metadata metadata{};
    kv1::quantize<quantizer>(x, codes.span(), metadata);
    kv1::detail::pack_codes<Bits>(codes.data(), x.size(), packed.data());
    kv1::detail::unpack_codes<Bits>(packed.data(), x.size(), again.data());
    REQUIRE(std::ranges::equal(codes.span(), again.span()));
    kv1::encode_row<quantizer>(x, row.span(), metadata);
    REQUIRE(std::ranges::equal(packed.span(), row.span()));
}

} // namespace

TEST_CASE("attention stays within arenas, queries and outputs, and writes to no arena",
          "[attention][bounds]") {
    kv1_test::for_each_target([&](kv1::target) {
        for (const guarded_end end : both_ends) {
            for (const kv_format f : kv1::all_kv_formats)
                for (const shape& s : {shape{20, 13, 2, 3, 48, 16}, shape{32, 64, 1, 4, 64, 64},
                                       shape{1, 1, 1, 1, 16, 16}, shape{80, 96, 1, 7, 240, 48}})
                    fill_and_attend(s, f, f, end);
            for (const std::size_t dim : std::array<std::size_t, 7>{31, 33, 64, 100, 128, 130, 256})
                for (const std::size_t group : std::array<std::size_t, 5>{1, 2, 5, 8, 16})
                    fill_and_attend({dim, dim, 1, group, 1088, 64}, kv_format::affine2, kv_format::affine2,
                                    end);
            fill_and_attend({128, 64, 2, 4, 96, 32}, kv_format::affine4, kv_format::affine2, end);
            for (const kv_format f : {kv_format::affine3, kv_format::compact2, kv_format::affine8})
                fill_and_attend({128, 96, 1, 5, 240, 48, 64, 32}, f, f, end);
            fill_and_attend({64, 512, 1, 4, 32, 32, 32, 32}, kv_format::compact3, kv_format::affine2, end);
            for (const kv_format f : kv1::all_kv_formats) // values in keys
                for (const shape& s :
                     {shape{20, 13, 2, 3, 48, 16, 0, 0, true}, shape{1, 1, 1, 1, 16, 16, 0, 0, true},
                      shape{80, 80, 1, 7, 240, 48, 0, 0, true}, shape{288, 256, 1, 5, 64, 64, 0, 0, true}})
                    fill_and_attend(s, f, f, end);
            fill_and_attend({96, 64, 1, 4, 96, 32, 32, 32, true}, kv_format::compact3, kv_format::compact3,
                            end);
        }
    });
}

TEST_CASE("conversion, quantizing and packing stay within what they read and write", "[bounds]") {
    kv1_test::for_each_target([&](kv1::target) {
        kv1_test::generator g(2);
        for (const guarded_end end : both_ends)
            for (const std::size_t n : std::array<std::size_t, 19>{1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32,
                                                                   33, 63, 64, 65, 100, 128, 129}) {
                INFO(n << " values" << (end == guarded_end::front ? ", front" : ", back"));
                const guarded_array<float> x(kv1_test::normal_values(g, n), end), y(n, end);
                const guarded_array<kv1::float16> half(n, end);
                const guarded_array<kv1::bfloat16> brain(n, end);
                kv1::convert(std::span<const float>(x.span()), half.span());
                kv1::convert(std::span<const kv1::float16>(half.span()), y.span());
                REQUIRE(std::ranges::equal(x.span(), y.span(), [](float a, float b) {
                    return static_cast<float>(kv1::float16(a)) == b;
                }));
                kv1::convert(std::span<const float>(x.span()), brain.span());
                kv1::convert(std::span<const kv1::bfloat16>(brain.span()), y.span());
                REQUIRE(std::ranges::equal(x.span(), y.span(), [](float a, float b) {
                    return static_cast<float>(kv1::bfloat16(a)) == b;
                }));
                pack_and_unpack<1>(x.span(), end);
                pack_and_unpack<2>(x.span(), end);
                pack_and_unpack<3>(x.span(), end);
                pack_and_unpack<4>(x.span(), end);
                pack_and_unpack<8>(x.span(), end);
            }
    });
}
#endif
