// SPDX-License-Identifier: Apache-2.0
//
// The driver of a target: attention of some query rows of one KV head to a range of tokens. The softmax is taken
// online, chunk by chunk, with a running maximum and sum (Milakov and Gimelshein 2018; FlashAttention). Parsed once
// per target.

// Pairs: the kernels of keys of 2 and 3 bits are those of pairs.inl.
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
    // and where parts are joined without it, it is not asked for
    const bool shifted = job.soft_cap > 0.0f || (job.partials == nullptr &&
                                                 (job.log_sum_exp != nullptr || job.sink_logits != nullptr));
    sum_sample sample;
    for (float& factor : sample.factors)
        factor = 1.0f;

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
            pair_query(own, part, keys.traits(), tables + tile_at * pair_table_bytes, codes + tile_at,
                       r - tile_row, rows, code_scales[n], code_offsets[n]);
#endif
            return;
        }
        std::int32_t code_sum = 0;
        round_query(own, part, keys.traits(), codes + tile_at, r - tile_row, rows, code_scales[n], code_sum);
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
        shifts[r] = shifted ? key_shift(job, row) : 0.0f;
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

    const query_rows q{job.rows,    part,        query, query_sums, codes, in_pairs ? tables : nullptr,
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
    // the first chunk from a token on that some row sees
    const bool asks = job.mask != nullptr || job.slots != nullptr;
    const auto seen_from = [&](std::size_t from) {
        row_view c{from, from};
        while (c.last < any.last) {
            c = {c.last, chunk_end(*job.layout, c.last, any.last)};
            if (c.last > any.first && (!asks || some_row_sees(job, seen, c.first, c.last)))
                return c;
        }
        return row_view{c.last, c.last};
    };
    std::size_t now = 0;
    auto [first, last] = seen_from(job.first_token);
    if (first < last)
        list_tiles(job, job.pages, granule, first, last, lists[now]);
    while (first < last) {
        const chunk_tiles& chunk = lists[now];
        chunk_tiles& after = lists[1 - now];
        const row_view next = seen_from(last);
        // past the range's end begins what the next task is likely to walk
        const row_view fetched = last == job.last_token && last % page_tokens == 0 && last < job.fetch_token
                                     ? row_view{last, chunk_end(*job.layout, last, job.fetch_token)}
                                     : next;
        after.count = 0;
        if (fetched.first < fetched.last)
            list_tiles(job, job.pages, granule, fetched.first, fetched.last, after);
        else if (job.next_pages != nullptr)
            list_tiles(job, job.next_pages, granule, job.next_token,
                       chunk_end(*job.layout, job.next_token, job.last_token), after);
        const bool few = chunk.count < page_tiles && !in_keys;
        if (few)
            prefetch_values(values, chunk);
        const std::size_t slots = chunk.count * tile_tokens;
        const chunk_view key_view{&keys,       chunk.tiles,
                                  chunk.count, &values,
                                  chunk.tiles, in_keys || few ? 0 : chunk.count,
                                  value_share, round_up(value_share, line_bytes) / line_bytes};
        if (per_channel)
            add_page_scores(
                job, chunk, key_view, q, [&](const float* own, std::size_t r) { round_row(own, r, 0); }, mode,
                scores, tops);
        else if (groups == 1)
            job.key_kernels->key_scores[mode](key_view, q, scores, tops);
        else
            add_group_scores(job.key_kernels->key_scores[mode], key_view, q, scores,
                             job.scratch->group_scores, tops);
        bool known = true; // tops are those of the scores
        if (job.key_turning != nullptr)
            known =
                add_mean_scores(job, chunk.tiles, chunk.token, chunk.count, 0, job.rows, scores, tops,
                                [&](std::size_t token) { return tokens_seen_by(job, 0, job.rows, token); });

        const bool masked = job.mask != nullptr && last > job.mask_first;
        const bool whole =
            !adjusted && !masked && last - first == slots && first >= all.first && last <= all.last;
        const bool entire = asks && job.soft_cap <= 0.0f && job.alibi_slopes == nullptr &&
                            last - first == slots && first >= all.first && last <= all.last;
        slot_rules::span positions{0, 0};
        if (entire && job.slots != nullptr && job.slots->positions != nullptr)
            positions = positions_of(*job.slots, first, last);
        bool left = whole; // the row's scores are left as they are
        for (std::size_t r = 0; r < job.rows; ++r) {
            float* row = scores + r * score_stride;
            const std::size_t head = (job.first_row + r) % job.head_group;
            if (!whole && entire &&
                (r == 0 || head == 0 || (job.slots != nullptr && job.slots->bias_head_stride != 0)))
                left = leaves_scores(job, (job.first_row + r) / job.head_group, job.first_head + head, first,
                                     last, positions);
            if (!left)
                adjust_scores(job, r, seen[r], chunk, shifts[r], row);
            if (!left || !known)
                tops[r] = maximum_of(row, slots, lowest_score);
            const float largest = tops[r];
            if (corrected && sample.tile.page != nullptr)
                keep_of_row(job, chunk, scores, r, largest, maxima[r] + about_log2(denominators[r]), sample);
            float m = largest == lowest_score ? lowest_score : largest * log2_e;
            m = m > maxima[r] || m != m ? m : maxima[r];
            rescale[r] = m == maxima[r] && m != lowest_score ? 1.0f : softmax_rescale(maxima[r], m);
            maxima[r] = m;
        }
        if (corrected && sample.tile.page == nullptr)
            take_sample(job, q, chunk, seen, shifts, scores, tops, {first, last}, whole, !adjusted && !masked,
                        sample);
        if (per_channel)
            prefetch_channels(keys, after);
        if (in_keys)
            transpose_values(keys, chunk.tiles, chunk.count, values, job.scratch->transposed);
        const chunk_view value_view{&values,     in_keys ? transposed : chunk.tiles,
                                    chunk.count, &keys,
                                    after.tiles, after.count,
                                    key_share,   round_up(key_share, line_bytes) / line_bytes};
        const softmax_rows weights{job.rows, scores, maxima, rescale, denominators};
        if (values.groups() == 1)
            job.value_kernels->value_sums[mode](value_view, weights, sums, value_stride);
        else
            add_group_sums(*job.value_kernels, mode, value_view, weights, job.scratch->group_scores, sums,
                           value_stride);
        first = next.first;
        last = next.last;
        now = 1 - now;
    }

    for (std::size_t r = 0; r < job.rows; ++r)
        if (sample.count[r] != 0)
            sample.factors[r] = factor_of(job, q, r, seen[r], shifts[r], sample, maxima[r], denominators[r]);
    for (std::size_t r = 0; r < job.rows; ++r) {
        const std::size_t token = (job.first_row + r) / job.head_group,
                          head = (job.first_row + r) % job.head_group;
        float* row = sums + r * value_stride;
        // what all weights were too small by, sums were too
        softmax_state state{maxima[r], denominators[r] * sample.factors[r]};
        if (job.partials != nullptr) {
            float* partial = job.partials + r * job.partial_stride;
            partial[0] = state.maximum;
            partial[1] = state.denominator;
            for (std::size_t c = 0; c < values.channels; ++c)
                partial[2 + c] = row[c] * sample.factors[r];
            continue;
        }
        shift_maximum(job, shifts[r], state);
        float factor = 1.0f;
        const float seen_weights = state.denominator;
        if (job.sink_logits != nullptr)
            factor = add_sink_logit(state, job.sink_logits[head]);
        const f32 inverse(state.denominator > 0.0f ? factor * sample.factors[r] / state.denominator : 0.0f);
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
