// SPDX-License-Identifier: Apache-2.0
//
// A sequence's life: create, fork, truncate, drop pages, commit, roll back, destroy. Cases of cache_operations.hpp.
#pragma once

#include "append_operations.hpp"

#include <algorithm>
#include <cstddef>
#include <utility>

namespace kv1_test {

class sequence_operations : public append_operations {
protected:
    using append_operations::append_operations;

    void create() {
        if (living_.size() >= 12)
            return;
        const auto id = cache_.try_create_sequence();
        require(id.reason(), "create");
        living_.push_back({*id, model_.empty(below(2))});
    }

    void fork() {
        living* l = some();
        if (l == nullptr || living_.size() >= 12)
            return;
        const auto id = cache_.try_fork(l->id);
        require(id.code() == (l->model.agreed() ? kv1::errc::ok : kv1::errc::layers_disagree), "fork");
        if (!id)
            return;
        ++tallies_.forked;
        living twin{*id, l->model};
        compare(twin);
        living_.push_back(std::move(twin));
    }

    void truncate() {
        living* l = some();
        if (l == nullptr)
            return;
        cut(*l, below(l->model.shortest() + 2));
    }

    void cut(living& l, std::size_t n) {
        const kv1::status s = cache_.try_truncate(l.id, n);
        const kv1::errc expected = model_.can_truncate(l.model, n);
        if (s.code() == kv1::errc::capacity_exceeded) { // a page for tokens without their fp16 copies
            require(expected == kv1::errc::ok && description_.fp16_sinks + description_.fp16_window != 0,
                    "truncate needs no page");
            return;
        }
        require(s.code() == expected, "truncate");
        if (s) {
            model_.truncate(l.model, n);
            ++tallies_.truncated;
        }
        compare(l);
    }

    void drop() {
        living* l = some();
        if (l == nullptr)
            return;
        const std::size_t full = l->model.shortest() / description_.page_tokens;
        const std::size_t first = below(full + 2), n = below(3);
        const kv1::status s = cache_.try_drop_pages(l->id, first, n);
        const bool fits = first <= full && n <= full - first;
        require(s.code() == (fits ? kv1::errc::ok : kv1::errc::out_of_range), "drop");
        if (fits) {
            for (std::size_t p = first; p < first + n; ++p)
                l->model.dropped.insert(p);
            tallies_.dropped += n;
        }
        compare(*l);
    }

    void commit() {
        living* l = some();
        if (l == nullptr)
            return;
        const auto n = cache_.try_commit(l->id);
        require(n.code() == (l->model.agreed() ? kv1::errc::ok : kv1::errc::layers_disagree), "commit");
        if (n) {
            require(*n == l->model.shortest(), "the committed length");
            model_.commit(l->model);
            ++tallies_.committed;
            tallies_.retained += cache_.try_statistics(l->id)->bytes_retained != 0 ? 1u : 0u;
            for (std::size_t layer = 0; layer < l->model.given_up.size(); ++layer)
                if (const std::size_t gone = l->model.given_up[layer]; gone != 0)
                    attend_at(*l, layer, below(gone + 40));
        }
        compare(*l);
    }

    void rollback() {
        living* l = some();
        if (l == nullptr)
            return;
        const kv1::status s = cache_.try_rollback(l->id);
        if (!l->model.committed) {
            require(s.code() == kv1::errc::nothing_committed, "a rollback needs a commit");
            ++tallies_.never_committed;
            compare(*l);
            return;
        }
        const std::size_t n = std::min(*l->model.committed, l->model.shortest());
        const kv1::errc expected = model_.can_truncate(l->model, n);
        if (s.code() == kv1::errc::capacity_exceeded)
            return;
        require(s.code() == expected, "rollback");
        if (s) {
            model_.truncate(l->model, n);
            ++tallies_.rolled_back;
        }
        compare(*l);
    }

    void destroy() {
        if (living_.empty())
            return;
        const std::size_t i = below(living_.size());
        require(cache_.try_destroy_sequence(living_[i].id), "destroy");
        require(cache_.try_length(living_[i].id).code() == kv1::errc::invalid_sequence, "a stale handle");
        living_.erase(living_.begin() + static_cast<std::ptrdiff_t>(i));
        ++tallies_.destroyed;
    }
};

} // namespace kv1_test
