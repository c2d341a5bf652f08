// SPDX-License-Identifier: Apache-2.0
//
// A small engine that knows nothing of kv1. It has its own threads, its own tensors, its own block manager and its own
// fp16 cache. Several requests run in one step; each has a block table. Its QKV projection is fused, so K and V lie with
// strides in a larger buffer. Weights are random: the example shows how data flows.
#pragma once

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <random>
#include <span>
#include <stdexcept>
#include <thread>
#include <vector>

namespace engine {

struct shape {
    std::size_t layers = 3, heads = 8, kv_heads = 2, head_dim = 64, vocabulary = 96, hidden = 512;
    [[nodiscard]] std::size_t width() const { return heads * head_dim; }
    [[nodiscard]] std::size_t fused() const {
        return (heads + 2 * kv_heads) * head_dim;
    } // floats of a token's q, k and v
};

/// A pool of threads.
class thread_pool {
public:
    explicit thread_pool(unsigned threads) {
        for (unsigned i = 1; i < threads; ++i)
            workers_.emplace_back([this] { serve(); });
    }
    ~thread_pool() {
        {
            const std::lock_guard lock(mutex_);
            closing_ = true;
        }
        wake_.notify_all();
        for (std::thread& w : workers_)
            w.join();
    }
    /// Runs work(0) ... work(count - 1), also on the calling thread, and waits for them.
    void run(std::size_t count, const std::function<void(std::size_t)>& work) {
        {
            const std::lock_guard lock(mutex_);
            work_ = &work;
            next_ = 0;
            count_ = count;
            running_ = 0;
        }
        wake_.notify_all();
        std::unique_lock lock(mutex_);
        take(lock);
        done_.wait(lock, [this] { return next_ == count_ && running_ == 0; });
        work_ = nullptr;
    }

private:
    void take(std::unique_lock<std::mutex>& lock) {
        while (work_ != nullptr && next_ < count_) {
            const std::size_t i = next_++;
            ++running_;
            const auto* work = work_;
            lock.unlock();
            (*work)(i);
            lock.lock();
            if (--running_ == 0 && next_ == count_)
                done_.notify_all();
        }
    }
    void serve() {
        std::unique_lock lock(mutex_);
        while (!closing_) {
            wake_.wait(lock, [this] { return closing_ || (work_ != nullptr && next_ < count_); });
            take(lock);
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    const std::function<void(std::size_t)>* work_ = nullptr;
    std::size_t next_ = 0, count_ = 0, running_ = 0;
    bool closing_ = false;
};

/// A tensor [tokens][heads][channels] inside a larger buffer.
struct head_tensor {
    float* data;
    std::size_t tokens, heads;
    std::size_t token_stride; // floats
};

inline std::uint16_t to_half(float x) { // round to nearest even; the numbers here are far from overflow
    std::uint32_t bits = 0;
    static_assert(sizeof bits == sizeof x);
    std::memcpy(&bits, &x, sizeof bits);
    const std::uint32_t sign = bits >> 16 & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude < 0x38800000u) // below the normal numbers: a multiple of 2^-24
        return static_cast<std::uint16_t>(sign |
                                          static_cast<std::uint32_t>(std::lrint(std::fabs(x) * 0x1p24f)));
    return static_cast<std::uint16_t>(sign |
                                      (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}
inline float from_half(std::uint16_t h) {
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                          : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
    return (h & 0x8000) != 0 ? -magnitude : magnitude;
}

/// What the engine keeps of one request: which blocks its tokens lie in, and how many tokens there are.
struct request {
    std::vector<std::uint32_t> blocks; // of block_tokens tokens each
    std::size_t length = 0;
};

/// Hands out blocks of tokens. A token at position p of a request has the slot blocks[p / block_tokens] * block_tokens +
/// p % block_tokens.
class block_manager {
public:
    block_manager(std::size_t blocks, std::size_t block_tokens) : block_tokens_(block_tokens) {
        for (std::size_t b = 0; b < blocks; ++b)
            free_.push_back(static_cast<std::uint32_t>(b));
    }
    /// Makes room for so many more tokens, and gives their slots.
    std::vector<std::uint32_t> extend(request& r, std::size_t tokens) {
        std::vector<std::uint32_t> slots;
        for (const std::size_t end = r.length + tokens; r.length < end; ++r.length) {
            if (r.length == r.blocks.size() * block_tokens_) {
                if (free_.empty())
                    throw std::runtime_error("no free block");
                r.blocks.push_back(free_.back());
                free_.pop_back();
            }
            slots.push_back(
                static_cast<std::uint32_t>(r.blocks.back() * block_tokens_ + r.length % block_tokens_));
        }
        return slots;
    }
    /// Ends a request. Its blocks go to others.
    void release(request& r) {
        free_.insert(free_.end(), r.blocks.begin(), r.blocks.end());
        r = {};
    }
    [[nodiscard]] std::size_t block_tokens() const { return block_tokens_; }

private:
    std::size_t block_tokens_;
    std::vector<std::uint32_t> free_;
};

/// The newest tokens of a request, which a step computes.
struct rows_of_request {
    const request* of;
    std::size_t tokens;
};

/// The engine's own cache: K and V in fp16, [layer][slot][kv head][channel].
class fp16_cache {
public:
    fp16_cache(const shape& s, std::size_t slots, std::size_t block_tokens)
        : shape_(s), slots_(slots), block_tokens_(block_tokens),
          k_(s.layers * slots * s.kv_heads * s.head_dim), v_(k_.size()) {}

    /// Row t of k and v goes to slots[t].
    void write(std::size_t layer, std::span<const std::uint32_t> slots, const head_tensor& k,
               const head_tensor& v, thread_pool& pool) {
        pool.run(shape_.kv_heads, [&](std::size_t head) {
            for (std::size_t t = 0; t < k.tokens; ++t)
                for (std::size_t c = 0; c < shape_.head_dim; ++c) {
                    const std::size_t to = at(layer, slots[t], head) + c;
                    k_[to] = to_half(k.data[t * k.token_stride + head * shape_.head_dim + c]);
                    v_[to] = to_half(v.data[t * v.token_stride + head * shape_.head_dim + c]);
                }
        });
    }

    /// Causal attention of each request's newest tokens. Rows of q lie request after request.
    void attend(std::size_t layer, std::span<const rows_of_request> rows, const head_tensor& q,
                const head_tensor& out, thread_pool& pool) const {
        std::size_t first = 0;
        for (const rows_of_request& r : rows) {
            pool.run(r.tokens * q.heads, [&](std::size_t task) {
                const std::size_t i = task / q.heads, visible = r.of->length - r.tokens + i + 1;
                attend_row(layer, *r.of, visible, task % q.heads, q.data + (first + i) * q.token_stride,
                           out.data + (first + i) * out.token_stride);
            });
            first += r.tokens;
        }
    }

    void end_step(std::span<const rows_of_request>) {} // called after all layers

    [[nodiscard]] std::size_t bytes_of(std::size_t tokens) const {
        return tokens * shape_.layers * shape_.kv_heads * shape_.head_dim * 2 * sizeof(std::uint16_t);
    }

private:
    [[nodiscard]] std::size_t at(std::size_t layer, std::size_t slot, std::size_t head) const {
        return ((layer * slots_ + slot) * shape_.kv_heads + head) * shape_.head_dim;
    }
    void attend_row(std::size_t layer, const request& r, std::size_t visible, std::size_t head,
                    const float* q, float* out) const {
        const std::size_t dim = shape_.head_dim, kv_head = head / (shape_.heads / shape_.kv_heads);
        const auto slot = [&](std::size_t t) {
            return r.blocks[t / block_tokens_] * block_tokens_ + t % block_tokens_;
        };
        std::vector<float> p(visible);
        for (std::size_t t = 0; t < visible; ++t) {
            const std::uint16_t* key = k_.data() + at(layer, slot(t), kv_head);
            for (std::size_t c = 0; c < dim; ++c)
                p[t] += q[head * dim + c] * from_half(key[c]);
            p[t] /= std::sqrt(static_cast<float>(dim));
        }
        const float top = *std::max_element(p.begin(), p.end());
        float sum = 0;
        for (float& x : p)
            sum += x = std::exp(x - top);
        std::fill_n(out + head * dim, dim, 0.0f);
        for (std::size_t t = 0; t < visible; ++t) {
            const std::uint16_t* value = v_.data() + at(layer, slot(t), kv_head);
            for (std::size_t c = 0; c < dim; ++c)
                out[head * dim + c] += p[t] / sum * from_half(value[c]);
        }
    }

    shape shape_;
    std::size_t slots_, block_tokens_;
    std::vector<std::uint16_t> k_, v_;
};

/// What one step computes: the newest tokens of some requests, request after request.
struct step {
    std::vector<int> tokens;
    std::vector<std::size_t> positions; // of the tokens in their requests
    std::vector<std::uint32_t> slots;
    std::vector<rows_of_request> rows;

    void add(request& r, std::span<const int> text, block_manager& blocks) {
        for (std::size_t i = 0; i < text.size(); ++i)
            positions.push_back(r.length + i);
        tokens.insert(tokens.end(), text.begin(), text.end());
        const std::vector<std::uint32_t> its = blocks.extend(r, text.size());
        slots.insert(slots.end(), its.begin(), its.end());
        rows.push_back({&r, text.size()});
    }
};

/// A decoder with random weights.
class model {
public:
    explicit model(const shape& s) : shape_(s) {
        std::mt19937 random(7);
        embedding_ = matrix(random, s.vocabulary, s.width(), 1.0f);
        for (std::size_t l = 0; l < s.layers; ++l)
            layers_.push_back(
                {matrix(random, s.fused(), s.width(), 1.6f), matrix(random, s.width(), s.width(), 1.0f),
                 matrix(random, s.hidden, s.width(), 1.0f), matrix(random, s.width(), s.hidden, 1.0f)});
    }

    [[nodiscard]] const shape& dimensions() const { return shape_; }

    /// Runs a step, and gives the logits after each request's last token.
    template <class Cache>
    std::vector<std::vector<float>> forward(const step& now, Cache& cache, thread_pool& pool) const {
        const std::size_t n = now.tokens.size(), width = shape_.width(), fused = shape_.fused(),
                          dim = shape_.head_dim;
        std::vector<float> x(n * width), normed(x.size()), qkv(n * fused), mixed(x.size()),
            hidden(n * shape_.hidden);
        for (std::size_t t = 0; t < n; ++t)
            std::copy_n(embedding_.data() + static_cast<std::size_t>(now.tokens[t]) * width, width,
                        x.data() + t * width);
        for (std::size_t l = 0; l < shape_.layers; ++l) {
            normalize(x, normed, width);
            multiply(layers_[l].qkv, normed, qkv, n, pool);
            for (std::size_t t = 0; t < n; ++t)
                rotate(qkv.data() + t * fused, shape_.heads + shape_.kv_heads, now.positions[t]);
            float* q = qkv.data();
            float* k = q + shape_.heads * dim;
            float* v = k + shape_.kv_heads * dim;
            cache.write(l, now.slots, {k, n, shape_.kv_heads, fused}, {v, n, shape_.kv_heads, fused}, pool);
            cache.attend(l, now.rows, {q, n, shape_.heads, fused}, {mixed.data(), n, shape_.heads, width},
                         pool);
            multiply(layers_[l].out, mixed, normed, n, pool);
            add(x, normed);
            normalize(x, normed, width);
            multiply(layers_[l].up, normed, hidden, n, pool);
            for (float& h : hidden)
                h = h / (1.0f + std::exp(-h));
            multiply(layers_[l].down, hidden, normed, n, pool);
            add(x, normed);
        }
        cache.end_step(now.rows);
        normalize(x, normed, width);
        std::vector<std::vector<float>> logits;
        std::size_t end = 0;
        for (const rows_of_request& r : now.rows) {
            end += r.tokens;
            logits.emplace_back(shape_.vocabulary);
            multiply(embedding_, {normed.data() + (end - 1) * width, width}, logits.back(), 1, pool);
        }
        return logits;
    }

private:
    struct layer {
        std::vector<float> qkv, out, up, down;
    };

    static std::vector<float> matrix(std::mt19937& random, std::size_t rows, std::size_t columns,
                                     float gain) {
        std::normal_distribution<float> normal(0.0f, gain / std::sqrt(static_cast<float>(columns)));
        std::vector<float> m(rows * columns);
        for (float& x : m)
            x = normal(random);
        return m;
    }
    static void normalize(const std::vector<float>& x, std::vector<float>& out, std::size_t width) {
        for (std::size_t t = 0; t < x.size() / width; ++t) {
            float squares = 0;
            for (std::size_t c = 0; c < width; ++c)
                squares += x[t * width + c] * x[t * width + c];
            const float factor = 1.0f / std::sqrt(squares / static_cast<float>(width) + 1e-6f);
            for (std::size_t c = 0; c < width; ++c)
                out[t * width + c] = x[t * width + c] * factor;
        }
    }
    static void add(std::vector<float>& x, const std::vector<float>& y) {
        for (std::size_t i = 0; i < x.size(); ++i)
            x[i] += y[i];
    }
    // y[token] = m x[token]; each thread computes some rows of m.
    static void multiply(const std::vector<float>& m, std::span<const float> x, std::span<float> y,
                         std::size_t tokens, thread_pool& pool) {
        const std::size_t columns = x.size() / tokens, rows = y.size() / tokens;
        constexpr std::size_t chunk = 64;
        pool.run((rows + chunk - 1) / chunk, [&](std::size_t task) {
            for (std::size_t t = 0; t < tokens; ++t)
                for (std::size_t r = task * chunk; r < std::min(rows, (task + 1) * chunk); ++r) {
                    float sum = 0;
                    for (std::size_t c = 0; c < columns; ++c)
                        sum += m[r * columns + c] * x[t * columns + c];
                    y[t * rows + r] = sum;
                }
        });
    }
    // Rotary positions of consecutive heads, in place.
    void rotate(float* heads, std::size_t count, std::size_t position) const {
        for (std::size_t c = 0; c < shape_.head_dim; c += 2) {
            const double angle =
                static_cast<double>(position) *
                std::pow(10000.0, -static_cast<double>(c) / static_cast<double>(shape_.head_dim));
            const auto cosine = static_cast<float>(std::cos(angle)),
                       sine = static_cast<float>(std::sin(angle));
            for (std::size_t h = 0; h < count; ++h) {
                float* pair = heads + h * shape_.head_dim + c;
                const float a = pair[0], b = pair[1];
                pair[0] = a * cosine - b * sine;
                pair[1] = a * sine + b * cosine;
            }
        }
    }

    shape shape_;
    std::vector<float> embedding_;
    std::vector<layer> layers_;
};

} // namespace engine
