// SPDX-License-Identifier: Apache-2.0
//
// The driver of a target: attention of some query rows of one KV head to a range of tokens. The softmax is taken
// online, chunk by chunk, with a running maximum and sum (Milakov and Gimelshein 2018; FlashAttention). Parsed once
// per target.

KV1_LAZY KV1_INLINE float maximum_of(const float* scores, std::size_t slots, float start) {
    f32 first(start), second(start); // that do not wait for each other
    std::size_t i = 0;
    for (; i + 4 * lanes <= slots; i += 4 * lanes) {
        first = xs::max(first, xs::max(f32::load_aligned(scores + i), f32::load_aligned(scores + i + lanes)));
        second = xs::max(second, xs::max(f32::load_aligned(scores + i + 2 * lanes),
                                         f32::load_aligned(scores + i + 3 * lanes)));
    }
    for (; i < slots; i += lanes)
        first = xs::max(first, f32::load_aligned(scores + i));
    return xs::reduce_max(xs::max(first, second));
}

// Copies channels of one query row, in the order of a lane's bytes and their fields, into its runs among those of
// `rows` rows.
template <std::size_t Planes>
KV1_INLINE void scatter_query(const std::int8_t* plain, std::size_t padded, std::int8_t* out,
                              std::size_t rows) {
    for (std::size_t first = 0; first < padded; first += 4 * Planes, out += rows * 4 * Planes)
        KV1_UNROLL for (std::size_t f = 0; f < Planes; ++f) {
            KV1_UNROLL for (std::size_t j = 0; j < 4; ++j) { out[f * 4 + j] = plain[first + j * Planes + f]; }
        }
}

// Rounds a query row to 8 bits for the fast path. Channels are reordered so that four consecutive bytes are multiplied
// by the four bytes of a lane. codes: those of the row tile, by bit slice; the row is row r of `rows` rows in it.
KV1_LAZY inline void round_query(const float* query, std::size_t padded, const format_traits& t,
                                 std::int8_t* const (&codes)[2], std::size_t r, std::size_t rows,
                                 float& scale, std::int32_t& sum) noexcept {
    f32 largest(0.0f);
    for (std::size_t i = 0; i < padded; i += lanes)
        largest = xs::max(largest, xs::abs(f32::load_aligned(query + i)));
    const float top = xs::reduce_max(largest);
    scale = top / 127.0f;
    const f32 inverse(top > 0.0f ? 127.0f / top : 0.0f);
    alignas(64) std::int8_t plain[max_vector_length];
    i32 total(0);
    for (std::size_t i = 0; i < padded; i += lanes) {
        const i32 code = rounded_codes(f32::load_aligned(query + i) * inverse);
        total = total + code;
        store_u8(xs::bitwise_cast<std::uint32_t>(code), reinterpret_cast<std::uint8_t*>(plain) + i);
    }
    sum = xs::reduce_add(total);
    for (int p = 0; p < t.slice_count(); ++p)
        switch (t.field_bits(p)) {
        case 1:
            scatter_query<8>(plain, padded, codes[p] + r * 32, rows);
            break;
        case 2:
            scatter_query<4>(plain, padded, codes[p] + r * 16, rows);
            break;
        case 4:
            scatter_query<2>(plain, padded, codes[p] + r * 8, rows);
            break;
        case 8:
            scatter_query<1>(plain, padded, codes[p] + r * 4, rows);
            break;
        }
}

// The tiles of tokens first ... last - 1, and tiles that complete their granules. token[k] is the first token of tile
// k; no_token: the tile completes a granule. Precondition: first is a multiple of the granule within its page.
struct chunk_tiles {
    tile_ref tiles[max_chunk_tiles];
    std::size_t token[max_chunk_tiles];
    std::size_t count = 0;
};

KV1_LAZY inline void list_tiles(const attention_job& job, std::size_t granule, std::size_t first,
                                std::size_t last, chunk_tiles& out) noexcept {
    const std::size_t page_tokens = job.layout->page_tokens();
    std::size_t index = first / page_tokens, in_page = first - index * page_tokens, count = 0;
    while (first < last) {
        const std::byte* page =
            job.pages + static_cast<std::size_t>(job.block_table[index++]) * job.block_stride;
        for (; in_page < page_tokens && first < last; in_page += tile_tokens, first += tile_tokens, ++count) {
            out.tiles[count] = {page, in_page};
            out.token[count] = first;
        }
        for (; in_page % granule != 0; in_page += tile_tokens, ++count) {
            out.tiles[count] = out.tiles[count - 1];
            out.token[count] = no_token;
        }
        in_page = 0;
    }
    out.count = count;
}

// A row sees the tokens first ... last - 1 that the mask shows.
struct row_view {
    std::size_t first, last;
};

KV1_LAZY inline row_view view_of(const attention_job& job, std::size_t row) noexcept {
    const std::size_t token = (job.first_row + row) / job.head_group;
    const std::size_t limit = job.visible_base + token * job.visible_step;
    row_view v{job.first_visible, limit < job.last_token ? limit : job.last_token};
    if (job.window != 0) {
        const std::ptrdiff_t from = job.first_position + static_cast<std::ptrdiff_t>(token) + 1 -
                                    static_cast<std::ptrdiff_t>(job.window);
        if (from > static_cast<std::ptrdiff_t>(v.first))
            v.first = static_cast<std::size_t>(from);
    }
    return v;
}

// Whether a mask shows all tokens of a tile. False is permitted if bytes are neither 0 nor 1.
KV1_LAZY KV1_INLINE bool all_set(const std::uint8_t* mask) {
    std::uint64_t low = 0, high = 0;
    static_assert(tile_tokens == sizeof low + sizeof high);
    std::memcpy(&low, mask, sizeof low);
    std::memcpy(&high, mask + sizeof low, sizeof high);
    return (low & high) == 0x0101010101010101u;
}

// Applies soft cap and position bias to a row's scores, and sets scores of tokens that the row does not see to
// lowest_score.
KV1_LAZY inline void adjust_scores(const attention_job& job, std::size_t row, const row_view& seen,
                                   const chunk_tiles& chunk, float shift, float* scores) noexcept {
    const std::size_t token = (job.first_row + row) / job.head_group,
                      head = (job.first_row + row) % job.head_group;
    if (job.soft_cap > 0.0f) {
        const f32 cap(job.soft_cap), inverse(1.0f / job.soft_cap);
        for (std::size_t i = 0; i < chunk.count * tile_tokens; i += lanes)
            (cap * xs::tanh((f32::load_aligned(scores + i) + f32(shift)) * inverse))
                .store_aligned(scores + i);
    }
    if (job.alibi_slopes != nullptr) {
        alignas(64) float steps[tile_tokens];
        for (std::size_t i = 0; i < tile_tokens; ++i)
            steps[i] = static_cast<float>(i);
        const f32 slope(job.alibi_slopes[head]);
        for (std::size_t k = 0; k < chunk.count; ++k) {
            const f32 distance(static_cast<float>(static_cast<std::ptrdiff_t>(chunk.token[k]) -
                                                  job.first_position - static_cast<std::ptrdiff_t>(token)));
            for (std::size_t i = 0; i < tile_tokens; i += lanes) {
                float* at = scores + k * tile_tokens + i;
                xs::fma(slope, distance + f32::load_aligned(steps + i), f32::load_aligned(at))
                    .store_aligned(at);
            }
        }
    }
    if (job.slots != nullptr)
        apply_slot_rules(*job.slots, token, job.first_head + head, seen.first, seen.last, chunk.token,
                         chunk.count, scores);
    for (std::size_t k = 0; k < chunk.count; ++k) {
        const std::size_t first = chunk.token[k];
        float* tile = scores + k * tile_tokens;
        const bool inside = first != no_token && first >= seen.first && first + tile_tokens <= seen.last;
        const bool masked = job.mask != nullptr && first + tile_tokens > job.mask_first;
        if (inside && !masked)
            continue;
        const std::uint8_t* mask = job.mask == nullptr ? nullptr : job.mask + token * job.mask_stride;
        if (inside && first >= job.mask_first && all_set(mask + (first - job.mask_first)))
            continue;
        for (std::size_t i = 0; i < tile_tokens; ++i) {
            const std::size_t t = first + i;
            if (first == no_token || t < seen.first || t >= seen.last ||
                (mask != nullptr && t >= job.mask_first && mask[t - job.mask_first] == 0))
                tile[i] = lowest_score;
        }
    }
}

// Scores of keys with groups of channels: the sum of the scores of all groups. q: queries of the first group, those of
// the others behind it, [group][row]. own: room for the scores of one group.
template <class Kernels>
KV1_NOINLINE void add_group_scores(const Kernels& kernels, std::size_t mode, const chunk_view& view,
                                   const query_rows& q, float* scores, float* own, float* tops) noexcept {
    const std::size_t groups = view.layout->groups(), slots = view.count * tile_tokens;
    for (std::size_t g = 0; g < groups; ++g) {
        const section_layout keys = view.layout->group(g), next = fetched_with(view, g, groups);
        const std::size_t row = g * q.rows, at = row * q.stride;
        kernels.key_scores[mode](
            {&keys, view.tiles, view.count, &next, view.next_tiles, view.next_count, view.next_share},
            {q.rows,
             q.stride,
             q.values + at,
             q.sums + row,
             {q.codes[0] + at, q.codes[1] + at},
             q.tables == nullptr ? nullptr : q.tables + 8 * at,
             q.code_scales + row,
             q.code_offsets + row},
            g == 0 ? scores : own, tops);
        for (std::size_t r = 0; g != 0 && r < q.rows; ++r)
            for (std::size_t i = 0; i < slots; i += lanes) {
                float* sum = scores + r * score_stride + i;
                (f32::load_aligned(sum) + f32::load_aligned(own + r * score_stride + i)).store_aligned(sum);
            }
    }
    for (std::size_t r = 0; r < q.rows; ++r)
        tops[r] = maximum_of(scores + r * score_stride, slots, lowest_score);
}

// The slope and base of each channel of a page of keys per channel; zero past the channels.
KV1_LAZY KV1_NOINLINE inline void load_channels(const section_layout& s, const std::byte* page,
                                                std::size_t padded, float* slopes, float* bases) noexcept {
    const auto* scales = reinterpret_cast<const std::uint16_t*>(page + s.scale_offset);
    const auto* minima = reinterpret_cast<const std::uint16_t*>(page + s.minimum_offset);
    const bool compact = s.traits().metadata == metadata_kind::compact;
    std::size_t c = 0;
    for (; c + lanes <= s.channels; c += lanes) {
        f32 slope, base;
        if (compact) {
            decode_compact_words(load_u16(scales + c), s.traits().top_level(), slope, base);
        } else {
            slope = load_half(scales + c);
            base = load_half(minima + c);
        }
        slope.store_aligned(slopes + c);
        base.store_aligned(bases + c);
    }
    for (; c < s.channels; ++c) {
        const affine_map p = decode_metadata(s.format, load_channel_metadata(s, page, c));
        slopes[c] = p.slope;
        bases[c] = p.base;
    }
    for (; c < padded; ++c)
        slopes[c] = bases[c] = 0.0f;
}

// Prefetches metadata of the next pages.
KV1_LAZY KV1_INLINE void prefetch_channels(const section_layout& s, const chunk_tiles& chunk) {
    const std::byte* page = nullptr;
    for (std::size_t k = 0; k < chunk.count; ++k) {
        if (chunk.tiles[k].page == page)
            continue;
        page = chunk.tiles[k].page;
        for (std::size_t at = 0; at < s.channels * sizeof(std::uint16_t); at += line_bytes) {
            prefetch(page + s.scale_offset + at);
            prefetch(page + s.minimum_offset + at);
        }
    }
}

// Scores of keys per channel. For each page, the query is multiplied by the page's scales, and the sum of the query
// times the page's minima is added to the scores. Keys of a page that is not full are fp16 and take the query itself.
// round_row(x, r) makes the codes of row r for the fast path, to which q refers.
template <class Rounding>
KV1_NOINLINE void add_page_scores(const attention_job& job, const chunk_tiles& chunk, const chunk_view& view,
                                  const query_rows& q, const Rounding& round_row, std::size_t mode,
                                  float* scores, float* tops) noexcept {
    auto& scaled = job.scratch->scaled;
    auto &slopes = job.scratch->slopes, &bases = job.scratch->bases;
    float sums[max_rows], shifts[max_rows], own_tops[max_rows];
    const section_layout& keys = *view.layout;
    for (std::size_t r = 0; r < q.rows; ++r)
        tops[r] = lowest_score;
    for (std::size_t first = 0, last = 0; first < view.count; first = last) {
        const std::byte* page = view.tiles[first].page;
        while (last < view.count && view.tiles[last].page == page)
            ++last;
        const std::size_t fetched = view.next_count < last ? view.next_count : last;
        chunk_view own{&keys,
                       view.tiles + first,
                       last - first,
                       view.next_layout,
                       view.next_tiles + first,
                       fetched < first ? 0 : fetched - first,
                       view.next_share};
        float* at = scores + first * tile_tokens;
        if (job.open_keys != nullptr && chunk.token[first] >= job.open_from) {
            tile_ref open[max_chunk_tiles];
            for (std::size_t k = first; k < last; ++k)
                open[k - first] = {job.open_keys, view.tiles[k].token};
            own.layout = &job.open_layout->keys();
            own.tiles = open;
            job.open_kernels->key_scores[mode](own, q, at, own_tops);
            for (std::size_t r = 0; r < q.rows; ++r)
                tops[r] = own_tops[r] > tops[r] ? own_tops[r] : tops[r];
            continue;
        }
        load_channels(keys, page, q.stride, slopes, bases);
        for (std::size_t r = 0; r < q.rows; ++r) {
            f32 sum(0.0f), shift(0.0f);
            for (std::size_t c = 0; c < q.stride; c += lanes) {
                const f32 query = f32::load_aligned(q.values + r * q.stride + c);
                const f32 times = query * f32::load_aligned(slopes + c);
                times.store_aligned(scaled + r * q.stride + c);
                sum = sum + times;
                shift = xs::fma(query, f32::load_aligned(bases + c), shift);
            }
            sums[r] = xs::reduce_add(sum);
            shifts[r] = xs::reduce_add(shift);
            round_row(scaled + r * q.stride, r);
        }
        query_rows its = q;
        its.values = scaled;
        its.sums = sums;
        job.key_kernels->key_scores[mode](own, its, at, own_tops);
        for (std::size_t r = 0; r < q.rows; ++r) {
            const f32 shift(shifts[r]);
            for (std::size_t i = 0; i < own.count * tile_tokens; i += lanes) {
                float* score = at + r * score_stride + i;
                (f32::load_aligned(score) + shift).store_aligned(score);
            }
            const float top = own_tops[r] + shifts[r];
            tops[r] = top > tops[r] ? top : tops[r];
        }
    }
}

// Sums of values with groups of channels, group by group. Each group takes the exponentials anew, from a copy of
// `scores`, which it overwrites.
template <class Kernels>
KV1_NOINLINE void add_group_sums(const Kernels& kernels, std::size_t mode, const chunk_view& view,
                                 const softmax_rows& w, float* scores, float* sums,
                                 std::size_t stride) noexcept {
    const std::size_t groups = view.layout->groups();
    for (std::size_t g = 0; g < groups; ++g) {
        const section_layout values = view.layout->group(g), next = fetched_with(view, g, groups);
        float denominators[max_rows];
        softmax_rows own = w;
        if (g + 1 < groups) {
            for (std::size_t r = 0; r < w.rows; ++r) {
                std::memcpy(scores + r * score_stride, w.scores + r * score_stride,
                            view.count * tile_tokens * sizeof(float));
                denominators[r] = w.denominators[r];
            }
            own.scores = scores;
            own.denominators = denominators;
        }
        kernels.value_sums[mode](
            {&values, view.tiles, view.count, &next, view.next_tiles, view.next_count, view.next_share}, own,
            sums + g * values.channels, stride);
    }
}

// A tile whose scores are taken once more, exactly (sum_correction()): that of a row's largest score.
struct top_tile {
    tile_ref tile{nullptr, 0};
    std::size_t token = 0;
    std::size_t slot = 0; // in its chunk
    float score = lowest_score;
    float scores[tile_tokens];
};

// Where a chunk has a larger score than those before it.
KV1_LAZY KV1_NOINLINE inline void find_top(const chunk_tiles& chunk, const float* scores, float top,
                                           top_tile& out) noexcept {
    for (std::size_t k = 0; k < chunk.count; ++k) {
        f32 largest = f32::load_aligned(scores + k * tile_tokens);
        for (std::size_t i = lanes; i < tile_tokens; i += lanes)
            largest = xs::max(largest, f32::load_aligned(scores + k * tile_tokens + i));
        if (xs::any(largest == f32(top))) {
            out.tile = chunk.tiles[k];
            out.token = chunk.token[k];
            out.slot = k * tile_tokens;
            out.score = top;
            std::memcpy(out.scores, scores + k * tile_tokens, sizeof out.scores);
            return;
        }
    }
}

// The scores of some rows in one tile of a chunk, [row][tile_tokens].
KV1_LAZY KV1_NOINLINE inline void copy_tile(const float* scores, std::size_t rows, std::size_t slot,
                                            float* out) noexcept {
    for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t i = 0; i < tile_tokens; i += lanes)
            f32::load_aligned(scores + r * score_stride + slot + i).store_aligned(out + r * tile_tokens + i);
}

// Exact scores of one tile, of all rows of q, which are the job's from first_row on.
KV1_LAZY KV1_NOINLINE inline void exact_tile(const attention_job& job, const query_rows& q,
                                             std::size_t first_row, const top_tile& top,
                                             float* scores) noexcept {
    constexpr auto exact = static_cast<std::size_t>(precision::exact);
    const section_layout& keys = job.layout->keys();
    chunk_tiles chunk;
    chunk.tiles[0] = top.tile;
    chunk.token[0] = top.token;
    chunk.count = 1;
    const chunk_view view{&keys, chunk.tiles, 1, &keys, chunk.tiles, 0, 0};
    float tops[max_rows];
    if (keys.axis == quantization_axis::per_channel)
        add_page_scores(
            job, chunk, view, q, [](const float*, std::size_t) {}, exact, scores, tops);
    else if (keys.groups() == 1)
        job.key_kernels->key_scores[exact](view, q, scores, tops);
    else
        add_group_scores(*job.key_kernels, exact, view, q, scores, job.scratch->group_scores, tops);
    if (job.key_turning != nullptr)
        add_mean_scores(job, chunk.tiles, chunk.token, 1, first_row, q.rows, scores);
}

KV1_LAZY KV1_NOINLINE inline float correction_of(const attention_job& job, std::size_t r,
                                                 const row_view& seen, float shift, const top_tile& top,
                                                 const softmax_state& state, float* exact) noexcept {
    chunk_tiles chunk;
    chunk.token[0] = top.token;
    chunk.count = 1;
    adjust_scores(job, r, seen, chunk, shift, exact);
    alignas(64) float weights[tile_tokens], corrected[tile_tokens];
    const f32 log2e(log2_e), less = softmax_shift(state.maximum);
    for (std::size_t i = 0; i < tile_tokens; i += lanes) {
        exp2_nonpositive(xs::fma(f32::load_unaligned(top.scores + i), log2e, less))
            .store_aligned(weights + i);
        exp2_nonpositive(xs::fma(f32::load_aligned(exact + i), log2e, less)).store_aligned(corrected + i);
    }
    const std::size_t first = seen.first > job.first_token ? seen.first : job.first_token;
    return sum_correction({top.scores, exact, weights, corrected}, tile_tokens, seen.last - first, state);
}

// A row whose largest score has more of the weight than this has a tile of its own, others share the last row's, which
// sees most, if they see any of it.
inline constexpr float own_share = 1.0f / 32.0f;

// What the rows' maxima lack. tops: of each row; shared: each row's scores in the last row's. `scores` is scratch.
KV1_LAZY KV1_NOINLINE inline void correct_maxima(const attention_job& job, const query_rows& q,
                                                 const row_view* seen, const float* shifts,
                                                 const top_tile* tops, const float* shared,
                                                 const float* denominators, float* maxima,
                                                 float* scores) noexcept {
    const top_tile& last = tops[job.rows - 1];
    bool is_shared = false;
    bool own[max_rows];
    for (std::size_t r = 0; r < job.rows; ++r) {
        const bool same = tops[r].tile.page == last.tile.page && tops[r].tile.token == last.tile.token;
        const bool sees = last.tile.page != nullptr &&
                          maximum_of(shared + r * tile_tokens, tile_tokens, lowest_score) != lowest_score;
        own[r] =
            !same && (!sees || std::exp2(tops[r].score * log2_e - maxima[r]) > own_share * denominators[r]);
        is_shared = is_shared || !own[r];
    }
    alignas(64) float exact[max_rows * tile_tokens];
    if (is_shared && last.tile.page != nullptr) {
        exact_tile(job, q, 0, last, scores);
        copy_tile(scores, job.rows, 0, exact);
    }
    for (std::size_t r = 0; r < job.rows; ++r) {
        const softmax_state state{maxima[r], denominators[r]};
        top_tile top = own[r] ? tops[r] : last;
        if (top.tile.page == nullptr || !(state.denominator > 0.0f))
            continue;
        float* its = exact + r * tile_tokens;
        if (own[r]) {
            float* const query = scores + score_stride;
            for (std::size_t g = 0; g < job.layout->keys().groups(); ++g)
                std::memcpy(query + g * q.stride, q.values + (g * q.rows + r) * q.stride,
                            q.stride * sizeof(float));
            query_rows one = q;
            one.rows = 1;
            one.values = query;
            exact_tile(job, one, r, top, scores);
            its = scores;
        } else {
            std::memcpy(top.scores, shared + r * tile_tokens, sizeof top.scores);
        }
        maxima[r] += correction_of(job, r, seen[r], shifts[r], top, state, its);
    }
}

// Pairs: the kernels of 2-bit keys are those of pairs.inl.
template <bool Pairs>
inline void attend_rows(const attention_job& job) noexcept {
    const section_layout& keys = job.layout->keys();
    const bool in_keys = job.layout->values_in_keys();
    const section_layout values = in_keys ? transposed_values(*job.layout) : job.layout->values();
    const std::size_t key_stride = round_up(keys.channels, 32);
    const std::size_t value_stride = round_up(values.channels, 32);
    const std::size_t groups = keys.groups(), part = key_stride / groups; // of a query, which meets one group
    const bool integer_keys = job.mode == precision::fast && keys.traits().code_bits != 0;
    const bool per_channel =
        keys.axis == quantization_axis::per_channel; // then queries are rounded page by page
    const std::size_t mode = static_cast<std::size_t>(job.mode);

    auto &query = job.scratch->query, &sums = job.scratch->sums;
    auto& scores = job.scratch->scores;
    auto& codes = job.scratch->codes;
    auto& tables = job.scratch->tables;
    const bool in_pairs = Pairs && integer_keys && takes_pairs(keys.traits());
    float query_sums[max_group_rows], code_scales[max_group_rows],
        code_offsets[max_group_rows]; // [group][row]
    float tops[max_rows], maxima[max_rows], denominators[max_rows], rescale[max_rows];
    float shifts[max_rows]; // of scores, for the mean that keys were stored without
    row_view seen[max_rows];
    // outputs alone do not see what shifts all scores of a row
    const bool corrected =
        integer_keys && (job.partials != nullptr || job.log_sum_exp != nullptr || job.sink_logits != nullptr);
    top_tile top_tiles[max_rows];
    alignas(64) float shared[max_rows * tile_tokens]; // scores of the last row's tile
    float shared_score = lowest_score;

    const float half_code = 0.5f * static_cast<float>(keys.traits().top_level());
    // `own`, row r of group g, for the integer path; rows of a group come in order
    std::size_t tile_row = 0, tile = 0;
    const auto round_row = [&](const float* own, std::size_t r, std::size_t g) {
        if (r == 0)
            tile_row = tile = 0;
        else if (r == tile_row + row_tile_size(job.rows, tile))
            tile_row += row_tile_size(job.rows, tile++);
        if (!integer_keys)
            return;
        const std::size_t n = g * job.rows + r, tile_at = (g * job.rows + tile_row) * part;
        const std::size_t rows = row_tile_size(job.rows, tile);
        if (in_pairs) {
#if defined(KV1_ISA_PAIRS)
            pair_query(own, part, keys.traits(), tables + tile_at * 8, codes[0] + tile_at, r - tile_row, rows,
                       code_scales[n], code_offsets[n]);
#endif
            return;
        }
        std::int32_t code_sum = 0;
        round_query(own, part, keys.traits(), {codes[0] + tile_at, codes[1] + tile_at}, r - tile_row, rows,
                    code_scales[n], code_sum);
        code_offsets[n] = -code_scales[n] * (half_code * static_cast<float>(code_sum));
        if (!per_channel) // codes and bases meet the same query
            query_sums[n] = code_scales[n] * static_cast<float>(code_sum);
    };

    row_view any{job.last_token, 0}, all{0, job.last_token}; // tokens that some row, and every row, may see
    for (std::size_t r = 0; r < job.rows; ++r) {
        const std::size_t token = (job.first_row + r) / job.head_group,
                          head = (job.first_row + r) % job.head_group;
        float* row = groups == 1 ? query + r * key_stride : scores; // there for a moment
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(token) * job.query_token_stride +
                                  static_cast<std::ptrdiff_t>(head) * job.query_head_stride;
        const std::ptrdiff_t size = job.query_type == scalar_type::fp32 ? 4 : 2;
        load_floats(job.query_type, static_cast<const std::byte*>(job.queries) + at * size, keys.channels,
                    row);
        shifts[r] = key_shift(job, row);
        if (job.key_turning != nullptr)
            make_waves(job, row, r);
        if (job.key_basis)
            std::memcpy(row, job.queries_in_basis + (job.first_row + r) * keys.channels,
                        keys.channels * sizeof(float));
        if (job.key_hadamard != 0)
            rotate(row, keys.channels, job.key_hadamard);
        for (std::size_t i = keys.channels; i < key_stride; ++i)
            row[i] = 0.0f;
        for (std::size_t g = 0; g < groups; ++g) {
            const std::size_t n = g * job.rows + r;
            float* own = query + n * part;
            f32 sum(0.0f);
            for (std::size_t i = 0; i < part; i += lanes) {
                const f32 scaled = f32::load_aligned(row + g * part + i) * f32(job.scale);
                scaled.store_aligned(own + i);
                sum = sum + scaled;
            }
            query_sums[n] = xs::reduce_add(sum);
        }
        for (std::size_t i = 0; i < value_stride; ++i)
            sums[r * value_stride + i] = 0.0f;
        maxima[r] = lowest_score;
        denominators[r] = 0.0f;
        seen[r] = view_of(job, r);
        any.first = seen[r].first < any.first ? seen[r].first : any.first;
        any.last = seen[r].last > any.last ? seen[r].last : any.last;
        all.first = seen[r].first > all.first ? seen[r].first : all.first;
        all.last = seen[r].last < all.last ? seen[r].last : all.last;
    }

    for (std::size_t g = 0; g < groups && !per_channel; ++g)
        for (std::size_t r = 0; r < job.rows; ++r)
            round_row(query + (g * job.rows + r) * part, r, g);

    const query_rows q{
        job.rows,    part,        query, query_sums, {codes[0], codes[1]}, in_pairs ? tables : nullptr,
        code_scales, code_offsets};
    const std::size_t page_tokens = keys.tokens, granule = granule_of(*job.layout);
    // a tile's share of K's and of V's bytes
    const std::size_t page_tiles = page_tokens / tile_tokens;
    const std::size_t key_share = keys.bytes() / page_tiles, value_share = values.bytes() / page_tiles;
    const bool adjusted = job.soft_cap > 0.0f || job.alibi_slopes != nullptr || job.slots != nullptr;
    chunk_tiles lists[2];                 // of this chunk and the next
    tile_ref transposed[max_chunk_tiles]; // of values that lie in keys
    for (std::size_t k = 0; in_keys && k < max_chunk_tiles; ++k)
        transposed[k] = {job.scratch->transposed, k * tile_tokens};
    std::size_t first = job.first_token, last = first, now = 0;
    if (first < any.last)
        last = chunk_end(*job.layout, first, any.last);
    while (last <= any.first && last < any.last) { // chunks that no row sees
        first = last;
        last = chunk_end(*job.layout, first, any.last);
    }
    if (first < last)
        list_tiles(job, granule, first, last, lists[now]);
    while (first < last) {
        const chunk_tiles& chunk = lists[now];
        chunk_tiles& after = lists[1 - now];
        const std::size_t after_last = last < any.last ? chunk_end(*job.layout, last, any.last) : last;
        // past the range's end begins what the next task is likely to walk
        const std::size_t fetched =
            last == job.last_token && last % page_tokens == 0 && last < job.fetch_token
                ? chunk_end(*job.layout, last, job.fetch_token)
                : after_last;
        after.count = 0;
        if (last < fetched)
            list_tiles(job, granule, last, fetched, after);
        const std::size_t slots = chunk.count * tile_tokens;
        const chunk_view key_view{
            &keys, chunk.tiles, chunk.count, &values, chunk.tiles, in_keys ? 0 : chunk.count, value_share};
        if (per_channel)
            add_page_scores(
                job, chunk, key_view, q, [&](const float* own, std::size_t r) { round_row(own, r, 0); }, mode,
                scores, tops);
        else if (groups == 1)
            job.key_kernels->key_scores[mode](key_view, q, scores, tops);
        else
            add_group_scores(*job.key_kernels, mode, key_view, q, scores, job.scratch->group_scores, tops);
        if (job.key_turning != nullptr)
            add_mean_scores(job, chunk.tiles, chunk.token, chunk.count, 0, job.rows, scores);

        const bool masked = job.mask != nullptr && last > job.mask_first;
        const bool whole =
            !adjusted && !masked && last - first == slots && first >= all.first && last <= all.last;
        for (std::size_t r = 0; r < job.rows; ++r) {
            float* row = scores + r * score_stride;
            if (!whole)
                adjust_scores(job, r, seen[r], chunk, shifts[r], row);
            if (!whole || job.key_turning != nullptr)
                tops[r] = maximum_of(row, slots, lowest_score);
            const float largest = tops[r];
            if (corrected && largest > top_tiles[r].score)
                find_top(chunk, row, largest, top_tiles[r]);
            float m = largest == lowest_score ? lowest_score : largest * log2_e;
            m = m > maxima[r] || m != m ? m : maxima[r];
            rescale[r] = m == maxima[r] && m != lowest_score ? 1.0f : softmax_rescale(maxima[r], m);
            maxima[r] = m;
        }
        const top_tile& lead = top_tiles[job.rows - 1];
        if (corrected && lead.score > shared_score) {
            shared_score = lead.score;
            copy_tile(scores, job.rows, lead.slot, shared);
        }
        if (per_channel)
            prefetch_channels(keys, after);
        if (in_keys)
            transpose_values(keys, chunk.tiles, chunk.count, values, job.scratch->transposed);
        const chunk_view value_view{
            &values,  in_keys ? transposed : chunk.tiles, chunk.count, &keys, after.tiles, after.count,
            key_share};
        const softmax_rows weights{job.rows, scores, maxima, rescale, denominators};
        if (values.groups() == 1)
            job.value_kernels->value_sums[mode](value_view, weights, sums, value_stride);
        else
            add_group_sums(*job.value_kernels, mode, value_view, weights, job.scratch->group_scores, sums,
                           value_stride);
        first = last;
        last = after_last;
        now = 1 - now;
    }

    if (corrected)
        correct_maxima(job, q, seen, shifts, top_tiles, shared, denominators, maxima, scores);
    for (std::size_t r = 0; r < job.rows; ++r) {
        const std::size_t token = (job.first_row + r) / job.head_group,
                          head = (job.first_row + r) % job.head_group;
        float* row = sums + r * value_stride;
        softmax_state state{maxima[r], denominators[r]};
        if (job.partials != nullptr) {
            float* partial = job.partials + r * job.partial_stride;
            partial[0] = state.maximum;
            partial[1] = state.denominator;
            std::memcpy(partial + 2, row, values.channels * sizeof(float));
            continue;
        }
        shift_maximum(job, shifts[r], state);
        float factor = 1.0f;
        const float seen_weights = state.denominator;
        if (job.sink_logits != nullptr)
            factor = add_sink_logit(state, job.sink_logits[head]);
        const f32 inverse(state.denominator > 0.0f ? factor / state.denominator : 0.0f);
        for (std::size_t i = 0; i < value_stride; i += lanes)
            (f32::load_aligned(row + i) * inverse).store_aligned(row + i);
        restore_output(job, state.denominator > 0.0f ? factor * seen_weights / state.denominator : 0.0f, row);
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(token) * job.output_token_stride +
                                  static_cast<std::ptrdiff_t>(head) * job.output_head_stride;
        const std::ptrdiff_t size = job.output_type == scalar_type::fp32 ? 4 : 2;
        store_outputs(job.output_type, row, values.channels,
                      static_cast<std::byte*>(job.outputs) + at * size);
        if (job.log_sum_exp != nullptr)
            job.log_sum_exp[r] = log_sum_exp_of(state);
    }
}
