// SPDX-License-Identifier: Apache-2.0
//
// Random operations on caches whose keys and values have offsets, attended to on the fast path: fp16 sinks, the
// quantized body and the fp16 window are joined by their log-sum-exp, and so are ranges that a caller joins. What
// comes out is held against an oracle that keeps all tokens as they were given: attention over what the cache
// holds of them, by definition. The promise of ARCHITECTURE ("Accuracy of the integer path"): outputs within 5 %
// of what quantization costs, the log-sum-exp within 0.02 nats. The levels of codebook2 do not fit a large offset
// under rotation, so tokens are left nats apart and few of them weigh; there it is 5 % of what quantization moves
// it by, too.
#include "random.hpp"
#include "targets.hpp"

#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

using kv1::kv_format;

namespace {

constexpr std::size_t dim = 64, kv_heads = 2, group = 2, heads = kv_heads * group;
constexpr std::size_t sinks = 4, window = 32, page = 32, capacity = 4096;

struct offsets {
    const char* name;
    float key_bias = 0.0f, keys = 0.0f, values = 0.0f; // of one key channel; of all
};

// A sequence as the caller gave it, and which of its tokens may still be seen in fp16.
struct history {
    kv1::sequence_id id;
    std::vector<float> k = {}, v = {}; // [token][head][channel]
    std::size_t fp16_from = 0;
    [[nodiscard]] std::size_t length() const { return k.size() / (kv_heads * dim); }
};

struct row {
    std::vector<double> out = std::vector<double>(dim);
    double lse = -std::numeric_limits<double>::infinity();
};

// Attention of a query over tokens [token][channel] in fp32.
row attend_plainly(std::span<const float> q, const std::vector<float>& k, const std::vector<float>& v) {
    row r;
    std::vector<double> scores(k.size() / dim);
    for (std::size_t t = 0; t < scores.size(); ++t) {
        for (std::size_t c = 0; c < dim; ++c)
            scores[t] += static_cast<double>(q[c]) * k[t * dim + c];
        scores[t] /= std::sqrt(static_cast<double>(dim));
    }
    const double top = *std::max_element(scores.begin(), scores.end());
    double sum = 0.0;
    for (double& s : scores)
        sum += s = std::exp(s - top);
    r.lse = top + std::log(sum);
    for (std::size_t t = 0; t < scores.size(); ++t)
        for (std::size_t c = 0; c < dim; ++c)
            r.out[c] += scores[t] / sum * v[t * dim + c];
    return r;
}

class random_walk {
public:
    random_walk(const kv1::cache_description& d, const offsets& o, std::uint64_t seed)
        : cache_(d), offsets_(o), random_(seed) {
        sequences_.push_back({cache_.create_sequence()});
        append(sequences_[0], 150);
    }

    void step() {
        const std::size_t chosen = random_.below(sequences_.size());
        history& s = sequences_[chosen];
        const std::size_t what = random_.below(8);
        if (what < 3 && s.length() < 500)
            append(s, random_.between(1, what == 0 ? 90 : 4));
        else if (what == 3)
            commit(s);
        else if (what == 4)
            truncate(s);
        else if (what == 5 && sequences_.size() < 3)
            fork(chosen);
        else
            attend(s);
    }
    // Of all rows that were attended to.
    void require_accurate(bool levels_fit) const {
        REQUIRE(rows_ > 20);
        INFO("integer " << integer_ << ", quantization " << quantization_ << "; log-sum-exp " << lse_
                        << ", by quantization " << quantized_lse_);
        REQUIRE(std::sqrt(integer_ / quantization_) <= 0.05);
        REQUIRE(lse_ <= std::max(0.02, levels_fit ? 0.0 : 0.05 * quantized_lse_));
        REQUIRE(integer_ > 0.0);
    }

private:
    std::vector<float> tokens(std::size_t n, float bias, float mean) {
        std::vector<float> x = kv1_test::normal_values(random_, n * kv_heads * dim, 1.0f, mean);
        for (std::size_t i = 5; i < x.size(); i += dim)
            x[i] += bias;
        return x;
    }
    void append(history& s, std::size_t n) {
        const std::vector<float> k = tokens(n, offsets_.key_bias, offsets_.keys),
                                 v = tokens(n, 0, offsets_.values);
        cache_.append(s.id, 0, {k.data(), n, kv_heads, dim}, {v.data(), n, kv_heads, dim});
        s.k.insert(s.k.end(), k.begin(), k.end());
        s.v.insert(s.v.end(), v.begin(), v.end());
    }
    void commit(history& s) {
        cache_.commit(s.id);
        s.fp16_from = std::max(s.fp16_from, s.length() + 1 > window ? s.length() + 1 - window : 0);
    }
    void truncate(history& s) {
        const std::size_t n = s.length() - random_.below(std::min<std::size_t>(s.length() / 4, 40) + 1);
        cache_.truncate(s.id, n);
        s.k.resize(n * kv_heads * dim);
        s.v.resize(n * kv_heads * dim);
        s.fp16_from = std::min(s.fp16_from, n);
    }
    void fork(std::size_t from) {
        history copy = sequences_[from];
        copy.id = cache_.fork(sequences_[from].id);
        sequences_.push_back(std::move(copy));
    }

    // One KV head's tokens first ... last - 1 as a query sees them that sees none from `limit` on. given: as
    // if nothing were quantized.
    std::vector<float> seen(const history& s, kv1::kv_side side, std::size_t head, std::size_t first,
                            std::size_t last, std::size_t limit, bool given) const {
        std::vector<float> held(s.length() * dim);
        cache_.read(s.id, 0, side, head, 0, s.length(), held);
        const std::vector<float>& own = side == kv1::kv_side::key ? s.k : s.v;
        std::vector<float> x;
        for (std::size_t t = first; t < last; ++t) {
            const bool copied = t < sinks || (t + window >= limit && t >= s.fp16_from);
            for (std::size_t c = 0; c < dim; ++c) {
                const float original = own[(t * kv_heads + head) * dim + c];
                x.push_back(given    ? original
                            : copied ? static_cast<float>(kv1::float16(original))
                                     : held[t * dim + c]);
            }
        }
        return x;
    }

    // The last few tokens' queries: at once, or a range and the rest joined.
    void attend(const history& s) {
        const std::size_t n = s.length(), m = random_.between(1, 3);
        const std::vector<float> q = kv1_test::normal_values(random_, m * heads * dim);
        const std::size_t cut = random_.chance(0.5) ? n : random_.between(1, n - m);
        struct part {
            std::vector<float> out, lse;
        };
        std::vector<part> parts;
        for (const auto& [first, last] : {std::pair(std::size_t{0}, cut), std::pair(cut, n)}) {
            if (first == last)
                continue;
            parts.push_back({std::vector<float>(m * heads * dim), std::vector<float>(m * heads)});
            part& p = parts.back();
            kv1::attention_options options;
            options.range = {first, last};
            options.log_sum_exp = p.lse;
            cache_.attend(s.id, 0, {q.data(), m, heads, dim}, {p.out.data(), m, heads, dim}, options);
        }
        if (parts.size() == 2) {
            const kv1::attention_part both[] = {{parts[0].out, parts[0].lse}, {parts[1].out, parts[1].lse}};
            kv1::merge_attention(both, dim, parts[0].out, parts[0].lse);
        }
        for (std::size_t i = 0; i < m; ++i)
            for (std::size_t h = 0; h < heads; ++h) {
                const std::size_t limit = n - m + i + 1, at = i * heads + h;
                const auto oracle = [&](bool given) {
                    return attend_plainly(std::span(q).subspan(at * dim, dim),
                                          seen(s, kv1::kv_side::key, h / group, 0, limit, limit, given),
                                          seen(s, kv1::kv_side::value, h / group, 0, limit, limit, given));
                };
                const row want = oracle(false), unquantized = oracle(true);
                lse_ = std::max(lse_, std::fabs(parts[0].lse[at] - want.lse));
                quantized_lse_ = std::max(quantized_lse_, std::fabs(want.lse - unquantized.lse));
                for (std::size_t c = 0; c < dim; ++c) {
                    integer_ += std::pow(parts[0].out[at * dim + c] - want.out[c], 2.0);
                    quantization_ += std::pow(want.out[c] - unquantized.out[c], 2.0);
                }
                ++rows_;
            }
    }

    kv1::kv_cache cache_;
    offsets offsets_;
    kv1_test::generator random_;
    std::vector<history> sequences_;
    std::size_t rows_ = 0;
    double integer_ = 0.0, quantization_ = 0.0, lse_ = 0.0, quantized_lse_ = 0.0; // squares; the largest
};

} // namespace

TEST_CASE("parts of caches with offsets join accurately on the fast path, whatever was done before",
          "[accuracy]") {
    constexpr offsets all_offsets[] = {{"key bias 300", 300.0f},
                                       {"keys + 3, values + 3", 0.0f, 3.0f, 3.0f},
                                       {"key bias 40, values - 5", 40.0f, 0.0f, -5.0f}};
    kv1_test::for_each_target([&](kv1::target) {
        std::uint64_t seed = 0;
        for (const offsets& o : all_offsets)
            for (const bool encoded : {false, true})
                for (const kv_format format :
                     {kv_format::affine2, kv_format::codebook2, kv_format::compact2}) {
                    INFO(o.name << (encoded ? ", ls+had, " : ", ") << to_string(format));
                    kv1::layer_description layer{kv_heads, dim, dim, format, format};
                    if (encoded)
                        for (kv1::vector_encoding* e : {&layer.key_encoding, &layer.value_encoding}) {
                            e->levels = kv1::level_choice::least_squares;
                            e->hadamard = dim;
                        }
                    kv1::cache_description d = kv1::uniform_cache(1, layer, capacity, page);
                    d.fp16_sinks = sinks;
                    d.fp16_window = window;
                    random_walk walk(d, o, ++seed);
                    for (int i = 0; i < 60; ++i)
                        walk.step();
                    walk.require_accurate(format != kv_format::codebook2);
                }
    });
}
