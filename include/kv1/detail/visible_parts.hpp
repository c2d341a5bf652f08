// SPDX-License-Identifier: Apache-2.0
//
// Attention joined from parts: fp16 sinks, quantized body, fp16 window. It serves what one job cannot:
// windows that a mask decides on, pages dropped among the queries, fp16 tokens beside quantized ones.
//
// What a query sees of a part is a span of positions, and in a part's block table a run of places. A place is
// a position less the dropped tokens before it. With 64 tokens a page and page 1 dropped, position 130 has
// place 66, and the span 50-129 has the run 50-65.
//
//   in_step()  attends for queries whose runs move in step: the ends stand still or move one place a query
//   masked()   attends for up to 64 queries whatever they see, under a mask [query][place] made for a part
//
// Each gives the result of every part, and the results are merged by their log-sum-exp.
#pragma once

#include <kv1/attention.hpp>
#include <kv1/detail/block_table.hpp>
#include <kv1/status.hpp>

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

inline constexpr std::size_t max_parts = 3;
inline constexpr std::size_t most_queries = 64; // that one call attends for
inline constexpr std::size_t most_mask_bytes = std::size_t{1}
                                               << 20; // of them, where that leaves a few queries

// The positions first ... last - 1 of a part, which a query sees unless they are dropped or masked.
struct position_span {
    std::size_t first = 0, last = 0;
    [[nodiscard]] bool empty() const noexcept { return first >= last; }
};
// The spans of one query, [part].
using position_spans = std::array<position_span, max_parts>;

// A span as places in a part's block table; first == last == 0: the query sees nothing of the part.
struct visible_run {
    std::size_t first = 0, last = 0;
    [[nodiscard]] bool empty() const noexcept { return first == last; }
    friend bool operator==(const visible_run&, const visible_run&) = default;
};
using visible_runs = std::array<visible_run, max_parts>;

// A part's pages and kernels: the fields of a job that do not change from query to query. table is null if
// there is no such part.
struct part_source {
    attention_job job{};
    const block_table* table = nullptr;
};
using part_sources = std::array<part_source, max_parts>;

// Log-sum-exp and outputs of query rows, in the order [tokens][query heads].
struct row_results {
    buffer<float> outputs, log_sum_exp;
    [[nodiscard]] bool resize(std::size_t rows, std::size_t channels) noexcept {
        return outputs.resize(rows * channels) && log_sum_exp.resize(rows);
    }
    // Adds a sink logit to the softmax of row r: e^sink joins the denominator, and no value belongs to it.
    void add_sink_logit(std::size_t r, std::size_t channels, float logit) noexcept {
        const float top = (std::max)(log_sum_exp[r], logit);
        const float own = std::exp(log_sum_exp[r] - top), sum = own + std::exp(logit - top);
        for (std::size_t c = 0; c < channels; ++c)
            outputs[r * channels + c] *= own / sum;
        log_sum_exp[r] = top + std::log(sum);
    }
};

// Queries first ... first + count - 1, whose runs move in step. `from` has the runs of the first query, the
// steps say how far the ends of each part's run move from one query to the next.
struct query_run {
    std::size_t first, count;
    visible_runs from;
    std::array<std::size_t, max_parts> first_step, last_step; // 0 or 1
};

// Finds as many queries from `first` on as move in step, at most `longest`. runs(i) gives the runs of query
// i.
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

// Attention of one call over the parts of one layer of one sequence.
class part_attention {
public:
    part_attention(std::size_t kv_heads, std::size_t page_tokens, std::span<const float> alibi_slopes,
                   executor_view run) noexcept
        : kv_heads_(kv_heads), page_(page_tokens), slopes_(alibi_slopes), run_(run) {}

    // The result of the last call of in_step() or masked(). add_sink_logit() may change it.
    [[nodiscard]] row_results& total() noexcept { return results_[0]; }

    // Attends for as many queries from `first` on as move in step, and gives their number. spans(i) gives the
    // spans of query i. Errors: out_of_memory.
    template <class Spans>
    result<std::size_t> in_step(const part_sources& parts, std::size_t first, const tensor_view& queries,
                                Spans&& spans) noexcept {
        const auto runs = [&](std::size_t i) {
            const position_spans seen = spans(i);
            visible_runs placed;
            for (std::size_t p = 0; p < max_parts; ++p)
                if (parts[p].table != nullptr && !seen[p].empty()) {
                    const visible_run run{place(parts[p], seen[p].first), place(parts[p], seen[p].last)};
                    placed[p] = run.empty() ? visible_run{} : run;
                }
            return placed;
        };
        const query_run q = next_query_run(first, queries.tokens(), most_queries, runs);
        const tensor_view some = queries.slice(q.first, q.count);
        if (!begin(parts, some))
            return no_memory();
        for (std::size_t p = 0; p < max_parts; ++p) {
            if (parts[p].table == nullptr || q.from[p].empty())
                continue;
            visible_run from = q.from[p];
            attention_job job = job_from(parts[p].job, from);
            job.last_token = from.last + (q.count - 1) * q.last_step[p];
            job.visible_base = from.last;
            job.visible_step = q.last_step[p];
            job.first_visible = from.first;
            // A lower end that moves is expressed as a window: with a window of 1, query i sees no place
            // before first_position + i.
            job.first_position = static_cast<std::ptrdiff_t>(from.first);
            job.window = q.first_step[p];
            if (const status s = attend(job, some); !s)
                return s;
        }
        if (const status s = end(); !s)
            return s;
        return q.count;
    }

    // Attends for some queries from `first` on, under masks, and gives their number. Query i has the position
    // first_position + i. Of the tokens in its spans it sees those with shows(i, position), which is true
    // before position masked_from. Errors: out_of_memory.
    template <class Spans, class Shows>
    result<std::size_t> masked(const part_sources& parts, std::size_t first, const tensor_view& queries,
                               std::ptrdiff_t first_position, std::size_t masked_from, Spans&& spans,
                               Shows&& shows) noexcept {
        std::array<position_spans, most_queries> seen;
        std::size_t count = (std::min)(most_queries, queries.tokens() - first);
        for (std::size_t i = 0; i < count; ++i)
            seen[i] = spans(first + i);
        const auto widest = [&](std::size_t n) {
            std::size_t width = 0;
            for (std::size_t p = 0; p < max_parts; ++p) {
                const joint_span s = join({seen.data(), n}, p, masked_from);
                width = (std::max)(width, s.last - s.differ_from);
            }
            return width;
        };
        while (count > 8 && count * widest(count) > most_mask_bytes)
            count /= 2;
        const tensor_view some = queries.slice(first, count);
        if (!begin(parts, some))
            return no_memory();
        for (std::size_t p = 0; p < max_parts; ++p) {
            if (parts[p].table == nullptr)
                continue;
            const joint_span all = join({seen.data(), count}, p, masked_from);
            const auto sees = [&](std::size_t i, std::size_t t) {
                return t >= seen[i][p].first && t < seen[i][p].last && shows(first + i, t);
            };
            for (std::size_t from = all.first; from < all.last;) {
                // ALiBi takes distances between places, so a job must not cross a hole
                const std::size_t to =
                    slopes_.empty() ? all.last : (std::min)(all.last, hole_after(parts[p], from));
                if (const status s =
                        attend_masked(parts[p], {from, to, (std::max)(from, all.differ_from)},
                                      first_position + static_cast<std::ptrdiff_t>(first), sees, some);
                    !s)
                    return s;
                from = slopes_.empty() ? to : (std::max)(to, kept_from(parts[p], to));
            }
        }
        if (const status s = end(); !s)
            return s;
        return count;
    }

private:
    // The positions of a part that any of some queries sees. From differ_from on not all of them see the
    // same. Two queries that see positions 4-67 and 4-68 have first 4, last 69 and differ_from 68.
    struct joint_span {
        std::size_t first = 0, last = 0, differ_from = 0;
    };

    static status no_memory() noexcept { return {errc::out_of_memory, "no memory for partial results"}; }

    static joint_span join(std::span<const position_spans> seen, std::size_t part,
                           std::size_t masked_from) noexcept {
        constexpr std::size_t far = (std::numeric_limits<std::size_t>::max)();
        joint_span all{far, 0, masked_from};
        bool differ = false;
        for (const position_spans& s : seen) {
            differ = differ || s[part].empty() || (all.first != far && s[part].first != all.first);
            if (s[part].empty())
                continue;
            all.first = (std::min)(all.first, s[part].first);
            all.last = (std::max)(all.last, s[part].last);
            all.differ_from = (std::min)(all.differ_from, s[part].last);
        }
        if (all.first == far)
            return {};
        all.differ_from = differ ? all.first : std::clamp(all.differ_from, all.first, all.last);
        return all;
    }

    [[nodiscard]] std::size_t place(const part_source& part, std::size_t position) const noexcept {
        return part.table->kept_before(position, page_);
    }
    // The first position at or after `position` that is not dropped, or the end of the pages.
    [[nodiscard]] std::size_t kept_from(const part_source& part, std::size_t position) const noexcept {
        return (std::max)(position, part.table->next_kept(position / page_) * page_);
    }
    // The position at which the first hole after `position` begins.
    [[nodiscard]] std::size_t hole_after(const part_source& part, std::size_t position) const noexcept {
        for (const page_hole& h : part.table->holes())
            if (h.first * page_ > position)
                return h.first * page_;
        return (std::numeric_limits<std::size_t>::max)();
    }

    // Starts a result, to which nothing has been joined yet. False: no memory.
    [[nodiscard]] bool begin(const part_sources& parts, const tensor_view& queries) noexcept {
        for (const part_source& p : parts)
            if (p.table != nullptr)
                channels_ = p.job.layout->values().channels;
        rows_ = queries.tokens() * queries.heads();
        count_ = 0;
        return results_[0].resize(rows_, channels_);
    }
    // Ends it: zeros and -infinity for each query row if there was nothing to join.
    status end() noexcept {
        if (count_ != 0)
            return merge();
        row_results& none = results_[0];
        std::fill(none.outputs.begin(), none.outputs.end(), 0.0f);
        std::fill(none.log_sum_exp.begin(), none.log_sum_exp.end(), -std::numeric_limits<float>::infinity());
        return {};
    }
    // Joins what there is to one result.
    status merge() noexcept {
        if (count_ == 1)
            return {};
        std::array<attention_part, max_parts> each;
        for (std::size_t i = 0; i < count_; ++i)
            each[i] = {{results_[i].outputs.data(), rows_ * channels_},
                       {results_[i].log_sum_exp.data(), rows_}};
        const std::span<const attention_part> all(each.data(), count_);
        count_ = 1;
        return try_merge_attention(all, channels_, {results_[0].outputs.data(), rows_ * channels_},
                                   {results_[0].log_sum_exp.data(), rows_});
    }

    // The job without the whole pages before a run; places of the run count from the first page that is left.
    [[nodiscard]] attention_job job_from(attention_job job, visible_run& from) const noexcept {
        const std::size_t skipped = from.first / page_;
        job.block_table += skipped;
        job.skipped_pages += skipped;
        job.open_from -= (std::min)(skipped * page_, job.open_from);
        from.first -= skipped * page_;
        from.last -= skipped * page_;
        return job;
    }

    template <class Sees>
    status attend_masked(const part_source& part, const joint_span& span, std::ptrdiff_t first_position,
                         Sees&& sees, const tensor_view& queries) noexcept {
        visible_run from{place(part, span.first), place(part, span.last)};
        if (from.empty())
            return {};
        // shift: position less place, of the tokens from the first one on
        const std::size_t begin = kept_from(part, span.first), shift = begin - from.first;
        const std::size_t differ = place(part, (std::min)(span.differ_from, span.last));
        const std::size_t before = from.first, columns = from.last - differ;
        attention_job job = job_from(part.job, from);
        const std::size_t skipped = before - from.first;
        if (columns != 0) {
            if (!mask_.resize(queries.tokens() * columns))
                return no_memory();
            for (std::size_t i = 0, at = 0; i < queries.tokens(); ++i)
                for (std::size_t t = kept_from(part, span.differ_from); t < span.last;
                     t = (t + 1) % page_ != 0 ? t + 1 : kept_from(part, t + 1))
                    mask_[at++] = sees(i, t) ? 1 : 0;
            job.mask = mask_.data();
            job.mask_first = differ - skipped;
            job.mask_stride = columns;
        }
        job.last_token = job.visible_base = from.last;
        job.visible_step = 0;
        job.first_visible = from.first;
        job.first_position = first_position - static_cast<std::ptrdiff_t>(shift + skipped);
        job.window = 0;
        return attend(job, queries);
    }

    // Runs a job. Its result joins the others where there is no room for another one, and in the end.
    status attend(const attention_job& job, const tensor_view& queries) noexcept {
        if (count_ == max_parts)
            if (const status s = merge(); !s)
                return s;
        row_results& own = results_[count_];
        if (!own.resize(rows_, channels_))
            return no_memory();
        ++count_;
        return attend_heads(
            job, kv_heads_, queries, {own.outputs.data(), queries.tokens(), queries.heads(), channels_},
            {slopes_.empty() ? nullptr : slopes_.data(), nullptr}, {own.log_sum_exp.data(), rows_}, run_);
    }

    std::size_t kv_heads_, page_;
    std::span<const float> slopes_;
    executor_view run_;
    std::array<row_results, max_parts> results_;
    std::size_t count_ = 0; // of them that have the result of a job
    std::size_t rows_ = 0, channels_ = 0;
    buffer<std::uint8_t> mask_;
};

} // namespace kv1::inline KV1_ABI::detail
