// SPDX-License-Identifier: Apache-2.0
//
// What a slot_cache gives to a calibration: its layers before the first token, and then what each attention node saw.
#include "slot_cache.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

namespace kv1_ggml {

bool slot_cache::join_calibration() {
    const std::vector<const slot_cache*> caches = of_model();
    std::vector<calibrated_layer> layers;
    std::size_t cells = 0;
    for (const slot_cache* c : caches) {
        cells = std::max(cells, c->slots_);
        for (const cache_layer& l : c->layers_) {
            for (const ggml_tensor* t : {l.keys, l.values})
                if (t != nullptr && !is_float(t)) {
                    say(GGML_LOG_LEVEL_ERROR,
                        "KV1_CALIBRATE: llama.cpp turns keys and values of quantized types; "
                        "leave -ctk and -ctv alone");
                    return false;
                }
            calibrated_layer own{l.of_model, {l.kv_heads, l.key_dim, l.value_dim}, l.output_projection};
            own.shape.values_in_keys = l.values_in_keys;
            own.shape.rotary = l.rotary;
            layers.push_back(std::move(own));
        }
    }
    std::sort(layers.begin(), layers.end(),
              [](const calibrated_layer& a, const calibrated_layer& b) { return a.of_model < b.of_model; });
    if (how_.calibration_stride == 0)
        how_.calibration_stride = cells > 4096 ? 8 : 1;
    calibration_ = calibration_run::join(how_, caches, layers, model());
    how_.policy = kv1::parse_policy("32");
    return calibration_ != nullptr;
}

// What an attention node saw, into the calibration.
outcome slot_cache::calibrate(const ggml_tensor* op, std::size_t layer, thread_team& team) {
    const ggml_tensor *const q = op->src[0], *const k = op->src[1], *const mask = op->src[3];
    const cache_layer& l = layers_[layer];
    const std::size_t tokens = size_of(q->ne[1]), heads = size_of(q->ne[2]), streams = size_of(q->ne[3]),
                      row = l.keys->nb[1];
    if (mask == nullptr)
        return outcome::done;
    if (texts_of_step_ != book_->step()) {
        texts_of_step_ = book_->step();
        texts_.clear();
        for (std::size_t s = 0; s < streams; ++s) {
            const auto begin = static_cast<std::uint32_t>((k->view_offs + s * k->nb[3]) / row);
            const std::size_t width = mask->nb[1] / 2, first = texts_.size();
            const auto* const rows = reinterpret_cast<const kv1::float16*>(
                static_cast<const std::byte*>(mask->data) + (s % size_of(mask->ne[3])) * mask->nb[3]);
            const bool whole = find_texts(
                *book_, book_->batch().subspan(s * tokens, tokens), begin,
                begin + static_cast<std::uint32_t>(k->ne[1]),
                [&](std::size_t i, std::uint32_t slot) {
                    return slot >= begin && slot - begin < size_of(k->ne[1]) &&
                           rows[i * width + (slot - begin)].bits() != 0xfc00u;
                },
                texts_);
            if (!whole && !std::exchange(warned_, true))
                say(GGML_LOG_LEVEL_WARN,
                    "KV1_CALIBRATE: tokens that do not see all before them are left out");
            for (std::size_t t = first; t < texts_.size(); ++t)
                for (std::uint32_t& i : texts_[t].tokens)
                    i += static_cast<std::uint32_t>(s * tokens);
        }
    }
    // Scores are taken as products over sqrt(key_dim); where they are others, queries make up for it.
    const float factor = float_param(op, 0) * std::sqrt(static_cast<float>(l.key_dim));
    std::vector<float> queries, keys, values;
    for (const text_part& t : texts_) {
        queries.clear();
        for (const std::uint32_t i : t.tokens)
            for (std::size_t h = 0; h < heads; ++h) {
                const auto* const from = reinterpret_cast<const float*>(
                    static_cast<const std::byte*>(q->data) + i % tokens * q->nb[1] + h * q->nb[2] +
                    i / tokens * q->nb[3]);
                queries.insert(queries.end(), from, from + l.key_dim);
            }
        if (std::abs(factor - 1) > 1e-6f)
            for (float& x : queries)
                x *= factor;
        const std::size_t n = t.slots.size();
        const auto read = [&](kv1::kv_side side, std::size_t dim, std::vector<float>& all) {
            all.resize(l.kv_heads * n * dim); // [KV head][token][channel]
            kv1::status s;
            for (std::size_t h = 0; s && h < l.kv_heads; ++h)
                s = store_->try_read(layer, side, h, t.slots, std::span(all).subspan(h * n * dim, n * dim));
            return s;
        };
        const auto view = [&](const std::vector<float>& all, std::size_t dim) {
            return kv1::tensor_view(all.data(), n, l.kv_heads, dim, static_cast<std::ptrdiff_t>(dim),
                                    static_cast<std::ptrdiff_t>(n * dim));
        };
        kv1::status s = read(kv1::kv_side::key, l.key_dim, keys);
        if (s)
            s = read(kv1::kv_side::value, l.value_dim, values);
        if (s)
            s = calibration_->add(l.of_model, t, {queries.data(), t.tokens.size(), heads, l.key_dim},
                                  view(keys, l.key_dim), view(values, l.value_dim), team);
        if (!s)
            return failed("calibrating", s);
    }
    return outcome::done;
}

} // namespace kv1_ggml
