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
#include <kv1/detail/vector_sums.hpp>
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
    const std::size_t front = (std::min)(first_token, last_token), in_page = front % layout.page_tokens();
    s.first_token = front - in_page;
    const std::size_t tokens = last_token - s.first_token;
    const std::size_t tasks = kv_heads * s.row_splits;
    const std::size_t wanted = tasks >= wanted_tasks ? 1 : (wanted_tasks + tasks - 1) / tasks;
    // a power of two of equal ranges divides among 2, 4, 8 or 16 threads
    const std::size_t ranges =
        std::bit_floor(std::max<std::size_t>(1, (std::min)(wanted, tokens / smallest_range)));
    s.range_tokens = round_up(std::max<std::size_t>(1, (tokens + ranges - 1) / ranges), layout.page_tokens());
    s.ranges = std::max<std::size_t>(1, (tokens + s.range_tokens - 1) / s.range_tokens);
    // What of the first page nobody sees costs as much as other tokens. A window of 32 fp16 tokens may lie behind 32 of
    // its page. Ranges that follow each other keep to pages: the end of one fetches the begin of the next.
    if (s.ranges == 1)
        s.first_token = front - in_page % granule_of(layout);
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
        if (i == 0)
            multiply(p + 2, factor, channels);
        else
            add_multiple(partials + 2, factor, p + 2, channels);
    }
    partials[0] = maximum;
    partials[1] = denominator;
}

// Optional arguments, one number a query head; null: not given.
struct head_options {
    const float* alibi_slopes = nullptr;
    const float* sink_logits = nullptr;
};

// One call of attention over all KV heads, as tasks in phases, some of which may have none: queries enter the basis
// of the keys, ranges are attended to, their results merged. A phase begins when all tasks of the one before are
// done; tasks of a phase run in any order, on any threads. What the arguments refer to outlives the object.
class attention_tasks {
public:
    static constexpr std::size_t phases = 3;

    attention_tasks(const attention_job& common, std::size_t kv_heads, const tensor_view& queries,
                    const mutable_tensor_view& outputs, const head_options& heads,
                    std::span<float> log_sum_exp) noexcept
        : common_(common), kv_heads_(kv_heads), queries_(queries), outputs_(outputs), heads_(heads),
          log_sum_exp_(log_sum_exp), rows_(queries.tokens() * common.head_group),
          channels_(common.layout->values().channels), stride_(round_up(channels_ + 2, 16)) {
        // the tokens front ... reach - 1 are all that any query sees
        std::size_t front = common.first_visible;
        if (common.window != 0) {
            const std::ptrdiff_t from =
                common.first_position + 1 - static_cast<std::ptrdiff_t>(common.window);
            front = (std::max)(front, from > 0 ? static_cast<std::size_t>(from) : 0);
        }
        reach_ =
            (std::min)(common.last_token, common.visible_base + (queries.tokens() - 1) * common.visible_step);
        split_ = split_attention(*common.layout, rows_, kv_heads, front, reach_);
    }

    // Comes first. Errors: out_of_memory.
    [[nodiscard]] status prepare() noexcept {
        if (split_.ranges > 1) {
            partials_.reset(new (std::nothrow) float[kv_heads_ * rows_ * split_.ranges * stride_]);
            if (partials_ == nullptr)
                return {errc::out_of_memory, "no memory for partial results"};
        }
        if (common_.key_basis) {
            in_basis_.reset(new (std::nothrow) float[kv_heads_ * rows_ * key_channels()]);
            if (in_basis_ == nullptr)
                return {errc::out_of_memory, "no memory for queries in another basis"};
        }
        return {};
    }

    [[nodiscard]] std::size_t tasks(std::size_t phase) const noexcept {
        const std::size_t splits = kv_heads_ * split_.row_splits;
        switch (phase) {
        case 0:
            return common_.key_basis ? splits : 0;
        case 1:
            return splits * split_.ranges;
        default:
            return split_.ranges > 1 ? kv_heads_ * rows_ : 0;
        }
    }
    void run(std::size_t phase, std::size_t task) noexcept {
        if (starved_.load(std::memory_order_relaxed))
            return;
        switch (phase) {
        case 0:
            enter(task);
            break;
        case 1:
            attend(task);
            break;
        default:
            merge(task);
        }
    }

    // Comes after a phase. Errors: out_of_memory; outputs are then unspecified.
    [[nodiscard]] status finish() const noexcept {
        return starved_.load(std::memory_order_relaxed) ? no_scratch() : status{};
    }

private:
    [[nodiscard]] std::size_t key_channels() const noexcept { return common_.layout->keys().channels; }
    [[nodiscard]] std::size_t head_offset(std::size_t kv_head) const noexcept {
        return kv_head * common_.head_group;
    }
    [[nodiscard]] attention_job job_for(std::size_t kv_head, std::size_t row_split) const noexcept {
        attention_job job = common_;
        job.pages = common_.pages + kv_head * common_.layout->bytes();
        if (common_.open_keys != nullptr)
            job.open_keys = common_.open_keys + kv_head * common_.open_layout->bytes();
        job.queries = queries_.at(0, head_offset(kv_head));
        job.query_type = queries_.type();
        job.query_token_stride = queries_.token_stride();
        job.query_head_stride = queries_.head_stride();
        job.outputs = outputs_.at(0, head_offset(kv_head));
        job.output_type = outputs_.type();
        job.output_token_stride = outputs_.token_stride();
        job.output_head_stride = outputs_.head_stride();
        job.first_row = row_split * split_.rows_per_task;
        job.rows = (std::min)(split_.rows_per_task, rows_ - job.first_row);
        job.first_token = split_.first_token;
        job.first_head = head_offset(kv_head);
        job.alibi_slopes =
            heads_.alibi_slopes == nullptr ? nullptr : heads_.alibi_slopes + head_offset(kv_head);
        job.sink_logits = heads_.sink_logits == nullptr ? nullptr : heads_.sink_logits + head_offset(kv_head);
        if (common_.key_means != nullptr)
            job.key_means = common_.key_means + kv_head * key_channels();
        if (common_.key_basis) {
            job.key_basis.columns += kv_head * common_.key_basis.n * common_.key_basis.stride;
            job.queries_in_basis = in_basis_.get() + kv_head * rows_ * key_channels();
        }
        if (common_.value_basis)
            job.value_basis.columns += kv_head * common_.value_basis.n * common_.value_basis.stride;
        if (common_.key_turning != nullptr)
            job.key_turning = common_.key_turning + kv_head;
        if (common_.value_means != nullptr)
            job.value_means = common_.value_means + kv_head * channels_;
        return job;
    }
    // log_sum_exp is [tokens][query heads]; `row` counts the query rows of one KV head
    [[nodiscard]] float& lse_of(std::size_t kv_head, std::size_t row) const noexcept {
        return log_sum_exp_[row / common_.head_group * queries_.heads() + head_offset(kv_head) +
                            row % common_.head_group];
    }

    // Once for all ranges.
    void enter(std::size_t task) noexcept {
        const scratch_lease scratch(*common_.scratches);
        if (!scratch) {
            starved_.store(true, std::memory_order_relaxed);
            return;
        }
        const std::size_t n = key_channels(), kv_head = task / split_.row_splits;
        const attention_job job = job_for(kv_head, task % split_.row_splits);
        float* const own = scratch.as<attention_scratch>().query;
        for (std::size_t r = 0; r < job.rows; ++r) {
            const std::size_t row = job.first_row + r;
            common_.target->load_floats(
                queries_.type(),
                queries_.at(row / common_.head_group, head_offset(kv_head) + row % common_.head_group), n,
                own + r * n);
        }
        common_.target->enter_basis(job.key_basis, own, job.rows,
                                    in_basis_.get() + (kv_head * rows_ + job.first_row) * n);
    }

    void attend(std::size_t task) noexcept {
        const scratch_lease scratch(*common_.scratches);
        if (!scratch) {
            starved_.store(true, std::memory_order_relaxed);
            return;
        }
        const std::size_t range = task % split_.ranges, row_split = task / split_.ranges % split_.row_splits,
                          kv_head = task / split_.ranges / split_.row_splits;
        attention_job job = job_for(kv_head, row_split);
        float lse[max_rows];
        if (split_.ranges > 1) {
            job.first_token = split_.first_token + range * split_.range_tokens;
            job.last_token = (std::min)(common_.last_token, job.first_token + split_.range_tokens);
            job.fetch_token = reach_;
            job.partials =
                partials_.get() + ((kv_head * rows_ + job.first_row) * split_.ranges + range) * stride_;
            job.partial_stride = split_.ranges * stride_;
        }
        if (row_split + 1 == split_.row_splits && kv_head + 1 < kv_heads_) {
            job.next_pages = job.pages + common_.layout->bytes();
            job.next_token = split_.first_token;
        }
        job.log_sum_exp = log_sum_exp_.empty() ? nullptr : lse;
        job.scratch = &scratch.as<attention_scratch>();
        job.target->attend_rows(job);
        if (split_.ranges == 1 && !log_sum_exp_.empty())
            for (std::size_t r = 0; r < job.rows; ++r)
                lse_of(kv_head, job.first_row + r) = lse[r];
    }

    void merge(std::size_t task) noexcept {
        const std::size_t kv_head = task / rows_, row = task % rows_;
        float* partial = partials_.get() + task * split_.ranges * stride_;
        merge_partials(partial, split_.ranges, stride_, channels_);
        const std::size_t head = head_offset(kv_head) + row % common_.head_group;
        softmax_state state{partial[0], partial[1]};
        const attention_job job = job_for(kv_head, 0);
        if (job.key_means != nullptr && (!log_sum_exp_.empty() || heads_.sink_logits != nullptr)) {
            float query[max_vector_length];
            common_.target->load_floats(queries_.type(), queries_.at(row / common_.head_group, head),
                                        key_channels(), query);
            shift_maximum(job, key_shift(job, query), state);
        }
        const float seen_weights = state.denominator;
        const float factor =
            heads_.sink_logits == nullptr ? 1.0f : add_sink_logit(state, heads_.sink_logits[head]);
        multiply(partial + 2, state.denominator > 0.0f ? factor / state.denominator : 0.0f, channels_);
        restore_output(job, state.denominator > 0.0f ? factor * seen_weights / state.denominator : 0.0f,
                       partial + 2);
        common_.target->store_outputs(outputs_.type(), partial + 2, channels_,
                                      outputs_.at(row / common_.head_group, head));
        if (!log_sum_exp_.empty())
            lse_of(kv_head, row) = log_sum_exp_of(state);
    }

    attention_job common_;
    std::size_t kv_heads_;
    tensor_view queries_;
    mutable_tensor_view outputs_;
    head_options heads_;
    std::span<float> log_sum_exp_;
    std::size_t rows_, channels_, stride_; // stride_: floats from one partial result to the next
    std::size_t reach_ = 0;
    attention_split split_{};
    std::unique_ptr<float[]> partials_;
    std::unique_ptr<float[]> in_basis_; // queries, [KV head][row][channels]
    std::atomic<bool> starved_{false};  // a task had no scratch
};

// Attends for all KV heads. `common` is the job of KV head 0, with all of its query rows and tokens. Errors:
// out_of_memory.
inline status attend_heads(const attention_job& common, std::size_t kv_heads, const tensor_view& queries,
                           const mutable_tensor_view& outputs, const head_options& heads,
                           std::span<float> log_sum_exp, executor_view run) noexcept {
    attention_tasks tasks(common, kv_heads, queries, outputs, heads, log_sum_exp);
    status s = tasks.prepare();
    for (std::size_t phase = 0; s && phase < attention_tasks::phases; ++phase) {
        if (tasks.tasks(phase) == 0)
            continue;
        auto task = [&](std::size_t i) { tasks.run(phase, i); };
        run(tasks.tasks(phase), task_view(task));
        s = tasks.finish();
    }
    return s;
}

} // namespace kv1::inline KV1_ABI::detail
