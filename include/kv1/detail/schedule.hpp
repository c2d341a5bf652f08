// SPDX-License-Identifier: Apache-2.0
//
// Splits attention into tasks: over KV heads, over query rows (at most 16 a task) and, if that gives fewer
// than 64 tasks, over ranges of tokens. Ranges give partial results, which are merged in order by their
// maxima. The split depends on shapes alone, so results do not depend on the number of threads.
//
// Example: one query token, 32 query heads, 8 KV heads, 32,768 tokens in pages of 64. A KV head has 4 query
// rows, which fit a task. That makes 8 tasks, so the tokens are split into 8 ranges of 4,096: 64 tasks, and 32
// merges, one a query head.
#pragma once

#include <kv1/detail/arena.hpp>
#include <kv1/detail/kernels/interface.hpp>
#include <kv1/detail/kernels/restore.hpp>
#include <kv1/detail/kernels/softmax.hpp>
#include <kv1/detail/scratch_pool.hpp>
#include <kv1/executor.hpp>
#include <kv1/tensor.hpp>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <limits>
#include <memory>
#include <span>

namespace kv1::inline KV1_ABI::detail {

inline constexpr std::size_t wanted_tasks = 64;
inline constexpr std::size_t smallest_range = 2048; // tokens; shorter ones cost more than they gain

// How a call is split. Each KV head has row_splits * ranges tasks. A range has range_tokens tokens; the last
// may have fewer.
struct attention_split {
    std::size_t rows_per_task, row_splits, first_token, range_tokens, ranges;
};

// first_token ... last_token - 1: the tokens that any query row sees.
inline attention_split split_attention(const page_layout& layout, std::size_t rows, std::size_t kv_heads,
                                       std::size_t first_token, std::size_t last_token) noexcept {
    attention_split s{};
    s.rows_per_task = (std::min)(rows_for(layout.keys().channels), rows_for(layout.values().channels));
    s.row_splits = (rows + s.rows_per_task - 1) / s.rows_per_task;
    s.first_token = (std::min)(first_token, last_token) / layout.page_tokens() * layout.page_tokens();
    const std::size_t tokens = last_token - s.first_token;
    const std::size_t tasks = kv_heads * s.row_splits;
    const std::size_t wanted = tasks >= wanted_tasks ? 1 : (wanted_tasks + tasks - 1) / tasks;
    // a power of two of equal ranges divides among 2, 4, 8 or 16 threads
    const std::size_t ranges =
        std::bit_floor(std::max<std::size_t>(1, (std::min)(wanted, tokens / smallest_range)));
    s.range_tokens = round_up(std::max<std::size_t>(1, (tokens + ranges - 1) / ranges), layout.page_tokens());
    s.ranges = std::max<std::size_t>(1, (tokens + s.range_tokens - 1) / s.range_tokens);
    return s;
}

// Merges the partial results of one query row into the first. There are `ranges` of them, `stride` floats
// apart, each {maximum, sum of weights, weighted sums of the channels}.
inline void merge_partials(float* partials, std::size_t ranges, std::size_t stride,
                           std::size_t channels) noexcept {
    float maximum = lowest_score;
    for (std::size_t i = 0; i < ranges; ++i)
        maximum = (std::max)(maximum, partials[i * stride]);
    float denominator = 0.0f;
    for (std::size_t i = 0; i < ranges; ++i) {
        float* p = partials + i * stride;
        const float factor = softmax_rescale(p[0], maximum);
        denominator += p[1] * factor;
        for (std::size_t c = 0; c < channels; ++c)
            partials[2 + c] = i == 0 ? p[2 + c] * factor : partials[2 + c] + p[2 + c] * factor;
    }
    partials[0] = maximum;
    partials[1] = denominator;
}

// Optional arguments, one number a query head; null: not given.
struct head_options {
    const float* alibi_slopes = nullptr;
    const float* sink_logits = nullptr;
};

// Attends for all KV heads. `common` is the job of KV head 0, with all of its query rows and tokens. Errors:
// out_of_memory.
inline status attend_heads(const attention_job& common, std::size_t kv_heads, const tensor_view& queries,
                           const mutable_tensor_view& outputs, const head_options& heads,
                           std::span<float> log_sum_exp, executor_view run) noexcept {
    const page_layout& layout = *common.layout;
    const std::size_t rows = queries.tokens() * common.head_group;
    const std::size_t channels = layout.values().channels;
    // the tokens front ... reach - 1 are all that any query sees
    std::size_t front = common.first_visible;
    if (common.window != 0) {
        const std::ptrdiff_t from = common.first_position + 1 - static_cast<std::ptrdiff_t>(common.window);
        front = (std::max)(front, from > 0 ? static_cast<std::size_t>(from) : 0);
    }
    const std::size_t reach =
        (std::min)(common.last_token, common.visible_base + (queries.tokens() - 1) * common.visible_step);
    const attention_split split = split_attention(layout, rows, kv_heads, front, reach);
    const std::size_t stride = round_up(channels + 2, 16);

    std::unique_ptr<float[]> partials;
    if (split.ranges > 1) {
        const std::size_t count = kv_heads * rows * split.ranges * stride;
        partials.reset(new (std::nothrow) float[count]);
        if (partials == nullptr)
            return {errc::out_of_memory, "no memory for partial results"};
    }

    std::unique_ptr<float[]> queries_in_basis; // [KV head][row][channels]
    if (common.key_basis) {
        queries_in_basis.reset(new (std::nothrow) float[kv_heads * rows * layout.keys().channels]);
        if (queries_in_basis == nullptr)
            return {errc::out_of_memory, "no memory for queries in another basis"};
    }

    const auto head_offset = [&](std::size_t kv_head) { return kv_head * common.head_group; };
    const auto job_for = [&](std::size_t kv_head, std::size_t row_split) {
        attention_job job = common;
        job.pages = common.pages + kv_head * layout.bytes();
        if (common.open_keys != nullptr)
            job.open_keys = common.open_keys + kv_head * common.open_layout->bytes();
        job.queries = queries.at(0, head_offset(kv_head));
        job.query_type = queries.type();
        job.query_token_stride = queries.token_stride();
        job.query_head_stride = queries.head_stride();
        job.outputs = outputs.at(0, head_offset(kv_head));
        job.output_type = outputs.type();
        job.output_token_stride = outputs.token_stride();
        job.output_head_stride = outputs.head_stride();
        job.first_row = row_split * split.rows_per_task;
        job.rows = (std::min)(split.rows_per_task, rows - job.first_row);
        job.first_token = split.first_token;
        job.alibi_slopes =
            heads.alibi_slopes == nullptr ? nullptr : heads.alibi_slopes + head_offset(kv_head);
        job.sink_logits = heads.sink_logits == nullptr ? nullptr : heads.sink_logits + head_offset(kv_head);
        if (common.key_means != nullptr)
            job.key_means = common.key_means + kv_head * layout.keys().channels;
        if (common.key_basis) {
            job.key_basis.columns += kv_head * common.key_basis.n * common.key_basis.stride;
            job.queries_in_basis = queries_in_basis.get() + kv_head * rows * layout.keys().channels;
        }
        if (common.value_basis)
            job.value_basis.columns += kv_head * common.value_basis.n * common.value_basis.stride;
        if (common.key_turning != nullptr)
            job.key_turning = common.key_turning + kv_head;
        if (common.value_means != nullptr)
            job.value_means = common.value_means + kv_head * channels;
        return job;
    };
    // log_sum_exp is [tokens][query heads]; `row` counts the query rows of one KV head
    const auto lse_of = [&](std::size_t kv_head, std::size_t row) -> float& {
        return log_sum_exp[row / common.head_group * queries.heads() + head_offset(kv_head) +
                           row % common.head_group];
    };

    std::atomic<bool> starved{false}; // a task had no scratch
    if (common.key_basis) {           // once for all ranges
        auto enter_task = [&](std::size_t task) {
            const scratch_lease scratch(*common.scratches);
            if (!scratch) {
                starved.store(true, std::memory_order_relaxed);
                return;
            }
            const std::size_t n = layout.keys().channels;
            const attention_job job = job_for(task / split.row_splits, task % split.row_splits);
            float* const own = scratch.as<attention_scratch>().query;
            for (std::size_t r = 0; r < job.rows; ++r) {
                const std::size_t row = job.first_row + r;
                common.target->load_floats(
                    queries.type(),
                    queries.at(row / common.head_group,
                               head_offset(task / split.row_splits) + row % common.head_group),
                    n, own + r * n);
            }
            common.target->enter_basis(job.key_basis, own, job.rows,
                                       queries_in_basis.get() +
                                           (task / split.row_splits * rows + job.first_row) * n);
        };
        run(kv_heads * split.row_splits, task_view(enter_task));
        if (starved.load(std::memory_order_relaxed))
            return no_scratch();
    }
    auto attend_task = [&](std::size_t task) {
        const scratch_lease scratch(*common.scratches);
        if (!scratch) {
            starved.store(true, std::memory_order_relaxed);
            return;
        }
        const std::size_t range = task % split.ranges, row_split = task / split.ranges % split.row_splits,
                          kv_head = task / split.ranges / split.row_splits;
        attention_job job = job_for(kv_head, row_split);
        float lse[max_rows];
        if (split.ranges > 1) {
            job.first_token = split.first_token + range * split.range_tokens;
            job.last_token = (std::min)(common.last_token, job.first_token + split.range_tokens);
            job.fetch_token = reach;
            job.partials =
                partials.get() + ((kv_head * rows + job.first_row) * split.ranges + range) * stride;
            job.partial_stride = split.ranges * stride;
        }
        job.log_sum_exp = log_sum_exp.empty() ? nullptr : lse;
        job.scratch = &scratch.as<attention_scratch>();
        job.target->attend_rows(job);
        if (split.ranges == 1 && !log_sum_exp.empty())
            for (std::size_t r = 0; r < job.rows; ++r)
                lse_of(kv_head, job.first_row + r) = lse[r];
    };
    run(kv_heads * split.row_splits * split.ranges, task_view(attend_task));
    if (starved.load(std::memory_order_relaxed))
        return no_scratch();
    if (split.ranges == 1)
        return {};

    auto merge_task = [&](std::size_t task) {
        const std::size_t kv_head = task / rows, row = task % rows;
        float* partial = partials.get() + task * split.ranges * stride;
        merge_partials(partial, split.ranges, stride, channels);
        const std::size_t head = head_offset(kv_head) + row % common.head_group;
        softmax_state state{partial[0], partial[1]};
        const attention_job job = job_for(kv_head, 0);
        if (job.key_means != nullptr) {
            float query[max_vector_length];
            common.target->load_floats(queries.type(), queries.at(row / common.head_group, head),
                                       layout.keys().channels, query);
            shift_maximum(job, key_shift(job, query), state);
        }
        const float seen_weights = state.denominator;
        const float factor =
            heads.sink_logits == nullptr ? 1.0f : add_sink_logit(state, heads.sink_logits[head]);
        for (std::size_t c = 0; c < channels; ++c)
            partial[2 + c] = state.denominator > 0.0f ? partial[2 + c] * factor / state.denominator : 0.0f;
        restore_output(job, state.denominator > 0.0f ? factor * seen_weights / state.denominator : 0.0f,
                       partial + 2);
        common.target->store_outputs(outputs.type(), partial + 2, channels,
                                     outputs.at(row / common.head_group, head));
        if (!log_sum_exp.empty())
            lse_of(kv_head, row) = log_sum_exp_of(state);
    };
    run(kv_heads * rows, task_view(merge_task));
    return {};
}

} // namespace kv1::inline KV1_ABI::detail
