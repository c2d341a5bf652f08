// SPDX-License-Identifier: Apache-2.0
//
// Attention over slots, as tasks in phases. This header decides how kernels see the slots of a stream, and joins what
// they see as codes with what has an fp16 copy.
//
//   body     the block table of the view. Columns without gaps need no more than a first and a last token. A list,
//            positions, and columns with fp16 copies in the middle take an array of positions, one number a token of
//            the table, in which hidden tokens are negative (slot_rules.hpp)
//   copies   a block table of the pages that hold the stream's copies, with positions. A mask of bytes and an additive
//            mask are gathered for them
//
// If a stream has both, each gives its outputs and log-sum-exp, and a last phase joins them. Where means turn and positions
// of the body's slots do not follow each other, a first phase finds what means add to scores (slot_waves.hpp).
#pragma once

#include <kv1/attention.hpp>
#include <kv1/detail/buffer.hpp>
#include <kv1/detail/kernels/slot_rules.hpp>
#include <kv1/detail/layer_store.hpp>
#include <kv1/detail/schedule.hpp>
#include <kv1/detail/slot_layer.hpp>
#include <kv1/detail/slot_places.hpp>
#include <kv1/detail/slot_waves.hpp>
#include <kv1/detail/visible_columns.hpp>
#include <kv1/detail/visible_parts.hpp>
#include <kv1/slot_views.hpp>
#include <kv1/status.hpp>
#include <kv1/tensor.hpp>
#include <kv1/work_plan.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <span>
#include <utility>

namespace kv1::inline KV1_ABI::detail {

// What is attended to in one plane, for the queries of one stream.
struct slot_part {
    buffer<std::uint32_t> table;
    buffer<std::int32_t> positions; // [tokens of the table]
    buffer<std::uint8_t> bytes;     // [queries][tokens]: a mask that was gathered
    buffer<float> added;            // [queries][1 or heads][tokens]: the same of an additive one
    slot_rules rules;
    attention_job job{};
    row_results results; // if there is another part
    std::optional<attention_tasks> tasks;
};

// A stream that attends to something, or to nothing.
class stream_attention {
public:
    // Comes first. Errors: those of the view and the mask, out_of_memory.
    [[nodiscard]] status prepare(const slot_layer& layer, const layer_store& store, const slot_stream& stream,
                                 const tensor_view& queries, const mutable_tensor_view& outputs,
                                 const slot_attention_options& options) noexcept {
        layer_ = &layer;
        stream_ = &stream;
        options_ = &options;
        queries_.emplace(queries);
        outputs_.emplace(outputs);
        if (const status s = places_.find(stream.slots, page(), layer.blocks()); !s)
            return s;
        if (const status s = check_mask(); !s)
            return s;
        if (!list_copies() || !take_query_positions())
            return no_memory();
        attention_options kernels_options;
        kernels_options.scale = options.scale;
        kernels_options.mode = options.mode;
        kernels_options.soft_cap = options.soft_cap;
        const bool some_copied = !copied_.empty();
        slot_part* const body = &parts_[0];
        body->job = store.job(layer.body, nullptr, queries.heads(), kernels_options);
        if (!place_body(*body))
            return no_memory();
        const bool has_body = !some_copied || copied_.size() != columns();
        if (has_body && !place_waves(*body))
            return no_memory();
        if (some_copied) {
            slot_part* const copies = &parts_[1];
            copies->job = store.job(layer.copies, nullptr, queries.heads(), kernels_options);
            if (!place_copies(*copies))
                return no_memory();
        }
        const head_options heads{slopes_of_job(), optional_of(options.sink_logits)};
        if (has_body && some_copied) {
            for (slot_part& part : parts_) {
                if (!part.results.resize(queries.tokens() * queries.heads(), outputs.channels()))
                    return no_memory();
                part.tasks.emplace(
                    part.job, layer.body.kv_heads, queries,
                    mutable_tensor_view(part.results.outputs.data(), queries.tokens(), queries.heads(),
                                        outputs.channels()),
                    head_options{&part == body ? heads.alibi_slopes : nullptr, nullptr},
                    std::span(part.results.log_sum_exp.data(), part.results.log_sum_exp.size()));
            }
        } else {
            slot_part& only = has_body ? parts_[0] : parts_[1];
            only.tasks.emplace(only.job, layer.body.kv_heads, queries, outputs,
                               head_options{has_body ? heads.alibi_slopes : nullptr, heads.sink_logits},
                               options.log_sum_exp);
        }
        for (slot_part& part : parts_)
            if (part.tasks)
                if (const status s = part.tasks->prepare(); !s)
                    return s;
        return {};
    }

    [[nodiscard]] std::span<slot_part> parts() noexcept { return parts_; }
    [[nodiscard]] bool joins() const noexcept { return parts_[0].tasks && parts_[1].tasks; }
    [[nodiscard]] std::size_t queries() const noexcept { return queries_->tokens(); }

    // What means that turn add to scores, before all else.
    [[nodiscard]] std::size_t wave_tasks() const noexcept { return waves_.tasks(layer_->body.kv_heads); }
    void make_waves(std::size_t task) noexcept { waves_.run(task, *queries_); }
    [[nodiscard]] bool starved() const noexcept { return waves_.starved(); }

    // Joins both parts of one query.
    void join(std::size_t query) noexcept {
        const std::size_t heads = queries_->heads(), channels = outputs_->channels();
        row_results &a = parts_[0].results, &b = parts_[1].results;
        for (std::size_t h = 0; h < heads; ++h) {
            const std::size_t row = query * heads + h;
            float* const out = a.outputs.data() + row * channels;
            const float* const other = b.outputs.data() + row * channels;
            const float top = (std::max)(a.log_sum_exp[row], b.log_sum_exp[row]);
            if (top > -std::numeric_limits<float>::infinity()) {
                const float own = std::exp(a.log_sum_exp[row] - top),
                            its = std::exp(b.log_sum_exp[row] - top);
                for (std::size_t c = 0; c < channels; ++c)
                    out[c] = (own * out[c] + its * other[c]) / (own + its);
                a.log_sum_exp[row] = top + std::log(own + its);
            } else if (top != top) { // a NaN in the query
                std::fill_n(out, channels, top);
            }
            if (!options_->sink_logits.empty())
                a.add_sink_logit(row, channels, options_->sink_logits[h]);
            parts_[0].job.target->store_outputs(outputs_->type(), out, channels, outputs_->at(query, h));
            if (!options_->log_sum_exp.empty())
                options_->log_sum_exp[row] = a.log_sum_exp[row];
        }
    }

private:
    struct copied_column {
        std::uint32_t copy, column;
    };

    static status no_memory() noexcept { return {errc::out_of_memory, "an allocation failed"}; }
    static const float* optional_of(std::span<const float> x) noexcept {
        return x.empty() ? nullptr : x.data();
    }

    [[nodiscard]] std::size_t page() const noexcept { return layer_->body.layout.page_tokens(); }
    [[nodiscard]] const slot_mask& mask() const noexcept { return stream_->mask; }
    [[nodiscard]] slot_mask_kind kind() const noexcept { return stream_->mask.kind(); }
    [[nodiscard]] std::size_t columns() const noexcept { return places_.columns(); }
    [[nodiscard]] bool is_causal() const noexcept {
        return kind() == slot_mask_kind::causal || kind() == slot_mask_kind::by_position;
    }
    [[nodiscard]] std::int32_t position_of(std::size_t column) const noexcept {
        return kind() == slot_mask_kind::by_position ? (std::max)(mask().column_positions()[column], -1)
                                                     : static_cast<std::int32_t>(column);
    }
    // Whether the body takes positions.
    [[nodiscard]] bool by_positions() const noexcept {
        return places_.is_list() || kind() == slot_mask_kind::by_position || scattered_;
    }
    // ALiBi by places is the job's own.
    [[nodiscard]] const float* slopes_of_job() const noexcept {
        return by_positions() || kind() == slot_mask_kind::additive ? nullptr
                                                                    : optional_of(options_->alibi_slopes);
    }

    [[nodiscard]] status check_mask() const noexcept {
        const std::size_t m = queries(), n = columns();
        switch (kind()) {
        case slot_mask_kind::none:
            return {};
        case slot_mask_kind::causal:
            if (m > n)
                return {errc::shape_mismatch, "causal queries are among the slots"};
            return {};
        case slot_mask_kind::by_position:
            if (mask().query_positions().size() != m || mask().column_positions().size() != n)
                return {errc::shape_mismatch, "one position per query, and one per slot"};
            return {};
        case slot_mask_kind::bytes: {
            const auto stride = static_cast<std::size_t>(mask().query_stride());
            const std::size_t size = mask().visible().size();
            if (n != 0 && (size < n || (stride != 0 && (size - n) / stride < m - 1)))
                return {errc::shape_mismatch, "the mask has its rows, one per query"};
            return {};
        }
        case slot_mask_kind::additive:
            if (mask().added() == nullptr && n != 0)
                return {errc::invalid_argument, "an additive mask is not null"};
            if (options_->window != 0)
                return {errc::invalid_argument, "an additive mask has its window itself"};
            return {};
        }
        return {errc::invalid_argument, "a mask's kind is an enumerator"};
    }

    // The columns that have fp16 copies. Those at the view's ends are left out by first and last token, if all else is.
    // False: no memory.
    [[nodiscard]] bool list_copies() noexcept {
        if (!layer_->has_copies || layer_->copied.size() == 0)
            return true;
        const std::span<const std::uint32_t> slots = layer_->copied.slots();
        for (std::uint32_t copy = 0; copy < slots.size(); ++copy) {
            if (slots[copy] == slot_copies::none)
                continue;
            const std::uint32_t column = places_.column_of(slots[copy]);
            if (column != slot_places::none && !copied_.try_push_back({copy, column}))
                return false;
        }
        if (copied_.empty() || places_.is_list())
            return true;
        std::sort(copied_.begin(), copied_.end(),
                  [](const copied_column& a, const copied_column& b) { return a.column < b.column; });
        const std::size_t count = copied_.size();
        while (front_ < count && copied_[front_].column == front_)
            ++front_;
        while (back_ < count - front_ && copied_[count - 1 - back_].column == columns() - 1 - back_)
            ++back_;
        scattered_ = front_ + back_ != count;
        return true;
    }
    [[nodiscard]] bool take_query_positions() noexcept {
        if (kind() == slot_mask_kind::by_position || (!by_positions() && copied_.empty()))
            return true;
        if (!query_positions_.resize(queries()))
            return false;
        const auto first = static_cast<std::ptrdiff_t>(columns()) - static_cast<std::ptrdiff_t>(queries());
        for (std::size_t i = 0; i < queries(); ++i)
            query_positions_[i] = static_cast<std::int32_t>(first + static_cast<std::ptrdiff_t>(i));
        return true;
    }

    // Rules for tokens with positions.
    void set_rules(slot_part& part) const noexcept {
        part.rules.positions = part.positions.data();
        part.rules.query_positions =
            kind() == slot_mask_kind::by_position ? mask().query_positions().data() : query_positions_.data();
        part.rules.causal = is_causal();
        part.rules.window = options_->window;
        part.rules.slopes = optional_of(options_->alibi_slopes);
        part.job.slots = &part.rules;
    }
    void see_all(attention_job& job, std::size_t first, std::size_t last) const noexcept {
        job.first_visible = first;
        job.last_token = job.visible_base = last;
        job.visible_step = 0;
        job.first_position = 0;
    }

    // Columns at the ends of a range or table that are copied, or that no query sees, are no part of the job, unless
    // nothing would be left of it.
    void leave_out_hidden_ends(attention_job& job) const noexcept {
        column_range seen =
            visible_columns(mask(), columns(), queries(), queries_->heads(), options_->window);
        if (!scattered_)
            seen = {(std::max)(seen.first, front_), (std::min)(seen.last, columns() - back_)};
        if (seen.first < seen.last)
            see_all(job, places_.offset() + seen.first, places_.offset() + seen.last);
        else if (!scattered_)
            see_all(job, places_.offset() + front_, places_.offset() + columns() - back_);
    }

    [[nodiscard]] bool place_body(slot_part& part) noexcept {
        attention_job& job = part.job;
        const std::span<const std::uint32_t> blocks = places_.blocks();
        if (!part.table.resize(blocks.size()))
            return false;
        for (std::size_t i = 0; i < blocks.size(); ++i)
            part.table[i] = layer_->block_of(blocks[i]);
        job.block_table = part.table.data();
        job.block_positions = layer_->has_positions ? layer_->positions() : nullptr;
        see_all(job, places_.offset(), places_.end());
        if (!places_.is_list())
            leave_out_hidden_ends(job);
        if (by_positions()) {
            if (!part.positions.resize(blocks.size() * page(), -1))
                return false;
            std::int32_t* const own = part.positions.data() + places_.offset();
            if (!places_.is_list() && kind() == slot_mask_kind::by_position)
                std::transform(mask().column_positions().begin(), mask().column_positions().end(), own,
                               [](std::int32_t p) { return p < -1 ? -1 : p; });
            else if (!places_.is_list())
                std::iota(own, own + columns(), 0);
            for (std::size_t c = 0; places_.is_list() && c < columns(); ++c)
                part.positions[places_.place_of_column(c)] = position_of(c);
            for (const copied_column& c : copied_)
                part.positions[places_.place_of_column(c.column)] = -1;
            set_rules(part);
        } else {
            const std::size_t own =
                places_.offset() + columns() - queries(); // the first query's; it may wrap around
            if (is_causal()) {
                job.visible_base = own + 1;
                job.visible_step = 1;
            }
            job.first_position = static_cast<std::ptrdiff_t>(own);
            job.window = options_->window;
        }
        const auto n = static_cast<std::uint32_t>(columns());
        if (kind() == slot_mask_kind::bytes) {
            if (places_.is_list())
                return gather_bytes(part, places_.end(), n, [&](std::uint32_t c) {
                    return copied_column{static_cast<std::uint32_t>(places_.place_of_column(c)), c};
                });
            job.mask = mask().visible().data();
            job.mask_first = places_.offset();
            job.mask_stride = static_cast<std::size_t>(mask().query_stride());
        }
        if (kind() == slot_mask_kind::additive) {
            if (places_.is_list())
                return gather_added(part, places_.end(), n, [&](std::uint32_t c) {
                    return copied_column{static_cast<std::uint32_t>(places_.place_of_column(c)), c};
                });
            slot_rules& rules = part.rules;
            rules.bias = mask().added();
            rules.bias_type = mask().type();
            rules.bias_first = places_.offset();
            rules.bias_query_stride = mask().query_stride();
            rules.bias_head_stride = mask().head_stride();
            rules.slopes = optional_of(options_->alibi_slopes);
            job.slots = &rules;
        }
        return true;
    }

    // An additive mask of the mean's shares in scores, if slots stand in no order. Soft caps come between these and a mask,
    // and slopes multiply a mask: kernels find the shares then, and where the mask would be large.
    [[nodiscard]] bool place_waves(slot_part& part) noexcept {
        constexpr std::size_t most = std::size_t{1} << 24;
        attention_job& job = part.job;
        slot_rules& rules = part.rules;
        const std::size_t places = places_.end(), heads = queries_->heads();
        if (!layer_->has_positions || options_->soft_cap > 0.0f || !options_->alibi_slopes.empty() ||
            places == 0 || queries() * heads > most / places)
            return true;
        if (!waves_.sort(job, queries()))
            return false;
        if (!waves_.used())
            return true;
        const std::size_t numbers = queries() * heads * places;
        buffer<float> added;
        if (!added.reserve(numbers))
            return false;
        added.set_size(numbers);
        if (rules.bias == nullptr)
            std::fill_n(added.data(), numbers, 0.0f);
        for (std::size_t q = 0; rules.bias != nullptr && q < queries(); ++q)
            for (std::size_t h = 0; h < heads; ++h) {
                float* const own = added.data() + (q * heads + h) * places;
                std::fill_n(own, rules.bias_first, 0.0f);
                job.target->load_floats(rules.bias_type, rules.bias_row(q, h), places - rules.bias_first,
                                        own + rules.bias_first);
            }
        part.added = std::move(added);
        rules.bias = part.added.data();
        rules.bias_type = scalar_type::fp32;
        rules.bias_first = 0;
        rules.bias_query_stride = static_cast<std::ptrdiff_t>(heads * places);
        rules.bias_head_stride = static_cast<std::ptrdiff_t>(places);
        waves_.add_to(part.added.data(), places);
        job.slots = &rules;
        job.key_turning = nullptr;
        return true;
    }

    [[nodiscard]] bool place_copies(slot_part& part) noexcept {
        buffer<std::uint32_t> index; // [pages of copies]: in the table
        if (!index.resize(layer_->copies_begun.size(), slot_places::none))
            return false;
        buffer<copied_column> placed; // places in the table, in place of copies
        if (!placed.assign(copied_.view()))
            return false;
        for (copied_column& c : placed) {
            std::uint32_t& i = index[c.copy / page()];
            if (i == slot_places::none) {
                i = static_cast<std::uint32_t>(part.table.size());
                if (!part.table.try_push_back(static_cast<std::uint32_t>(c.copy / page())))
                    return false;
            }
            c.copy = static_cast<std::uint32_t>(i * page() + c.copy % page());
        }
        const std::size_t tokens = part.table.size() * page();
        if (!part.positions.resize(tokens, -1))
            return false;
        for (const copied_column& c : placed)
            part.positions[c.copy] = position_of(c.column);
        part.job.block_table = part.table.data();
        see_all(part.job, 0, tokens);
        set_rules(part);
        const auto at = [&](std::uint32_t i) { return placed[i]; };
        const auto n = static_cast<std::uint32_t>(placed.size());
        if (kind() == slot_mask_kind::bytes)
            return gather_bytes(part, tokens, n, at);
        return kind() != slot_mask_kind::additive || gather_added(part, tokens, n, at);
    }

    // Copies a mask by the tokens of a table. at(i) gives {place, column}.
    template <class At>
    [[nodiscard]] bool gather_bytes(slot_part& part, std::size_t tokens, std::uint32_t count,
                                    At&& at) noexcept {
        if (!part.bytes.resize(queries() * tokens))
            return false;
        for (std::size_t q = 0; q < queries(); ++q) {
            const std::uint8_t* row =
                mask().visible().data() + q * static_cast<std::size_t>(mask().query_stride());
            for (std::uint32_t i = 0; i < count; ++i)
                part.bytes[q * tokens + at(i).copy] = row[at(i).column] != 0 ? 1 : 0;
        }
        part.job.mask = part.bytes.data();
        part.job.mask_first = 0;
        part.job.mask_stride = tokens;
        return true;
    }
    template <class At>
    [[nodiscard]] bool gather_added(slot_part& part, std::size_t tokens, std::uint32_t count,
                                    At&& at) noexcept {
        const std::size_t heads = mask().head_stride() != 0 ? queries_->heads() : 1;
        if (!part.added.resize(queries() * heads * tokens, lowest_score))
            return false;
        slot_rules given;
        given.bias = mask().added();
        given.bias_type = mask().type();
        given.bias_query_stride = mask().query_stride();
        given.bias_head_stride = mask().head_stride();
        for (std::size_t q = 0; q < queries(); ++q)
            for (std::size_t h = 0; h < heads; ++h) {
                const std::byte* const row = given.bias_row(q, h);
                float* const out = part.added.data() + (q * heads + h) * tokens;
                for (std::uint32_t i = 0; i < count; ++i)
                    part.job.target->load_floats(
                        given.bias_type, row + static_cast<std::ptrdiff_t>(at(i).column) * given.element(), 1,
                        out + at(i).copy);
            }
        slot_rules& rules = part.rules;
        rules.bias = part.added.data();
        rules.bias_type = scalar_type::fp32;
        rules.bias_first = 0;
        rules.bias_query_stride = static_cast<std::ptrdiff_t>(heads * tokens);
        rules.bias_head_stride = heads != 1 ? static_cast<std::ptrdiff_t>(tokens) : 0;
        rules.slopes = optional_of(options_->alibi_slopes);
        part.job.slots = &rules;
        return true;
    }

    const slot_layer* layer_ = nullptr;
    const slot_stream* stream_ = nullptr;
    const slot_attention_options* options_ = nullptr;
    std::optional<tensor_view> queries_;
    std::optional<mutable_tensor_view> outputs_;
    slot_places places_;
    buffer<copied_column> copied_;
    std::size_t front_ = 0, back_ = 0; // copied columns at the view's ends
    bool scattered_ = false;           // there are others
    buffer<std::int32_t> query_positions_;
    slot_part parts_[2]; // body, copies
    slot_waves waves_;   // of the body
};

class slot_attention final : public planned_work {
public:
    // Preconditions: the streams' queries are those of the tensor; options and tensors fit the layer.
    slot_attention(const slot_layer& layer, const layer_store& store, std::span<const slot_stream> streams,
                   const tensor_view& queries, const mutable_tensor_view& outputs,
                   const slot_attention_options& options) noexcept
        : layer_(layer), store_(store), given_(streams), queries_(queries), outputs_(outputs),
          options_(options) {}

    // Errors: those of views and masks, the token being the stream's first query; out_of_memory.
    [[nodiscard]] status prepare() noexcept {
        const std::size_t count = given_.size();
        streams_.reset(new (std::nothrow) stream_attention[count]);
        own_options_.reset(new (std::nothrow) slot_attention_options[count]);
        if (streams_ == nullptr || own_options_ == nullptr)
            return {errc::out_of_memory, "an allocation failed"};
        for (std::size_t i = 0, first = 0; i < count; ++i) {
            const std::size_t m = given_[i].queries;
            if (m == 0)
                continue;
            own_options_[i] = options_;
            if (!options_.log_sum_exp.empty())
                own_options_[i].log_sum_exp =
                    options_.log_sum_exp.subspan(first * queries_.heads(), m * queries_.heads());
            stream_attention& stream = streams_[used_];
            if (const status s = stream.prepare(layer_, store_, given_[i], queries_.slice(first, m),
                                                outputs_.slice(first, m), own_options_[i]);
                !s)
                return {s.code(), s.rule(), {.token = static_cast<std::int64_t>(first)}};
            for (slot_part& part : stream.parts())
                if (part.tasks && !add(*part.tasks))
                    return {errc::out_of_memory, "an allocation failed"};
            if (stream.joins() && !joined_.try_push_back({&stream, counts_[joining]}))
                return {errc::out_of_memory, "an allocation failed"};
            counts_[joining] += stream.joins() ? m : 0;
            if (stream.wave_tasks() != 0 && !waving_.try_push_back({&stream, counts_[waving]}))
                return {errc::out_of_memory, "an allocation failed"};
            counts_[waving] += stream.wave_tasks();
            ++used_;
            first += m;
        }
        if (counts_[waving] != 0)
            kinds_[used_phases_++] = waving;
        for (std::size_t kind = 0; kind <= joining; ++kind)
            if (counts_[kind] != 0)
                kinds_[used_phases_++] = kind;
        return {};
    }

    [[nodiscard]] std::size_t phases() const noexcept override { return used_phases_; }
    [[nodiscard]] std::size_t tasks(std::size_t phase) const noexcept override {
        return counts_[kinds_[phase]];
    }
    void run(std::size_t phase, std::size_t task) noexcept override {
        if (const std::size_t kind = kinds_[phase]; kind < attention_tasks::phases) {
            const entry<attention_tasks>& e = find(all_[kind], task);
            e.of->run(kind, task - e.first);
        } else if (kind == waving) {
            const entry<stream_attention>& e = find(waving_, task);
            e.of->make_waves(task - e.first);
        } else {
            const entry<stream_attention>& e = find(joined_, task);
            e.of->join(task - e.first);
        }
    }
    status finish() noexcept override {
        for (const entry<stream_attention>& e : waving_)
            if (e.of->starved())
                return {errc::out_of_memory, "an allocation failed"};
        for (const entry<attention_tasks>& e : all_[1])
            if (const status s = e.of->finish(); !s)
                return s;
        return {};
    }

private:
    // What the tasks from `first` on belong to.
    template <class T>
    struct entry {
        T* of;
        std::size_t first;
    };

    // False: no memory.
    [[nodiscard]] bool add(attention_tasks& tasks) noexcept {
        for (std::size_t kind = 0; kind < attention_tasks::phases; ++kind) {
            if (tasks.tasks(kind) == 0)
                continue;
            if (!all_[kind].try_push_back({&tasks, counts_[kind]}))
                return false;
            counts_[kind] += tasks.tasks(kind);
        }
        return true;
    }
    template <class T>
    [[nodiscard]] static const entry<T>& find(const buffer<entry<T>>& entries, std::size_t task) noexcept {
        const auto after = std::upper_bound(entries.begin(), entries.end(), task,
                                            [](std::size_t t, const entry<T>& e) { return t < e.first; });
        return *(after - 1);
    }

    const slot_layer& layer_;
    layer_store store_;
    std::span<const slot_stream> given_;
    tensor_view queries_;
    mutable_tensor_view outputs_;
    slot_attention_options options_;
    std::unique_ptr<stream_attention[]> streams_;
    std::unique_ptr<slot_attention_options[]> own_options_;
    std::size_t used_ = 0;
    // Kinds of work are the phases of attention_tasks, joining after these, and waves before. Those that have tasks are
    // phases.
    static constexpr std::size_t joining = attention_tasks::phases, waving = joining + 1;
    buffer<entry<attention_tasks>> all_[attention_tasks::phases]; // by kind
    buffer<entry<stream_attention>> joined_, waving_;
    std::size_t counts_[waving + 1] = {}; // tasks of each kind
    std::size_t kinds_[waving + 1] = {};  // of each phase
    std::size_t used_phases_ = 0;
};

} // namespace kv1::inline KV1_ABI::detail
