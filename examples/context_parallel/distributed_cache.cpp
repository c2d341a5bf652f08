// SPDX-License-Identifier: Apache-2.0
//
// Sequences: made, forked, cut and committed on all ranks, or on none.
#include "distributed_cache.hpp"

#include "calls.hpp"

#include <algorithm>
#include <utility>

namespace context_parallel {

namespace {

digest told_of(collective what, sequence s) {
    return digest().add(static_cast<std::uint64_t>(what)).add(s.number);
}

std::size_t whole_pages(std::size_t tokens, std::size_t page) { return (tokens + page - 1) / page * page; }

void add_encoding(digest& d, const kv1::vector_encoding& e) {
    d.add(static_cast<std::uint64_t>(e.levels)).add(std::uint64_t{e.hadamard});
    for (const std::vector<float>* const numbers : {&e.means, &e.error_weights, &e.basis})
        d.add_all(std::span<const float>(*numbers));
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
    ranks_.agree(told_of_description(), guarded([&]() -> kv1::status {
                     if (positions_.ranks() != static_cast<std::size_t>(ranks_.size()))
                         return {kv1::errc::invalid_argument, "positions are dealt to all ranks"};
                     return own_.open(whole_, positions_, static_cast<std::size_t>(ranks_.rank()));
                 }));
}

digest distributed_cache::told_of_description() const {
    digest d;
    d.add(static_cast<std::uint64_t>(collective::making))
        .add(std::uint64_t{positions_.ranks()})
        .add(std::uint64_t{positions_.block_tokens()});
    d.add(static_cast<std::uint64_t>(from_root_)).add(static_cast<std::uint64_t>(join_));
    d.add(std::uint64_t{KV1_VERSION_MAJOR}).add(std::uint64_t{KV1_VERSION_MINOR});
    for (const std::size_t n : {whole_.capacity_tokens, whole_.page_tokens, whole_.fp16_sinks,
                                whole_.fp16_window, whole_.window_capacity_tokens,
                                whole_.fp16_capacity_tokens, whole_.first_position, whole_.layers.size()})
        d.add(std::uint64_t{n});
    for (const kv1::layer_description& l : whole_.layers) {
        for (const std::size_t n :
             {l.kv_heads, l.key_dim, l.value_dim, l.sliding_window, l.window_retention,
              static_cast<std::size_t>(l.values_in_keys), l.key_group, l.value_group,
              static_cast<std::size_t>(l.key_format), static_cast<std::size_t>(l.value_format),
              static_cast<std::size_t>(l.key_axis), static_cast<std::size_t>(l.rotary.pairs),
              l.rotary.first_channel})
            d.add(std::uint64_t{n});
        d.add_all(std::span<const float>(l.rotary.frequencies));
        add_encoding(d, l.key_encoding);
        add_encoding(d, l.value_encoding);
    }
    return d;
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
    if (own_.holds(r.here, layer, r.lengths[layer]))
        return {};
    return {
        kv1::errc::broken_invariant, "the rank has lost tokens", {.layer = static_cast<std::int64_t>(layer)}};
}

sequence distributed_cache::create_sequence() {
    record r;
    const sequence s{next_};
    auto room = sequences_.end();
    const kv1::status here = guarded([&]() -> kv1::status {
        r.lengths.assign(whole_.layers.size(), 0);
        r.given_up = r.lengths;
        const auto made = own_.create();
        if (!made)
            return made.reason();
        r.here = *made;
        room = sequences_.emplace(s.number, r).first;
        return {};
    });
    try {
        ranks_.agree(told_of(collective::creating, s), here);
    } catch (...) {
        if (r.here != rank_sequence{})
            own_.destroy(r.here);
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
    own_.destroy(r->here);
    sequences_.erase(s.number);
}

sequence distributed_cache::fork(sequence s) {
    record* const r = find(s);
    kv1::status here = usable(r);
    if (here && !r->at_commit_point())
        here = {kv1::errc::layers_disagree, "layers hold different numbers of tokens"};
    const sequence twin{next_};
    rank_sequence copy;
    auto room = sequences_.end();
    if (here)
        here = guarded([&]() -> kv1::status {
            const auto forked = own_.fork(r->here);
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
        if (copy != rank_sequence{})
            own_.destroy(copy);
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
        rank_sequence twin;
        if (here) {
            const auto forked = own_.fork(r->here);
            here = forked ? kv1::status{} : forked.reason();
            if (forked) {
                twin = *forked;
                here = own_.truncate(twin, tokens, changed);
            }
        }
        try {
            ranks_.agree(told, here);
        } catch (...) {
            if (twin != rank_sequence{})
                own_.destroy(twin);
            throw;
        }
        own_.destroy(r->here);
        r->here = twin;
    } else {
        ranks_.agree(told, here);
        here = own_.truncate(r->here, tokens, changed);
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
    here = own_.commit(r->here, fp16_from);
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

} // namespace context_parallel
