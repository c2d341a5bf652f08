// SPDX-License-Identifier: Apache-2.0
//
// Calibrates a cache for a model, keeps what it found in a file, and runs the cache: main() is all that an engine
// writes for it. The model is anybody's. Here it is a few layers of attention with RoPE, which make queries, keys and
// values of random hidden states.
#include <kv1/calibration_file.hpp>
#include <kv1/kv_cache.hpp>
#include <kv1/rotary_embedding.hpp>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <iostream>
#include <random>
#include <vector>

namespace {

constexpr std::size_t layers = 2, kv_heads = 2, heads = 8, dim = 64, hidden = 96, tokens = 512;

using matrix = std::vector<float>;

class model {
public:
    struct attention_input {
        matrix q, k, v; // [tokens][heads or kv_heads][dim]
        [[nodiscard]] kv1::tensor_view queries() const { return {q.data(), tokens, heads, dim}; }
        [[nodiscard]] kv1::tensor_view keys() const { return {k.data(), tokens, kv_heads, dim}; }
        [[nodiscard]] kv1::tensor_view values() const { return {v.data(), tokens, kv_heads, dim}; }
    };

    [[nodiscard]] kv1::tensor_view output_projection(std::size_t layer) const {
        return {output_[layer].data(), hidden, heads, dim};
    }
    [[nodiscard]] attention_input read(std::size_t layer, unsigned text) const {
        const matrix x = random(tokens * hidden, 1.0f, 100 * text + static_cast<unsigned>(layer));
        attention_input in{product(x, query_[layer], 0.0f), product(x, key_[layer], 3.0f),
                           product(x, value_[layer], 0.0f)};
        for (auto [rows, of] : {std::pair(&in.q, heads), std::pair(&in.k, kv_heads)})
            for (std::size_t i = 0; i < tokens * of; ++i)
                kv1::apply_rotary(rotary, std::span(*rows).subspan(i * dim, dim),
                                  static_cast<std::int64_t>(i / of));
        return in;
    }

    kv1::rotary_embedding rotary{kv1::rotary_frequencies(10000.0, dim)};

private:
    static matrix random(std::size_t n, float spread, unsigned seed) {
        std::mt19937 bits(seed);
        std::normal_distribution<float> normal(0.0f, spread);
        matrix m(n);
        for (float& v : m)
            v = normal(bits);
        return m;
    }
    // x W^T, in which some channels are larger than others; to every fourth a bias is added.
    static matrix product(const matrix& x, const matrix& w, float bias) {
        const std::size_t n = w.size() / hidden;
        matrix y(tokens * n);
        for (std::size_t t = 0; t < tokens; ++t)
            for (std::size_t c = 0; c < n; ++c) {
                float sum = 0.0f;
                for (std::size_t i = 0; i < hidden; ++i)
                    sum += x[t * hidden + i] * w[c * hidden + i];
                y[t * n + c] = sum * (c % 8 == 0 ? 2.0f : 0.6f) + (c % 4 == 0 ? bias : 0.0f);
            }
        return y;
    }
    static std::vector<matrix> weights(std::size_t rows, std::size_t columns, unsigned seed) {
        std::vector<matrix> all;
        for (unsigned i = 0; i < layers; ++i)
            all.push_back(random(rows * columns, 1.0f / std::sqrt(static_cast<float>(columns)), seed + i));
        return all;
    }

    std::vector<matrix> query_ = weights(heads * dim, hidden, 1), key_ = weights(kv_heads * dim, hidden, 11),
                        value_ = weights(kv_heads * dim, hidden, 21),
                        output_ = weights(hidden, heads*dim, 31);
};

// What the layers' outputs are off by, in parts of them.
double error_of(kv1::kv_cache& cache, const model& m);

} // namespace

int main() {
    const model m;
    const kv1::model_fingerprint name = kv1::fingerprint_of("a model of two layers");
    const std::filesystem::path file = std::filesystem::temp_directory_path() / "two_layers.kv1calib";
    kv1::layer_description layer{kv_heads, dim, dim};
    layer.rotary = m.rotary;
    const kv1::cache_description shape = kv1::uniform_cache(layers, layer, 2 * tokens);

    // Once: texts go through the model, and what its layers attend with through the calibrator.
    kv1::calibrator calibrator(kv1::parse_policy("c2+ls+basis+had+mean+ew,c2+ls+basis+had+ew@4:32"), shape,
                               {.model = name});
    for (std::size_t l = 0; l < layers; ++l)
        calibrator.set_output_projection(l, m.output_projection(l));
    for (unsigned text = 1; text <= 4; ++text)
        for (std::size_t l = 0; l < layers; ++l) {
            const model::attention_input in = m.read(l, text);
            calibrator.add(l, in.queries(), in.keys(), in.values());
        }
    kv1::save_calibration(calibrator.finish(), file);

    // In an engine: load the calibration, create the cache, run.
    const kv1::calibration found = kv1::load_calibration(file, name);
    kv1::kv_cache cache(kv1::describe_cache(found, shape));
    const double calibrated = error_of(cache, m);

    // The same bytes without a calibration.
    kv1::kv_cache plain(kv1::describe_cache(kv1::parse_policy("c2+ls+had@4:32"), shape));
    const double not_calibrated = error_of(plain, m);
    std::cout << "two bits: outputs are off by " << not_calibrated << ", calibrated by " << calibrated
              << '\n';
    std::filesystem::remove(file);
    return calibrated < 0.75 * not_calibrated ? 0 : 1;
}

namespace {

double error_of(kv1::kv_cache& cache, const model& m) {
    kv1::kv_cache exact(kv1::describe_cache(kv1::parse_policy("32"), cache.description()));
    const kv1::sequence_id s = cache.create_sequence(), reference = exact.create_sequence();
    double errors = 0.0, squares = 0.0;
    for (std::size_t l = 0; l < layers; ++l) {
        const model::attention_input in = m.read(l, 9); // another text
        matrix out(tokens * heads * dim), wanted(out.size());
        cache.append(s, l, in.keys(), in.values());
        cache.attend(s, l, in.queries(), {out.data(), tokens, heads, dim});
        exact.append(reference, l, in.keys(), in.values());
        exact.attend(reference, l, in.queries(), {wanted.data(), tokens, heads, dim});
        const kv1::tensor_view w = m.output_projection(l);
        for (std::size_t t = 0; t < tokens; ++t)
            for (std::size_t o = 0; o < hidden; ++o) {
                double error = 0.0, sum = 0.0;
                const auto* row = static_cast<const float*>(w.at(o, 0));
                for (std::size_t c = 0; c < heads * dim; ++c) {
                    const auto product = static_cast<double>(row[c]);
                    error +=
                        product * static_cast<double>(out[t * heads * dim + c] - wanted[t * heads * dim + c]);
                    sum += product * static_cast<double>(wanted[t * heads * dim + c]);
                }
                errors += error * error;
                squares += sum * sum;
            }
    }
    return std::sqrt(errors / squares);
}

} // namespace
