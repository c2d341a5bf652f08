// SPDX-License-Identifier: Apache-2.0
//
// Means of keys that turn with their position (layer_description::rotary), against the definition in double.
//
// Values here are the rows of the identity in fp32, so outputs are the weights of single tokens, and with the
// log-sum-exp their logarithms are scores. A twin cache without means holds the same keys, the means at their
// positions taken off by hand: it has to hold the same codes, and each of its scores to differ by the query
// times the mean at the key's position.
#include "compare.hpp"
#include "random.hpp"
#include "targets.hpp"
#include "thread_executor.hpp"

#include <kv1/cache_io.hpp>
#include <kv1/cache_policy.hpp>
#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <utility>
#include <vector>

using kv1::kv_format;
using kv1::kv_side;
using kv1::level_choice;
using kv1::rotary_pairs;
using kv1_test::generator;
using kv1_test::unit_roundoff;
namespace detail = kv1::detail;

namespace {

constexpr std::size_t kv_heads = 2;

struct setting {
    kv_format format = kv_format::compact3;
    std::size_t dim = 64, turning = 64, first_channel = 0, pairs = 32; // pairs: whose means are not zero
    rotary_pairs kind = rotary_pairs::half_split;
    std::size_t group = 2; // query heads a KV head
    std::size_t tokens = 300, page = 32, first_position = 0;
    bool hadamard = true, per_channel = false;
    std::size_t key_group = 0;

    [[nodiscard]] std::size_t heads() const { return kv_heads * group; }
    // The means of all KV heads, before rotary embedding.
    [[nodiscard]] std::vector<float> means() const {
        generator g(17);
        const kv1::rotary_embedding r = rotary();
        std::vector<float> m = kv1_test::normal_values(g, kv_heads * dim, 1.5f);
        for (std::size_t h = 0; h < kv_heads; ++h)
            for (std::size_t j = pairs; j < turning / 2; ++j) {
                const std::size_t other = (j * 7 + h) % (turning / 2); // not the same in all heads
                m[h * dim + r.first_of(other)] = m[h * dim + r.second_of(other)] = 0.0f;
            }
        return m;
    }
    [[nodiscard]] kv1::rotary_embedding rotary() const {
        return {kv1::rotary_frequencies(10000.0, turning), kind, first_channel};
    }
    [[nodiscard]] kv1::cache_description description() const {
        kv1::layer_description l{kv_heads, dim, detail::round_up(tokens, 32), format, kv_format::fp32};
        l.key_encoding.levels =
            detail::traits_of(format).fits_levels() ? level_choice::least_squares : level_choice::min_max;
        l.key_encoding.hadamard = hadamard ? kv1::rotation_width(dim) : 0;
        l.key_encoding.means = means();
        l.key_group = key_group;
        l.key_axis = per_channel ? kv1::quantization_axis::per_channel : kv1::quantization_axis::per_token;
        l.rotary = rotary();
        kv1::cache_description d = kv1::uniform_cache(1, l, 2 * tokens + 8 * page, page);
        d.first_position = first_position;
        return d;
    }
    [[nodiscard]] kv1::cache_description twin() const {
        kv1::cache_description d = description();
        d.layers[0].key_encoding.means.clear();
        d.layers[0].rotary = {};
        return d;
    }
    // Keys that turn, with their means: k = R (mu + d).
    [[nodiscard]] std::vector<float> keys(generator& g) const {
        const std::vector<float> m = means();
        const kv1::rotary_embedding r = rotary();
        std::vector<float> k = kv1_test::normal_values(g, tokens * kv_heads * dim);
        for (std::size_t i = 0; i < tokens * kv_heads; ++i) {
            const std::span<float> key(k.data() + i * dim, dim);
            for (std::size_t c = 0; c < dim; ++c)
                key[c] += m[i % kv_heads * dim + c];
            kv1::apply_rotary(r, key, static_cast<std::int64_t>(first_position + i / kv_heads));
        }
        return k;
    }
    // The mean of a head at a position, in double.
    [[nodiscard]] std::vector<double> mean_at(std::size_t head, std::size_t position) const {
        const std::vector<float> m = means();
        const auto first = m.begin() + static_cast<std::ptrdiff_t>(head * dim);
        std::vector<double> x(first, first + static_cast<std::ptrdiff_t>(dim));
        kv1::apply_rotary(rotary(), std::span(x), static_cast<std::int64_t>(position));
        return x;
    }
};

// The means by the library's definition, bit for bit.
class defined_means {
public:
    explicit defined_means(const setting& s) : dim_(s.dim), means_(s.means()) {
        REQUIRE(turning_.take(s.rotary(), kv_heads, s.dim, means_));
    }
    [[nodiscard]] std::vector<float> at(std::size_t head, std::size_t position) const {
        const auto first = means_.begin() + static_cast<std::ptrdiff_t>(head * dim_);
        std::vector<float> x(first, first + static_cast<std::ptrdiff_t>(dim_));
        if (!turning_.empty())
            detail::set_mean_at(turning_.data()[head], position, x.data());
        return x;
    }

private:
    std::size_t dim_;
    std::vector<float> means_;
    detail::turning_means turning_;
};

std::vector<float> without_means(const setting& s, const std::vector<float>& k) {
    const defined_means means(s);
    std::vector<float> x = k;
    for (std::size_t i = 0; i < k.size() / s.dim; ++i) {
        const std::vector<float> m = means.at(i % kv_heads, s.first_position + i / kv_heads);
        for (std::size_t c = 0; c < s.dim; ++c)
            x[i * s.dim + c] -= m[c];
    }
    return x;
}

// The rows of the identity, the same in all heads.
std::vector<float> identity(const setting& s) {
    const std::size_t dim = detail::round_up(s.tokens, 32);
    std::vector<float> v(s.tokens * kv_heads * dim);
    for (std::size_t i = 0; i < s.tokens * kv_heads; ++i)
        v[i * dim + i / kv_heads] = 1.0f;
    return v;
}

struct filled_cache {
    kv1::kv_cache cache;
    kv1::sequence_id id;

    filled_cache(const setting& s, const kv1::cache_description& d, const std::vector<float>& k)
        : cache(d), id(cache.create_sequence()) {
        append(s, k, identity(s), 0, s.tokens);
    }
    void append(const setting& s, const std::vector<float>& k, const std::vector<float>& v, std::size_t first,
                std::size_t count) {
        const std::size_t dim = detail::round_up(s.tokens, 32);
        cache.append(id, 0, {k.data() + first * kv_heads * s.dim, count, kv_heads, s.dim},
                     {v.data() + first * kv_heads * dim, count, kv_heads, dim});
    }
};

// The score of every token, [row][token], and what the softmax says of all. A token without weight has none.
struct score_table {
    std::vector<double> scores, lse;
};
score_table scores_of(const setting& s, const kv1::kv_cache& cache, kv1::sequence_id id,
                      const std::vector<float>& q, kv1::attention_options options) {
    const std::size_t rows = q.size() / s.dim, queries = rows / s.heads(),
                      dim = detail::round_up(s.tokens, 32);
    std::vector<float> out(rows * dim), lse(rows);
    options.log_sum_exp = lse;
    cache.attend(id, 0, {q.data(), queries, s.heads(), s.dim}, {out.data(), queries, s.heads(), dim},
                 options);
    score_table t{std::vector<double>(rows * s.tokens), {lse.begin(), lse.end()}};
    for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t i = 0; i < s.tokens; ++i)
            t.scores[r * s.tokens + i] = std::log(static_cast<double>(out[r * dim + i])) + t.lse[r];
    return t;
}

// Scores differ by the mean's share in all tokens that are there, and everything else is the same. Bounds,
// u = 2^-24, with A the sum of a row's amplitudes |q pair| |mean pair| times the scale: a wave begins with
// cosine and sine within 4 u, four polynomials stand for a slow one's within 4 u; folding and adding up P
// pairs rounds by 3 P u, a score by u of its size. A weight is e^x with x rounded by 2 u of the distance to
// the maximum, and two of them make a difference.
void check_scores(const setting& s, const score_table& found, const score_table& twin, bool exact,
                  const std::vector<float>& q) {
    const std::size_t rows = q.size() / s.dim;
    const double scale = 1.0 / std::sqrt(static_cast<double>(s.dim));
    kv1_test::tally wrong;
    for (std::size_t r = 0; r < rows; ++r) {
        const std::size_t head = r % s.heads() / s.group;
        const float* query = q.data() + r * s.dim;
        const std::vector<double> mean = s.mean_at(head, 0);
        double amplitude = 0.0, largest = 0.0;
        for (std::size_t c = 0; c < s.dim; ++c)
            amplitude += std::fabs(query[c]) * std::fabs(mean[c]);
        for (std::size_t j = 0; j < s.turning / 2; ++j) {
            const std::size_t a = s.rotary().first_of(j), b = s.rotary().second_of(j);
            amplitude += std::hypot(query[a], query[b]) * std::hypot(mean[a], mean[b]);
        }
        amplitude *= scale;
        for (std::size_t i = 0; i < s.tokens; ++i)
            if (std::isfinite(twin.scores[r * s.tokens + i]))
                largest = std::max(largest, std::fabs(twin.scores[r * s.tokens + i]));
        const double bound = unit_roundoff * ((8.0 + 3.0 * static_cast<double>(s.pairs)) * amplitude +
                                              16.0 * (amplitude + largest) + 64.0);
        double common = 0.0; // on the fast path the two log-sum-exps have errors of their own
        bool first = !exact;
        for (std::size_t i = 0; i < s.tokens; ++i) {
            const double before = twin.scores[r * s.tokens + i], now = found.scores[r * s.tokens + i];
            if (!std::isfinite(before) && !std::isfinite(now))
                continue;
            const std::vector<double> m = s.mean_at(head, s.first_position + i);
            double share = 0.0;
            for (std::size_t c = 0; c < s.dim; ++c)
                share += static_cast<double>(query[c]) * m[c] * scale;
            const double error = now - before - share;
            if (std::exchange(first, false))
                common = error;
            wrong.expect(std::fabs(error - common) <= 2.0 * bound, "row ", r, " token ", i, ": ", now,
                         " after ", before, " with ", share, ", off by ", error - common, " of ",
                         2.0 * bound);
        }
    }
    INFO(wrong.report());
    REQUIRE(wrong.clean());
}

setting random_setting(generator& g) {
    setting s;
    const kv_format formats[] = {kv_format::compact3, kv_format::affine2,   kv_format::compact2,
                                 kv_format::affine4,  kv_format::codebook2, kv_format::affine8,
                                 kv_format::codebook4};
    const std::size_t dims[] = {32, 40, 64, 96, 128};
    s.format = formats[g.below(std::size(formats))];
    s.dim = dims[g.below(std::size(dims))];
    s.turning = 2 * g.between(1, s.dim / 2);
    s.first_channel = g.below(s.dim - s.turning + 1);
    s.pairs = g.between(0, s.turning / 2);
    s.kind = g.chance(0.5) ? rotary_pairs::half_split : rotary_pairs::interleaved;
    s.group = g.between(1, 5);
    s.page = 16 * g.between(1, 5);
    s.tokens = g.between(1, 700);
    s.first_position = g.chance(0.3) ? 0 : g.below(262144);
    s.hadamard = g.chance(0.5);
    s.per_channel = s.format != kv_format::affine8 && g.chance(0.25);
    s.key_group = !s.per_channel && s.dim % 32 == 0 && s.dim > 32 && g.chance(0.25) ? 32 : 0;
    return s;
}

std::string text(const setting& s) {
    return std::string(to_string(s.format)) + ", " + std::to_string(s.dim) + " channels, " +
           std::to_string(s.turning) + " from " + std::to_string(s.first_channel) + " on turn" +
           (s.kind == rotary_pairs::interleaved ? " (interleaved)" : "") + ", " + std::to_string(s.pairs) +
           " pairs, group " + std::to_string(s.group) + ", " + std::to_string(s.tokens) + " tokens at " +
           std::to_string(s.first_position) + ", page " + std::to_string(s.page) +
           (s.hadamard ? ", had" : "") + (s.per_channel ? ", channel" : "") +
           (s.key_group != 0 ? ", g32" : "");
}

} // namespace

TEST_CASE("a mean at a position has the definition's bits on every target, and is the mean turned",
          "[rotary]") {
    generator g(1901);
    for (int round = 0; round < 40; ++round) {
        setting s = random_setting(g);
        s.pairs = s.turning / 2;
        const defined_means means(s);
        std::vector<float> unturned = s.means();
        detail::turning_means turning;
        REQUIRE(turning.take(s.rotary(), kv_heads, s.dim, unturned));
        const std::size_t position = round == 0   ? 0
                                     : round < 30 ? g.below(262145)
                                                  : g.below(std::size_t{1} << 40);
        for (std::size_t h = 0; h < kv_heads; ++h) {
            const std::vector<float> expected = means.at(h, position);
            kv1_test::for_each_target([&](kv1::target) {
                std::vector<float> x(unturned.begin() + static_cast<std::ptrdiff_t>(h * s.dim),
                                     unturned.begin() + static_cast<std::ptrdiff_t>((h + 1) * s.dim));
                detail::common_kernels().turn_mean(turning.data()[h], position, x.data());
                REQUIRE(kv1_test::same_bits(x, expected));
            });
            if (round >= 30)
                continue; // so far out, an angle of a double is not exact enough to compare with
            const std::vector<double> exact = s.mean_at(h, position);
            for (std::size_t c = 0; c < s.dim; ++c)
                REQUIRE(std::fabs(expected[c] - exact[c]) <= 4.0 * unit_roundoff * 9.0); // |mean| < 9
        }
    }
}

TEST_CASE("keys are stored without the mean at their position, and are read with it", "[rotary]") {
    generator g(1902);
    for (int round = 0; round < 25; ++round) {
        const setting s = random_setting(g);
        CAPTURE(text(s));
        const std::vector<float> k = s.keys(g), bare = without_means(s, k);
        const defined_means means(s);
        kv1_test::for_each_target([&](kv1::target target) {
            if (target == kv1::target::scalar && s.tokens > 200)
                return;
            filled_cache found(s, s.description(), k), twin(s, s.twin(), bare);
            for (std::size_t h = 0; h < kv_heads; ++h) {
                std::vector<float> rows(s.tokens * s.dim), expected(rows.size());
                found.cache.read(found.id, 0, kv_side::key, h, 0, s.tokens, rows);
                twin.cache.read(twin.id, 0, kv_side::key, h, 0, s.tokens, expected);
                for (std::size_t i = 0; i < s.tokens; ++i) {
                    const std::vector<float> m = means.at(h, s.first_position + i);
                    for (std::size_t c = 0; c < s.dim; ++c)
                        expected[i * s.dim + c] += m[c];
                }
                REQUIRE(kv1_test::same_bits(rows, expected));
            }
        });
    }
}

TEST_CASE("the mean's share of each score is given back on every target, path and length", "[rotary]") {
    generator g(1903);
    for (int round = 0; round < 40; ++round) {
        setting s = random_setting(g);
        if (round == 0) // three chunks, the last positions of a long context
            s = {.tokens = 1100, .first_position = 262144 - 1100};
        CAPTURE(text(s));
        const std::vector<float> k = s.keys(g), bare = without_means(s, k);
        const std::size_t queries = g.between(1, 4);
        const std::vector<float> q = kv1_test::normal_values(g, queries * s.heads() * s.dim);
        kv1_test::for_each_target([&](kv1::target target) {
            if (target == kv1::target::scalar && round % 4 != 0)
                return;
            const filled_cache found(s, s.description(), k), twin(s, s.twin(), bare);
            for (const auto mode : {kv1::precision::exact, kv1::precision::fast}) {
                kv1::attention_options options{.mode = mode};
                if (queries > 1 && queries <= s.tokens)
                    options.mask = kv1::attention_mask::causal();
                check_scores(s, scores_of(s, found.cache, found.id, q, options),
                             scores_of(s, twin.cache, twin.id, q, options), mode == kv1::precision::exact, q);
            }
        });
    }
}

TEST_CASE("tokens behind dropped pages keep their positions, and so do forks", "[rotary]") {
    generator g(1904);
    for (int round = 0; round < 20; ++round) {
        setting s = random_setting(g);
        s.tokens = g.between(6 * s.page, 10 * s.page + 5);
        CAPTURE(text(s));
        const std::vector<float> k = s.keys(g), bare = without_means(s, k), v = identity(s);
        const std::vector<float> q = kv1_test::normal_values(g, s.heads() * s.dim);
        kv1_test::for_each_target([&](kv1::target target) {
            if (target == kv1::target::scalar && round % 4 != 0)
                return;
            filled_cache found(s, s.description(), k), twin(s, s.twin(), bare);
            for (filled_cache* c : {&found, &twin}) {
                c->cache.commit(c->id);
                c->cache.drop_pages(c->id, 1, 1);
                c->cache.drop_pages(c->id, 3, 2);
                const kv1::sequence_id fork = c->cache.fork(c->id); // which goes on by itself
                c->cache.destroy_sequence(c->id);
                c->id = fork;
                if (s.per_channel)
                    continue; // a cut within its pages is refused
                c->cache.truncate(c->id, s.tokens - 3);
                c->append(s, c == &found ? k : bare, v, s.tokens - 3, 3);
            }
            for (const auto mode : {kv1::precision::exact, kv1::precision::fast})
                check_scores(s, scores_of(s, found.cache, found.id, q, {.mode = mode}),
                             scores_of(s, twin.cache, twin.id, q, {.mode = mode}),
                             mode == kv1::precision::exact, q);
            std::vector<float> row(s.dim), expected(s.dim);
            found.cache.read(found.id, 0, kv_side::key, 1, 5 * s.page + 2, 1, row);
            twin.cache.read(twin.id, 0, kv_side::key, 1, 5 * s.page + 2, 1, expected);
            const std::vector<float> m = defined_means(s).at(1, s.first_position + 5 * s.page + 2);
            for (std::size_t c = 0; c < s.dim; ++c)
                REQUIRE(row[c] == expected[c] + m[c]);
        });
    }
}

TEST_CASE("codes depend on a key and its position alone, however it was appended", "[rotary]") {
    generator g(1905);
    for (int round = 0; round < 12; ++round) {
        setting s = random_setting(g);
        s.tokens = g.between(30, 200);
        CAPTURE(text(s));
        const std::vector<float> k = s.keys(g), v = identity(s);
        const filled_cache whole(s, s.description(), k);
        filled_cache pieces(s, s.description(), k);
        pieces.cache.truncate(pieces.id, 0);
        for (std::size_t at = 0; at < s.tokens;) {
            const std::size_t n = std::min(s.tokens - at, g.chance(0.5) ? 1 : g.between(1, 40));
            pieces.append(s, k, v, at, n);
            at += n;
        }
        for (std::size_t h = 0; h < kv_heads; ++h) {
            std::vector<float> a(s.tokens * s.dim), b(a.size());
            whole.cache.read(whole.id, 0, kv_side::key, h, 0, s.tokens, a);
            pieces.cache.read(pieces.id, 0, kv_side::key, h, 0, s.tokens, b);
            REQUIRE(kv1_test::same_bits(a, b));
        }
    }
}

TEST_CASE("fp16 sinks and windows, soft caps, ranges and dropped pages see keys with their means",
          "[rotary]") {
    // expected: softmax in double over what read() gives, and the given keys in fp16 where the window has them
    generator g(1906);
    for (const std::size_t window : {std::size_t{0}, std::size_t{40}})
        for (const float cap : {0.0f, 6.0f}) {
            setting s{.tokens = window != 0 ? 150u : 5000u, .first_position = 7000};
            const std::size_t value_dim = 32;
            kv1::cache_description d = s.description();
            d.layers[0].value_dim = value_dim;
            d.fp16_window = window;
            d.fp16_sinks = window / 10;
            const std::vector<float> k = s.keys(g);
            const std::vector<float> v = kv1_test::normal_values(g, s.tokens * kv_heads * value_dim);
            const std::vector<float> q = kv1_test::normal_values(g, s.heads() * s.dim);
            kv1_test::for_each_target([&](kv1::target target) {
                if (target == kv1::target::scalar && s.tokens > 1000)
                    return;
                kv1::kv_cache cache(d);
                const auto id = cache.create_sequence();
                cache.append(id, 0, {k.data(), s.tokens, kv_heads, s.dim},
                             {v.data(), s.tokens, kv_heads, value_dim});
                const std::size_t hole = window != 0 ? s.page : 0, behind = 2 * hole; // page 1 is dropped
                if (hole != 0)
                    cache.drop_pages(id, 1, 1);
                std::vector<float> out(s.heads() * value_dim), lse(s.heads());
                cache.attend(id, 0, {q.data(), 1, s.heads(), s.dim}, {out.data(), 1, s.heads(), value_dim},
                             {.mode = kv1::precision::exact, .log_sum_exp = lse, .soft_cap = cap});
                for (std::size_t h = 0; h < s.heads(); ++h) {
                    const std::size_t kv = h / s.group;
                    std::vector<float> keys(s.tokens * s.dim);
                    cache.read(id, 0, kv_side::key, kv, 0, hole, std::span(keys).first(hole * s.dim));
                    cache.read(id, 0, kv_side::key, kv, behind, s.tokens - behind,
                               std::span(keys).subspan(behind * s.dim));
                    double sum = 0.0, norms = 0.0;
                    std::vector<double> expected(value_dim);
                    for (std::size_t i = 0; i < s.tokens; ++i) {
                        if (i >= hole && i < behind)
                            continue;
                        const bool copied = i < d.fp16_sinks || i + window >= s.tokens;
                        double score = 0.0, norm = 0.0;
                        for (std::size_t c = 0; c < s.dim; ++c) {
                            const double x =
                                copied ? static_cast<double>(kv1::float16(k[(i * kv_heads + kv) * s.dim + c]))
                                       : static_cast<double>(keys[i * s.dim + c]);
                            score += static_cast<double>(q[h * s.dim + c]) * x;
                            norm += std::fabs(static_cast<double>(q[h * s.dim + c]) * x);
                        }
                        score /= std::sqrt(static_cast<double>(s.dim));
                        if (cap > 0.0f)
                            score = cap * std::tanh(score / cap);
                        norms = std::max(norms, norm / std::sqrt(static_cast<double>(s.dim)));
                        const double w = std::exp(score);
                        sum += w;
                        for (std::size_t c = 0; c < value_dim; ++c) {
                            const float x = v[(i * kv_heads + kv) * value_dim + c];
                            expected[c] +=
                                w * static_cast<double>(copied ? static_cast<float>(kv1::float16(x)) : x);
                        }
                    }
                    // scores err by roundings of a rotated product, and of waves: 164 u of amplitudes that
                    // are at most four times the largest product
                    const double score_error = kv1_test::gamma(4.0 * 164.0 + 64.0 + 24.0) * 2.0 * norms;
                    REQUIRE(std::fabs(static_cast<double>(lse[h]) - std::log(sum)) <=
                            score_error + kv1_test::gamma(200));
                    for (std::size_t c = 0; c < value_dim;
                         ++c) // values are below 8, sinks and windows in fp16
                        REQUIRE(std::fabs(static_cast<double>(out[h * value_dim + c]) - expected[c] / sum) <=
                                8.0 * (2 * score_error + kv1_test::gamma(400)));
                }
            });
        }
}

TEST_CASE("a saved sequence goes into a cache whose keys turn alike, and into no other", "[rotary]") {
    generator g(1907);
    const setting s{.pairs = 20, .tokens = 100, .first_position = 50};
    const std::vector<float> k = s.keys(g), q = kv1_test::normal_values(g, s.heads() * s.dim);
    const filled_cache from(s, s.description(), k);
    std::vector<std::byte> memory(kv1::saved_bytes(from.cache, {&from.id, 1}));
    kv1::save(from.cache, {&from.id, 1}, kv1::memory_sink(memory));
    kv1::kv_cache again(s.description());
    kv1::sequence_id loaded;
    REQUIRE(kv1::load(again, kv1::memory_source(memory), {&loaded, 1}) == 1);
    REQUIRE(scores_of(s, again, loaded, q, {}).lse == scores_of(s, from.cache, from.id, q, {}).lse);

    std::vector<kv1::cache_description> others(6, s.description());
    others[0].first_position = 49;
    others[1].layers[0].rotary.frequencies[3] *= 1.5f;
    others[2].layers[0].rotary.pairs = rotary_pairs::interleaved;
    others[3].layers[0].rotary = {};
    others[4].layers[0].key_encoding.means[s.rotary().first_of(1)] += 1.0f;
    others[5].layers[0].key_encoding.basis.assign(kv_heads * s.dim * s.dim, 0.0f);
    for (std::size_t i = 0; i < kv_heads * s.dim; ++i)
        others[5].layers[0].key_encoding.basis[i * s.dim + (i + 1) % s.dim] = 1.0f;
    for (std::size_t i = 0; i < others.size(); ++i) {
        CAPTURE(i);
        kv1::kv_cache stranger(others[i]);
        kv1::sequence_id refused;
        const auto r = kv1::try_load(stranger, kv1::memory_source(memory), {&refused, 1});
        REQUIRE_FALSE(r);
        REQUIRE(r.reason().code() == kv1::errc::different_cache);
    }
}

TEST_CASE("what can not turn, or is no basis, is refused with the layer", "[rotary]") {
    const setting s;
    const auto refusal = [&](const auto& change) {
        kv1::cache_description d = kv1::uniform_cache(2, s.description().layers[0], 256, 32);
        change(d);
        const auto made = kv1::kv_cache::create(d);
        REQUIRE_FALSE(made);
        return made.reason();
    };
    using description = kv1::cache_description;
    const auto code = [&](const auto& change) { return refusal(change).code(); };
    CHECK(code([](description& d) { d.layers[1].rotary.first_channel = 1; }) == kv1::errc::invalid_argument);
    CHECK(code([](description& d) { d.layers[1].rotary.frequencies.resize(33); }) ==
          kv1::errc::invalid_argument);
    CHECK(code([](description& d) { d.layers[1].rotary.frequencies[2] = INFINITY; }) ==
          kv1::errc::non_finite);
    CHECK(refusal([](description& d) { d.layers[1].rotary.first_channel = 1; }).where().layer == 1);
    CHECK(code([](description& d) { d.first_position = std::size_t{1} << 50; }) ==
          kv1::errc::invalid_argument);
    CHECK(code([](description& d) { d.layers[0].key_encoding.basis.resize(5); }) ==
          kv1::errc::shape_mismatch);
    CHECK(code([](description& d) { d.layers[0].key_encoding.basis.resize(kv_heads * 64 * 64); }) ==
          kv1::errc::invalid_argument);
    CHECK(code([](description& d) { d.layers[0].key_encoding.basis.assign(kv_heads * 64 * 64, NAN); }) ==
          kv1::errc::non_finite);
    // values in keys: the part that turns comes after them, and there is no basis
    const auto latent = [](description& d) {
        d.layers[0] = kv1::latent_layer(96, 64, kv_format::compact3);
        d.layers[0].rotary = {kv1::rotary_frequencies(10000.0, 32), rotary_pairs::interleaved, 64};
    };
    description fine = s.description();
    latent(fine);
    CHECK(kv1::kv_cache::create(fine));
    CHECK(code([&](description& d) {
              latent(d);
              d.layers[0].rotary.first_channel = 62;
          }) == kv1::errc::invalid_argument);
    CHECK(code([&](description& d) {
              latent(d);
              d.layers[0].key_encoding.basis.assign(96 * 96, 0.0f);
          }) == kv1::errc::invalid_argument);
}

TEST_CASE("the rotary part of a latent has a mean that turns", "[rotary]") {
    // multi-head latent attention: outputs are sums of the keys' first channels, which do not turn
    generator g(1908);
    constexpr std::size_t dim = 96, value_dim = 64, heads = 3, count = 200;
    kv1::layer_description l = kv1::latent_layer(dim, value_dim, kv_format::compact3);
    l.rotary = {kv1::rotary_frequencies(10000.0, 32), rotary_pairs::interleaved, 64};
    l.key_encoding.levels = level_choice::least_squares;
    l.key_encoding.means = kv1_test::normal_values(g, dim, 2.0f);
    kv1::cache_description d = kv1::uniform_cache(1, l, 256, 32);
    d.first_position = 77;
    std::vector<float> k = kv1_test::normal_values(g, count * dim);
    for (std::size_t t = 0; t < count; ++t) {
        const std::span<float> key(k.data() + t * dim, dim);
        for (std::size_t c = 0; c < dim; ++c)
            key[c] += l.key_encoding.means[c];
        kv1::apply_rotary(l.rotary, key, static_cast<std::int64_t>(77 + t));
    }
    const std::vector<float> q = kv1_test::normal_values(g, heads * dim);
    kv1_test::for_each_target([&](kv1::target) {
        kv1::kv_cache cache(d);
        const auto id = cache.create_sequence();
        cache.append(id, 0, {k.data(), count, 1, dim});
        std::vector<float> out(heads * value_dim), keys(count * dim);
        cache.attend(id, 0, {q.data(), 1, heads, dim}, {out.data(), 1, heads, value_dim},
                     {.mode = kv1::precision::exact});
        cache.read(id, 0, kv_side::key, 0, 0, count, keys);
        for (std::size_t h = 0; h < heads; ++h) {
            double sum = 0.0, norms = 0.0;
            std::vector<double> expected(value_dim);
            for (std::size_t t = 0; t < count; ++t) {
                double score = 0.0, norm = 0.0;
                for (std::size_t c = 0; c < dim; ++c) {
                    const double term =
                        static_cast<double>(q[h * dim + c]) * static_cast<double>(keys[t * dim + c]);
                    score += term;
                    norm += std::fabs(term);
                }
                const double w = std::exp(score / std::sqrt(static_cast<double>(dim)));
                norms = std::max(norms, norm / std::sqrt(static_cast<double>(dim)));
                sum += w;
                for (std::size_t c = 0; c < value_dim; ++c)
                    expected[c] += w * static_cast<double>(keys[t * dim + c]);
            }
            const double score_error = kv1_test::gamma(4.0 * 164.0 + 96.0 + 24.0) * 2.0 * norms;
            for (std::size_t c = 0; c < value_dim; ++c) // keys are below 16
                REQUIRE(std::fabs(static_cast<double>(out[h * value_dim + c]) - expected[c] / sum) <=
                        16.0 * (2 * score_error + kv1_test::gamma(400)));
        }
    });
}
