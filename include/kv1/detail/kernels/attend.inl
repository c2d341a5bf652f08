// SPDX-License-Identifier: Apache-2.0
//
// The driver of a target: some query rows of one KV head against a range of tokens, with the softmax taken
// online per block of tokens (running maximum and sum; Milakov and Gimelshein 2018, FlashAttention). Parsed
// once per target. Scratch lies on the stack, about 70 KiB.

// exp of the scores less the new maximum, zero from `visible` on; returns their sum.
KV1_INLINE float exponentiate(float* scores, std::size_t visible, std::size_t padded, float maximum) {
    f32 sum(0.0f);
    const f32 m(maximum);
    std::size_t i = 0;
    for (; i + lanes <= visible; i += lanes) {
        const f32 p = xs::exp(f32::load_aligned(scores + i) - m);
        p.store_aligned(scores + i);
        sum = sum + p;
    }
    float total = xs::reduce_add(sum);
    if (i < visible) { // the register that the limit cuts
        alignas(64) float part[lanes];
        xs::exp(f32::load_aligned(scores + i) - m).store_aligned(part);
        for (std::size_t k = 0; i + k < visible; ++k) {
            scores[i + k] = part[k];
            total += part[k];
        }
    }
    for (i = visible; i < padded; ++i)
        scores[i] = 0.0f;
    return total;
}

KV1_INLINE float maximum_of(const float* scores, std::size_t visible, float start) {
    f32 largest(start);
    std::size_t i = 0;
    for (; i + lanes <= visible; i += lanes)
        largest = xs::max(largest, f32::load_aligned(scores + i));
    float m = xs::reduce_max(largest);
    for (; i < visible; ++i)
        m = scores[i] > m ? scores[i] : m;
    return m;
}

// The 8-bit query of the fast path, reordered so that four consecutive bytes meet the four bytes of a lane.
inline void round_query(const float* query, std::size_t padded, const format_traits& t,
                        std::int8_t* const (&codes)[2], float& scale, std::int32_t& sum) noexcept {
    f32 largest(0.0f);
    for (std::size_t i = 0; i < padded; i += lanes)
        largest = xs::max(largest, xs::abs(f32::load_aligned(query + i)));
    const float top = xs::reduce_max(largest);
    scale = top / 127.0f;
    const f32 inverse(top > 0.0f ? 127.0f / top : 0.0f);
    alignas(64) std::int8_t plain[max_head_dim];
    i32 total(0);
    for (std::size_t i = 0; i < padded; i += lanes) {
        const i32 code = rounded_codes(f32::load_aligned(query + i) * inverse);
        total = total + code;
        store_u8(xs::bitwise_cast<std::uint32_t>(code), reinterpret_cast<std::uint8_t*>(plain) + i);
    }
    sum = xs::reduce_add(total);
    for (int p = 0; p < t.part_count(); ++p) {
        const auto planes = static_cast<std::size_t>(8 / t.field_bits(p));
        for (std::size_t line = 0; line < padded; line += 4 * planes)
            for (std::size_t f = 0; f < planes; ++f)
                for (std::size_t j = 0; j < 4; ++j)
                    codes[p][line + f * 4 + j] = plain[line + j * planes + f];
    }
}

inline constexpr float lowest = std::numeric_limits<float>::lowest();

inline void attend_rows(const attention_job& job) noexcept {
    const section_layout& keys = job.layout->keys();
    const section_layout& values = job.layout->values();
    const std::size_t key_stride = round_up(keys.channels, 32);
    const std::size_t value_stride = round_up(values.channels, 32);
    const bool integer_keys = job.mode == precision::fast && keys.traits().code_bits != 0;
    const std::size_t mode = static_cast<std::size_t>(job.mode);

    alignas(64) float query[scratch_floats];
    alignas(64) float sums[scratch_floats];
    alignas(64) float scores[max_rows * max_block_tokens];
    alignas(64) std::int8_t codes[2][scratch_floats];
    float query_sums[max_rows], code_scales[max_rows], maxima[max_rows], denominators[max_rows],
        rescale[max_rows];
    std::int32_t code_sums[max_rows];
    std::size_t limits[max_rows];

    std::size_t last = 0;
    for (std::size_t r = 0; r < job.rows; ++r) {
        const std::size_t token = (job.first_row + r) / job.group, head = (job.first_row + r) % job.group;
        float* row = query + r * key_stride;
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(token) * job.query_token_stride +
                                  static_cast<std::ptrdiff_t>(head) * job.query_head_stride;
        const std::ptrdiff_t size = job.query_type == scalar_type::fp32 ? 4 : 2;
        load_floats(job.query_type, static_cast<const std::byte*>(job.queries) + at * size, keys.channels,
                    row);
        for (std::size_t i = keys.channels; i < key_stride; ++i)
            row[i] = 0.0f;
        f32 sum(0.0f);
        for (std::size_t i = 0; i < key_stride; i += lanes) {
            const f32 scaled = f32::load_aligned(row + i) * f32(job.scale);
            scaled.store_aligned(row + i);
            sum = sum + scaled;
        }
        query_sums[r] = xs::reduce_add(sum);
        if (integer_keys)
            round_query(row, key_stride, keys.traits(),
                        {codes[0] + r * key_stride, codes[1] + r * key_stride}, code_scales[r], code_sums[r]);
        for (std::size_t i = 0; i < value_stride; ++i)
            sums[r * value_stride + i] = 0.0f;
        maxima[r] = lowest;
        denominators[r] = 0.0f;
        const std::size_t limit = job.visible_base + token * job.visible_step;
        limits[r] = limit < job.last_token ? limit : job.last_token;
        last = limits[r] > last ? limits[r] : last;
    }

    const query_rows q{job.rows, key_stride, query, query_sums, {codes[0], codes[1]}, code_scales, code_sums};
    const std::size_t page_tokens = keys.tokens;
    for (std::size_t first = job.first_token; first < last;) {
        const std::size_t in_page = first % page_tokens;
        std::size_t n = page_tokens - in_page < max_block_tokens ? page_tokens - in_page : max_block_tokens;
        n = last - first < n ? last - first : n;
        const std::byte* page =
            job.pages + static_cast<std::size_t>(job.block_table[first / page_tokens]) * job.block_stride;
        const std::size_t tiles = round_up(n, tile_tokens);
        const std::size_t padded = round_up(n, 32);
        const section_view key_view{&keys, page, in_page, tiles};
        job.key_kernels->key_scores[mode](key_view, q, scores, max_block_tokens);

        for (std::size_t r = 0; r < job.rows; ++r) {
            float* row = scores + r * max_block_tokens;
            const std::size_t visible = limits[r] <= first      ? 0
                                        : limits[r] - first < n ? limits[r] - first
                                                                : n;
            if (job.mask != nullptr) {
                const std::uint8_t* mask = job.mask + (job.first_row + r) / job.group * job.mask_stride;
                for (std::size_t t = job.mask_first > first ? job.mask_first - first : 0; t < visible; ++t)
                    if (mask[first + t - job.mask_first] == 0)
                        row[t] = lowest;
            }
            const float m = maximum_of(row, visible, maxima[r]);
            rescale[r] = maxima[r] == lowest ? 0.0f : std::exp(maxima[r] - m);
            maxima[r] = m;
            // nothing seen so far: every weight is zero, whatever the masked scores say
            const float seen = exponentiate(row, m == lowest ? 0 : visible, padded, m);
            denominators[r] = denominators[r] * rescale[r] + seen;
        }
        const section_view value_view{&values, page, in_page, tiles};
        const weight_rows w{job.rows, max_block_tokens, scores, rescale};
        job.value_kernels->value_sums[mode](value_view, w, sums, value_stride);
        first += n;
    }

    for (std::size_t r = 0; r < job.rows; ++r) {
        const std::size_t token = (job.first_row + r) / job.group, head = (job.first_row + r) % job.group;
        float* row = sums + r * value_stride;
        if (job.partials != nullptr) {
            float* partial = job.partials + r * job.partial_stride;
            partial[0] = maxima[r];
            partial[1] = denominators[r];
            std::memcpy(partial + 2, row, values.channels * sizeof(float));
            continue;
        }
        const f32 inverse(denominators[r] > 0.0f ? 1.0f / denominators[r] : 0.0f);
        for (std::size_t i = 0; i < value_stride; i += lanes)
            (f32::load_aligned(row + i) * inverse).store_aligned(row + i);
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(token) * job.output_token_stride +
                                  static_cast<std::ptrdiff_t>(head) * job.output_head_stride;
        const std::ptrdiff_t size = job.output_type == scalar_type::fp32 ? 4 : 2;
        store_floats(job.output_type, row, values.channels, static_cast<std::byte*>(job.outputs) + at * size);
        if (job.log_sum_exp != nullptr)
            job.log_sum_exp[r] = denominators[r] > 0.0f ? maxima[r] + std::log(denominators[r])
                                                        : -std::numeric_limits<float>::infinity();
    }
}
