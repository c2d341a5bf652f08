// SPDX-License-Identifier: Apache-2.0
//
// What the sum of a query row's weights is off by on the integer path. Parsed once per target, after chunk.inl.
//
// Rounding errors of a query shift all scores alike where keys share an offset, or where the tokens with weight have
// something in common. Outputs alone do not see that. The log-sum-exp does, and with it whatever is joined to these
// keys. So some tiles are scored once more, exactly or with 15 bits of the query. Their errors are what these scores
// are larger by.
//
// All rows score one tile of the first chunk. The mean m of its errors is taken for that of all tokens, and the sum of
// weights is corrected by exp(m).
//
// How errors deviate from their mean says, too, what share of the weight a token must have for its own error to matter.
// Tiles with such tokens are kept, and scored in the end. There a token counts for the mean by its weight, but no more
// than twice what tokens have on average: a token with much weight says little of the rest. The sum is corrected by
//
//   (sum of the weights in these tiles, by their better scores + (sum of all other weights) * exp(m)) / (sum of weights)
//
// A mean counts as far as it stands out from its own error.
//
// Example: unit queries and keys of 128 channels have errors that deviate by 0.006 nats. Then tokens with half of the
// weight matter, and there are none. Queries three times larger have errors three times larger: a sixth of the weight
// matters, and some rows have a token or two with so much.

inline constexpr float fewest_sampled = 8.0f; // tokens that a row must see of the first tile
// An error that is as large as errors deviate moves the sum by it times the share of the token's weight. That must not
// be more than this, in nats of the log-sum-exp.
inline constexpr float share_error = 0.003f;
inline constexpr float smallest_share = 0.05f; // shares below are not looked for
inline constexpr float share_limit = 2.0f;     // of the average weight
// The mean must be known within wanted_error, in nats of the log-sum-exp. Where the first tile alone does not give that,
// another one is kept, whatever its share; where it gives less than few_tiles_error, as many as there is room for.
inline constexpr float wanted_error = 0.0045f, few_tiles_error = 0.006f;

// What rows keep until all chunks are known.
struct sum_sample {
    tile_ref tile{nullptr, 0}; // of the first chunk; null: no chunk yet
    std::size_t token = 0;
    alignas(64) float scores[max_rows * tile_tokens],
        exact[max_rows * tile_tokens];   // of all rows in that tile
    alignas(64) float factors[max_rows]; // of the sums of weights
    // Tiles with a token that has a share of 2^limit of the weight or more are kept, in attention_scratch::kept.
    alignas(64) float limits[max_rows];
    alignas(64) float own_errors[max_rows]; // of the means, squared
    std::size_t count[max_rows] = {};       // of these
    float smallest[max_rows];               // top of these, once there is no room for more
};

// Adds to a sample's scores what means that turn give: of tiles that need not follow one another.
KV1_LAZY inline void add_means(const attention_job& job, const chunk_tiles& chunk, std::size_t first_row,
                               std::size_t rows, float* scores) noexcept {
    float tops[max_rows]; // not asked for
    for (std::size_t k = 0; job.key_turning != nullptr && k < chunk.count; ++k)
        add_mean_scores(job, chunk.tiles + k, chunk.token + k, 1, first_row, rows, scores + k * tile_tokens,
                        tops, [&](std::size_t place) { return tokens_seen_by(job, first_row, rows, place); });
}

// Exact scores of tiles, [row][score_stride], of all rows of q, which are the job's from first_row on.
KV1_LAZY KV1_NOINLINE inline void score_exactly(const attention_job& job, const query_rows& q,
                                                std::size_t first_row, const chunk_tiles& tile,
                                                float* scores) noexcept {
    constexpr auto exact = static_cast<std::size_t>(precision::exact);
    const section_layout& keys = job.layout->keys();
    const chunk_view view{&keys, tile.tiles, tile.count, &keys, tile.tiles, 0, 0, 0};
    float tops[max_rows];
    if (keys.axis == quantization_axis::per_channel)
        add_page_scores(
            job, tile, view, q, [](const float*, std::size_t) {}, exact, scores, tops);
    else if (keys.groups() == 1)
        job.key_kernels->key_scores[exact](view, q, scores, tops);
    else
        add_group_scores(job.key_kernels->key_scores[exact], view, q, scores, job.scratch->group_scores,
                         tops);
    add_means(job, tile, first_row, q.rows, scores);
}

// Scores of a few tiles for row r alone. For one row the integer kernels take a fourth of the time that exact scores do.
// They meet the query with 15 bits, so an error (exact score - score) is known within 1/254 of what it may be.
KV1_LAZY KV1_NOINLINE inline void score_finely(const attention_job& job, const query_rows& q, std::size_t r,
                                               const chunk_tiles& chunk, float* scores) noexcept {
    const section_layout& keys = job.layout->keys();
    const std::size_t groups = keys.groups();
    if (keys.axis == quantization_axis::per_channel) {
        query_rows one = q;
        one.rows = 1;
        one.values = q.values + r * q.stride;
        score_exactly(job, one, r, chunk, scores);
        return;
    }
    const chunk_view view{&keys, chunk.tiles, chunk.count, &keys, chunk.tiles, 0, 0, 0};
    float sums[2 * max_groups], scales[2 * max_groups], offsets[2 * max_groups], tops[2]; // [group][2]
    std::int8_t* const codes = job.scratch->fine_codes;
    for (std::size_t g = 0; g < groups; ++g)
        round_finely(q.values + (g * q.rows + r) * q.stride, q.stride, keys.traits(),
                     codes + 2 * g * q.stride, job.scratch->fine_room, scales + 2 * g, offsets + 2 * g,
                     sums + 2 * g);
    const query_rows both{2, q.stride, nullptr, sums, codes, nullptr, scales, offsets};
    if (groups == 1)
        job.key_kernels->code_scores(view, both, scores, tops);
    else
        add_group_scores(job.key_kernels->code_scores, view, both, scores, job.scratch->group_scores, tops);
    for (std::size_t i = 0; i < chunk.count * tile_tokens; i += lanes)
        (f32::load_aligned(scores + i) + f32::load_aligned(scores + score_stride + i))
            .store_aligned(scores + i);
    add_means(job, chunk, r, 1, scores);
}

// Keeps a tile with its scores, in place of the one with the smallest top where there is no room. Returns the smallest
// top once there is none.
KV1_LAZY inline float keep_tile(kept_tile* kept, float* tops, std::size_t& count, tile_ref tile,
                                std::size_t token, float top, const float* scores) noexcept {
    const auto lowest = [&] {
        std::size_t at = 0;
        for (std::size_t i = 1; i < most_kept; ++i)
            at = tops[i] < tops[at] ? i : at;
        return at;
    };
    const std::size_t at = count < most_kept ? count++ : lowest();
    if (top > tops[at]) {
        tops[at] = top;
        kept[at].tile = tile;
        kept[at].token = token;
        for (std::size_t i = 0; i < tile_tokens; i += lanes)
            f32::load_aligned(scores + i).store_aligned(kept[at].scores + i);
    }
    return count < most_kept ? lowest_score : tops[lowest()];
}

KV1_LAZY KV1_INLINE f32 largest_of_tile(const float* scores) {
    f32 largest = f32::load_aligned(scores);
    for (std::size_t i = lanes; i < tile_tokens; i += lanes)
        largest = xs::max(largest, f32::load_aligned(scores + i));
    return largest;
}

// Keeps the tiles of a chunk with scores of `least` or more. Which these are is found out without branches: they are few,
// and elsewhere in each chunk.
KV1_LAZY KV1_NOINLINE inline void keep_tops(const chunk_tiles& chunk, const float* scores, float least,
                                            kept_tile* kept, float* tops, std::size_t& count,
                                            float& smallest) noexcept {
    constexpr std::size_t at_once = 4;
    static_assert(max_chunk_tiles <= 32);
    const f32 limit(least);
    const auto reaches = [&](f32 x) { return static_cast<std::uint32_t>(xs::any(x >= limit)); };
    std::uint32_t fours = 0, tiles = 0; // a bit each
    std::size_t k = 0;
    for (; k + at_once <= chunk.count; k += at_once) {
        const float* const at = scores + k * tile_tokens;
        const f32 first = xs::max(largest_of_tile(at), largest_of_tile(at + tile_tokens)),
                  second =
                      xs::max(largest_of_tile(at + 2 * tile_tokens), largest_of_tile(at + 3 * tile_tokens));
        fours |= reaches(xs::max(first, second)) << (k / at_once);
    }
    for (; k < chunk.count; ++k)
        tiles |= reaches(largest_of_tile(scores + k * tile_tokens)) << k;
    for (; fours != 0; fours &= fours - 1) {
        const auto first = static_cast<std::size_t>(std::countr_zero(fours)) * at_once;
        KV1_UNROLL for (std::size_t i = 0; i < at_once; ++i) {
            tiles |= reaches(largest_of_tile(scores + (first + i) * tile_tokens)) << (first + i);
        }
    }
    for (; tiles != 0; tiles &= tiles - 1) {
        const auto at = static_cast<std::size_t>(std::countr_zero(tiles));
        const float* const tile = scores + at * tile_tokens;
        const float top = xs::reduce_max(largest_of_tile(tile));
        if (top > smallest)
            smallest = keep_tile(kept, tops, count, chunk.tiles[at], chunk.token[at], top, tile);
    }
}

// The sums of the lanes of each of the registers; registers are used up.
KV1_LAZY KV1_INLINE f32 sums_of_lanes(f32 (&x)[lanes]) {
    KV1_UNROLL for (std::size_t n = lanes / 2; n > 0; n /= 2) {
        KV1_UNROLL for (std::size_t i = 0; i < n; ++i) { x[i] = add_neighbours(x[2 * i], x[2 * i + 1]); }
    }
    return x[0];
}
// The same for any number of registers, a multiple of 4 that fills whole ones.
template <std::size_t N>
KV1_INLINE void sums_of_lanes(f32 (&x)[N], float* sums) {
    static_assert(N % lanes == 0);
    KV1_UNROLL for (std::size_t first = 0; first < N; first += lanes) {
        f32 some[lanes];
        KV1_UNROLL for (std::size_t i = 0; i < lanes; ++i) { some[i] = x[first + i]; }
        sums_of_lanes(some).store_aligned(sums + first);
    }
}

// log2(x), at most 0.09 less, of a positive x
KV1_LAZY KV1_INLINE float about_log2(float x) {
    return static_cast<float>(static_cast<std::int32_t>(std::bit_cast<std::uint32_t>(x) - 0x3f800000u)) *
           0x1p-23f;
}

// Of errors: their mean, their variance, and the square of the mean's error. As many tokens as equal shares would be:
// (sum of shares)^2 / (sum of their squares).
KV1_LAZY KV1_INLINE void mean_of_errors(f32 shares, f32 squared_shares, f32 errors, f32 squares, f32& mean,
                                        f32& variance, f32& own) {
    const f32 some = xs::max(shares, f32(1e-18f));
    const f32 each = f32(1.0f) / some;
    mean = errors * each;
    variance = xs::max(squares * each - mean * mean, f32(0.0f));
    const f32 tokens = some * some / xs::max(squared_shares, f32(1e-36f));
    own = variance / xs::max(tokens - f32(1.0f), f32(0.01f));
}
// exp(mean), less what may be the mean's own error
KV1_LAZY KV1_INLINE f32 growth_of(f32 mean, f32 own) {
    const f32 sure = xs::select(mean * mean > own, mean - own / mean, f32(0.0f));
    return exp2_nonpositive(xs::min(sure * f32(log2_e), f32(60.0f)));
}

// Keeps the tiles of a chunk with a token that has a share of the weight. top: the largest score in the chunk; whole: what
// the log-sum-exp is at least, in units of log2.
KV1_LAZY KV1_INLINE void keep_of_row(const attention_job& job, const chunk_tiles& chunk, const float* scores,
                                     std::size_t r, float top, float whole, sum_sample& out) {
    if (top == lowest_score)
        return;
    const float scaled = top * log2_e;
    const float wanted = out.count[r] == 0 ? wanted_error : few_tiles_error;
    const bool more = out.own_errors[r] > wanted * wanted;
    const float least = ((more || scaled > whole ? scaled : whole) + out.limits[r]) * ln_2;
    auto& tops = job.scratch->kept_tops[r];
    if (out.count[r] == 0) {
        out.smallest[r] = lowest_score;
        for (float& each : tops)
            each = lowest_score;
    }
    if (top < least || !(top > out.smallest[r]))
        return;
    keep_tops(chunk, scores + r * score_stride, least > out.smallest[r] ? least : out.smallest[r],
              job.scratch->kept[r], tops, out.count[r], out.smallest[r]);
}

// Takes the sample from the first chunk, which has tokens first ... last - 1, and says which shares of the weight
// matter. tops: the largest scores; whole: all rows see all tokens; even: rows see runs of them, and scores are as they
// came from the kernels. Behind fp16 sinks the first chunk begins with tokens that no row sees.
KV1_LAZY KV1_NOINLINE inline void take_sample(const attention_job& job, const query_rows& q,
                                              const chunk_tiles& chunk, const row_view* seen,
                                              const float* shifts, const float* scores, const float* tops,
                                              const row_view& tokens, bool whole, bool even,
                                              sum_sample& out) noexcept {
    constexpr std::size_t at_once = 4, sorts = 4; // rows, and sums of each
    std::size_t k = chunk.count / 2;
    while (chunk.token[k] == no_token)
        --k;
    out.tile = chunk.tiles[k];
    out.token = chunk.token[k];
    chunk_tiles one;
    one.tiles[0] = out.tile;
    one.token[0] = out.token;
    one.count = 1;
    // keys by channel are scaled in `scaled`; scores of groups and of single tokens take group_scores
    const bool scales = job.layout->keys().axis == quantization_axis::per_channel;
    float* const room = scales ? job.scratch->group_scores : job.scratch->scaled;
    static_assert(scratch_floats >= max_rows * score_stride);
    score_exactly(job, q, 0, one, room);
    alignas(64) float sums[sorts][max_rows] = {};
    for (std::size_t first = 0; first < q.rows; first += at_once) {
        const f32 zero(0.0f);
        f32 sum[at_once * sorts];
        KV1_UNROLL for (std::size_t i = 0; i < at_once * sorts; ++i) { sum[i] = zero; }
        KV1_UNROLL for (std::size_t i = 0; i < at_once; ++i) {
            const std::size_t r = first + i;
            if (r >= q.rows)
                continue;
            float* const exact = room + r * score_stride;
            if (!whole)
                adjust_scores(job, r, seen[r], one, shifts[r], exact);
            const f32 top(tops[r]);
            for (std::size_t j = 0; j < tile_tokens; j += lanes) {
                const f32 score = f32::load_aligned(scores + r * score_stride + k * tile_tokens + j);
                const f32 other = f32::load_aligned(exact + j), error = other - score;
                const auto is_seen = score > f32(lowest_score);
                const f32 less = xs::select(is_seen, score - top, zero);
                sum[i] = sum[i] + error;
                sum[at_once + i] = xs::fma(error, error, sum[at_once + i]);
                sum[2 * at_once + i] = sum[2 * at_once + i] + less;
                sum[3 * at_once + i] = sum[3 * at_once + i] + xs::select(is_seen, f32(1.0f), zero);
                score.store_aligned(out.scores + r * tile_tokens + j);
                other.store_aligned(out.exact + r * tile_tokens + j);
            }
        }
        alignas(64) float all[at_once * sorts];
        sums_of_lanes(sum, all);
        for (std::size_t s = 0; s < sorts; ++s)
            for (std::size_t i = 0; i < at_once; ++i)
                sums[s][first + i] = all[s * at_once + i];
    }
    // of the log-sum-exp: the mean of all scores, as if these were equal; before that, the logarithm of their number
    alignas(64) float lowest[max_rows] = {};
    bool some[max_rows];
    for (std::size_t r = 0; r < q.rows; ++r) {
        const std::size_t first = seen[r].first > tokens.first ? seen[r].first : tokens.first;
        const std::size_t last = seen[r].last < tokens.last ? seen[r].last : tokens.last;
        some[r] = even && first < last;
        lowest[r] = some[r] ? about_log2(static_cast<float>(last - first)) : 0.0f;
    }
    for (std::size_t r = 0; r < q.rows; r += lanes) {
        const f32 count = f32::load_aligned(sums[3] + r);
        f32 mean, variance, own;
        mean_of_errors(count, count, f32::load_aligned(sums[0] + r), f32::load_aligned(sums[1] + r), mean,
                       variance, own);
        growth_of(mean, own).store_aligned(out.factors + r);
        const auto few_seen = count < f32(fewest_sampled);
        xs::select(few_seen, f32(1.0f), own).store_aligned(out.own_errors + r);
        const f32 each = f32(1.0f) / xs::max(count, f32(1.0f)), less = f32::load_aligned(sums[2] + r) * each;
        xs::fma(less, f32(log2_e), f32::load_aligned(lowest + r)).store_aligned(lowest + r);
        const f32 share =
            xs::min(xs::max(f32(share_error) / xs::sqrt(xs::max(variance, f32(1e-18f))), f32(smallest_share)),
                    f32(1.0f));
        xs::select(few_seen, f32(smallest_share), share).store_aligned(out.limits + r);
    }
    for (std::size_t r = 0; r < q.rows; ++r) {
        out.limits[r] = about_log2(out.limits[r]);
        keep_of_row(job, chunk, scores, r, tops[r], some[r] ? tops[r] * log2_e + lowest[r] : lowest_score,
                    out);
    }
}

// Sums over the tiles of a row that are scored exactly. share: min(weight, share_limit * average).
template <class = void>
struct tile_sums {
    f32 inside, corrected;                       // weights, by both scores
    f32 shares, squared_shares, errors, squares; // shares, times errors, times their squares
};

KV1_LAZY KV1_INLINE void add_tile(const float* scores, const float* exact, f32 less, f32 most,
                                  tile_sums<>& sums) {
    for (std::size_t i = 0; i < tile_tokens; i += lanes) {
        const f32 score = f32::load_aligned(scores + i), other = f32::load_aligned(exact + i);
        const f32 weight = exp2_nonpositive(xs::fma(score, f32(log2_e), less));
        const f32 share = xs::min(weight, most), error = other - score, moved = share * error;
        sums.inside = sums.inside + weight;
        sums.corrected = sums.corrected + exp2_nonpositive(xs::fma(other, f32(log2_e), less));
        sums.shares = sums.shares + share;
        sums.squared_shares = xs::fma(share, share, sums.squared_shares);
        sums.errors = sums.errors + moved;
        sums.squares = xs::fma(moved, error, sums.squares);
    }
}

// The factor by which the sum of row r's weights is too small, by tiles of its own.
KV1_LAZY KV1_NOINLINE inline float factor_of(const attention_job& job, const query_rows& q, std::size_t r,
                                             const row_view& seen, float shift, const sum_sample& sample,
                                             float maximum, float denominator) noexcept {
    const kept_tile* const kept = job.scratch->kept[r];
    const float* const tops = job.scratch->kept_tops[r];
    const std::size_t count = sample.count[r];
    const f32 less = softmax_shift(maximum), none(0.0f);
    f32 heavy(0.0f); // weights, one of each tile
    for (std::size_t i = 0; i < count; i += lanes)
        heavy = heavy + exp2_nonpositive(xs::fma(f32::load_aligned(tops + i), f32(log2_e), less));
    const float largest = xs::reduce_add(heavy);
    const std::size_t first = seen.first > job.first_token ? seen.first : job.first_token;
    const std::size_t tokens = seen.last > first ? seen.last - first : 1;
    const float others = denominator > largest ? denominator - largest : 0.0f;
    const f32 most(share_limit * others / static_cast<float>(tokens));
    tile_sums<> sums{none, none, none, none, none, none};
    add_tile(sample.scores + r * tile_tokens, sample.exact + r * tile_tokens, less, most, sums);
    chunk_tiles tiles;
    const float* scores[most_kept];
    for (std::size_t i = 0; i < count; ++i)
        if (kept[i].tile.page != sample.tile.page || kept[i].tile.token != sample.tile.token) {
            scores[tiles.count] = kept[i].scores;
            tiles.tiles[tiles.count] = kept[i].tile;
            tiles.token[tiles.count++] = kept[i].token;
        }
    if (tiles.count != 0)
        score_finely(job, q, r, tiles, job.scratch->scores);
    for (std::size_t k = 0; k < tiles.count; ++k) {
        float* const exact = job.scratch->scores + k * tile_tokens;
        chunk_tiles one; // adjust_scores() takes tiles that follow one another
        one.token[0] = tiles.token[k];
        one.count = 1;
        adjust_scores(job, r, seen, one, shift, exact);
        add_tile(scores[k], exact, less, most, sums);
    }
    constexpr std::size_t room = lanes < 8 ? 8 : lanes;
    f32 by_lane[room] = {sums.shares,  sums.squared_shares, sums.errors,
                         sums.squares, sums.inside,         sums.corrected};
    KV1_UNROLL for (std::size_t i = 6; i < room; ++i) { by_lane[i] = none; }
    alignas(64) float total[room];
    sums_of_lanes(by_lane, total);
    f32 mean, variance, own;
    mean_of_errors(f32(total[0]), f32(total[1]), f32(total[2]), f32(total[3]), mean, variance, own);
    const f32 outside = xs::max(f32(denominator - total[4]), none);
    const float factor = xs::fma(outside, growth_of(mean, own), f32(total[5])).get(0) / denominator;
    // not a number, or nothing seen: no correction
    return factor > 0.0f && factor < std::numeric_limits<float>::infinity() ? factor : 1.0f;
}
