// SPDX-License-Identifier: Apache-2.0
#include "rank_cache.hpp"

#include "row_operation.hpp"

#include <algorithm>
#include <limits>
#include <utility>

namespace context_parallel {

namespace {

constexpr std::size_t none = static_cast<std::size_t>(-1);

bool plain(kv1::kv_format f) { return f == kv1::kv_format::fp32 || f == kv1::kv_format::fp16; }

bool means_turn(const kv1::layer_description& l) {
    return !l.rotary.empty() && !l.key_encoding.means.empty();
}

std::size_t whole_pages(std::size_t tokens, std::size_t page) { return (tokens + page - 1) / page * page; }

} // namespace

// Of fp16 sinks and windows, where the cache has any.
bool rank_cache::has_copies(const kv1::layer_description& l) noexcept {
    return l.sliding_window == 0 && !(plain(l.key_format) && plain(l.value_format));
}

bool rank_cache::has_window(std::size_t layer) const noexcept { return recent_layer_[layer] != none; }

bool rank_cache::needs_part(std::size_t layer, const query_sight& sight) const noexcept {
    return has_window(layer) || (sight.needs_mask() && sight.rules().sliding_window != 0);
}

kv1::status rank_cache::open(const kv1::cache_description& whole, const distribution& positions,
                             std::size_t rank) {
    if (whole.page_tokens == 0 || positions.block_tokens() % whole.page_tokens != 0)
        return {kv1::errc::invalid_argument, "positions are dealt in whole pages"};
    page_ = whole.page_tokens;
    positions_ = positions;
    rank_ = rank;
    if (positions.ranks() > 1 && std::ranges::any_of(whole.layers, means_turn)) {
        position_limit_ = positions.ranks() * positions.block_tokens();
        if (whole.capacity_tokens > position_limit_)
            return {kv1::errc::invalid_argument,
                    "keys whose means turn with their position are dealt in one range a rank"};
    }
    const auto share = [&](std::size_t tokens) {
        return tokens == 0 ? 0 : std::max(page_, whole_pages(owned(tokens), page_));
    };
    // Everything as it is quantized, and the sinks, which are the first tokens of whoever holds them.
    kv1::cache_description body = whole;
    body.first_position += positions_.position(rank, 0);
    body.fp16_window = 0;
    body.fp16_sinks = owned(whole.fp16_sinks);
    body.capacity_tokens = share(whole.capacity_tokens);
    body.window_capacity_tokens = share(whole.window_capacity_tokens);
    body.fp16_capacity_tokens = share(whole.fp16_capacity_tokens);
    // What one cache would keep, whose pages end elsewhere, and room for a call's queries.
    for (kv1::layer_description& l : body.layers)
        if (l.sliding_window != 0) {
            l.sliding_window = positions_.most_owned(l.sliding_window) + 1 + page_;
            l.window_retention = positions_.most_owned(l.window_retention + page_);
        }

    kv1::cache_description recent;
    recent.page_tokens = page_;
    recent.capacity_tokens =
        share(whole.fp16_capacity_tokens != 0 ? whole.fp16_capacity_tokens : whole.capacity_tokens);
    recent_layer_.assign(whole.layers.size(), none);
    for (std::size_t i = 0; i < whole.layers.size() && whole.fp16_window != 0; ++i) {
        const kv1::layer_description& l = whole.layers[i];
        if (!has_copies(l))
            continue;
        recent_layer_[i] = recent.layers.size();
        kv1::layer_description& copy = recent.layers.emplace_back();
        copy = {l.kv_heads, l.key_dim, l.value_dim, kv1::kv_format::fp16, kv1::kv_format::fp16};
        copy.values_in_keys = l.values_in_keys;
    }

    kv1::result<kv1::kv_cache> made = kv1::kv_cache::create(std::move(body));
    if (!made)
        return made.reason();
    body_.emplace(std::move(*made));
    if (recent.layers.empty())
        return {};
    made = kv1::kv_cache::create(std::move(recent));
    if (!made)
        return made.reason();
    recent_.emplace(std::move(*made));
    return {};
}

kv1::result<rank_sequence> rank_cache::create() noexcept {
    rank_sequence s;
    const auto body = body_->try_create_sequence();
    if (!body)
        return body.reason();
    s.body = *body;
    if (recent_) {
        const auto recent = recent_->try_create_sequence();
        if (!recent) {
            destroy(s);
            return recent.reason();
        }
        s.recent = *recent;
    }
    return s;
}

kv1::result<rank_sequence> rank_cache::fork(const rank_sequence& from) noexcept {
    rank_sequence s = from;
    s.recent = {};
    const auto body = body_->try_fork(from.body);
    if (!body)
        return body.reason();
    s.body = *body;
    if (recent_) {
        const auto recent = recent_->try_fork(from.recent);
        if (!recent) {
            destroy(s);
            return recent.reason();
        }
        s.recent = *recent;
    }
    return s;
}

void rank_cache::destroy(const rank_sequence& s) noexcept {
    static_cast<void>(body_->try_destroy_sequence(s.body)); // one that is gone already is no matter
    if (recent_)
        static_cast<void>(recent_->try_destroy_sequence(s.recent));
}

// Where the fp16 tokens begin later than the cut, they begin anew.
kv1::status rank_cache::truncate(rank_sequence& s, std::size_t position, bool& changed) noexcept {
    const std::size_t tokens = owned(position);
    if (const kv1::status cut = body_->try_truncate(s.body, tokens); !cut)
        return cut;
    changed = true;
    if (!recent_)
        return {};
    if (tokens >= s.recent_base) {
        const kv1::status cut = recent_->try_truncate(s.recent, tokens - s.recent_base);
        if (cut || cut.code() != kv1::errc::dropped_tokens)
            return cut;
    }
    const auto fresh = recent_->try_create_sequence();
    if (!fresh)
        return fresh.reason();
    static_cast<void>(recent_->try_destroy_sequence(s.recent));
    s.recent = *fresh;
    s.recent_base = tokens;
    return {};
}

kv1::status rank_cache::commit(const rank_sequence& s, std::size_t fp16_from) noexcept {
    if (const auto done = body_->try_commit(s.body); !done)
        return done.reason();
    if (!recent_)
        return {};
    if (const auto done = recent_->try_commit(s.recent); !done)
        return done.reason();
    const std::size_t place = owned(fp16_from);
    return place <= s.recent_base ? kv1::status{}
                                  : recent_->try_drop_pages(s.recent, 0, (place - s.recent_base) / page_);
}

bool rank_cache::holds(const rank_sequence& s, std::size_t layer, std::size_t length) const noexcept {
    const std::size_t wanted = owned(length);
    const auto body = body_->try_length(s.body, layer);
    if (!body || *body != wanted)
        return false;
    if (!has_window(layer))
        return true;
    const auto recent = recent_->try_length(s.recent, recent_layer_[layer]);
    return recent && *recent + s.recent_base == wanted;
}

kv1::status rank_cache::append(std::span<const rank_sequence> batch, std::size_t layer,
                               std::span<const std::size_t> indptr, const kv1::tensor_view& keys,
                               const kv1::tensor_view& values, const thread_source& run, bool& changed) {
    std::vector<kv1::sequence_id> bodies, recents;
    for (const rank_sequence& s : batch) {
        bodies.push_back(s.body);
        recents.push_back(s.recent);
    }
    if (const kv1::status s = body_->try_append(bodies, layer, indptr, keys, values, run); !s)
        return s;
    changed = true;
    return has_window(layer) ? recent_->try_append(recents, recent_layer_[layer], indptr, keys, values, run)
                             : kv1::status{};
}

kv1::status rank_cache::attend(const rank_sequence& s, std::size_t layer, std::size_t length,
                               const kv1::tensor_view& queries, const query_sight& sight,
                               const kv1::attention_options& options, std::span<float> rows,
                               rank_scratch& scratch, const thread_source& run) const {
    const std::size_t heads = queries.heads(), count = queries.tokens(),
                      width = count == 0 ? 1 : rows.size() / (count * heads), channels = width - 1;
    // Attends in one of the caches, whose places begin at `base`; found(row) is called for rows in `to`.
    const auto over = [&](const kv1::kv_cache& cache, kv1::sequence_id id, std::size_t of_cache,
                          std::size_t base, std::span<float> to, auto&& spans, auto&& found) -> kv1::status {
        kv1::status status;
        const auto places = [&](std::size_t i) -> token_span {
            const token_span seen = spans(i), own{owned(seen.first), owned(seen.last)};
            return own.empty() ? token_span{} : token_span{own.first - base, own.last - base};
        };
        const auto call = [&](const local_call& c) {
            if (!status)
                return;
            const std::size_t first = c.first * heads, n = c.count * heads;
            const kv1::attention_options own{.scale = options.scale,
                                             .mask = c.mask,
                                             .mode = options.mode,
                                             .log_sum_exp = std::span(scratch.log_sum_exp).first(n),
                                             .range = c.range,
                                             .window = c.window,
                                             .soft_cap = options.soft_cap};
            status = cache.try_attend(id, of_cache, queries.slice(c.first, c.count),
                                      {to.data() + first * width, c.count, heads, channels,
                                       static_cast<std::ptrdiff_t>(heads * width),
                                       static_cast<std::ptrdiff_t>(width)},
                                      own, run);
            for (std::size_t r = 0; r < n && status; ++r) {
                to[(first + r) * width + channels] = scratch.log_sum_exp[r];
                found(first + r);
            }
        };
        // Where the cache has a sliding window, queries of a call are within a page, and see no more by a mask
        // than the window holds: it hides nothing.
        const std::size_t window = cache.description().layers[of_cache].sliding_window;
        if (sight.needs_mask()) {
            const std::size_t masked = owned(sight.masked_from());
            for_each_masked_call(
                count, owned(length) - base, masked - std::min(base, masked), window != 0 ? window : none,
                places,
                [&](std::size_t i, std::size_t place) {
                    return sight.shows(i, positions_.position(rank_, place + base));
                },
                scratch.visible, call);
        } else {
            for_each_local_call(count, window != 0 ? page_ : none, places, call);
        }
        return status;
    };
    const std::span<float> part = std::span(scratch.part).first(needs_part(layer, sight) ? rows.size() : 0);
    const auto join_part = [&](std::size_t row) {
        join_row(part.subspan(row * width, width), rows.subspan(row * width, width));
    };
    const auto quantized = [&](std::size_t i) { return sight.quantized(i); };

    if (!has_window(layer))
        return part.empty() ? over(*body_, s.body, layer, 0, rows, quantized, [](std::size_t) {})
                            : over(*body_, s.body, layer, 0, part, quantized, join_part);
    const kv1::status body = over(*body_, s.body, layer, 0, rows, quantized, [](std::size_t) {});
    return body ? over(
                      *recent_, s.recent, recent_layer_[layer], s.recent_base, part,
                      [&](std::size_t i) { return sight.recent(i); }, join_part)
                : body;
}

std::size_t rank_cache::bytes_in_use() const noexcept {
    return body_->statistics().bytes_in_use + (recent_ ? recent_->statistics().bytes_in_use : 0);
}

} // namespace context_parallel
