// SPDX-License-Identifier: Apache-2.0
//
// What a calibration adds up over the tokens of one layer (calibration.hpp has the definitions).
//
// A call is split into tasks by KV head and part: part i of n takes every n-th block of queries, so that parts
// take about as long under a causal mask. Each task sums on its own, and the sums are joined in order at the
// end, when nothing can fail any more. The split depends on shapes alone.
//
// All sums are in double. Where one token has nearly all of a query's probability, v - o is a small difference
// of large numbers: sums in fp32 were 15 % off.
#pragma once

#include <kv1/cache_description.hpp>
#include <kv1/detail/buffer.hpp>
#include <kv1/detail/fixed_vector.hpp>
#include <kv1/encoding.hpp>
#include <kv1/executor.hpp>
#include <kv1/rotary_embedding.hpp>
#include <kv1/status.hpp>
#include <kv1/tensor.hpp>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>

namespace kv1::inline KV1_ABI::detail {

// What of a layer is wanted, and which tokens are quantized.
struct calibrated_quantities {
    bool means = false;         // of keys and of values
    bool error_weights = false; // of keys and of values
    bool moments = false;       // of queries, and of values weighted by their probabilities
    std::size_t sinks = 0;      // the first tokens of a text are not quantized,
    std::size_t window = 0;     // nor are the newest of a query
    std::size_t query_stride = 1;
    double scale = 1.0; // of scores
    [[nodiscard]] bool any() const noexcept { return means || error_weights || moments; }
};

// A row of a tensor as doubles.
inline void read_row(const tensor_view& x, std::size_t token, std::size_t head, double* out) noexcept {
    const std::size_t n = x.channels();
    const void* row = x.at(token, head);
    switch (x.type()) {
    case scalar_type::fp32:
        for (std::size_t c = 0; c < n; ++c)
            out[c] = static_cast<double>(static_cast<const float*>(row)[c]);
        return;
    case scalar_type::fp16:
        for (std::size_t c = 0; c < n; ++c)
            out[c] = static_cast<double>(half_to_float(static_cast<const std::uint16_t*>(row)[c]));
        return;
    case scalar_type::bf16:
        for (std::size_t c = 0; c < n; ++c)
            out[c] = static_cast<double>(bfloat_to_float(static_cast<const std::uint16_t*>(row)[c]));
    }
}

// c += a[0] b_0 + ... + a[3] b_3; b is [4][n].
inline void add_four_rows(double* __restrict c, const double* a, const double* b, std::size_t n) noexcept {
    const double a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3];
    const double *const b0 = b, *const b1 = b0 + n, *const b2 = b1 + n, *const b3 = b2 + n;
    for (std::size_t j = 0; j < n; ++j)
        c[j] += (a0 * b0[j] + a1 * b1[j]) + (a2 * b2[j] + a3 * b3[j]);
}
inline void add_one_row(double* __restrict c, double a, const double* b, std::size_t n) noexcept {
    for (std::size_t j = 0; j < n; ++j)
        c[j] += a * b[j];
}

// c += a b: c is [rows][n], with c_stride from row to row; a is [rows][depth], with a_stride; b is [depth][n].
inline void add_product(double* c, std::size_t c_stride, const double* a, std::size_t a_stride,
                        const double* b, std::size_t rows, std::size_t depth, std::size_t n) noexcept {
    const std::size_t fours = depth / 4 * 4;
    for (std::size_t r = 0; r < rows; ++r, c += c_stride, a += a_stride) {
        for (std::size_t k = 0; k < fours; k += 4)
            add_four_rows(c, a + k, b + k * n, n);
        for (std::size_t k = fours; k < depth; ++k)
            add_one_row(c, a[k], b + k * n, n);
    }
}

// sums, [n][n], += sum over i of factors[i] x_i y_i^T; x and y are [count][n]. factors: null for ones. scratch is
// [n][count].
inline void add_outer_products(double* sums, const double* x, const double* y, const double* factors,
                               std::size_t count, std::size_t n, double* scratch) noexcept {
    for (std::size_t i = 0; i < count; ++i)
        for (std::size_t c = 0; c < n; ++c)
            scratch[c * count + i] = factors == nullptr ? x[i * n + c] : factors[i] * x[i * n + c];
    add_product(sums, n, scratch, count, y, n, count, n);
}

inline double dot_product(const double* a, const double* b, std::size_t n) noexcept {
    double sum = 0.0;
    for (std::size_t i = 0; i < n; ++i)
        sum += a[i] * b[i];
    return sum;
}

// Query heads that share a KV head, in pairs a <= b: (0, 0), (0, 1), (1, 1) for two.
constexpr std::size_t head_pairs(std::size_t group) noexcept { return group * (group + 1) / 2; }
template <class F>
constexpr void for_each_pair(std::size_t group, F&& f) {
    std::size_t pair = 0;
    for (std::size_t b = 0; b < group; ++b)
        for (std::size_t a = 0; a <= b; ++a)
            f(pair++, a, b);
}

class layer_sums {
public:
    // Errors: out_of_memory.
    status create(const layer_description& shape, rotary_embedding&& rotary,
                  const calibrated_quantities& wanted) noexcept {
        rotary_ = std::move(rotary);
        heads_ = shape.kv_heads;
        key_dim_ = shape.key_dim;
        value_dim_ = shape.value_dim;
        sliding_window_ = shape.sliding_window;
        wanted_ = wanted;
        const bool fits = (!wanted.means || (key_means_.resize(heads_ * key_dim_) &&
                                             value_means_.resize(heads_ * value_dim_))) &&
                          (!wanted.error_weights || key_weights_.resize(heads_ * key_dim_ * key_dim_)) &&
                          (!wanted.moments || (query_moments_.resize(heads_ * key_dim_ * key_dim_) &&
                                               value_moments_.resize(heads_ * value_dim_ * value_dim_)));
        return fits ? status{} : no_memory();
    }

    void set_sliding_window(std::size_t tokens) noexcept { sliding_window_ = tokens; }

    // Takes products W_a^T W_b of the parts of the output projection that belong to query heads a and b. w is
    // [outputs][group * heads][value_dim].
    status set_projection(const tensor_view& w, executor_view run) noexcept {
        const std::size_t group = w.heads() / heads_, pairs = head_pairs(group), d = value_dim_;
        constexpr std::size_t rows = 32; // at a time
        const std::size_t size = group * rows * d + d * rows;
        buffer<double> sums, scratch;
        if (!sums.resize(heads_ * pairs * d * d) || !scratch.resize(heads_ * size))
            return no_memory();
        const auto task = [&](std::size_t head) {
            double *const parts = scratch.data() + head * size, *const turned = parts + group * rows * d;
            for (std::size_t o = 0; o < w.tokens(); o += rows) {
                const std::size_t count = (std::min)(rows, w.tokens() - o);
                for (std::size_t a = 0; a < group; ++a)
                    for (std::size_t r = 0; r < count; ++r)
                        read_row(w, o + r, head * group + a, parts + (a * count + r) * d);
                for_each_pair(group, [&](std::size_t pair, std::size_t a, std::size_t b) {
                    add_outer_products(sums.data() + (head * pairs + pair) * d * d, parts + a * count * d,
                                       parts + b * count * d, nullptr, count, d, turned);
                });
            }
        };
        run(heads_, task);
        return take_products(group, sums);
    }
    // products is [heads][group][group][value_dim][value_dim].
    status set_products(std::size_t group, std::span<const float> products) noexcept {
        const std::size_t square = value_dim_ * value_dim_;
        buffer<double> own;
        if (!own.resize(heads_ * head_pairs(group) * square))
            return no_memory();
        double* to = own.data();
        for (std::size_t h = 0; h < heads_; ++h)
            for_each_pair(group, [&](std::size_t, std::size_t a, std::size_t b) {
                const float* from = products.data() + ((h * group + a) * group + b) * square;
                to = std::copy_n(from, square, to);
            });
        return take_products(group, own);
    }
    // 0: no projection was given.
    [[nodiscard]] std::size_t group() const noexcept { return group_; }

    // Adds the queries, the last of the tokens of keys and values, whose first token is at first_position.
    // Preconditions: extents fit, values are finite. Errors: out_of_memory, not_representable; nothing is added
    // then.
    status add(const tensor_view& queries, const tensor_view& keys, const tensor_view& values,
               std::size_t first_position, executor_view run) noexcept {
        const call_view call{queries,
                             keys,
                             values,
                             first_position,
                             queries.heads() / heads_,
                             keys.tokens() - queries.tokens()};
        const std::size_t parts = std::clamp<std::size_t>(queries.tokens() / 128, 1, 8);
        buffer<double> norms;
        if (wanted_.error_weights && !compute_norms(call, norms, run))
            return no_memory();
        fixed_vector<part_sums> all;
        if (!all.reserve(heads_ * parts))
            return no_memory();
        for (std::size_t i = 0; i < heads_ * parts; ++i)
            if (!all.emplace_back().create(*this, call))
                return no_memory();
        const auto task = [&](std::size_t i) {
            add_part(call, norms.view(), i / parts, i % parts, parts, all[i]);
        };
        run(heads_ * parts, task);
        for (const part_sums& p : all)
            if (!p.finite())
                return {errc::not_representable, "sums over these tokens are too large for a double"};
        const auto join = [&](std::size_t h) { take(call, h, {&all[h * parts], parts}); };
        run(heads_, join);
        tokens_ += queries.tokens();
        for (std::size_t t = 0; t < queries.tokens(); ++t)
            queries_ += taken(call.position(t)) ? 1 : 0;
        return {};
    }

    // What was added up, divided by the number of tokens or queries; zeros where nothing was added. `head` is
    // a KV head.
    // @{
    void key_means(std::size_t head, std::span<double> out) const noexcept { mean(key_means_, head, out); }
    void value_means(std::size_t head, std::span<double> out) const noexcept {
        mean(value_means_, head, out);
    }
    void key_weights(std::size_t head, std::span<double> out) const noexcept {
        symmetric(key_weights_, head, key_dim_, wanted_.scale * wanted_.scale, out);
    }
    void value_weights(std::size_t head, std::span<double> out) const noexcept {
        const std::size_t pairs = head_pairs(group_), d = value_dim_;
        std::fill(out.begin(), out.end(), 0.0);
        for_each_pair(group_, [&](std::size_t pair, std::size_t a, std::size_t b) {
            const float* m = products_.data() + (head * pairs + pair) * d * d;
            const double share = shares_[head * pairs + pair] * (a == b ? 0.5 : 1.0);
            for (std::size_t i = 0; i < d; ++i)
                for (std::size_t j = 0; j < d; ++j)
                    out[i * d + j] +=
                        share * (static_cast<double>(m[i * d + j]) + static_cast<double>(m[j * d + i]));
        });
        for (double& x : out)
            x *= queries_ == 0 ? 0.0 : 1.0 / static_cast<double>(queries_);
    }
    void query_moments(std::size_t head, std::span<double> out) const noexcept {
        symmetric(query_moments_, head, key_dim_, 1.0, out);
    }
    void value_moments(std::size_t head, std::span<double> out) const noexcept {
        symmetric(value_moments_, head, value_dim_, 1.0, out);
    }
    // @}
    [[nodiscard]] std::size_t tokens() const noexcept { return tokens_; }
    [[nodiscard]] std::size_t kv_heads() const noexcept { return heads_; }
    [[nodiscard]] std::size_t key_dim() const noexcept { return key_dim_; }
    [[nodiscard]] std::size_t value_dim() const noexcept { return value_dim_; }
    [[nodiscard]] const rotary_embedding& rotary() const noexcept { return rotary_; }
    [[nodiscard]] const calibrated_quantities& wanted() const noexcept { return wanted_; }

private:
    static constexpr std::size_t tile = 16;         // keys at a time
    static constexpr std::size_t most_queries = 32; // at a time

    static status no_memory() noexcept { return {errc::out_of_memory, "an allocation failed"}; }

    struct call_view {
        const tensor_view &queries, &keys, &values;
        std::size_t first_position, group, before; // before: tokens ahead of the queries
        [[nodiscard]] std::size_t position(std::size_t query) const noexcept {
            return first_position + before + query;
        }
        // Queries of a block, so that a task's probabilities stay small.
        [[nodiscard]] std::size_t block() const noexcept {
            return (std::max)(std::size_t{1}, most_queries / group);
        }
    };

    struct pair_cost {
        double share = 0.0, distance = 0.0;
    };

    // What one task adds up, and what it works in.
    struct part_sums {
        buffer<double> key_means, value_means, key_weights, shares, query_moments;
        buffer<double> received; // [tokens]: the probability that each token was given
        buffer<double> row, queries, keys, values, outputs, probabilities, mixed, joint, turned, matrix;
        buffer<pair_cost> costs; // [pair][query]

        [[nodiscard]] bool create(const layer_sums& l, const call_view& c) noexcept {
            const std::size_t pairs = head_pairs(c.group), n = c.keys.tokens(), kd = l.key_dim_,
                              vd = l.value_dim_, queries_at_once = c.block(),
                              heads = queries_at_once * c.group;
            const calibrated_quantities& w = l.wanted_;
            if (!row.resize((std::max)(kd, vd)))
                return false;
            if (w.means && !(key_means.resize(kd) && value_means.resize(vd)))
                return false;
            if ((w.error_weights || w.moments) &&
                !(queries.resize(heads * kd) && keys.resize(tile * kd) && values.resize(tile * vd) &&
                  outputs.resize(heads * vd) && probabilities.resize(heads * (n + tile)) &&
                  turned.resize((std::max)({heads * kd, tile * vd, 4 * queries_at_once * vd}))))
                return false;
            if (w.moments && !(query_moments.resize(kd * kd) && received.resize(n)))
                return false;
            return !w.error_weights ||
                   (key_weights.resize(kd * kd) && shares.resize(pairs) && matrix.resize(vd * vd) &&
                    mixed.resize(queries_at_once * pairs * vd) &&
                    joint.resize(queries_at_once * pairs * tile) && costs.resize(queries_at_once * pairs));
        }
        [[nodiscard]] bool finite() const noexcept {
            for (const buffer<double>* b : {&key_means, &value_means, &key_weights, &shares, &query_moments})
                for (const double x : *b)
                    if (!std::isfinite(x))
                        return false;
            return true;
        }
    };

    [[nodiscard]] bool taken(std::size_t position) const noexcept {
        return position % wanted_.query_stride == wanted_.query_stride / 2;
    }

    status take_products(std::size_t group, const buffer<double>& sums) noexcept {
        const std::size_t square = value_dim_ * value_dim_;
        buffer<float> products;
        buffer<double> shares;
        if (!products.resize(sums.size()) || !shares.resize(sums.size() / square))
            return no_memory();
        for (std::size_t i = 0; i < sums.size(); ++i) {
            products[i] = static_cast<float>(sums[i]);
            if (!std::isfinite(products[i]))
                return {errc::not_representable, "products of the output projection are too large for fp32"};
        }
        products_ = std::move(products);
        shares_ = std::move(shares);
        group_ = group;
        return {};
    }

    // norms[head][pair][token] = v^T W_a^T W_b v. False: no memory.
    bool compute_norms(const call_view& c, buffer<double>& norms, executor_view run) const noexcept {
        const std::size_t pairs = head_pairs(c.group), n = c.keys.tokens(), d = value_dim_;
        constexpr std::size_t chunk = 256;
        const std::size_t chunks = (n + chunk - 1) / chunk;
        buffer<double> scratch; // of a task: values and products of 16 tokens, a matrix
        const std::size_t size = 2 * tile * d + d * d;
        if (!norms.resize(heads_ * pairs * n) || !scratch.resize(heads_ * chunks * size))
            return false;
        const auto task = [&](std::size_t i) {
            const std::size_t head = i / chunks, first = i % chunks * chunk,
                              end = (std::min)(n, first + chunk);
            double *const v = scratch.data() + i * size, *const turned = v + tile * d,
                          *const m = turned + tile * d;
            for (std::size_t pair = 0; pair < pairs; ++pair) {
                std::copy_n(products_.data() + (head * pairs + pair) * d * d, d * d, m);
                for (std::size_t t = first; t < end; t += tile) {
                    const std::size_t count = (std::min)(tile, end - t);
                    for (std::size_t j = 0; j < count; ++j)
                        read_row(c.values, t + j, head, v + j * d);
                    std::fill_n(turned, count * d, 0.0);
                    add_product(turned, d, v, d, m, count, d, d);
                    for (std::size_t j = 0; j < count; ++j)
                        norms[(head * pairs + pair) * n + t + j] = dot_product(turned + j * d, v + j * d, d);
                }
            }
        };
        run(heads_ * chunks, task);
        return true;
    }

    void add_part(const call_view& c, std::span<const double> norms, std::size_t head, std::size_t part,
                  std::size_t parts, part_sums& sums) const noexcept {
        const std::size_t block = c.block();
        for (std::size_t first = part * block; first < c.queries.tokens(); first += parts * block) {
            const std::size_t end = (std::min)(c.queries.tokens(), first + block);
            if (wanted_.means)
                add_means(c, head, first, end, sums);
            if (wanted_.error_weights || wanted_.moments)
                add_queries(c, norms, head, first, end, sums);
        }
    }

    void add_means(const call_view& c, std::size_t head, std::size_t first, std::size_t end,
                   part_sums& sums) const noexcept {
        for (std::size_t t = first; t < end; ++t) {
            double* const x = sums.row.data();
            read_row(c.keys, c.before + t, head, x);
            apply_rotary(rotary_, std::span<double>(x, key_dim_), -static_cast<std::int64_t>(c.position(t)));
            for (std::size_t i = 0; i < key_dim_; ++i)
                sums.key_means[i] += x[i];
            read_row(c.values, c.before + t, head, x);
            for (std::size_t i = 0; i < value_dim_; ++i)
                sums.value_means[i] += x[i];
        }
    }

    // What the queries of a block do that the stride takes.
    void add_queries(const call_view& c, std::span<const double> norms, std::size_t head, std::size_t first,
                     std::size_t end, part_sums& s) const noexcept {
        std::size_t which[most_queries];
        std::size_t count = 0;
        for (std::size_t t = first; t < end; ++t)
            if (taken(c.position(t)))
                which[count++] = t;
        if (count == 0)
            return;
        const std::size_t g = c.group;
        for (std::size_t a = 0; a < g; ++a)
            for (std::size_t q = 0; q < count; ++q)
                read_row(c.queries, which[q], head * g + a, s.queries.data() + (a * count + q) * key_dim_);
        if (wanted_.moments)
            add_outer_products(s.query_moments.data(), s.queries.data(), s.queries.data(), nullptr, g * count,
                               key_dim_, s.turned.data());
        const queries_view block{{which, count}, c.before + which[count - 1] + 1, c.keys.tokens() + tile};
        attend(c, head, block, s);
        if (wanted_.error_weights)
            add_weights(c, norms, head, block, s);
    }

    // Queries at a time.
    struct queries_view {
        std::span<const std::size_t> which;
        std::size_t tokens; // that any of them sees
        std::size_t width;  // of a row of probabilities
        [[nodiscard]] std::size_t count() const noexcept { return which.size(); }
    };

    // The first token that a query sees, and the first of that token's tile.
    // @{
    [[nodiscard]] std::size_t first_seen(const call_view& c, std::size_t query) const noexcept {
        const std::size_t last = c.before + query;
        return sliding_window_ == 0 || last < sliding_window_ ? 0 : last + 1 - sliding_window_;
    }
    [[nodiscard]] std::size_t first_tile(const call_view& c, std::size_t query) const noexcept {
        return first_seen(c, query) / tile * tile;
    }
    // @}

    // Fills probabilities, [query head][query][width], and outputs, [query head][query][value_dim].
    void attend(const call_view& c, std::size_t head, const queries_view& block,
                part_sums& s) const noexcept {
        const std::size_t rows = c.group * block.count(), start = first_tile(c, block.which.front()),
                          width = block.width;
        double* const p = s.probabilities.data();
        for (std::size_t t = start; t < block.tokens; t += tile) {
            double* const k = s.keys.data(); // [key_dim][tile]
            for (std::size_t j = 0; j < tile; ++j) {
                if (t + j < block.tokens)
                    read_row(c.keys, t + j, head, s.row.data());
                for (std::size_t i = 0; i < key_dim_; ++i)
                    k[i * tile + j] = t + j < block.tokens ? s.row[i] : 0.0;
            }
            for (std::size_t r = 0; r < rows; ++r)
                std::fill_n(p + r * width + t, tile, 0.0);
            add_product(p + t, width, s.queries.data(), key_dim_, k, rows, key_dim_, tile);
        }
        for (std::size_t r = 0; r < rows; ++r) {
            const std::size_t query = block.which[r % block.count()];
            const std::size_t first = first_seen(c, query), end = c.before + query + 1;
            double* const own = p + r * width;
            const double most = *std::max_element(own + first, own + end);
            double sum = 0.0;
            for (std::size_t j = first; j < end; ++j)
                sum += own[j] = std::exp((own[j] - most) * wanted_.scale);
            for (std::size_t j = first; j < end; ++j)
                own[j] /= sum;
            std::fill(own + start, own + first, 0.0);
            std::fill(own + end, own + (block.tokens + tile - 1) / tile * tile, 0.0);
            for (std::size_t j = first; wanted_.moments && j < end; ++j)
                s.received[j] += own[j];
        }
        if (!wanted_.error_weights)
            return;
        std::fill_n(s.outputs.data(), rows * value_dim_, 0.0);
        for (std::size_t t = start; t < block.tokens; t += tile) {
            read_values(c, head, t, block.tokens, s);
            add_product(s.outputs.data(), value_dim_, p + t, width, s.values.data(), rows, tile, value_dim_);
        }
    }

    void read_values(const call_view& c, std::size_t head, std::size_t first, std::size_t n,
                     part_sums& s) const noexcept {
        for (std::size_t j = 0; j < tile; ++j)
            if (first + j < n)
                read_row(c.values, first + j, head, s.values.data() + j * value_dim_);
            else
                std::fill_n(s.values.data() + j * value_dim_, value_dim_, 0.0);
    }

    // For every query and two of its heads a and b, over the tokens j that are quantized, x_j being the product
    // of their probabilities:
    //
    //   share     sum of x_j
    //   mixed     m = sum of x_j v_j
    //   distance  sum of x_j (v_j - o)^T M (v_j - o'), M = W^T W'
    //             = sum of x_j v_j^T M v_j - m^T M o' - o^T M m + share o^T M o'
    void add_weights(const call_view& c, std::span<const double> norms, std::size_t head,
                     const queries_view& block, part_sums& s) const noexcept {
        const std::size_t g = c.group, pairs = head_pairs(g), d = value_dim_, count = block.count();
        std::fill_n(s.mixed.data(), count * pairs * d, 0.0);
        std::fill_n(s.costs.data(), count * pairs, pair_cost{});
        for (std::size_t t = first_tile(c, block.which.front()); t < block.tokens; t += tile) {
            read_values(c, head, t, block.tokens, s);
            for_each_pair(g, [&](std::size_t pair, std::size_t a, std::size_t b) {
                const double* const norm = norms.data() + (head * pairs + pair) * c.keys.tokens();
                for (std::size_t q = 0; q < count; ++q)
                    join_probabilities(c, block, t, a * count + q, b * count + q, norm,
                                       s.joint.data() + (pair * count + q) * tile, s.costs[pair * count + q],
                                       s);
            });
            add_product(s.mixed.data(), d, s.joint.data(), tile, s.values.data(), count * pairs, tile, d);
        }
        for_each_pair(g, [&](std::size_t pair, std::size_t a, std::size_t b) {
            const double *const oa = s.outputs.data() + a * count * d,
                                *const ob = s.outputs.data() + b * count * d,
                                *const mixed = s.mixed.data() + pair * count * d;
            pair_cost* const costs = s.costs.data() + pair * count;
            // (share o - m)^T M and o^T M
            double *const left = s.turned.data(), *const products = left + 2 * count * d;
            for (std::size_t q = 0; q < count; ++q)
                for (std::size_t i = 0; i < d; ++i)
                    left[q * d + i] = costs[q].share * oa[q * d + i] - mixed[q * d + i];
            std::copy_n(oa, count * d, left + count * d);
            const float* const m = products_.data() + (head * pairs + pair) * d * d;
            std::copy_n(m, d * d, s.matrix.data());
            std::fill_n(products, 2 * count * d, 0.0);
            add_product(products, d, left, d, s.matrix.data(), 2 * count, d, d);
            double factors[most_queries];
            for (std::size_t q = 0; q < count; ++q) {
                const double distance = costs[q].distance + dot_product(products + q * d, ob + q * d, d) -
                                        dot_product(products + (count + q) * d, mixed + q * d, d);
                s.shares[pair] += costs[q].share;
                // the sums are made symmetric in the end: a and b give what b and a give
                factors[q] = a == b ? distance : 2.0 * distance;
            }
            add_outer_products(s.key_weights.data(), s.queries.data() + a * count * key_dim_,
                               s.queries.data() + b * count * key_dim_, factors, count, key_dim_,
                               s.turned.data());
        });
    }

    // joint, [tile], becomes the products of two rows of probabilities; cost grows by them.
    void join_probabilities(const call_view& c, const queries_view& block, std::size_t first, std::size_t row,
                            std::size_t other, const double* norm, double* joint, pair_cost& cost,
                            const part_sums& s) const noexcept {
        const double *const x = s.probabilities.data() + row * block.width + first,
                            *const y = s.probabilities.data() + other * block.width + first;
        const std::size_t query = block.which[row % block.count()];
        std::fill_n(joint, tile, 0.0);
        for (std::size_t j = 0; j < tile && first + j < block.tokens; ++j) {
            if (!quantized(c, query, first + j))
                continue;
            joint[j] = x[j] * y[j];
            cost.share += joint[j];
            cost.distance += joint[j] * norm[first + j];
        }
    }

    [[nodiscard]] bool quantized(const call_view& c, std::size_t query, std::size_t token) const noexcept {
        return c.first_position + token >= wanted_.sinks && c.before + query >= token + wanted_.window;
    }

    // Joins the sums of a KV head's tasks, in order.
    void take(const call_view& c, std::size_t head, std::span<part_sums> parts) noexcept {
        const auto join = [head](buffer<double>& all, const buffer<double>& own) {
            for (std::size_t i = 0; i < own.size(); ++i)
                all[head * own.size() + i] += own[i];
        };
        part_sums& first = parts.front();
        for (const part_sums& part : parts) {
            join(key_means_, part.key_means);
            join(value_means_, part.value_means);
            join(key_weights_, part.key_weights);
            join(shares_, part.shares);
            join(query_moments_, part.query_moments);
            for (std::size_t j = 0; &part != &first && j < part.received.size(); ++j)
                first.received[j] += part.received[j];
        }
        const std::size_t n = first.received.size();
        for (std::size_t t = 0; t < n; t += tile) {
            const std::size_t count = (std::min)(tile, n - t);
            read_values(c, head, t, n, first);
            add_outer_products(value_moments_.data() + head * value_dim_ * value_dim_, first.values.data(),
                               first.values.data(), first.received.data() + t, count, value_dim_,
                               first.turned.data());
        }
    }

    void mean(const buffer<double>& sums, std::size_t head, std::span<double> out) const noexcept {
        for (std::size_t i = 0; i < out.size(); ++i)
            out[i] = tokens_ == 0 ? 0.0 : sums[head * out.size() + i] / static_cast<double>(tokens_);
    }
    void symmetric(const buffer<double>& sums, std::size_t head, std::size_t n, double factor,
                   std::span<double> out) const noexcept {
        const double* const own = sums.data() + head * n * n;
        const double each = queries_ == 0 ? 0.0 : 0.5 * factor / static_cast<double>(queries_);
        for (std::size_t i = 0; i < n; ++i)
            for (std::size_t j = 0; j < n; ++j)
                out[i * n + j] = each * (own[i * n + j] + own[j * n + i]);
    }

    std::size_t heads_ = 0, key_dim_ = 0, value_dim_ = 0, sliding_window_ = 0, group_ = 0;
    rotary_embedding rotary_;
    calibrated_quantities wanted_;
    std::size_t tokens_ = 0, queries_ = 0;
    buffer<double> key_means_, value_means_;       // [heads][dim]
    buffer<double> key_weights_;                   // [heads][key_dim][key_dim]
    buffer<double> shares_;                        // [heads][pairs]: sums of p_j p'_j
    buffer<double> query_moments_, value_moments_; // [heads][dim][dim]
    buffer<float> products_;                       // [heads][pairs][value_dim][value_dim]
};

} // namespace kv1::inline KV1_ABI::detail
