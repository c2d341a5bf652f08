// SPDX-License-Identifier: Apache-2.0
//
// Attention where what a query sees is not simply the first tokens of one table: sliding windows, dropped
// pages amid the queries, fp16 sinks and windows beside a quantized body. Per query and part it is a run of
// tokens; queries whose runs move in step are attended to together, a part at a time, and parts are joined by
// their log-sum-exp.
#pragma once

#include <kv1/attention.hpp>

#include <kv1/detail/buffer.hpp>
#include <kv1/detail/schedule.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

namespace kv1::inline KV1_ABI::detail {

// Tokens of a part that a query sees, as places in the part's run of blocks; first == last == 0 where none.
struct visible_run {
    std::size_t first = 0, last = 0;
    [[nodiscard]] bool empty() const noexcept { return first == last; }
    friend bool operator==(const visible_run&, const visible_run&) = default;
};

inline constexpr std::size_t max_parts = 3;

// One query's runs, by part.
using visible_runs = std::array<visible_run, max_parts>;

// A part's pages and kernels; the fields of a job that do not change from query to query.
struct part_source {
    attention_job job{};
    bool used = false;
};

// Log-sum-exp and outputs of some rows, rows in the order [tokens][query heads].
struct row_results {
    buffer<float> outputs, log_sum_exp;
    [[nodiscard]] bool resize(std::size_t rows, std::size_t channels) noexcept {
        return outputs.resize(rows * channels) && log_sum_exp.resize(rows);
    }
    // A logit without a value joins row r's softmax.
    void add_sink(std::size_t r, std::size_t channels, float sink) noexcept {
        const float top = (std::max)(log_sum_exp[r], sink);
        const float own = std::exp(log_sum_exp[r] - top), sum = own + std::exp(sink - top);
        for (std::size_t c = 0; c < channels; ++c)
            outputs[r * channels + c] *= own / sum;
        log_sum_exp[r] = top + std::log(sum);
    }
};

// Queries first ... first + count - 1, in each part: the runs of the first one, and how far the ends move
// from query to query.
struct query_run {
    std::size_t first, count;
    visible_runs from;
    std::array<std::size_t, max_parts> first_step, last_step; // 0 or 1
};

// The longest run of queries from `first` on that move in step. runs(i) gives query i's.
template <class Runs>
query_run next_query_run(std::size_t first, std::size_t queries, std::size_t longest, Runs&& runs) noexcept {
    query_run q{first, 1, runs(first), {}, {}};
    visible_runs before = q.from;
    for (; first + q.count < queries && q.count < longest; ++q.count) {
        const visible_runs now = runs(first + q.count);
        for (std::size_t p = 0; p < max_parts; ++p) {
            const std::size_t up = now[p].first - before[p].first, end = now[p].last - before[p].last;
            if (now[p].empty() != before[p].empty() || up > 1 || end > 1)
                return q;
            if (q.count == 1) {
                q.first_step[p] = up;
                q.last_step[p] = end;
            } else if (up != q.first_step[p] || end != q.last_step[p]) {
                return q;
            }
        }
        before = now;
    }
    return q;
}

class part_attention {
public:
    part_attention(std::size_t kv_heads, std::size_t page_tokens, executor_view run) noexcept
        : kv_heads_(kv_heads), page_(page_tokens), run_(run) {}

    // All queries of a run over all parts, to `total`.
    status operator()(std::span<const part_source> parts, const query_run& q, const tensor_view& queries,
                      row_results& total) noexcept {
        const std::size_t rows = q.count * queries.heads(), channels = channels_of(parts);
        if (!total.resize(rows, channels))
            return no_memory();
        std::fill(total.outputs.begin(), total.outputs.end(), 0.0f);
        std::fill(total.log_sum_exp.begin(), total.log_sum_exp.end(),
                  -std::numeric_limits<float>::infinity());
        const tensor_view some = queries.rows(q.first, q.count);
        for (std::size_t p = 0; p < parts.size(); ++p)
            if (parts[p].used && !q.from[p].empty())
                if (const status s =
                        attend_part(parts[p].job, q.from[p], q.first_step[p], q.last_step[p], some, total);
                    !s)
                    return s;
        return {};
    }

private:
    static status no_memory() noexcept { return {errc::out_of_memory, "no memory for partial results"}; }
    static std::size_t channels_of(std::span<const part_source> parts) noexcept {
        for (const part_source& p : parts)
            if (p.used)
                return p.job.layout->values().channels;
        return 0;
    }

    status attend_part(attention_job job, visible_run from, std::size_t first_step, std::size_t last_step,
                       const tensor_view& queries, row_results& total) noexcept {
        const std::size_t skipped = from.first / page_; // pages that no query sees
        job.block_table += skipped;
        job.open_from -= (std::min)(skipped * page_, job.open_from);
        from.first -= skipped * page_;
        from.last -= skipped * page_;
        job.last_token = from.last + (queries.tokens() - 1) * last_step;
        job.visible_base = from.last;
        job.visible_step = last_step;
        job.first_visible = from.first;
        // a lower end that moves is a window of one token at a position that moves
        job.first_position = static_cast<std::ptrdiff_t>(from.first);
        job.window = first_step;
        return attend(job, queries, total);
    }

    status attend(const attention_job& job, const tensor_view& queries, row_results& total) noexcept {
        const std::size_t heads = queries.heads(), channels = job.layout->values().channels;
        const std::size_t rows = queries.tokens() * heads;
        if (!part_.resize(rows, channels))
            return no_memory();
        if (const status s = attend_heads(job, kv_heads_, queries,
                                          {part_.outputs.data(), queries.tokens(), heads, channels}, {},
                                          {part_.log_sum_exp.data(), rows}, run_);
            !s)
            return s;
        const std::span<float> outputs(total.outputs.data(), rows * channels),
            lse(total.log_sum_exp.data(), rows);
        const attention_part both[] = {
            {outputs, lse}, {{part_.outputs.data(), rows * channels}, {part_.log_sum_exp.data(), rows}}};
        return try_merge_attention(both, channels, outputs, lse);
    }

    std::size_t kv_heads_, page_;
    executor_view run_;
    row_results part_;
};

} // namespace kv1::inline KV1_ABI::detail
