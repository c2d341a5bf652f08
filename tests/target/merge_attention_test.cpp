// SPDX-License-Identifier: Apache-2.0
//
// Attention over disjoint sets of tokens, joined by log-sum-exp.
#include "attention_oracle.hpp"
#include "random.hpp"
#include "targets.hpp"

#include <kv1/kv_cache.hpp>

#include <cmath>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

using kv1::attention_part;
using kv1::precision;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr std::size_t dim = 32, tokens = 300, heads = 3;

struct rows {
    std::vector<float> out = std::vector<float>(heads * dim), lse = std::vector<float>(heads);
    operator attention_part() const { return {out, lse}; }
};

rows attend(const kv1::kv_cache& cache, kv1::sequence_id id, const std::vector<float>& q,
            kv1::attention_options options) {
    rows r;
    options.log_sum_exp = r.lse;
    cache.attend(id, 0, {q.data(), 1, heads, dim}, {r.out.data(), 1, heads, dim}, options);
    return r;
}

} // namespace

TEST_CASE("ranges of a sequence join to attention over all of it", "[attention]") {
    kv1::kv_cache cache(kv1::uniform_cache(1, {1, dim, dim}, 512, 32));
    const kv1::sequence_id id = cache.create_sequence();
    kv1_test::generator g(31);
    const auto k = kv1_test::normal_values(g, tokens * dim), v = kv1_test::normal_values(g, tokens * dim),
               q = kv1_test::normal_values(g, heads * dim), sink_logits = kv1_test::normal_values(g, heads);
    cache.append(id, 0, {k.data(), tokens, 1, dim}, {v.data(), tokens, 1, dim});
    const kv1_test::cached_side keys(cache, id, 0, kv1::kv_side::key, 0),
        values(cache, id, 0, kv1::kv_side::value, 0);
    std::vector<std::size_t> all(tokens);
    std::iota(all.begin(), all.end(), std::size_t{0});
    const std::vector<std::size_t> starts{0};

    kv1_test::for_each_target([&](kv1::target) {
        for (const bool with_sinks : {false, true}) {
            std::vector<attention_part> parts;
            std::vector<rows> results;
            kv1::attention_options options{.mode = precision::exact};
            for (const kv1::token_range range : {kv1::token_range{0, 7}, kv1::token_range{7, 7},
                                                 kv1::token_range{7, 130}, kv1::token_range{130}}) {
                options.range = range;
                options.sink_logits =
                    with_sinks && range.first == 130 ? std::span(sink_logits) : std::span<const float>();
                results.push_back(attend(cache, id, q, options));
            }
            parts.assign(results.begin(), results.end());
            rows joined;
            kv1::merge_attention(parts, dim, joined.out, joined.lse);
            for (std::size_t h = 0; h < heads; ++h) {
                const kv1_test::bounded_row row =
                    kv1_test::expect_row(
                        std::span(q).subspan(h * dim, dim), 1.0f / std::sqrt(32.0f), keys, values, all,
                        starts, precision::exact,
                        {.sink_logit = with_sinks ? std::optional(sink_logits[h]) : std::nullopt})
                        .truth;
                // Each part keeps the whole's bounds; its weight e^(l_i - l) is off by the errors of both
                // logarithms, and is applied in three roundings; outputs are at most `largest`.
                const double weight_error = std::expm1(2 * row.lse_bound) + 8 * kv1_test::exp_error +
                                            8 * kv1_test::unit_roundoff * (1 + std::fabs(row.lse));
                double largest = 0.0;
                for (const rows& r : results)
                    for (std::size_t c = 0; c < dim; ++c)
                        largest = std::max(largest, static_cast<double>(std::fabs(r.out[h * dim + c])));
                REQUIRE(std::fabs(joined.lse[h] - row.lse) <=
                        2 * row.lse_bound + 8 * kv1_test::unit_roundoff * (1 + std::fabs(row.lse)));
                for (std::size_t c = 0; c < dim; ++c) {
                    // a part with few tokens has a bound of its own, which the whole's does not cover
                    double bound = largest * (weight_error + 16 * kv1_test::unit_roundoff);
                    for (std::size_t i = 0; i < results.size(); ++i) {
                        const std::size_t first = i == 0   ? 0
                                                  : i == 3 ? 130
                                                           : 7,
                                          last = i == 0   ? 7
                                                 : i == 1 ? 7
                                                 : i == 2 ? 130
                                                          : tokens;
                        const kv1_test::bounded_row part =
                            kv1_test::expect_row(
                                std::span(q).subspan(h * dim, dim), 1.0f / std::sqrt(32.0f), keys, values,
                                std::span(all).subspan(first, last - first), starts, precision::exact,
                                {.sink_logit =
                                     with_sinks && i == 3 ? std::optional(sink_logits[h]) : std::nullopt})
                                .truth;
                        bound += part.out_bound[c];
                    }
                    REQUIRE(std::fabs(joined.out[h * dim + c] - row.out[c]) <= bound);
                }
            }
        }
    });
}

TEST_CASE("merging is by weight, in place too, and empty parts count for nothing", "[attention]") {
    const std::vector<float> a{1.0f, 2.0f, 3.0f, 4.0f}, b{5.0f, -2.0f, 7.0f, 7.0f}, zeros(4, 0.0f);
    const std::vector<float> la{0.0f, -infinity}, lb{std::log(3.0f), -infinity}, none{-infinity, -infinity};
    const std::vector<attention_part> parts{{a, la}, {zeros, none}, {b, lb}};
    std::vector<float> out(4, 9.0f), lse(2, 9.0f);
    kv1::merge_attention(parts, 2, out, lse);
    // weights 1/4 and 3/4, each within a few roundings
    REQUIRE(std::fabs(out[0] - 4.0f) < 8 * 4 * kv1_test::unit_roundoff);
    REQUIRE(std::fabs(out[1] + 1.0f) < 8 * 2 * kv1_test::unit_roundoff);
    REQUIRE((out[2] == 0.0f && out[3] == 0.0f));
    REQUIRE(std::fabs(lse[0] - std::log(4.0f)) < 8 * kv1_test::unit_roundoff);
    REQUIRE(lse[1] == -infinity);

    std::vector<float> place = b, place_lse = lb;
    const std::vector<attention_part> with_place{{a, la}, {zeros, none}, {place, place_lse}};
    kv1::merge_attention(with_place, 2, place, place_lse);
    REQUIRE(place == out);
    REQUIRE(place_lse == lse);

    kv1::merge_attention({}, 2, out, lse);
    REQUIRE(out == zeros);
    REQUIRE(lse == none);
}

TEST_CASE("parts of other shapes are refused", "[attention]") {
    std::vector<float> out(6), lse(3), short_out(4), short_lse(2);
    const auto code = [&](attention_part p, std::size_t channels) {
        return kv1::try_merge_attention(std::span(&p, 1), channels, out, lse).code();
    };
    REQUIRE(code({out, lse}, 2) == kv1::errc::ok);
    REQUIRE(code({out, lse}, 0) == kv1::errc::invalid_argument);
    REQUIRE(code({out, lse}, 4) == kv1::errc::shape_mismatch);
    REQUIRE(code({short_out, lse}, 2) == kv1::errc::shape_mismatch);
    REQUIRE(code({out, short_lse}, 2) == kv1::errc::shape_mismatch);
    REQUIRE(kv1::try_merge_attention({}, 3, out, lse).code() == kv1::errc::shape_mismatch);
    REQUIRE(kv1::try_merge_attention({}, 2, out, {}).code() == kv1::errc::ok);
}
