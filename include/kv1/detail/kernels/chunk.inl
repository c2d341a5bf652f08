// SPDX-License-Identifier: Apache-2.0
//
// What the driver does with a chunk: queries rounded, tiles listed, scores of keys with groups or by channel, what rows
// see, sums of values with groups. Parsed once per target.

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

// The same where bytes have four fields: quarters of a register are the runs, with their bytes transposed.
KV1_LAZY KV1_INLINE void scatter_query_by_4(const std::int8_t* plain, std::size_t padded, std::int8_t* out,
                                            std::size_t rows) {
    for (std::size_t first = 0; first < padded; first += 4 * lanes) {
        const u32 runs =
            transpose_bytes(u32::load_aligned(reinterpret_cast<const std::uint32_t*>(plain + first)));
        std::uint32_t* to[lanes / 4];
        alignas(16) std::uint32_t spare[4];
        for (std::size_t q = 0; q < lanes / 4; ++q) {
            const std::size_t channel = first + 16 * q;
            to[q] = channel < padded ? reinterpret_cast<std::uint32_t*>(out + channel * rows) : spare;
        }
        store_quarters(runs, to);
    }
}

KV1_LAZY KV1_INLINE void scatter_codes(const std::int8_t* plain, std::size_t padded, const format_traits& t,
                                       std::int8_t* codes, std::size_t r, std::size_t rows) {
    switch (t.field_bits(0)) {
    case 1:
        scatter_query<8>(plain, padded, codes + r * 32, rows);
        break;
    case 2:
        scatter_query_by_4(plain, padded, codes + r * 16, rows);
        break;
    case 4:
        scatter_query<2>(plain, padded, codes + r * 8, rows);
        break;
    case 8:
        scatter_query<1>(plain, padded, codes + r * 4, rows);
        break;
    }
}

// Rounds a query row to 8 bits for the fast path. Channels are reordered so that four consecutive bytes are multiplied
// by the four bytes of a lane. codes: those of the row tile; the row is row r of `rows` rows
// in it.
KV1_LAZY inline void round_query(const float* query, std::size_t padded, const format_traits& t,
                                 std::int8_t* codes, std::size_t r, std::size_t rows, float& scale,
                                 std::int32_t& sum) noexcept {
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
    scatter_codes(plain, padded, t, codes, r, rows);
}

// Rounds a query row to 15 bits, as the two rows of a row tile: coarse codes, and finer ones of what these leave. Scores
// of both add up. room: 2 * max_vector_length, aligned; too large for a small stack.
KV1_LAZY inline void round_finely(const float* query, std::size_t padded, const format_traits& t,
                                  std::int8_t* codes, std::int8_t* room, float* scales, float* offsets,
                                  float* sums) noexcept {
    constexpr float parts = 254.0f; // of a coarse step
    f32 largest(0.0f);
    for (std::size_t i = 0; i < padded; i += lanes)
        largest = xs::max(largest, xs::abs(f32::load_aligned(query + i)));
    const float top = xs::reduce_max(largest);
    const f32 inverse(top > 0.0f ? 127.0f / top : 0.0f);
    std::int8_t *const coarse = room, *const fine = room + max_vector_length;
    f32 coarse_sum(0.0f), fine_sum(0.0f);
    for (std::size_t i = 0; i < padded; i += lanes) {
        const f32 quotient = f32::load_aligned(query + i) * inverse;
        const i32 code = rounded_codes(quotient);
        const f32 whole = xs::to_float(code);
        const i32 rest = rounded_codes((quotient - whole) * f32(parts));
        coarse_sum = coarse_sum + whole;
        fine_sum = fine_sum + xs::to_float(rest);
        store_u8(xs::bitwise_cast<std::uint32_t>(code), reinterpret_cast<std::uint8_t*>(coarse) + i);
        store_u8(xs::bitwise_cast<std::uint32_t>(rest), reinterpret_cast<std::uint8_t*>(fine) + i);
    }
    const float half_level = 0.5f * static_cast<float>(t.top_level());
    scales[0] = top / 127.0f;
    scales[1] = scales[0] / parts;
    sums[0] = scales[0] * xs::reduce_add(coarse_sum);
    sums[1] = scales[1] * xs::reduce_add(fine_sum);
    offsets[0] = -half_level * sums[0];
    offsets[1] = -half_level * sums[1];
    scatter_codes(coarse, padded, t, codes, 0, 2);
    scatter_codes(fine, padded, t, codes, 1, 2);
}

// The tiles of tokens first ... last - 1, and tiles that complete their granules. token[k] is the first token of tile
// k; no_token: the tile completes a granule. Precondition: first is a multiple of the granule within its page.
struct chunk_tiles {
    tile_ref tiles[max_chunk_tiles];
    std::size_t token[max_chunk_tiles];
    std::size_t count = 0;
};

KV1_LAZY inline void list_tiles(const attention_job& job, const std::byte* pages, std::size_t granule,
                                std::size_t first, std::size_t last, chunk_tiles& out) noexcept {
    const std::size_t page_tokens = job.layout->page_tokens();
    std::size_t index = first / page_tokens, in_page = first - index * page_tokens, count = 0;
    while (first < last) {
        const std::byte* page = pages + static_cast<std::size_t>(job.block_table[index++]) * job.block_stride;
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

// Prefetches the values of a chunk that is less than a page. (The shares of values that come with tiles of keys lie in a
// row, so they are those tiles' values only where pages are whole.)
KV1_LAZY KV1_NOINLINE inline void prefetch_values(const section_layout& s,
                                                  const chunk_tiles& chunk) noexcept {
    for (std::size_t k = 0; k < chunk.count; ++k) {
        const tile_ref& tile = chunk.tiles[k];
        const auto prefetch_lines = [&](std::size_t begin, std::size_t count) {
            const std::size_t first = tile.token * count / s.tokens;
            const std::size_t last = round_up((tile.token + tile_tokens) * count, s.tokens) / s.tokens;
            for (std::size_t u = 0; u < s.units(); ++u)
                for (std::size_t l = first; l < last; ++l)
                    prefetch(tile.page + s.offset + (u * s.unit_lines() + begin + l) * line_bytes);
        };
        prefetch_lines(0, s.own_lines());
        prefetch_lines(s.first_shared(), s.shared_lines());
    }
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

// False: a query sees none of the tokens first ... last - 1 in a head. What is asked is found out with little, so some of
// several rules that hide them together may be missed.
KV1_LAZY inline bool may_see(const attention_job& job, std::size_t query, std::size_t head, std::size_t first,
                             std::size_t last) noexcept {
    if (first >= last)
        return false;
    if (job.mask != nullptr && first >= job.mask_first &&
        all_are(job.mask + query * job.mask_stride + (first - job.mask_first), last - first, 0))
        return false;
    if (job.slots == nullptr)
        return true;
    const slot_rules& rules = *job.slots;
    if (rules.positions != nullptr) { // in whole tiles: what is none of the tokens stands nowhere
        const slot_rules::span seen = rules.seen_by(query);
        const i32 from(seen.first), to(seen.last);
        bool some = false;
        for (std::size_t t = first / tile_tokens * tile_tokens; !some && t < last; t += lanes) {
            const i32 at = i32::load_unaligned(rules.positions + t);
            some = xs::any((at >= from) & (at <= to));
        }
        if (!some)
            return false;
    }
    if (rules.bias != nullptr) {
        const std::byte* const row = rules.bias_row(query, head);
        const auto element = static_cast<std::size_t>(rules.element());
        // -infinity, as often as it fits: what hides tokens in most masks
        const std::uint32_t infinity = rules.bias_type == scalar_type::fp32   ? 0xff800000u
                                       : rules.bias_type == scalar_type::fp16 ? 0xfc00fc00u
                                                                              : 0xff80ff80u;
        if (all_are(row + (first - rules.bias_first) * element, (last - first) * element, infinity))
            return false;
        alignas(64) float added[tile_tokens];
        bool some = false;
        for (std::size_t t = first; !some && t < last; t += tile_tokens) {
            const std::size_t n = last - t < tile_tokens ? last - t : tile_tokens;
            load_floats(rules.bias_type,
                        row + static_cast<std::ptrdiff_t>(t - rules.bias_first) * rules.element(), n, added);
            for (std::size_t i = 0; i < n; ++i)
                some = some || !(added[i] <= lowest_score);
        }
        return some;
    }
    return true;
}

// Whether some row sees some of the tokens first ... last - 1. True is permitted if none does.
KV1_LAZY KV1_NOINLINE inline bool some_row_sees(const attention_job& job, const row_view* seen,
                                                std::size_t first, std::size_t last) noexcept {
    const bool by_head = job.slots != nullptr && job.slots->bias_head_stride != 0;
    for (std::size_t r = 0; r < job.rows; ++r) {
        const std::size_t row = job.first_row + r, head = row % job.head_group;
        if (r != 0 && head != 0 && !by_head) // as the row before
            continue;
        if (may_see(job, row / job.head_group, job.first_head + head,
                    first > seen[r].first ? first : seen[r].first, last < seen[r].last ? last : seen[r].last))
            return true;
    }
    return false;
}

// The tokens of a tile that a query sees in a head, a bit each.
KV1_LAZY KV1_NOINLINE inline std::uint32_t tokens_seen(const attention_job& job, const row_view& seen,
                                                       std::size_t query, std::size_t head,
                                                       std::size_t first) noexcept {
    const std::size_t begin = seen.first > first ? seen.first - first : 0;
    const std::size_t end = seen.last < first + tile_tokens ? seen.last - first : tile_tokens;
    if (seen.last <= first || begin >= end)
        return 0;
    bool shown[tile_tokens] = {};
    for (std::size_t i = begin; i < end; ++i)
        shown[i] = true;
    for (std::size_t i = begin; job.mask != nullptr && i < end; ++i)
        if (first + i >= job.mask_first)
            shown[i] = job.mask[query * job.mask_stride + (first + i - job.mask_first)] != 0;
    if (job.slots != nullptr && job.slots->positions != nullptr) {
        const slot_rules::span span = job.slots->seen_by(query);
        const std::int32_t* const at = job.slots->positions + first;
        for (std::size_t i = begin; i < end; ++i)
            shown[i] = shown[i] && at[i] >= span.first && at[i] <= span.last;
    }
    if (job.slots != nullptr && job.slots->bias != nullptr) {
        const slot_rules& rules = *job.slots;
        alignas(64) float added[tile_tokens];
        load_floats(rules.bias_type,
                    rules.bias_row(query, head) +
                        static_cast<std::ptrdiff_t>(first + begin - rules.bias_first) * rules.element(),
                    end - begin, added);
        for (std::size_t i = begin; i < end; ++i)
            shown[i] = shown[i] && !(added[i - begin] <= lowest_score);
    }
    std::uint32_t bits = 0;
    for (std::size_t i = 0; i < tile_tokens; ++i)
        bits |= static_cast<std::uint32_t>(shown[i]) << i;
    return bits;
}

// Those that one of the job's rows first_row ... first_row + rows - 1 sees.
KV1_LAZY inline std::uint32_t tokens_seen_by(const attention_job& job, std::size_t first_row,
                                             std::size_t rows, std::size_t first) noexcept {
    const bool by_head = job.slots != nullptr && job.slots->bias_head_stride != 0;
    std::uint32_t bits = 0;
    for (std::size_t r = first_row; r < first_row + rows; ++r) {
        const std::size_t row = job.first_row + r, head = row % job.head_group;
        if (r == first_row || head == 0 || by_head)
            bits |= tokens_seen(job, view_of(job, r), row / job.head_group, job.first_head + head, first);
    }
    return bits;
}

// Whether a query sees all tokens of a chunk in a head, and no mask or rule changes a score. False is permitted.
// positions: the smallest and the largest of the chunk.
KV1_LAZY inline bool leaves_scores(const attention_job& job, std::size_t query, std::size_t head,
                                   std::size_t first, std::size_t last, slot_rules::span positions) noexcept {
    if (job.mask != nullptr && last > job.mask_first) {
        const std::size_t from = first > job.mask_first ? first : job.mask_first;
        if (!all_are(job.mask + query * job.mask_stride + (from - job.mask_first), last - from, 0x01010101u))
            return false;
    }
    if (job.slots == nullptr)
        return true;
    const slot_rules& rules = *job.slots;
    if (rules.positions != nullptr) {
        const slot_rules::span seen = rules.seen_by(query);
        if (positions.first < seen.first || positions.last > seen.last)
            return false;
    }
    if (rules.bias == nullptr)
        return rules.slopes == nullptr;
    const auto element = static_cast<std::size_t>(rules.element());
    return all_are(rules.bias_row(query, head) + (first - rules.bias_first) * element,
                   (last - first) * element, 0);
}

// The smallest and the largest position of the tiles of tokens first ... last - 1.
KV1_LAZY KV1_INLINE slot_rules::span positions_of(const slot_rules& rules, std::size_t first,
                                                  std::size_t last) {
    i32 low = i32::load_unaligned(rules.positions + first), high = low;
    for (std::size_t t = first; t < last; t += lanes) {
        const i32 at = i32::load_unaligned(rules.positions + t);
        low = xs::min(low, at);
        high = xs::max(high, at);
    }
    return {xs::reduce_min(low), xs::reduce_max(high)};
}

// Sets the scores of a tile but those of tokens first ... last - 1 to lowest_score.
KV1_LAZY KV1_INLINE void hide_tokens(float* tile, std::size_t first, std::size_t last) {
    alignas(64) static constexpr float places[tile_tokens] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                              8, 9, 10, 11, 12, 13, 14, 15};
    const f32 from(static_cast<float>(first < tile_tokens ? first : tile_tokens)),
        to(static_cast<float>(last < tile_tokens ? last : tile_tokens));
    for (std::size_t i = 0; i < tile_tokens; i += lanes) {
        const f32 place = f32::load_aligned(places + i);
        xs::select((place >= from) & (place < to), f32::load_aligned(tile + i), f32(lowest_score))
            .store_aligned(tile + i);
    }
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
    // Where tokens follow one another, the tiles that a row sees whole do so, too.
    std::size_t inner_from = chunk.count, inner_to = chunk.count;
    const std::size_t start = chunk.token[0];
    if (job.mask == nullptr && chunk.token[chunk.count - 1] == start + (chunk.count - 1) * tile_tokens) {
        inner_from = seen.first > start ? (seen.first - start + tile_tokens - 1) / tile_tokens : 0;
        inner_to = seen.last > start ? (seen.last - start) / tile_tokens : 0;
    }
    for (std::size_t k = 0; k < chunk.count; ++k) {
        if (k == inner_from && inner_to > k)
            k = inner_to;
        if (k >= chunk.count)
            break;
        const std::size_t first = chunk.token[k];
        float* tile = scores + k * tile_tokens;
        const bool inside = first != no_token && first >= seen.first && first + tile_tokens <= seen.last;
        const bool masked = job.mask != nullptr && first + tile_tokens > job.mask_first;
        if (inside && !masked)
            continue;
        if (!masked || first == no_token) {
            hide_tokens(tile, first == no_token || seen.first < first ? 0 : seen.first - first,
                        first == no_token || seen.last < first ? 0 : seen.last - first);
            continue;
        }
        const std::uint8_t* mask = job.mask + token * job.mask_stride;
        if (inside && first >= job.mask_first && all_set(mask + (first - job.mask_first)))
            continue;
        for (std::size_t i = 0; i < tile_tokens; ++i) {
            const std::size_t t = first + i;
            if (t < seen.first || t >= seen.last || (t >= job.mask_first && mask[t - job.mask_first] == 0))
                tile[i] = lowest_score;
        }
    }
}

// Scores of keys with groups of channels: the sum of the scores of all groups. q: queries of the first group, those of
// the others behind it, [group][row]. own: room for the scores of one group.
template <class Kernel>
KV1_NOINLINE void add_group_scores(Kernel* key_scores, const chunk_view& view, const query_rows& q,
                                   float* scores, float* own, float* tops) noexcept {
    const std::size_t groups = view.layout->groups(), slots = view.count * tile_tokens;
    for (std::size_t g = 0; g < groups; ++g) {
        const section_layout keys = view.layout->group(g);
        const group_share next = fetched_with(view, g, groups);
        const std::size_t row = g * q.rows, at = row * q.stride;
        key_scores({&keys, view.tiles, view.count, &next.section, view.next_tiles, view.next_count,
                    view.next_share, next.lines},
                   {q.rows, q.stride, q.values == nullptr ? nullptr : q.values + at, q.sums + row,
                    q.codes + at, q.tables == nullptr ? nullptr : q.tables + pair_table_bytes * at,
                    q.code_scales + row, q.code_offsets + row},
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
    const f32 steps(compact_steps(s.traits()));
    std::size_t c = 0;
    for (; c + lanes <= s.channels; c += lanes) {
        f32 slope, base;
        if (compact) {
            decode_compact_words(load_u16(scales + c), steps, slope, base);
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
                       view.next_share,
                       view.next_lines};
        float* at = scores + first * tile_tokens;
        if (job.open_keys != nullptr && chunk.token[first] >= job.open_from) {
            tile_ref open_tiles[max_chunk_tiles];
            for (std::size_t k = first; k < last; ++k)
                open_tiles[k - first] = {job.open_keys, view.tiles[k].token};
            own.layout = &job.open_layout->keys();
            own.tiles = open_tiles;
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
        const section_layout values = view.layout->group(g);
        const group_share next = fetched_with(view, g, groups);
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
        kernels.value_sums[mode]({&values, view.tiles, view.count, &next.section, view.next_tiles,
                                  view.next_count, view.next_share, next.lines},
                                 own, sums + g * values.channels, stride);
    }
}
