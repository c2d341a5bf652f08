// SPDX-License-Identifier: Apache-2.0
//
// Attention on every target against an oracle in double, within derived bounds
// (support/attention_problem.hpp). What a call gives and takes beside that: logits, scalar types, strides,
// bad numbers, workers.
#include "attention_problem.hpp"
#include "thread_executor.hpp"

#include <catch2/catch_template_test_macros.hpp>

#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

using kv1::attention_mask;
using kv1::kv_format;
using kv1::precision;
using kv1::sequence_id;
using kv1_test::check;
using kv1_test::in_format;
using kv1_test::problem;
using kv1_test::tally;
using kv1_test::world;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

} // namespace

TEST_CASE("logits are capped, biased by distance, and joined by a sink", "[attention]") {
    tally t;
    std::uint64_t seed = 970;
    for (const kv_format f : {kv_format::affine2, kv_format::affine8, kv_format::fp16})
        for (const std::size_t tokens : {std::size_t{40}, std::size_t{700}}) {
            const problem p{.group = 3, .tokens = tokens, .queries = 2, .key_format = f, .value_format = f};
            for (const float cap : {0.5f, 3.0f, 50.0f}) {
                problem capped = p;
                capped.soft_cap = cap;
                check(capped, ++seed, t);
            }
            problem biased = p, sunk = p;
            biased.alibi = sunk.sink_logits = true;
            check(biased, ++seed, t);
            biased.mask = attention_mask::none();
            check(biased, ++seed, t);
            check(sunk, ++seed, t);
            problem all = p;
            all.soft_cap = 4.0f;
            all.alibi = all.sink_logits = true;
            all.window = 33;
            check(all, ++seed, t);
        }
    // merged ranges: the sink counts once
    check({.key_dim = 16,
           .value_dim = 16,
           .group = 1,
           .tokens = 4500,
           .page_tokens = 64,
           .alibi = true,
           .sink_logits = true},
          ++seed, t);
    // a sink and no token
    check({.tokens = 50,
           .queries = 2,
           .mask = attention_mask::causal_from(70),
           .window = 3,
           .sink_logits = true},
          ++seed, t);
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("the softmax scale is the caller's where one is given: large, tiny, zero, negative",
          "[attention]") {
    tally t;
    std::uint64_t seed = 1600;
    for (const float scale : {0.0f, 1e-20f, 0.01f, 1.0f, 8.0f, -0.5f})
        for (const kv_format f : {kv_format::affine2, kv_format::affine8, kv_format::binary, kv_format::fp32})
            check(in_format(f, {.tokens = 100, .scale = scale}), ++seed, t);
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("an empty cache gives zeros and minus infinity", "[attention]") {
    kv1::kv_cache cache(kv1::uniform_cache(1, {2, 8, 8}, 16, 16));
    const kv1::sequence_id id = cache.create_sequence();
    kv1_test::for_each_target([&](kv1::target) {
        std::vector<float> q(3 * 4 * 8, 1.0f), out(3 * 4 * 8, 7.0f), lse(12, 7.0f);
        for (const attention_mask& mask : {attention_mask::none(), attention_mask::causal_from(5)}) {
            cache.attend(id, 0, {q.data(), 3, 4, 8}, {out.data(), 3, 4, 8},
                         {.mask = mask, .log_sum_exp = lse});
            REQUIRE(std::all_of(out.begin(), out.end(), [](float x) { return x == 0.0f; }));
            REQUIRE(std::all_of(lse.begin(), lse.end(), [](float x) { return x == -infinity; }));
        }
    });
}

TEST_CASE("no query is no work", "[attention]") {
    kv1::kv_cache cache(kv1::uniform_cache(1, {2, 8, 8}, 16, 16));
    const kv1::sequence_id id = cache.create_sequence();
    REQUIRE(cache.try_attend(id, 0, {static_cast<const float*>(nullptr), 0, 4, 8},
                             {static_cast<float*>(nullptr), 0, 4, 8}));
}

TEMPLATE_TEST_CASE("queries and outputs may be of any scalar type", "[attention]", float, kv1::float16,
                   kv1::bfloat16) {
    tally t;
    for (const kv_format f : {kv_format::affine2, kv_format::fp16}) {
        const problem p{.key_dim = 40,
                        .value_dim = 24,
                        .kv_heads = 2,
                        .group = 3,
                        .tokens = 70,
                        .queries = 3,
                        .key_format = f,
                        .value_format = f};
        check<TestType, float>(p, 1701, t);
        check<TestType, kv1::float16>(p, 1702, t);
        check<TestType, kv1::bfloat16>(p, 1703, t);
        // merged outputs are stored elsewhere
        check<TestType, kv1::float16>({.key_dim = 16,
                                       .value_dim = 16,
                                       .group = 1,
                                       .tokens = 4500,
                                       .page_tokens = 64,
                                       .key_format = f,
                                       .value_format = f},
                                      1704, t);
    }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("outputs of 16 bits saturate, and NaN stays NaN", "[attention]") {
    const float most = 65504.0f, wide = static_cast<float>(kv1::bfloat16::from_bits(0x7f7f)),
                nan = std::numeric_limits<float>::quiet_NaN(), huge = std::numeric_limits<float>::max();
    // what fp16 rounds to its largest, what it would round to infinity, what is far beyond it
    const std::vector<float> x{0.0f,      1.5f, -2.0f,    most,  -most, 65519.0f, 65520.0f,
                               -65520.0f, 1e6f, -1e9f,    huge,  -huge, infinity, -infinity,
                               nan,       3.0f, 65536.0f, 0.25f, 1e30f};
    kv1_test::for_each_target([&](kv1::target) {
        for (std::size_t n = 0; n <= x.size(); ++n) { // whole registers and what is left of them
            std::vector<kv1::float16> halves(n + 1, kv1::float16(7.0f));
            std::vector<kv1::bfloat16> brains(n + 1, kv1::bfloat16(7.0f));
            std::vector<float> floats(n + 1, 7.0f);
            const auto& kernels = kv1::detail::common_kernels();
            kernels.store_outputs(kv1::scalar_type::fp16, x.data(), n, halves.data());
            kernels.store_outputs(kv1::scalar_type::bf16, x.data(), n, brains.data());
            kernels.store_outputs(kv1::scalar_type::fp32, x.data(), n, floats.data());
            for (std::size_t i = 0; i < n; ++i) {
                if (std::isnan(x[i])) {
                    REQUIRE(std::isnan(static_cast<float>(halves[i])));
                    REQUIRE(std::isnan(static_cast<float>(brains[i])));
                    continue;
                }
                REQUIRE(static_cast<float>(halves[i]) ==
                        static_cast<float>(kv1::float16(std::clamp(x[i], -most, most))));
                REQUIRE(static_cast<float>(brains[i]) ==
                        static_cast<float>(kv1::bfloat16(std::clamp(x[i], -wide, wide))));
                REQUIRE(floats[i] == x[i]);
            }
            REQUIRE(static_cast<float>(halves[n]) == 7.0f);
            REQUIRE(static_cast<float>(brains[n]) == 7.0f);
            REQUIRE(floats[n] == 7.0f);
        }
    });
}

TEST_CASE("values at fp16's largest come out as that, whatever makes the output", "[attention]") {
    constexpr float most = 65504.0f;
    struct shape {
        std::size_t tokens, fp16_window, sliding_window;
    };
    // one job, parts that are joined, ranges that are merged
    for (const shape s : {shape{3, 0, 0}, shape{40, 8, 0}, shape{40, 0, 16}, shape{4500, 0, 0}})
        for (const kv_format f :
             {kv_format::affine2, kv_format::affine4, kv_format::compact2, kv_format::codebook2,
              kv_format::codebook4, kv_format::scaled_binary, kv_format::fp16, kv_format::fp32}) {
            kv1::cache_description d =
                kv1::uniform_cache(1, {1, 32, 32, kv_format::affine2, f, s.sliding_window}, 4608);
            d.fp16_window = s.fp16_window;
            kv1::kv_cache cache(d);
            const sequence_id id = cache.create_sequence();
            std::vector<float> k(s.tokens * 32, 1.0f), v(k.size());
            for (std::size_t i = 0; i < v.size(); ++i)
                v[i] = i % 32 < 16 ? most : -most;
            cache.append(id, 0, {k.data(), s.tokens, 1, 32}, {v.data(), s.tokens, 1, 32});
            std::vector<float> held(32); // of all tokens, which are alike
            cache.read(id, 0, kv1::kv_side::value, 0, 0, 1, held);
            kv1_test::for_each_target([&](kv1::target) {
                for (const precision mode : {precision::fast, precision::exact}) {
                    std::vector<kv1::float16> out(32);
                    cache.attend(id, 0, {k.data(), 1, 1, 32}, {out.data(), 1, 1, 32}, {.mode = mode});
                    for (std::size_t c = 0; c < 32; ++c) {
                        const float x = out[c], wanted = std::min(std::fabs(held[c]), most);
                        INFO(to_string(f) << " holds " << held[c] << ", gives " << x);
                        REQUIRE(std::fabs(x) <= most);
                        REQUIRE(std::signbit(x) == std::signbit(held[c]));
                        REQUIRE(std::fabs(x) >= 0.99f * wanted); // weights of 8 bits, halves
                    }
                }
            });
        }
}

TEST_CASE("strides of queries and outputs are obeyed, and nothing else is written", "[attention]") {
    const world w({.key_dim = 20, .value_dim = 12, .kv_heads = 2, .group = 3, .tokens = 30, .queries = 4},
                  1800);
    const std::size_t heads = w.heads();
    kv1_test::for_each_target([&](kv1::target) {
        std::vector<float> plain(4 * heads * 12);
        w.cache.attend(w.id, 0, {w.queries.data(), 4, heads, 20}, {plain.data(), 4, heads, 12});
        // head-major queries with gaps; outputs from the last token to the first
        std::vector<float> q(heads * 4 * 23, std::numeric_limits<float>::quiet_NaN());
        for (std::size_t i = 0; i < 4; ++i)
            for (std::size_t h = 0; h < heads; ++h)
                std::copy_n(w.queries.begin() + static_cast<std::ptrdiff_t>((i * heads + h) * 20), 20,
                            q.begin() + static_cast<std::ptrdiff_t>((h * 4 + i) * 23));
        const auto token_stride = static_cast<std::ptrdiff_t>(heads * 15 + 2);
        std::vector<float> out(4 * (heads * 15 + 2), 777.0f);
        w.cache.attend(w.id, 0, {q.data(), 4, heads, 20, 23, 4 * 23},
                       {out.data() + 3 * token_stride, 4, heads, 12, -token_stride, 15});
        std::size_t untouched = 0;
        for (std::size_t i = 0; i < 4; ++i)
            for (std::size_t at = 0; at < heads * 15 + 2; ++at) {
                const float x = out[(3 - i) * (heads * 15 + 2) + at];
                if (at % 15 < 12 && at / 15 < heads)
                    REQUIRE(x == plain[(i * heads + at / 15) * 12 + at % 15]);
                else
                    untouched += x == 777.0f ? 1u : 0u;
            }
        REQUIRE(untouched == 4 * (heads * 3 + 2));
    });
}

TEST_CASE("a NaN or infinity in a query spoils its own row and no other", "[attention]") {
    for (const kv_format f :
         {kv_format::affine2, kv_format::affine8, kv_format::fp32, kv_format::scaled_binary})
        for (const std::size_t tokens : {std::size_t{40}, std::size_t{4100}}) {
            if (tokens > 1000 && f != kv_format::affine2)
                continue;
            const world w({.key_dim = 20,
                           .value_dim = 12,
                           .group = 5,
                           .tokens = tokens,
                           .page_tokens = 64,
                           .queries = 2,
                           .key_format = f,
                           .value_format = f},
                          1900);
            kv1_test::for_each_target([&](kv1::target) {
                for (const precision mode : {precision::fast, precision::exact})
                    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), infinity, -infinity}) {
                        std::vector<float> clean(2 * 5 * 12), spoilt(2 * 5 * 12), lse(10), spoilt_lse(10);
                        w.cache.attend(w.id, 0, {w.queries.data(), 2, 5, 20}, {clean.data(), 2, 5, 12},
                                       {.mode = mode, .log_sum_exp = lse});
                        std::vector<float> q = w.queries;
                        q[3 * 20 + 7] = bad; // row 3
                        w.cache.attend(w.id, 0, {q.data(), 2, 5, 20}, {spoilt.data(), 2, 5, 12},
                                       {.mode = mode, .log_sum_exp = spoilt_lse});
                        for (std::size_t r = 0; r < 10; ++r) {
                            if (r == 3)
                                continue;
                            REQUIRE(kv1_test::same_bits(std::span(clean).subspan(r * 12, 12),
                                                        std::span(spoilt).subspan(r * 12, 12)));
                            REQUIRE(lse[r] == spoilt_lse[r]);
                        }
                    }
            });
        }
}

TEST_CASE("the result is the same bits for any number of workers", "[attention]") {
    for (const std::size_t tokens : {std::size_t{100}, std::size_t{4500}}) {
        const world w({.key_dim = 24,
                       .value_dim = 20,
                       .kv_heads = 2,
                       .group = 3,
                       .tokens = tokens,
                       .page_tokens = 64,
                       .queries = 4},
                      2000);
        const std::size_t heads = w.heads();
        kv1_test::for_each_target([&](kv1::target) {
            for (const precision mode : {precision::fast, precision::exact}) {
                std::vector<float> alone(4 * heads * 20), lse(4 * heads);
                w.cache.attend(w.id, 0, {w.queries.data(), 4, heads, 24}, {alone.data(), 4, heads, 20},
                               {.mode = mode, .log_sum_exp = lse});
                for (const std::size_t workers : {std::size_t{1}, std::size_t{2}, std::size_t{5}}) {
                    std::vector<float> out(4 * heads * 20), out_lse(4 * heads);
                    kv1_test::thread_executor run(workers);
                    w.cache.attend(w.id, 0, {w.queries.data(), 4, heads, 24}, {out.data(), 4, heads, 20},
                                   {.mode = mode, .log_sum_exp = out_lse}, run);
                    REQUIRE(kv1_test::same_bits(out, alone));
                    REQUIRE(kv1_test::same_bits(out_lse, lse));
                    REQUIRE(run.tasks() >= 2);
                }
            }
        });
    }
}

TEST_CASE("what is attended does not depend on how many tokens were appended at once", "[attention]") {
    kv1_test::generator g(21);
    const auto k = kv1_test::normal_values(g, 100 * 32), v = kv1_test::normal_values(g, 100 * 32),
               q = kv1_test::normal_values(g, 4 * 32);
    kv1_test::for_each_target([&](kv1::target) {
        kv1::kv2_cache whole(kv1::uniform_cache(1, {1, 32, 32}, 128)),
            pieces(kv1::uniform_cache(1, {1, 32, 32}, 128));
        const auto a = whole.create_sequence(), b = pieces.create_sequence();
        whole.append(a, 0, {k.data(), 100, 1, 32}, {v.data(), 100, 1, 32});
        for (std::size_t t = 0; t < 100; ++t)
            pieces.append(b, 0, {k.data() + t * 32, 1, 1, 32}, {v.data() + t * 32, 1, 1, 32});
        std::vector<float> x(4 * 32), y(4 * 32);
        whole.attend(a, 0, {q.data(), 1, 4, 32}, {x.data(), 1, 4, 32});
        pieces.attend(b, 0, {q.data(), 1, 4, 32}, {y.data(), 1, 4, 32});
        REQUIRE(kv1_test::same_bits(x, y));
    });
}
