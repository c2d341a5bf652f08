// SPDX-License-Identifier: Apache-2.0
//
// Means that turn with their key's position (detail/turning_means.hpp). When a key is stored, the mean at its position is
// taken off, bit for bit as set_mean_at() defines it. In attention a query (a, b) in a pair of channels meets the mean
// (m, n) of a key at position p with
//
//   a (m cos tp - n sin tp) + b (m sin tp + n cos tp) = C cos tp + S sin tp,   C = a m + b n,   S = b m - a n
//
// This is a wave of the pair's frequency t. A row's waves are turned to the middle of a run of at most 256 tokens, by
//
//   C, S at position p:   C cos tp + S sin tp,   S cos tp - C sin tp
//
// From there the cosine terms of all pairs are the same in both directions, and the sine terms are opposite. So they are
// added up for half of the tokens, and their sum and difference serve two tokens each. Waves are turned from position 0
// anew for every run, so rounding does not add up.
//
// Pairs that turn little within a run are folded into four waves of polynomials.
//
// Cost of a pair and row: one multiplication with addition a token, on 16 lanes 16 for 256 tokens, beside three loads for
// four of them; of a slow pair 2. Parsed once per target.

#include <kv1/detail/precise_math_begin.inl>

// Cosines and sines of a register of angles; see unit_at().
struct unit_vectors {
    f32 cosine, sine;
};
KV1_LAZY KV1_INLINE unit_vectors units_at(u32 phase) {
    const u32 quarter = (phase + u32(1u << 29)) >> 30;
    const i32 rest = xs::bitwise_cast<std::int32_t>(phase - (quarter << 30));
    const f32 x = product_of(xs::to_float(rest), f32(phase_step)), z = product_of(x, x);
    f32 c(cosine_terms[0]), s(sine_terms[0]);
    KV1_UNROLL for (std::size_t i = 1; i < 5; ++i) {
        c = sum_of(product_of(c, z), f32(cosine_terms[i]));
        s = sum_of(product_of(s, z), f32(sine_terms[i]));
    }
    s = product_of(s, x);
    const auto odd = xs::batch_bool_cast<float>((quarter & u32(1u)) != u32(0u));
    const u32 across = xs::bitwise_cast<std::uint32_t>(xs::select(odd, s, c));
    const u32 along = xs::bitwise_cast<std::uint32_t>(xs::select(odd, c, s));
    return {xs::bitwise_cast<float>(across ^ (((quarter + u32(1u)) & u32(2u)) << 30)),
            xs::bitwise_cast<float>(along ^ ((quarter & u32(2u)) << 30))};
}

// Of pairs from ... from + lanes - 1 at half a position times `halves`.
KV1_LAZY KV1_INLINE unit_vectors units_of(const turning_mean& m, std::size_t from, std::uint64_t halves) {
    alignas(64) std::uint32_t phases[lanes];
    for (std::size_t i = 0; i < lanes; ++i)
        phases[i] = static_cast<std::uint32_t>(m.half_turns[from + i] * halves >> 32);
    return units_at(u32::load_aligned(phases));
}

KV1_LAZY inline void turn_mean(const turning_mean& m, std::uint64_t position, float* mean) noexcept {
    alignas(64) float first[lanes], second[lanes];
    for (std::size_t from = 0; from < m.count; from += lanes) {
        const unit_vectors u = units_of(m, from, 2 * position);
        const f32 a = f32::load_aligned(m.first + from), b = f32::load_aligned(m.second + from);
        difference_of(product_of(a, u.cosine), product_of(b, u.sine)).store_aligned(first);
        sum_of(product_of(a, u.sine), product_of(b, u.cosine)).store_aligned(second);
        for (std::size_t i = 0; i < lanes && from + i < m.count; ++i) {
            mean[m.first_channel[from + i]] = first[i];
            mean[m.second_channel[from + i]] = second[i];
        }
    }
}

#include <kv1/detail/precise_math_end.inl>

// The waves of row r at position 0: C and S of each pair, [2][padded]. query: as it came.
KV1_LAZY inline void make_waves(const attention_job& job, const float* query, std::size_t r) noexcept {
    const turning_mean& m = *job.key_turning;
    float* const waves = job.scratch->still_waves + 2 * r * m.padded;
    for (std::size_t j = 0; j < m.padded; ++j) {
        const float a = job.scale * query[m.first_channel[j]], b = job.scale * query[m.second_channel[j]];
        waves[j] = a * m.first[j] + b * m.second[j];
        waves[m.padded + j] = b * m.first[j] - a * m.second[j];
    }
}

// Turns the waves of some rows from position 0 to half a position times `halves`.
KV1_LAZY inline void turn_waves(const turning_mean& m, std::uint64_t halves, std::size_t rows,
                                const float* still, float* waves) noexcept {
    for (std::size_t from = 0; from < m.padded; from += lanes) {
        const unit_vectors u = units_of(m, from, halves);
        for (std::size_t r = 0; r < rows; ++r) {
            const std::size_t at = 2 * r * m.padded + from;
            const f32 c = f32::load_aligned(still + at), s = f32::load_aligned(still + at + m.padded);
            xs::fma(c, u.cosine, s * u.sine).store_aligned(waves + at);
            xs::fms(s, u.cosine, c * u.sine).store_aligned(waves + at + m.padded);
        }
    }
}

// Folds the waves of slow pairs into those of polynomials. Pairs of an even and of an odd number have sums of their own,
// which do not wait for each other.
template <std::size_t Rows>
KV1_INLINE void fold_rows(const turning_mean& m, float* waves) {
    const std::size_t quick = m.quick(), count = m.count, row = 2 * m.padded;
    f32 even[Rows][2], odd[Rows][2];
    KV1_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
        KV1_UNROLL for (std::size_t k = 0; k < 2; ++k) { even[r][k] = odd[r][k] = f32(0.0f); }
    }
    const auto add = [&](std::size_t j, const float* shares, std::size_t k) {
        const f32 its_even = f32::load_unaligned(shares), its_odd = f32::load_unaligned(shares + slow_terms);
        KV1_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
            even[r][k] = xs::fma(f32(waves[r * row + j]), its_even, even[r][k]);
            odd[r][k] = xs::fma(f32(waves[r * row + m.padded + j]), its_odd, odd[r][k]);
        }
    };
    const float* shares = m.shares;
    std::size_t j = quick;
    for (; j + 2 <= count; j += 2, shares += 4 * slow_terms) {
        add(j, shares, 0);
        add(j + 1, shares + 2 * slow_terms, 1);
    }
    if (j < count)
        add(j, shares, 0);
    KV1_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
        alignas(64) float sums[2][lanes];
        (even[r][0] + even[r][1]).store_aligned(sums[0]);
        (odd[r][0] + odd[r][1]).store_aligned(sums[1]);
        std::memcpy(waves + r * row + quick, sums[0], slow_terms * sizeof(float));
        std::memcpy(waves + r * row + m.padded + quick, sums[1], slow_terms * sizeof(float));
    }
}
KV1_LAZY inline void fold_waves(const turning_mean& m, std::size_t rows, float* waves) noexcept {
    std::size_t r = 0;
    for (; r + 2 <= rows; r += 2)
        fold_rows<2>(m, waves + 2 * r * m.padded);
    for (; r < rows; ++r)
        fold_rows<1>(m, waves + 2 * r * m.padded);
}

// Adds the waves of Rows rows to their scores in Registers registers on each side of the middle, from a distance on.
// middle: the first row's scores there. count: how many of the last register's lanes are tokens of the run. tops: grow
// with the scores of whole registers, lane by lane.
template <std::size_t Rows, std::size_t Registers>
KV1_INLINE void add_waves(const turning_mean& m, const float* waves, std::size_t from, float* middle,
                          f32 (&tops)[Rows], std::size_t count = lanes) {
    f32 even[Rows][Registers], odd[Rows][Registers];
    KV1_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
        KV1_UNROLL for (std::size_t k = 0; k < Registers; ++k) { even[r][k] = odd[r][k] = f32(0.0f); }
    }
    for (std::size_t j = 0; j < m.terms; ++j) {
        const float* table = m.waves[j] + from;
        KV1_UNROLL for (std::size_t k = 0; k < Registers; ++k) {
            const f32 cosine = f32::load_aligned(table + k * lanes);
            const f32 sine = f32::load_aligned(table + wave_tokens + k * lanes);
            KV1_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
                even[r][k] = xs::fma(f32(waves[2 * r * m.padded + j]), cosine, even[r][k]);
                odd[r][k] = xs::fma(f32(waves[(2 * r + 1) * m.padded + j]), sine, odd[r][k]);
            }
        }
    }
    KV1_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
        KV1_UNROLL for (std::size_t k = 0; k < Registers; ++k) {
            float* const after = middle + r * score_stride + from + k * lanes;
            float* const before = middle + r * score_stride - from - (k + 1) * lanes;
            const f32 sum = even[r][k] + odd[r][k], difference = even[r][k] - odd[r][k];
            if (k + 1 == Registers && count < lanes) {
                alignas(64) float sums[lanes], differences[lanes];
                sum.store_aligned(sums);
                difference.store_aligned(differences);
                for (std::size_t i = 0; i < count; ++i) {
                    after[i] += sums[i];
                    before[lanes - 1 - i] += differences[i];
                }
                continue;
            }
            const f32 its_after = f32::load_unaligned(after) + sum;
            const f32 its_before = f32::load_unaligned(before) + reversed(difference);
            its_after.store_unaligned(after);
            its_before.store_unaligned(before);
            tops[r] = xs::max(tops[r], xs::max(its_after, its_before));
        }
    }
}

// Whether tops of a run grow with all of its scores.
KV1_LAZY KV1_INLINE bool run_has_tops(std::size_t tokens) { return tokens / 2 % lanes == 0; }

// Adds the waves of Rows rows to their scores of a run of tokens.
template <std::size_t Rows>
KV1_INLINE void add_run(const turning_mean& m, const float* waves, std::size_t tokens, float* scores,
                        f32* tops) {
    constexpr std::size_t registers =
        many_registers ? 4 : 2; // on each side, that the sums of two rows fit in
    const std::size_t half = tokens / 2;
    f32 own[Rows];
    KV1_UNROLL for (std::size_t r = 0; r < Rows; ++r) { own[r] = tops[r]; }
    std::size_t from = 0;
    for (; from + registers * lanes <= half; from += registers * lanes)
        add_waves<Rows, registers>(m, waves, from, scores + half, own);
    for (; from + lanes <= half; from += lanes)
        add_waves<Rows, 1>(m, waves, from, scores + half, own);
    if (from < half)
        add_waves<Rows, 1>(m, waves, from, scores + half, own, half - from);
    KV1_UNROLL for (std::size_t r = 0; r < Rows; ++r) { tops[r] = own[r]; }
}

// Whether the slots of a tile stand one after the other, the first at `start`. Slots of no token stand anywhere.
KV1_LAZY KV1_INLINE bool in_row_from(const std::int32_t* at, std::uint32_t start) {
    alignas(64) std::int32_t steps[tile_tokens];
    for (std::size_t i = 0; i < tile_tokens; ++i)
        steps[i] = static_cast<std::int32_t>(i);
    bool all = true;
    for (std::size_t i = 0; i < tile_tokens; i += lanes) {
        const i32 own = i32::load_unaligned(at + i),
                  wanted = i32(static_cast<std::int32_t>(start)) + i32::load_aligned(steps + i);
        all = all && xs::all((own == wanted) | (own < i32(0)));
    }
    return all;
}

// Adds the waves of rows to their scores of a run of tokens, whose first one is at `position`. tops: of the rows
// (add_waves()).
KV1_LAZY inline void add_run(const turning_mean& m, std::uint64_t position, std::size_t tokens,
                             std::size_t rows, const float* still, float* waves, float* scores,
                             f32* tops) noexcept {
    turn_waves(m, 2 * position + tokens - 1, rows, still, waves);
    if (m.shares != nullptr)
        fold_waves(m, rows, waves);
    std::size_t r = 0;
    for (; r + 2 <= rows; r += 2)
        add_run<2>(m, waves + 2 * r * m.padded, tokens, scores + r * score_stride, tops + r);
    for (; r < rows; ++r)
        add_run<1>(m, waves + 2 * r * m.padded, tokens, scores + r * score_stride, tops + r);
}

// The same for one token.
KV1_LAZY inline void add_token(const turning_mean& m, std::uint64_t position, std::size_t rows,
                               const float* still, float* scores) noexcept {
    f32 sums[max_rows];
    for (std::size_t r = 0; r < rows; ++r)
        sums[r] = f32(0.0f);
    for (std::size_t from = 0; from < m.padded; from += lanes) {
        const unit_vectors u = units_of(m, from, 2 * position);
        for (std::size_t r = 0; r < rows; ++r) {
            const float* const own = still + 2 * r * m.padded + from;
            sums[r] = xs::fma(f32::load_aligned(own), u.cosine,
                              xs::fma(f32::load_aligned(own + m.padded), u.sine, sums[r]));
        }
    }
    for (std::size_t r = 0; r < rows; ++r)
        scores[r * score_stride] += xs::reduce_add(sums[r]);
}

// Tokens of a chunk whose slots do not stand one after the other.
struct scattered_tokens {
    std::uint16_t slot[max_chunk_slots]; // of the chunk
    std::int32_t position[max_chunk_slots];
    std::size_t count = 0;
};

// The same for scattered tokens. Sequences that grow side by side lie between each other, a token of one after a token of
// the next, and each goes on where it was. Such tokens are brought together and take their waves as a run. Example: of
// the positions 7, 300, 8, 301, 9, 302, ... there are two runs, which begin at 7 and at 300.
KV1_LAZY KV1_NOINLINE inline void add_scattered(const turning_mean& m, const scattered_tokens& tokens,
                                                std::size_t rows, const float* still, float* waves,
                                                float* room, float* scores) noexcept {
    constexpr std::size_t most = 16, few = 4; // runs, and tokens that are no run
    constexpr std::uint8_t none = most;
    std::int32_t next[most];
    std::size_t length[most], runs = 0, latest = 0;
    std::uint8_t run_of[max_chunk_slots];
    for (std::size_t i = 0; i < tokens.count; ++i) {
        run_of[i] = none;
        for (std::size_t n = 0; n < runs && run_of[i] == none; ++n) {
            const std::size_t run = latest + n < runs ? latest + n : latest + n - runs;
            if (next[run] == tokens.position[i])
                run_of[i] = static_cast<std::uint8_t>(run);
        }
        if (run_of[i] == none && runs < most) {
            run_of[i] = static_cast<std::uint8_t>(runs);
            length[runs++] = 0;
        }
        if (run_of[i] == none)
            continue;
        ++length[run_of[i]];
        next[run_of[i]] = tokens.position[i] + 1; // past 2^31 - 1 nothing stands
        latest = run_of[i] + 1u < runs ? run_of[i] + 1u : 0;
    }
    std::uint16_t order[max_chunk_slots]; // by run
    f32 ignored[max_rows];
    for (std::size_t r = 0; r < rows; ++r)
        ignored[r] = f32(0.0f);
    std::size_t first[most], filled[most];
    for (std::size_t run = 0, at = 0; run < runs; ++run) {
        first[run] = filled[run] = at;
        at += length[run];
    }
    for (std::size_t i = 0; i < tokens.count; ++i)
        if (run_of[i] != none && length[run_of[i]] >= few)
            order[filled[run_of[i]]++] = tokens.slot[i];
        else
            add_token(m, static_cast<std::uint64_t>(tokens.position[i]), rows, still,
                      scores + tokens.slot[i]);
    for (std::size_t run = 0; run < runs; ++run) {
        if (length[run] < few)
            continue;
        auto position = static_cast<std::uint64_t>(next[run]) - length[run];
        for (std::size_t at = first[run], left = length[run], n = 0; left != 0;
             at += n, left -= n, position += n) {
            n = left < 2 * wave_tokens ? left : 2 * wave_tokens;
            const std::size_t even = n + n % 2; // waves begin in the middle between two tokens
            for (std::size_t r = 0; r < rows; ++r)
                std::memset(room + r * score_stride, 0, even * sizeof(float));
            add_run(m, position, even, rows, still, waves, room, ignored);
            for (std::size_t r = 0; r < rows; ++r)
                for (std::size_t k = 0; k < n; ++k)
                    scores[r * score_stride + order[at + k]] += room[r * score_stride + k];
        }
    }
}

// Where the first slot of a tile stands, or would stand if the tile's first token followed on it. False: the tile has no
// token.
KV1_LAZY KV1_INLINE bool start_of_tile(const std::int32_t* at, std::int64_t& start) {
    for (std::size_t i = 0; i < tile_tokens; ++i)
        if (at[i] >= 0) {
            start = std::int64_t{at[i]} - static_cast<std::int64_t>(i);
            return true;
        }
    return false;
}

// Adds what the turning mean gives to the scores of rows first_row ... first_row + rows - 1 in tiles. places: of each
// tile's first token. seen(place) gives the tokens of a tile that some row sees, a bit each; others may go without.
// True: tops are the rows' largest scores now. False: they are what they were.
template <class Seen>
KV1_NOINLINE inline bool add_mean_scores(const attention_job& job, const tile_ref* tiles,
                                         const std::size_t* places, std::size_t count, std::size_t first_row,
                                         std::size_t rows, float* scores, float* tops,
                                         const Seen& seen) noexcept {
    constexpr std::size_t longest = 2 * wave_tokens / tile_tokens; // run, in tiles
    const turning_mean& m = *job.key_turning;
    const float* const still = job.scratch->still_waves + 2 * first_row * m.padded;
    float* const waves = job.scratch->waves;
    f32 most[max_rows];
    for (std::size_t r = 0; r < rows; ++r)
        most[r] = f32(lowest_score);
    if (job.block_positions == nullptr) {
        bool known = true;
        for (std::size_t first = 0, last = 0; first < count; first = last) {
            last = first + 1;
            if (places[first] == no_token) {
                known = false;
                continue;
            }
            const std::uint64_t position = position_of(job, places[first]);
            while (last < count && last - first < longest && places[last] != no_token &&
                   (job.hole_count == 0 || tiles[last].token != 0 ||
                    position_of(job, places[last]) == position + (last - first) * tile_tokens))
                ++last;
            add_run(m, position, (last - first) * tile_tokens, rows, still, waves,
                    scores + first * tile_tokens, most);
            known = known && run_has_tops((last - first) * tile_tokens);
        }
        for (std::size_t r = 0; known && r < rows; ++r)
            tops[r] = xs::reduce_max(most[r]);
        return known;
    }
    scattered_tokens scattered;
    for (std::size_t first = 0, last = 0; first < count; first = last) {
        last = first + 1;
        std::int64_t start = 0;
        if (places[first] == no_token || !start_of_tile(slot_positions(job, places[first]), start))
            continue;
        const auto follows = [&](std::size_t tile) {
            return in_row_from(slot_positions(job, places[tile]),
                               static_cast<std::uint32_t>(start) +
                                   static_cast<std::uint32_t>((tile - first) * tile_tokens));
        };
        if (follows(first)) {
            while (last < count && last - first < longest && places[last] != no_token && follows(last))
                ++last;
            add_run(m, static_cast<std::uint64_t>(start), (last - first) * tile_tokens, rows, still, waves,
                    scores + first * tile_tokens, most);
            continue;
        }
        const std::int32_t* const at = slot_positions(job, places[first]);
        const std::uint32_t shown = seen(places[first]);
        for (std::size_t i = 0; i < tile_tokens; ++i) {
            if (at[i] < 0 || (shown >> i & 1u) == 0)
                continue;
            scattered.slot[scattered.count] = static_cast<std::uint16_t>(first * tile_tokens + i);
            scattered.position[scattered.count++] = at[i];
        }
    }
    if (scattered.count != 0)
        add_scattered(m, scattered, rows, still, waves, job.scratch->group_scores, scores);
    return false;
}
