// SPDX-License-Identifier: Apache-2.0
//
// Scores of slots whose order says nothing: adds an additive mask, or distances of positions, and hides what a query
// does not see (slot_rules.hpp). Parsed once per target. 16 tokens of a row take two conversions, two additions and
// two selections at most, next to 16 dot products of a whole vector.

// Whether some bytes are a pattern of four bytes over and over, whose last copy may be cut.
KV1_LAZY KV1_INLINE bool all_are(const void* from, std::size_t bytes, std::uint32_t pattern) {
    const auto* at = static_cast<const std::uint8_t*>(from);
    u32 others(0u);
    std::size_t i = 0;
    for (; i + lanes * sizeof(std::uint32_t) <= bytes; i += lanes * sizeof(std::uint32_t)) {
        alignas(64) std::uint32_t words[lanes];
        std::memcpy(words, at + i, sizeof words);
        others = others | (u32::load_aligned(words) ^ u32(pattern));
    }
    bool same = !xs::any(others != u32(0u));
    for (; same && i + sizeof pattern <= bytes; i += sizeof pattern) {
        std::uint32_t word;
        std::memcpy(&word, at + i, sizeof word);
        same = word == pattern;
    }
    if (same && i < bytes)
        same = std::memcmp(at + i, &pattern, bytes - i) == 0;
    return same;
}

KV1_LAZY KV1_NOINLINE inline void apply_slot_rules(const slot_rules& rules, std::size_t query,
                                                   std::size_t head, std::size_t first_seen,
                                                   std::size_t last_seen, const std::size_t* tokens,
                                                   std::size_t tiles, float* scores) noexcept {
    const f32 hidden(lowest_score), slope(rules.slopes != nullptr ? rules.slopes[head] : 1.0f);
    const std::byte* const row = rules.bias != nullptr ? rules.bias_row(query, head) : nullptr;
    const slot_rules::span seen = rules.positions != nullptr ? rules.seen_by(query) : slot_rules::span{0, 0};
    const bool distances = rules.slopes != nullptr && row == nullptr;
    const i32 own(rules.positions != nullptr ? rules.query_positions[query] : 0), from(seen.first),
        to(seen.last);
    alignas(64) float added[tile_tokens];
    for (std::size_t k = 0; k < tiles; ++k) {
        const std::size_t first = tokens[k]; // of a tile without tokens of its own: past all others
        if (first >= last_seen || first + tile_tokens <= first_seen)
            continue;
        float* const tile = scores + k * tile_tokens;
        if (row != nullptr) {
            // the tokens of the tile that have a column
            const std::size_t begin = first < first_seen ? first_seen - first : 0, left = last_seen - first,
                              end = left < tile_tokens ? left : tile_tokens;
            const bool entire = begin == 0 && end == tile_tokens;
            for (std::size_t i = 0; !entire && i < tile_tokens; ++i)
                added[i] = lowest_score;
            const std::byte* const numbers =
                row + static_cast<std::ptrdiff_t>(first + begin - rules.bias_first) * rules.element();
            const bool nothing =
                entire && all_are(numbers, tile_tokens * static_cast<std::size_t>(rules.element()), 0);
            if (!nothing)
                load_floats(rules.bias_type, numbers, end - begin, added + begin);
            for (std::size_t i = 0; !nothing && i < tile_tokens; i += lanes) {
                const f32 x = f32::load_aligned(added + i);
                xs::select(x <= hidden, hidden, xs::fma(slope, x, f32::load_aligned(tile + i)))
                    .store_aligned(tile + i);
            }
        }
        for (std::size_t i = 0; rules.positions != nullptr && i < tile_tokens; i += lanes) {
            const i32 at = i32::load_unaligned(rules.positions + first + i);
            f32 score = f32::load_aligned(tile + i);
            if (distances)
                score = xs::fma(slope, xs::to_float(at - own), score);
            xs::select(xs::batch_bool_cast<float>((at < from) | (at > to)), hidden, score)
                .store_aligned(tile + i);
        }
    }
}
