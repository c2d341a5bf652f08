// SPDX-License-Identifier: Apache-2.0
//
// Sequences: made, forked, cut and committed on all ranks, or on none.
#include "distributed_cache.hpp"

#include "local_parts.hpp"

#include <algorithm>
#include <utility>

namespace context_parallel {

namespace {

digest told_of(collective what, sequence s) {
    return digest().add(static_cast<std::uint64_t>(what)).add(s.number);
}

bool plain(kv1::kv_format f) { return f == kv1::kv_format::fp32 || f == kv1::kv_format::fp16; }

std::size_t whole_pages(std::size_t tokens, std::size_t page) { return (tokens + page - 1) / page * page; }

void add_encoding(digest& d, const kv1::vector_encoding& e) {
    d.add(static_cast<std::uint64_t>(e.levels)).add(std::uint64_t{e.hadamard});
    d.add_all(std::span<const float>(e.means)).add_all(std::span<const float>(e.error_weights));
}

} // namespace

bool distributed_cache::record::at_commit_point() const noexcept {
    return std::ranges::all_of(lengths, [&](std::size_t n) { return n == lengths.front(); });
}

std::size_t distributed_cache::record::shortest() const noexcept { return std::ranges::min(lengths); }

distributed_cache::distributed_cache(MPI_Comm ranks, const kv1::cache_description& whole,
                                     cache_options options)
    : ranks_(ranks, options.patience), whole_(whole),
      positions_(options.positions.value_or(distribution::pages(
          static_cast<std::size_t>(ranks_.size()), std::max<std::size_t>(1, whole.page_tokens)))),
      from_root_(options.from == inputs::of_root), join_(options.join), run_(std::move(options.run)) {
    ranks_.agree(told_of_description(), guarded([&] { return make_caches(); }));
}

digest distributed_cache::told_of_description() const {
    digest d;
    d.add(static_cast<std::uint64_t>(collective::making))
        .add(std::uint64_t{positions_.ranks()})
        .add(std::uint64_t{positions_.block_tokens()});
    d.add(static_cast<std::uint64_t>(from_root_)).add(static_cast<std::uint64_t>(join_));
    d.add(std::uint64_t{KV1_VERSION_MAJOR}).add(std::uint64_t{KV1_VERSION_MINOR});
    for (const std::size_t n :
         {whole_.capacity_tokens, whole_.page_tokens, whole_.fp16_sinks, whole_.fp16_window,
          whole_.window_capacity_tokens, whole_.fp16_capacity_tokens, whole_.layers.size()})
        d.add(std::uint64_t{n});
    for (const kv1::layer_description& l : whole_.layers) {
        for (const std::size_t n :
             {l.kv_heads, l.key_dim, l.value_dim, l.sliding_window, l.window_retention,
              static_cast<std::size_t>(l.values_in_keys), l.key_group, l.value_group,
              static_cast<std::size_t>(l.key_format), static_cast<std::size_t>(l.value_format),
              static_cast<std::size_t>(l.key_axis)})
            d.add(std::uint64_t{n});
        add_encoding(d, l.key_encoding);
        add_encoding(d, l.value_encoding);
    }
    return d;
}

kv1::status distributed_cache::make_caches() {
    if (positions_.ranks() != static_cast<std::size_t>(ranks_.size()) || whole_.page_tokens == 0 ||
        positions_.block_tokens() % whole_.page_tokens != 0)
        return {kv1::errc::invalid_argument, "positions are dealt to all ranks in whole pages"};
    const std::size_t page = whole_.page_tokens;
    const auto share = [&](std::size_t tokens) {
        return tokens == 0 ? 0 : std::max(page, whole_pages(owned(tokens), page));
    };
    // Everything as it is quantized, and the sinks, which are the first tokens of whoever holds them.
    kv1::cache_description body = whole_;
    body.fp16_window = 0;
    body.fp16_sinks = owned(whole_.fp16_sinks);
    body.capacity_tokens = share(whole_.capacity_tokens);
    body.window_capacity_tokens = share(whole_.window_capacity_tokens);
    body.fp16_capacity_tokens = share(whole_.fp16_capacity_tokens);
    // What one cache would keep, whose pages end elsewhere, and room for a call's queries.
    for (kv1::layer_description& l : body.layers) {
        if (l.values_in_keys)
            return {kv1::errc::invalid_argument, "layers with values in keys are not for ranks"};
        if (l.sliding_window == 0)
            continue;
        l.sliding_window = positions_.most_owned(l.sliding_window) + 1 + page;
        l.window_retention = positions_.most_owned(l.window_retention + page);
    }

    kv1::cache_description recent;
    recent.page_tokens = page;
    recent.capacity_tokens =
        share(whole_.fp16_capacity_tokens != 0 ? whole_.fp16_capacity_tokens : whole_.capacity_tokens);
    recent_layer_.assign(whole_.layers.size(), none);
    for (std::size_t i = 0; i < whole_.layers.size() && whole_.fp16_window != 0; ++i) {
        const kv1::layer_description& l = whole_.layers[i];
        if (!has_copies(l))
            continue;
        recent_layer_[i] = recent.layers.size();
        recent.layers.push_back(
            {l.kv_heads, l.key_dim, l.value_dim, kv1::kv_format::fp16, kv1::kv_format::fp16});
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

// Of fp16 sinks and windows, where the cache has any.
bool distributed_cache::has_copies(const kv1::layer_description& l) noexcept {
    return l.sliding_window == 0 && !(plain(l.key_format) && plain(l.value_format));
}

distributed_cache::record* distributed_cache::find(sequence s) noexcept {
    const auto found = sequences_.find(s.number);
    return found == sequences_.end() ? nullptr : &found->second;
}

kv1::status distributed_cache::usable(const record* r, bool also_failed_steps) const noexcept {
    if (r == nullptr)
        return {kv1::errc::invalid_sequence, "the handle names no living sequence"};
    if (r->is == condition::broken)
        return {kv1::errc::broken_invariant, "some ranks have undone what others keep: destroy the sequence"};
    if (r->is == condition::step_failed && !also_failed_steps)
        return {kv1::errc::broken_invariant, "a step failed on some ranks: roll the sequence back"};
    return {};
}

// Whether this rank has the tokens that it should have.
kv1::status distributed_cache::holds_all(const record& r, std::size_t layer) const noexcept {
    const std::size_t wanted = owned(r.lengths[layer]);
    const auto body = body_->try_length(r.here.body, layer);
    bool there = body && *body == wanted;
    if (recent_layer_[layer] != none) {
        const auto recent = recent_->try_length(r.here.recent, recent_layer_[layer]);
        there = there && recent && *recent + r.here.recent_base == wanted;
    }
    if (there)
        return {};
    return {
        kv1::errc::broken_invariant, "the rank has lost tokens", {.layer = static_cast<std::int64_t>(layer)}};
}

// ---- this rank's caches

kv1::result<distributed_cache::local_sequence> distributed_cache::create_local() {
    local_sequence s;
    const auto body = body_->try_create_sequence();
    if (!body)
        return body.reason();
    s.body = *body;
    if (recent_) {
        const auto recent = recent_->try_create_sequence();
        if (!recent) {
            destroy_local(s);
            return recent.reason();
        }
        s.recent = *recent;
    }
    return s;
}

kv1::result<distributed_cache::local_sequence> distributed_cache::fork_local(const local_sequence& from) {
    local_sequence s = from;
    s.recent = {};
    const auto body = body_->try_fork(from.body);
    if (!body)
        return body.reason();
    s.body = *body;
    if (recent_) {
        const auto recent = recent_->try_fork(from.recent);
        if (!recent) {
            destroy_local(s);
            return recent.reason();
        }
        s.recent = *recent;
    }
    return s;
}

void distributed_cache::destroy_local(const local_sequence& s) noexcept {
    static_cast<void>(body_->try_destroy_sequence(s.body)); // one that is gone already is no matter
    if (recent_)
        static_cast<void>(recent_->try_destroy_sequence(s.recent));
}

// Cuts to the first `tokens` places. Where the fp16 tokens begin later than that, they begin anew.
kv1::status distributed_cache::truncate_local(local_sequence& s, std::size_t tokens, bool& changed) {
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

// `fp16_from`: the position before which no later query sees fp16.
kv1::status distributed_cache::commit_local(local_sequence& s, std::size_t fp16_from) {
    if (const auto done = body_->try_commit(s.body); !done)
        return done.reason();
    if (!recent_)
        return {};
    if (const auto done = recent_->try_commit(s.recent); !done)
        return done.reason();
    const std::size_t place = owned(fp16_from);
    return place <= s.recent_base
               ? kv1::status{}
               : recent_->try_drop_pages(s.recent, 0, (place - s.recent_base) / whole_.page_tokens);
}

// ---- all ranks

sequence distributed_cache::create_sequence() {
    record r;
    const sequence s{next_};
    auto room = sequences_.end();
    const kv1::status here = guarded([&]() -> kv1::status {
        r.lengths.assign(whole_.layers.size(), 0);
        r.given_up = r.lengths;
        const auto made = create_local();
        if (!made)
            return made.reason();
        r.here = *made;
        room = sequences_.emplace(s.number, r).first;
        return {};
    });
    try {
        ranks_.agree(told_of(collective::creating, s), here);
    } catch (...) {
        if (r.here != local_sequence{})
            destroy_local(r.here);
        if (room != sequences_.end())
            sequences_.erase(room);
        throw;
    }
    ++next_;
    return s;
}

void distributed_cache::destroy_sequence(sequence s) {
    record* const r = find(s);
    ranks_.agree(told_of(collective::destroying, s), r != nullptr ? kv1::status{} : usable(r));
    destroy_local(r->here);
    sequences_.erase(s.number);
}

sequence distributed_cache::fork(sequence s) {
    record* const r = find(s);
    kv1::status here = usable(r);
    if (here && !r->at_commit_point())
        here = {kv1::errc::layers_disagree, "layers hold different numbers of tokens"};
    const sequence twin{next_};
    local_sequence copy;
    auto room = sequences_.end();
    if (here)
        here = guarded([&]() -> kv1::status {
            const auto forked = fork_local(r->here);
            if (!forked)
                return forked.reason();
            copy = *forked;
            room = sequences_.emplace(twin.number, *r).first;
            room->second.here = copy;
            return {};
        });
    try {
        ranks_.agree(told_of(collective::forking, s).add(twin.number), here);
    } catch (...) {
        if (copy != local_sequence{})
            destroy_local(copy);
        if (room != sequences_.end())
            sequences_.erase(room);
        throw;
    }
    ++next_;
    return twin;
}

void distributed_cache::truncate(sequence s, std::size_t tokens) {
    record* const r = find(s);
    kv1::status here = usable(r, true);
    if (here && tokens > r->shortest())
        here = {kv1::errc::out_of_range, "a layer holds fewer tokens"};
    cut(s, tokens, told_of(collective::cutting, s).add(std::uint64_t{tokens}), here);
}

void distributed_cache::rollback(sequence s) {
    record* const r = find(s);
    kv1::status here = usable(r, true);
    if (here && !r->committed)
        here = {kv1::errc::nothing_committed, "the sequence has no commit to return to"};
    const std::size_t tokens = here ? std::min(*r->committed, r->shortest()) : 0;
    cut(s, tokens, told_of(collective::cutting, s).add(std::uint64_t{tokens}), here);
}

// At a commit point a twin is cut, which takes the sequence's place once all ranks have theirs. Within a step
// nothing can be forked: ranks agree first, and what fails then fails for good.
void distributed_cache::cut(sequence s, std::size_t tokens, digest told, kv1::status here) {
    record* const r = find(s);
    bool changed = false;
    for (std::size_t i = 0; here && i < whole_.layers.size(); ++i) { // as one cache sees it
        const std::size_t window = whole_.layers[i].sliding_window;
        const std::size_t first = window != 0 && tokens + 1 > window ? tokens + 1 - window : 0;
        if (window != 0 && std::min(tokens, r->given_up[i]) > first)
            here = {kv1::errc::dropped_tokens,
                    "the window has given up tokens before the cut",
                    {.layer = static_cast<std::int64_t>(i)}};
    }
    if (r == nullptr || (r->at_commit_point() && r->is == condition::whole)) {
        local_sequence twin;
        if (here) {
            const auto forked = fork_local(r->here);
            here = forked ? kv1::status{} : forked.reason();
            if (forked) {
                twin = *forked;
                here = truncate_local(twin, owned(tokens), changed);
            }
        }
        try {
            ranks_.agree(told, here);
        } catch (...) {
            if (twin != local_sequence{})
                destroy_local(twin);
            throw;
        }
        destroy_local(r->here);
        r->here = twin;
    } else {
        ranks_.agree(told, here);
        here = truncate_local(r->here, owned(tokens), changed);
        try {
            ranks_.agree(told, here, changed);
        } catch (...) {
            if (changed)
                r->is = condition::broken;
            throw;
        }
    }
    r->is = condition::whole;
    std::ranges::fill(r->lengths, tokens);
    for (std::size_t& from : r->given_up)
        from = std::min(from, whole_pages(tokens, whole_.page_tokens));
    if (r->committed)
        r->committed = std::min(*r->committed, tokens);
    r->fp16_from = std::min(r->fp16_from, tokens);
}

std::size_t distributed_cache::commit(sequence s) {
    record* const r = find(s);
    kv1::status here = usable(r);
    if (here && !r->at_commit_point())
        here = {kv1::errc::layers_disagree, "layers hold different numbers of tokens"};
    for (std::size_t i = 0; here && i < whole_.layers.size(); ++i)
        here = holds_all(*r, i);
    ranks_.agree(told_of(collective::committing, s), here);
    const std::size_t n = r->lengths.front(), w = whole_.fp16_window;
    const std::size_t from = w == 0 ? n : n + 1 > w ? n + 1 - w : 0;
    const std::size_t fp16_from = std::max(r->fp16_from, from);
    here = commit_local(r->here, fp16_from);
    bool changed = static_cast<bool>(here);
    try {
        ranks_.agree(told_of(collective::committed, s), here, changed);
    } catch (...) {
        r->is = condition::broken;
        throw;
    }
    r->committed = n;
    r->fp16_from = fp16_from;
    for (std::size_t i = 0; i < whole_.layers.size(); ++i) { // as one cache does, page by page
        const std::size_t window = whole_.layers[i].sliding_window,
                          kept = window + whole_.layers[i].window_retention;
        if (window != 0 && n + 1 > kept)
            r->given_up[i] =
                std::max(r->given_up[i], (n + 1 - kept) / whole_.page_tokens * whole_.page_tokens);
    }
    return n;
}

std::size_t distributed_cache::length(sequence s, std::size_t layer) const {
    return sequences_.at(s.number).lengths.at(layer);
}

std::size_t distributed_cache::length(sequence s) const { return sequences_.at(s.number).shortest(); }

std::size_t distributed_cache::bytes_in_use() const noexcept {
    return body_->statistics().bytes_in_use + (recent_ ? recent_->statistics().bytes_in_use : 0);
}

} // namespace context_parallel
