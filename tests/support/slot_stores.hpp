// SPDX-License-Identifier: Apache-2.0
//
// Slot stores of one layer for tests: layers of every kind, vectors that are written over others, and all that a store
// holds.
#pragma once

#include "layers.hpp"
#include "slot_problem.hpp"

#include <kv1/kv_cache.hpp>
#include <kv1/slot_store.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

namespace kv1_test::slots {

inline constexpr std::size_t page = 32, kv_heads = 2, heads = 6;

inline std::vector<kv1::layer_description> layers() {
    std::vector<kv1::layer_description> all = kv1_test::layers_of_each_kind(kv_heads);
    kv1::layer_description latent = kv1::latent_layer(96, 64, kv1::kv_format::affine4);
    latent.kv_heads = kv_heads;
    kv1::layer_description turning = all[3]; // encoded; pairs in the middle turn, some of them with a mean
    turning.key_encoding.means.clear();
    for (std::size_t c = 0; c < kv_heads * 64; ++c)
        turning.key_encoding.means.push_back(c % 5 == 0 ? 0.0f : 0.125f * static_cast<float>(c % 17));
    turning.rotary.frequencies = kv1::rotary_frequencies(10000.0, 48);
    turning.rotary.first_channel = 8;
    all.push_back(latent);
    all.push_back(turning);
    return all;
}

inline kv1::slot_store_description one_layer(const kv1::layer_description& l, std::size_t slots) {
    kv1::slot_store_description d;
    d.layers = {l};
    d.slots = slots;
    d.page_tokens = page;
    return d;
}

inline std::string name_of(const kv1::layer_description& l) {
    return std::string(to_string(l.key_format)) + " x " + std::string(to_string(l.value_format));
}

// Writes vectors to slots in an order of no meaning, after other vectors. Vector t stands at t.
inline void write_over(generator& g, kv1::slot_store& store, std::span<const std::uint32_t> slots,
                       const slot_vectors& x) {
    const slot_vectors wrong(g, store.description().layers[0], slots.size());
    for (const bool right : {false, true}) {
        const std::vector<std::uint32_t> order = kv1_test::shuffled(g, numbers_from(0, slots.size()));
        for (std::size_t i = 0; i < order.size();) {
            const std::size_t n = std::min(order.size() - i, g.between(1, 40));
            slot_vectors some = right ? x : wrong;
            std::vector<std::uint32_t> to(n);
            std::vector<std::int32_t> at(n);
            for (std::size_t k = 0; k < n; ++k) {
                const slot_vectors& from = right ? x : wrong;
                const std::size_t t = order[i + k], key = kv_heads * x.key_dim,
                                  value = kv_heads * x.value_dim;
                to[k] = slots[t];
                at[k] = static_cast<std::int32_t>(t);
                std::memcpy(some.keys.data() + k * key, from.keys.data() + t * key, key * 4);
                std::memcpy(some.values.data() + k * value, from.values.data() + t * value, value * 4);
            }
            if (g.chance(0.5) || !x.has_values) {
                store.write(0, to, at, some.key_view(0, n), some.value_view(0, n));
            } else { // values first, keys in a call of their own
                store.write(0, to, kv1::slot_store::nothing(), some.value_view(0, n));
                store.write(0, to, at, some.key_view(0, n), kv1::slot_store::nothing());
            }
            i += n;
        }
    }
}

inline void append(kv1::kv_cache& cache, kv1::sequence_id id, const slot_vectors& x, std::size_t first,
                   std::size_t n) {
    if (x.has_values)
        cache.append(id, 0, x.key_view(first, n), x.value_view(first, n));
    else
        cache.append(id, 0, x.key_view(first, n));
}

// Everything that a store holds, for comparisons.
struct contents {
    std::vector<std::byte> bytes;
    std::vector<bool> copied;
    std::vector<std::int32_t> positions;
    std::vector<float> read;
    explicit contents(const kv1::slot_store& s) {
        const std::vector<std::uint32_t> all = numbers_from(0, s.slots());
        for (std::size_t l = 0; l < s.layers(); ++l) {
            const kv1::layer_description& d = s.description().layers[l];
            const std::size_t at = bytes.size();
            bytes.resize(at + all.size() * s.raw_bytes(l));
            s.export_raw(l, all, std::span(bytes).subspan(at));
            for (const std::uint32_t slot : all) {
                copied.push_back(s.has_fp16(l, slot));
                positions.push_back(s.key_position(l, slot));
            }
            for (const kv1::kv_side side : {kv1::kv_side::key, kv1::kv_side::value})
                for (std::size_t h = 0; h < d.kv_heads; ++h) {
                    const std::size_t first = read.size(),
                                      dim = side == kv1::kv_side::key ? d.key_dim : d.value_dim;
                    read.resize(first + all.size() * dim);
                    s.read(l, side, h, all, std::span(read).subspan(first));
                }
        }
    }
    friend bool operator==(const contents&, const contents&) = default;
};

inline std::vector<float> attend(const kv1::slot_store& s, std::span<const kv1::slot_stream> streams,
                                 const std::vector<float>& q, const kv1::slot_attention_options& o = {}) {
    const kv1::layer_description& l = s.description().layers[0];
    const std::size_t m = q.size() / heads / l.key_dim;
    std::vector<float> out(m * heads * l.value_dim, 777.0f);
    s.attend(0, streams, {q.data(), m, heads, l.key_dim}, {out.data(), m, heads, l.value_dim}, o);
    return out;
}

} // namespace kv1_test::slots
