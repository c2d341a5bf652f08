// SPDX-License-Identifier: Apache-2.0
//
// What the sum of a query row's weights is off by on the integer path. Parsed once per target, after chunk.inl.
//
// Rounding errors of a query shift all scores alike where keys share an offset, or where the tokens with weight have
// something in common. Outputs alone do not see that. The log-sum-exp does, and with it whatever is joined to these
// keys. So some tiles are scored once more, exactly. Their errors are exact score - score.
//
// All rows score one tile of the first chunk. If the errors of a row differ little in it, their mean m is taken for that
// of all tokens, and the sum of weights is corrected by exp(m).
//
// Other rows score tiles with large scores as well, until the mean is known well enough. There a token counts by its
// weight, but no more than twice what tokens have on average: a token with much weight says little of the rest. The sum
// is corrected by
//
//   (sum of the weights in these tiles, by exact scores + (sum of all other weights) * exp(m)) / (sum of weights)
//
// A mean counts as far as it stands out from its own error. Errors may differ the less, the more scores do: weights
// prefer large scores, which then decide what the mean is of.

inline constexpr float fewest_sampled = 8.0f; // tokens that a row must see of the first tile
// For one tile to do: the deviation of errors, times the share of the weight that the largest may have + 1/10 + a quarter
// of the deviation of scores, in nats.
inline constexpr float one_tile_error = 0.0045f;
inline constexpr float share_limit = 2.0f; // of the average weight
// The mean must be known within wanted_error, in nats of the log-sum-exp, and the largest weight of the next tile must
// not move that by more than heavy_error.
inline constexpr float wanted_error = 0.0045f, heavy_error = 0.002f;
inline constexpr float near_top = 2.5f; // nats; tiles with lower scores are not kept

// What rows keep until all chunks are known.
struct sum_sample {
    tile_ref tile{nullptr, 0}; // of the first chunk; null: no chunk yet
    std::size_t token = 0;
    alignas(64) float scores[max_rows * tile_tokens],
        exact[max_rows * tile_tokens];   // of all rows in that tile
    alignas(64) float factors[max_rows]; // of the sums of weights
    bool keeps[max_rows] = {};           // whether a row keeps tiles of its own, in attention_scratch::kept
    std::size_t count[max_rows] = {};    // of these
};

// Exact scores of one tile, [row][score_stride]: of all rows of q, which are the job's from first_row on.
KV1_LAZY KV1_NOINLINE inline void exact_tile(const attention_job& job, const query_rows& q,
                                             std::size_t first_row, tile_ref tile, std::size_t token,
                                             float* scores) noexcept {
    constexpr auto exact = static_cast<std::size_t>(precision::exact);
    const section_layout& keys = job.layout->keys();
    chunk_tiles chunk;
    chunk.tiles[0] = tile;
    chunk.token[0] = token;
    chunk.count = 1;
    const chunk_view view{&keys, chunk.tiles, 1, &keys, chunk.tiles, 0, 0, 0};
    float tops[max_rows];
    if (keys.axis == quantization_axis::per_channel)
        add_page_scores(
            job, chunk, view, q, [](const float*, std::size_t) {}, exact, scores, tops);
    else if (keys.groups() == 1)
        job.key_kernels->key_scores[exact](view, q, scores, tops);
    else
        add_group_scores(*job.key_kernels, exact, view, q, scores, job.scratch->group_scores, tops);
    if (job.key_turning != nullptr)
        add_mean_scores(job, chunk.tiles, chunk.token, 1, first_row, q.rows, scores,
                        [&](std::size_t place) { return tokens_seen_by(job, first_row, q.rows, place); });
}

// Applies to one tile's scores what adjust_scores() does to a chunk's.
KV1_LAZY KV1_INLINE void adjust_tile(const attention_job& job, std::size_t row, const row_view& seen,
                                     float shift, std::size_t token, float* scores) {
    chunk_tiles chunk;
    chunk.token[0] = token;
    chunk.count = 1;
    adjust_scores(job, row, seen, chunk, shift, scores);
}

// Keeps a tile with its scores, in place of the one with the smallest top where there is no room.
KV1_LAZY inline void keep_tile(kept_tile* kept, float* tops, std::size_t& count, tile_ref tile,
                               std::size_t token, float top, const float* scores) noexcept {
    std::size_t at = 0;
    if (count < most_kept) {
        at = count++;
    } else {
        for (std::size_t i = 1; i < most_kept; ++i)
            at = tops[i] < tops[at] ? i : at;
        if (!(top > tops[at]))
            return;
    }
    tops[at] = top;
    kept[at].tile = tile;
    kept[at].token = token;
    std::memcpy(kept[at].scores, scores, sizeof kept[at].scores);
}

// Keeps the tiles of a chunk with scores of `least` or more.
KV1_LAZY KV1_NOINLINE inline void keep_tops(const chunk_tiles& chunk, const float* scores, float least,
                                            kept_tile* kept, float* tops, std::size_t& count) noexcept {
    constexpr std::size_t at_once = 4; // tiles, of which few have such scores
    const f32 limit(least);
    for (std::size_t first = 0; first < chunk.count; first += at_once) {
        std::size_t last = chunk.count;
        if (first + at_once <= chunk.count) {
            last = first + at_once;
            f32 largest[tile_tokens / lanes];
            KV1_UNROLL for (std::size_t i = 0; i < tile_tokens / lanes; ++i) {
                const float* at = scores + first * tile_tokens + i * lanes;
                largest[i] = xs::max(xs::max(f32::load_aligned(at), f32::load_aligned(at + tile_tokens)),
                                     xs::max(f32::load_aligned(at + 2 * tile_tokens),
                                             f32::load_aligned(at + 3 * tile_tokens)));
                largest[0] = i == 0 ? largest[0] : xs::max(largest[0], largest[i]);
            }
            if (!xs::any(largest[0] >= limit))
                continue;
        }
        for (std::size_t k = first; k < last; ++k) {
            const float* const tile = scores + k * tile_tokens;
            f32 largest = f32::load_aligned(tile);
            for (std::size_t i = lanes; i < tile_tokens; i += lanes)
                largest = xs::max(largest, f32::load_aligned(tile + i));
            if (xs::any(largest >= limit))
                keep_tile(kept, tops, count, chunk.tiles[k], chunk.token[k], xs::reduce_max(largest), tile);
        }
    }
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

// Takes the sample from the first chunk, whose tokens number `tokens`, and says which rows keep tiles of their own.
// tops: the largest scores.
KV1_LAZY KV1_NOINLINE inline void take_sample(const attention_job& job, const query_rows& q,
                                              const chunk_tiles& chunk, const row_view* seen,
                                              const float* shifts, const float* scores, const float* tops,
                                              std::size_t tokens, sum_sample& out) noexcept {
    std::size_t k = chunk.count / 2;
    while (chunk.token[k] == no_token)
        --k;
    out.tile = chunk.tiles[k];
    out.token = chunk.token[k];
    // scores of groups are added up in group_scores, keys by channel are scaled in `scaled`
    float* const room = job.layout->keys().groups() == 1 ? job.scratch->group_scores : job.scratch->scaled;
    exact_tile(job, q, 0, out.tile, out.token, room);
    alignas(64) float counts[max_rows] = {}, errors[max_rows] = {}, squares[max_rows] = {},
                      sums[max_rows] = {}, squared_scores[max_rows] = {};
    for (std::size_t r = 0; r < q.rows; ++r) {
        float* const exact = room + r * score_stride;
        adjust_tile(job, r, seen[r], shifts[r], out.token, exact);
        const f32 zero(0.0f), top(tops[r]);
        f32 count = zero, error_sum = zero, square_sum = zero, sum = zero, squared = zero;
        for (std::size_t i = 0; i < tile_tokens; i += lanes) {
            const f32 score = f32::load_aligned(scores + r * score_stride + k * tile_tokens + i);
            const f32 other = f32::load_aligned(exact + i), error = other - score;
            const auto is_seen = score > f32(lowest_score);
            const f32 less = xs::select(is_seen, score - top, zero);
            count = count + xs::select(is_seen, f32(1.0f), zero);
            error_sum = error_sum + error;
            square_sum = xs::fma(error, error, square_sum);
            sum = sum + less;
            squared = xs::fma(less, less, squared);
            score.store_aligned(out.scores + r * tile_tokens + i);
            other.store_aligned(out.exact + r * tile_tokens + i);
        }
        counts[r] = xs::reduce_add(count);
        errors[r] = xs::reduce_add(error_sum);
        squares[r] = xs::reduce_add(square_sum);
        sums[r] = xs::reduce_add(sum);
        squared_scores[r] = xs::reduce_add(squared);
    }
    const f32 few(1.0f / static_cast<float>(tokens));
    alignas(64) float doubts[max_rows];
    for (std::size_t r = 0; r < q.rows; r += lanes) {
        const f32 count = f32::load_aligned(counts + r);
        f32 mean, variance, own;
        mean_of_errors(count, count, f32::load_aligned(errors + r), f32::load_aligned(squares + r), mean,
                       variance, own);
        growth_of(mean, own).store_aligned(out.factors + r);
        const f32 each = f32(1.0f) / xs::max(count, f32(1.0f)), less = f32::load_aligned(sums + r) * each;
        const f32 spread = xs::max(f32::load_aligned(squared_scores + r) * each - less * less, f32(0.0f));
        // what share of the weight the largest may have
        const f32 share =
            xs::min(exp2_nonpositive(xs::min(less * f32(-log2_e), f32(30.0f))) * few, f32(1.0f));
        const f32 weight = share + xs::fma(xs::sqrt(spread), f32(0.25f), f32(0.1f));
        const f32 doubt = variance * weight * weight;
        xs::select(count < f32(fewest_sampled), f32(1.0f), doubt).store_aligned(doubts + r);
    }
    for (std::size_t r = 0; r < q.rows; ++r)
        out.keeps[r] = !(doubts[r] <= one_tile_error * one_tile_error);
}

// Keeps the tiles of a chunk with a score near the row's largest. top: the largest in the chunk.
KV1_LAZY KV1_INLINE void keep_of_row(const attention_job& job, const chunk_tiles& chunk, const float* scores,
                                     std::size_t r, float top, sum_sample& out) {
    if (top == lowest_score)
        return;
    auto& tops = job.scratch->kept_tops[r];
    if (out.count[r] == 0)
        for (float& each : tops)
            each = lowest_score;
    const float largest = maximum_of(tops, tile_tokens, top);
    if (top >= largest - near_top)
        keep_tops(chunk, scores + r * score_stride, largest - near_top, job.scratch->kept[r], tops,
                  out.count[r]);
}

// Of a later chunk: keeps tops of the rows that do so, and of those whose largest score has about an eighth of the
// weight or more.
KV1_LAZY KV1_INLINE void watch_tops(const attention_job& job, const chunk_tiles& chunk, const float* scores,
                                    std::size_t r, float top, float maximum, float denominator,
                                    sum_sample& out) {
    const int exponent = static_cast<int>(std::bit_cast<std::uint32_t>(denominator) >> 23) - 127;
    if (!out.keeps[r])
        out.keeps[r] = top * log2_e - maximum > static_cast<float>(exponent - 2);
    if (out.keeps[r])
        keep_of_row(job, chunk, scores, r, top, out);
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

// The factor by which the sum of row r's weights is too small, by tiles of its own; scores are no longer needed.
KV1_LAZY KV1_NOINLINE inline float factor_of(const attention_job& job, const query_rows& q, std::size_t r,
                                             const row_view& seen, float shift, const sum_sample& sample,
                                             float maximum, float denominator) noexcept {
    const kept_tile* const kept = job.scratch->kept[r];
    float* const tops = job.scratch->kept_tops[r];
    const std::size_t count = sample.count[r];
    if (count == 0)
        tops[0] = lowest_score;
    float* const scores = job.scratch->scores;
    query_rows one = q; // this row alone
    one.rows = 1;
    one.values = q.values + r * q.stride;
    const std::size_t groups = job.layout->keys().groups();
    float* const query = scores + score_stride;
    for (std::size_t g = 0; groups > 1 && g < groups; ++g) {
        std::memcpy(query + g * q.stride, q.values + (g * q.rows + r) * q.stride, q.stride * sizeof(float));
        one.values = query;
    }
    const f32 less = softmax_shift(maximum), whole(denominator), inverse = f32(1.0f) / whole;
    f32 heavy(0.0f); // weights, one of each tile
    for (std::size_t i = 0; i < count; i += lanes)
        heavy = heavy + exp2_nonpositive(xs::fma(f32::load_aligned(tops + i), f32(log2_e), less));
    const float largest = xs::reduce_add(heavy);
    const std::size_t first = seen.first > job.first_token ? seen.first : job.first_token;
    const std::size_t tokens = seen.last > first ? seen.last - first : 1;
    const float others = denominator > largest ? denominator - largest : 0.0f;
    const f32 most(share_limit * others / static_cast<float>(tokens)), none(0.0f);
    tile_sums<> sums{none, none, none, none, none, none};
    add_tile(sample.scores + r * tile_tokens, sample.exact + r * tile_tokens, less, most, sums);
    for (std::size_t left = count;; --left) {
        std::size_t next = 0;
        for (std::size_t i = 1; i < count; ++i)
            next = tops[i] > tops[next] ? i : next;
        if (left == 0 || left < count) { // one is always scored
            f32 mean, variance, own;
            mean_of_errors(f32(xs::reduce_add(sums.shares)), f32(xs::reduce_add(sums.squared_shares)),
                           f32(xs::reduce_add(sums.errors)), f32(xs::reduce_add(sums.squares)), mean,
                           variance, own);
            const f32 outside = xs::max(whole - f32(xs::reduce_add(sums.inside)), none);
            const f32 moved = outside * outside * own;
            const f32 weight = exp2_nonpositive(xs::fma(f32(tops[next]), f32(log2_e), less));
            const f32 error = weight * weight * variance, scale = inverse * inverse;
            if (left == 0 || (xs::all(moved * scale < f32(wanted_error * wanted_error)) &&
                              xs::all(error * scale < f32(heavy_error * heavy_error)))) {
                const f32 corrected(xs::reduce_add(sums.corrected));
                const float factor = (xs::fma(outside, growth_of(mean, own), corrected) * inverse).get(0);
                // not a number, or nothing seen: no correction
                return factor > 0.0f && factor < std::numeric_limits<float>::infinity() ? factor : 1.0f;
            }
        }
        tops[next] = lowest_score;
        const kept_tile& tile = kept[next];
        if (tile.tile.page == sample.tile.page && tile.tile.token == sample.tile.token)
            continue;
        exact_tile(job, one, r, tile.tile, tile.token, scores);
        adjust_tile(job, r, seen, shift, tile.token, scores);
        add_tile(tile.scores, scores, less, most, sums);
    }
}
