// SPDX-License-Identifier: Apache-2.0
//
// Attention over one layer of a sequence. This header decides what each query sees, and describes it as jobs
// for the kernels.
//
// One job serves all queries if each sees one run of tokens in one block table, and the ends of the runs
// stand still or move one token a query. Three queries at positions 97, 98, 99 under a sliding window of 10
// see tokens 88-97, 89-98, 90-99: one job. Pages that were dropped before all of the windows change nothing.
// Else attention is joined from parts (visible_parts.hpp).
//
// A window of w, a layer's sliding window or the fp16 window, holds the last w tokens that the mask shows a
// query up to its own position, and all that the mask shows after it.
#pragma once

#include <kv1/attention.hpp>
#include <kv1/detail/cache_state.hpp>
#include <kv1/detail/layer_store.hpp>
#include <kv1/detail/schedule.hpp>
#include <kv1/detail/visible_parts.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>

namespace kv1::inline KV1_ABI::detail {

// Attention of one call over one layer of one sequence.
class sequence_attention {
public:
    // Precondition: the layer exists.
    sequence_attention(const cache_state& cache, const sequence_state& q, std::size_t layer,
                       const attention_options& options) noexcept
        : cache_(cache), q_(q), layer_(layer), options_(options), store_(cache.store_of(layer)),
          shape_(cache.planes_of(layer).shape), body_(store_.body()), table_(q.pages[body_.group].table),
          length_(q.length(layer)), copied_(store_.copies() != nullptr) {}

    status operator()(const tensor_view& queries, const mutable_tensor_view& outputs,
                      executor_view run) const noexcept {
        if (const status s = check(queries, outputs); !s)
            return s;
        if (queries.tokens() == 0)
            return {};
        const query_sight sight(*this, queries.tokens());
        if (const status s = all_there(sight, queries.tokens()); !s)
            return s;
        const std::size_t dropped = length_ - table_.kept_before(length_, page());
        const std::size_t holes_end = table_.holes().empty() ? 0 : table_.holes().back().last * page();
        // whole: each query sees one run of positions, and the runs move in step
        // past_holes: every run begins after the last hole, so places lie as far apart as positions
        // ends_past_holes: every run ends after the last hole. Runs that begin before it all begin at the same
        // position.
        const bool whole = !copied_ && sight.in_step();
        const bool past_holes = dropped == 0 || (sight.lower(0) >= holes_end && sight.limit(0) >= holes_end);
        const bool ends_past_holes = past_holes || (sight.limit(0) >= holes_end && sight.window() == 0);
        const attention_mask& mask = options_.mask;
        const bool parted = !whole || !ends_past_holes ||
                            (!mask.visible().empty() && length_ - mask.explicit_keys() < holes_end) ||
                            (!options_.alibi_slopes.empty() && !past_holes);
        if (parted)
            return attend_parts(sight, queries, outputs, run);

        attention_job job = job_for(body_, queries.heads());
        job.last_token = table_.kept_before((std::min)(length_, options_.range.last), page());
        job.first_visible = (std::min)(table_.kept_before(sight.fixed_lower(), page()), job.last_token);
        job.visible_base = sight.base() - dropped;
        job.visible_step = sight.step();
        job.first_position = sight.first_position() - static_cast<std::ptrdiff_t>(dropped);
        job.window = sight.window();
        if (!mask.visible().empty()) {
            job.mask = mask.visible().data();
            job.mask_first = length_ - dropped - mask.explicit_keys();
            job.mask_stride = mask.explicit_keys();
        }
        return store_.attend(job, queries, outputs, options_, run);
    }

private:
    // What query i sees: the positions lower(i) ... upper(i) - 1 that are not dropped and that the mask
    // shows.
    class query_sight {
    public:
        query_sight(const sequence_attention& a, std::size_t queries) noexcept
            : length_(a.length_), range_(a.options_.range), sliding_(bounded(a.shape_.sliding_window)),
              asked_(bounded(a.options_.window)), keys_(a.options_.mask.explicit_keys()),
              visible_(a.options_.mask.visible()) {
            const attention_mask& mask = a.options_.mask;
            first_position_ = mask.first_position() ? static_cast<std::ptrdiff_t>(*mask.first_position())
                                                    : static_cast<std::ptrdiff_t>(length_) -
                                                          static_cast<std::ptrdiff_t>(queries);
            step_ = mask.is_causal() ? 1 : 0;
            base_ = mask.is_causal() ? static_cast<std::size_t>(first_position_ + 1) : length_;
            in_step_ = sliding_ == 0 || (visible_.empty() &&
                                         end_position(queries - 1) <= static_cast<std::ptrdiff_t>(length_));
        }

        [[nodiscard]] std::size_t base() const noexcept { return base_; }
        [[nodiscard]] std::size_t step() const noexcept { return step_; }
        [[nodiscard]] std::ptrdiff_t first_position() const noexcept { return first_position_; }
        // One past the last position that the mask allows.
        [[nodiscard]] std::size_t limit(std::size_t i) const noexcept {
            return (std::min)(base_ + i * step_, length_);
        }
        // Whether each lower end stands still or moves one token a query.
        [[nodiscard]] bool in_step() const noexcept { return in_step_; }
        // The smaller of the layer's window and the one that options ask for; 0: neither is there.
        [[nodiscard]] std::size_t window() const noexcept {
            return sliding_ == 0 || asked_ == 0 ? sliding_ + asked_ : (std::min)(sliding_, asked_);
        }
        // The lower end that does not depend on the query: where the range of options begins.
        [[nodiscard]] std::size_t fixed_lower() const noexcept { return (std::min)(length_, range_.first); }
        [[nodiscard]] std::size_t lower(std::size_t i) const noexcept {
            const std::ptrdiff_t asked =
                asked_ == 0 ? 0 : end_position(i) - static_cast<std::ptrdiff_t>(asked_);
            return (std::max)({fixed_lower(), sliding_ == 0 ? 0 : back(i, sliding_),
                               asked > 0 ? static_cast<std::size_t>(asked) : 0});
        }
        // limit(i), or the end of the range of options if that comes first.
        [[nodiscard]] std::size_t upper(std::size_t i) const noexcept {
            return (std::min)(limit(i), range_.last);
        }
        // The position of the first of the last `window` tokens, up to query i's own, that the mask shows it.
        [[nodiscard]] std::size_t back(std::size_t i, std::size_t window) const noexcept {
            std::size_t end = own(i), left = window;
            for (; end > masked_from() && left != 0; --end)
                left -= shows(i, end - 1) ? 1u : 0u;
            return end > left ? end - left : 0;
        }
        // Positions from here on are seen only where an explicit mask shows them.
        [[nodiscard]] std::size_t masked_from() const noexcept {
            return visible_.empty() ? length_ : length_ - keys_;
        }
        // Precondition: t < length.
        [[nodiscard]] bool shows(std::size_t i, std::size_t t) const noexcept {
            return t < masked_from() || visible_[i * keys_ + (t - masked_from())] != 0;
        }

    private:
        // A window that no position reaches is none.
        static std::size_t bounded(std::size_t window) noexcept {
            return window < (std::numeric_limits<std::size_t>::max)() / 4 ? window : 0;
        }
        // One past query i's position.
        [[nodiscard]] std::ptrdiff_t end_position(std::size_t i) const noexcept {
            return first_position_ + static_cast<std::ptrdiff_t>(i) + 1;
        }
        // The number of cached tokens up to query i's position, its own included.
        [[nodiscard]] std::size_t own(std::size_t i) const noexcept {
            return static_cast<std::size_t>(
                std::clamp(end_position(i), std::ptrdiff_t{0}, static_cast<std::ptrdiff_t>(length_)));
        }

        std::size_t length_;
        token_range range_;
        std::size_t sliding_, asked_;
        std::size_t keys_;
        std::span<const std::uint8_t> visible_;
        std::ptrdiff_t first_position_ = 0;
        std::size_t step_ = 0, base_ = 0;
        bool in_step_ = true;
    };

    [[nodiscard]] std::size_t page() const noexcept { return cache_.page_tokens(); }
    // Refuses a query that would see tokens which a commit has freed.
    [[nodiscard]] status all_there(const query_sight& sight, std::size_t queries) const noexcept {
        const std::size_t gone = q_.pages[body_.group].window_from;
        for (std::size_t i = 0; gone != 0 && i < queries; ++i)
            for (std::size_t t = sight.lower(i), last = (std::min)(sight.upper(i), gone); t < last; ++t)
                if (sight.shows(i, t))
                    return {
                        errc::dropped_tokens,
                        "the sliding window has given up tokens that the query would see",
                        {.layer = static_cast<std::int64_t>(layer_), .token = static_cast<std::int64_t>(i)}};
        return {};
    }

    [[nodiscard]] status check(const tensor_view& queries,
                               const mutable_tensor_view& outputs) const noexcept {
        const error_location where{.layer = static_cast<std::int64_t>(layer_)};
        if (queries.has_negative_extent() || outputs.has_negative_extent())
            return {errc::invalid_argument, rule_extents, where};
        if (queries.heads() == 0 || queries.heads() % shape_.kv_heads != 0)
            return {errc::shape_mismatch, "query heads are a multiple of the KV heads", where};
        if (queries.channels() != shape_.key_dim || outputs.channels() != shape_.value_dim)
            return {errc::shape_mismatch, "queries and outputs have the layer's head dims", where};
        if (outputs.tokens() != queries.tokens() || outputs.heads() != queries.heads())
            return {errc::shape_mismatch, "one output row per query row", where};
        if (queries.tokens() != 0 && (queries.data() == nullptr || outputs.data() == nullptr))
            return {errc::invalid_argument, "queries and outputs are not null", where};
        if (!is_finite(store_.scale(options_)))
            return {errc::invalid_argument, "the softmax scale is finite", where};
        if (!options_.log_sum_exp.empty() &&
            options_.log_sum_exp.size() != queries.tokens() * queries.heads())
            return {errc::shape_mismatch, "one log-sum-exp per query row", where};
        if (!(options_.soft_cap >= 0.0f) || !is_finite(options_.soft_cap))
            return {errc::invalid_argument, "the soft cap is finite and not negative", where};
        for (const std::span<const float> per_head : {options_.alibi_slopes, options_.sink_logits}) {
            if (!per_head.empty() && per_head.size() != queries.heads())
                return {errc::shape_mismatch, "one slope, and one sink logit, per query head", where};
            if (!std::all_of(per_head.begin(), per_head.end(), [](float x) { return is_finite(x); }))
                return {errc::invalid_argument, "slopes and sink logits are finite", where};
        }
        const attention_mask& mask = options_.mask;
        if (mask.is_causal() && !mask.first_position() && queries.tokens() > length_)
            return {errc::shape_mismatch, "causal queries are among the cached tokens", where};
        if (mask.is_causal() &&
            mask.first_position().value_or(0) > (std::numeric_limits<std::size_t>::max)() / 4)
            return {errc::out_of_range, "the first position overflows", where};
        if (!mask.is_causal() && (mask.explicit_keys() > length_ ||
                                  mask.visible().size() != mask.explicit_keys() * queries.tokens()))
            return {errc::shape_mismatch, "the mask covers queries times its keys, all of them cached",
                    where};
        return {};
    }

    [[nodiscard]] attention_job job_for(const plane& p, std::size_t query_heads) const noexcept {
        const block_table& table = q_.pages[p.group].table;
        attention_job job = store_.job(p, table.blocks().data(), query_heads, options_);
        job.first_position_of_keys = cache_.storage.description().first_position;
        job.holes = table.holes().data();
        job.hole_count = table.holes().size();
        if (&p == &body_ && store_.open_keys() != nullptr && length_ % page() != 0)
            store_.read_open_keys(job, cache_.open_block(q_, layer_),
                                  table_.kept_before(length_ / page() * page(), page()));
        return job;
    }

    // The parts of what a query sees: fp16 sinks, the quantized body, the fp16 window. With 4 sinks and a
    // window of 32, a query at position 99 sees tokens 0-3, 4-67 and 68-99 in them.
    enum part : std::size_t { sinks, quantized, window };
    [[nodiscard]] position_spans spans_of(const query_sight& sight, std::size_t i) const noexcept {
        const std::size_t last = sight.upper(i), first = sight.lower(i);
        if (!copied_)
            return {position_span{}, {first, last}, position_span{}};
        const cache_description& d = cache_.storage.description();
        const std::size_t s = (std::min)(d.fp16_sinks, last), r = d.fp16_window;
        // tokens before fp16_from have no fp16 copy any more: a commit or a truncation freed it
        const std::size_t from =
            r == 0 ? last : (std::min)(last, (std::max)({s, sight.back(i, r), q_.fp16_from}));
        return {position_span{first, s}, {(std::max)(s, first), from}, {(std::max)(from, first), last}};
    }

    status attend_parts(const query_sight& sight, const tensor_view& queries,
                        const mutable_tensor_view& outputs, executor_view run) const noexcept {
        part_sources parts;
        parts[quantized] = {job_for(body_, queries.heads()), &table_};
        if (copied_) {
            const plane& copy = cache_.copy_of(layer_);
            parts[sinks] = parts[window] = {job_for(copy, queries.heads()), &q_.pages[copy.group].table};
        }
        const auto spans = [&](std::size_t i) { return spans_of(sight, i); };
        const auto shows = [&](std::size_t i, std::size_t t) { return sight.shows(i, t); };
        const bool by_mask = !options_.mask.visible().empty() || !options_.alibi_slopes.empty();

        part_attention attend(shape_.kv_heads, page(), options_.alibi_slopes, run);
        const std::size_t heads = queries.heads(), channels = shape_.value_dim;
        for (std::size_t i = 0; i < queries.tokens();) {
            const result<std::size_t> count = by_mask
                                                  ? attend.masked(parts, i, queries, sight.first_position(),
                                                                  sight.masked_from(), spans, shows)
                                                  : attend.in_step(parts, i, queries, spans);
            if (!count)
                return count.reason();
            row_results& total = attend.total();
            for (std::size_t r = 0; r < *count * heads; ++r) {
                if (!options_.sink_logits.empty())
                    total.add_sink_logit(r, channels, options_.sink_logits[r % heads]);
                parts[quantized].job.target->store_outputs(outputs.type(),
                                                           total.outputs.data() + r * channels, channels,
                                                           outputs.at(i + r / heads, r % heads));
            }
            if (!options_.log_sum_exp.empty())
                std::copy(total.log_sum_exp.begin(), total.log_sum_exp.end(),
                          options_.log_sum_exp.begin() + static_cast<std::ptrdiff_t>(i * heads));
            i += *count;
        }
        return {};
    }

    const cache_state& cache_;
    const sequence_state& q_;
    std::size_t layer_;
    const attention_options& options_;
    layer_store store_;
    const layer_description& shape_;
    const plane& body_;
    const block_table& table_;
    std::size_t length_;
    bool copied_;
};

} // namespace kv1::inline KV1_ABI::detail
