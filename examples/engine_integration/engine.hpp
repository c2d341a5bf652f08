// SPDX-License-Identifier: Apache-2.0
//
// A small engine that knows nothing of kv1. It has its own threads, its own tensors and its own fp16 cache.
// Its QKV projection is fused, so K and V lie with strides in a larger buffer. Weights are random: the
// example shows how data flows.
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

/// The engine's own cache: K and V in fp16, [layer][kv head][token][channel].
class fp16_cache {
public:
    fp16_cache(const shape& s, std::size_t capacity)
        : shape_(s), capacity_(capacity), k_(s.layers * s.kv_heads * capacity * s.head_dim), v_(k_.size()),
          lengths_(s.layers, 0) {}

    void append(std::size_t layer, const head_tensor& k, const head_tensor& v, thread_pool& pool) {
        pool.run(shape_.kv_heads, [&](std::size_t head) {
            for (std::size_t t = 0; t < k.tokens; ++t)
                for (std::size_t c = 0; c < shape_.head_dim; ++c) {
                    const std::size_t to = at(layer, head, lengths_[layer] + t) + c;
                    k_[to] = to_half(k.data[t * k.token_stride + head * shape_.head_dim + c]);
                    v_[to] = to_half(v.data[t * v.token_stride + head * shape_.head_dim + c]);
                }
        });
        lengths_[layer] += k.tokens;
    }

    /// Causal attention of the last q.tokens tokens.
    void attend(std::size_t layer, const head_tensor& q, const head_tensor& out, thread_pool& pool) const {
        const std::size_t dim = shape_.head_dim, group = shape_.heads / shape_.kv_heads;
        pool.run(q.tokens * q.heads, [&](std::size_t task) {
            const std::size_t t = task / q.heads, head = task % q.heads;
            const float* query = q.data + t * q.token_stride + head * dim;
            const std::size_t visible = lengths_[layer] - q.tokens + t + 1;
            std::vector<float> p(visible);
            for (std::size_t j = 0; j < visible; ++j) {
                const std::uint16_t* key = k_.data() + at(layer, head / group, j);
                for (std::size_t c = 0; c < dim; ++c)
                    p[j] += query[c] * from_half(key[c]);
                p[j] /= std::sqrt(static_cast<float>(dim));
            }
            const float top = *std::max_element(p.begin(), p.end());
            float sum = 0;
            for (float& x : p)
                sum += x = std::exp(x - top);
            float* result = out.data + t * out.token_stride + head * dim;
            std::fill_n(result, dim, 0.0f);
            for (std::size_t j = 0; j < visible; ++j) {
                const std::uint16_t* value = v_.data() + at(layer, head / group, j);
                for (std::size_t c = 0; c < dim; ++c)
                    result[c] += p[j] / sum * from_half(value[c]);
            }
        });
    }

    void end_step() {} // called after all layers

    [[nodiscard]] std::size_t bytes() const { // of the tokens that it holds
        std::size_t tokens = 0;
        for (const std::size_t n : lengths_)
            tokens += n;
        return tokens * shape_.kv_heads * shape_.head_dim * 2 * sizeof(std::uint16_t);
    }

private:
    [[nodiscard]] std::size_t at(std::size_t layer, std::size_t head, std::size_t token) const {
        return ((layer * shape_.kv_heads + head) * capacity_ + token) * shape_.head_dim;
    }

    shape shape_;
    std::size_t capacity_;
    std::vector<std::uint16_t> k_, v_;
    std::vector<std::size_t> lengths_;
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

    /// Runs tokens at positions position, position + 1, ..., and gives the logits after the last one.
    template <class Cache>
    std::vector<float> forward(std::span<const int> tokens, std::size_t position, Cache& cache,
                               thread_pool& pool) const {
        const std::size_t n = tokens.size(), width = shape_.width(), fused = shape_.fused(),
                          dim = shape_.head_dim;
        std::vector<float> x(n * width), normed(x.size()), qkv(n * fused), mixed(x.size()),
            hidden(n * shape_.hidden);
        for (std::size_t t = 0; t < n; ++t)
            std::copy_n(embedding_.data() + static_cast<std::size_t>(tokens[t]) * width, width,
                        x.data() + t * width);
        for (std::size_t l = 0; l < shape_.layers; ++l) {
            normalize(x, normed, width);
            multiply(layers_[l].qkv, normed, qkv, n, pool);
            for (std::size_t t = 0; t < n; ++t)
                rotate(qkv.data() + t * fused, shape_.heads + shape_.kv_heads, position + t);
            float* q = qkv.data();
            float* k = q + shape_.heads * dim;
            float* v = k + shape_.kv_heads * dim;
            cache.append(l, {k, n, shape_.kv_heads, fused}, {v, n, shape_.kv_heads, fused}, pool);
            cache.attend(l, {q, n, shape_.heads, fused}, {mixed.data(), n, shape_.heads, width}, pool);
            multiply(layers_[l].out, mixed, normed, n, pool);
            add(x, normed);
            normalize(x, normed, width);
            multiply(layers_[l].up, normed, hidden, n, pool);
            for (float& h : hidden)
                h = h / (1.0f + std::exp(-h));
            multiply(layers_[l].down, hidden, normed, n, pool);
            add(x, normed);
        }
        cache.end_step();
        normalize(x, normed, width);
        std::vector<float> logits(shape_.vocabulary);
        multiply(embedding_, {normed.end() - static_cast<std::ptrdiff_t>(width), normed.end()}, logits, 1,
                 pool);
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
