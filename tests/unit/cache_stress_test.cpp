// SPDX-License-Identifier: Apache-2.0
//
// Eight threads on one cache, as the header allows it: each changes its own sequences, all fork and attend to
// shared ones, store, match, save and load prefixes, evict and ask for statistics. Every token's key is its id, so that a
// page in the wrong hands shows. KV1_STRESS_OPERATIONS sets how many operations there are in all; run it
// under ThreadSanitizer.
#include "random.hpp"
#include "saved_bytes.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/kv_cache.hpp>

#include <array>
#include <atomic>
#include <cstdlib>
#include <span>
#include <string>
#include <thread>
#include <vector>

using kv1::errc;
using kv1::kv_format;
using kv1::sequence_id;

namespace {

constexpr std::size_t workers = 8, layers = 2, dim = 4, page = 16, longest = 90;

std::size_t wanted_operations() {
    const char* text = std::getenv("KV1_STRESS_OPERATIONS");
    return text != nullptr ? std::stoull(text) : 200000;
}

struct living {
    sequence_id id;
    std::vector<std::int32_t> ids; // tokens
    std::size_t first_kept = 0;    // dropped before it
};

// One thread's work; sets `wrong` to what went wrong first.
class worker {
public:
    worker(kv1::kv_cache& cache, std::span<const living> shared, std::uint64_t seed)
        : cache_(cache), shared_(shared), random_(seed) {}

    void operator()(std::size_t operations) {
        for (std::size_t i = 0; i < operations && wrong == nullptr; ++i)
            step();
        for (const living& l : mine_)
            expect(static_cast<bool>(cache_.try_destroy_sequence(l.id)), "destroy");
    }
    const char* wrong = nullptr;
    std::size_t exhausted = 0, matched = 0, reloaded = 0;

private:
    void expect(bool holds, const char* what) {
        if (!holds && wrong == nullptr)
            wrong = what;
    }
    void step() {
        living* l = mine_.empty() ? nullptr : &mine_[random_.below(mine_.size())];
        switch (random_.below(12)) {
        case 0:
            if (mine_.size() < 4)
                if (const auto id = cache_.try_create_sequence()) {
                    mine_.push_back({*id, {}, 0});
                    return;
                }
            break;
        case 1: // of a sequence that others fork and read at the same time
            if (mine_.size() < 4) {
                const living& from = shared_[random_.below(shared_.size())];
                const auto id = cache_.try_fork(from.id);
                expect(static_cast<bool>(id), "fork of a shared sequence");
                if (id)
                    mine_.push_back({*id, from.ids, from.first_kept});
            }
            break;
        case 2:
            if (l != nullptr && mine_.size() < 4) {
                const auto id = cache_.try_fork(l->id);
                expect(static_cast<bool>(id), "fork");
                if (id)
                    mine_.push_back({*id, l->ids, l->first_kept});
            }
            break;
        case 3:
        case 4:
        case 5:
            if (l != nullptr)
                append(*l, 1 + random_.below(20));
            break;
        case 6:
            if (l != nullptr) {
                const std::size_t n = l->first_kept + random_.below(l->ids.size() - l->first_kept + 1);
                expect(static_cast<bool>(cache_.try_truncate(l->id, n)), "truncate");
                l->ids.resize(n);
            }
            break;
        case 7:
            if (l != nullptr && l->ids.size() >= l->first_kept + page && random_.chance(0.2)) {
                expect(static_cast<bool>(cache_.try_drop_pages(l->id, l->first_kept / page, 1)), "drop");
                l->first_kept += page;
            }
            break;
        case 8:
            if (l != nullptr) {
                const auto n = cache_.try_commit(l->id);
                expect(n && *n == l->ids.size(), "commit");
                check(*l);
            }
            break;
        case 9:
            if (l != nullptr) {
                check(*l);
                expect(static_cast<bool>(cache_.try_destroy_sequence(l->id)), "destroy");
                expect(!cache_.contains(l->id), "a stale handle");
                mine_.erase(mine_.begin() + (l - mine_.data()));
            }
            break;
        case 10:
            prefixes(l);
            break;
        case 11:
            attend(shared_[random_.below(shared_.size())]);
            if (l != nullptr && !l->ids.empty())
                attend(*l);
            if (random_.chance(0.05))
                expect(cache_.statistics().pages_in_use <= cache_.statistics().pages_total, "statistics");
            break;
        }
    }

    void append(living& l, std::size_t n) {
        if (l.ids.size() + n > longest)
            return;
        std::array<float, 20 * dim> x{};
        std::array<std::int32_t, 20> ids{};
        for (std::size_t i = 0; i < n; ++i) {
            ids[i] = static_cast<std::int32_t>(random_.below(3));
            std::fill_n(x.begin() + static_cast<std::ptrdiff_t>(i * dim), dim, static_cast<float>(ids[i]));
        }
        for (std::size_t layer = 0; layer < layers; ++layer) {
            const kv1::status s =
                cache_.try_append(l.id, layer, {x.data(), n, 1, dim}, {x.data(), n, 1, dim});
            if (!s) {
                expect(s.code() == errc::capacity_exceeded, "append");
                ++exhausted;
                expect(static_cast<bool>(cache_.try_truncate(l.id, l.ids.size())), "undo");
                return;
            }
        }
        l.ids.insert(l.ids.end(), ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(n));
    }

    void prefixes(living* l) {
        const unsigned what = static_cast<unsigned>(random_.below(5));
        if (what == 4 && random_.chance(0.1))
            save_and_load_prefixes();
        if (what == 0 && l != nullptr && l->first_kept == 0)
            expect(static_cast<bool>(cache_.try_store_prefix(l->id, l->ids, {}, random_.chance(0.5))),
                   "store");
        if (what == 1)
            cache_.prefixes().evict(random_.below(3));
        if ((what == 2 || what == 3) && mine_.size() < 4) {
            std::array<std::int32_t, 40> ids{};
            for (std::int32_t& id : ids)
                id = static_cast<std::int32_t>(random_.below(3));
            std::span<const std::int32_t> wanted(ids);
            if (l != nullptr && what == 3)
                wanted = l->ids; // likely to be known
            const auto match = cache_.try_create_from_prefix(wanted);
            expect(static_cast<bool>(match), "match");
            if (match) {
                matched += match->tokens;
                mine_.push_back(
                    {match->sequence,
                     {wanted.begin(), wanted.begin() + static_cast<std::ptrdiff_t>(match->tokens)},
                     0});
                check(mine_.back());
            }
        }
    }

    // All that is known, while others store, evict and append to what they share with it. It comes back beside
    // what is still known; whoever matches it checks its pages.
    void save_and_load_prefixes() {
        const auto memory = kv1_test::try_saved(cache_, {}, {.prefixes = true});
        expect(static_cast<bool>(memory), "save of prefixes");
        if (!memory)
            return;
        const auto loaded = kv1::try_load(cache_, kv1::memory_source(*memory), {});
        expect(loaded || loaded.code() == errc::capacity_exceeded, "load of prefixes");
        reloaded += loaded ? 1 : 0;
    }

    void check(const living& l) {
        std::array<float, dim> x{};
        for (std::size_t t = l.first_kept; t < l.ids.size(); ++t) {
            expect(static_cast<bool>(cache_.try_read(l.id, t % layers, kv1::kv_side::key, 0, t, 1, x)),
                   "read");
            for (const float v : x)
                expect(v == static_cast<float>(l.ids[t]), "a token's key");
        }
    }
    // Values are ids as well: a mean of them lies between the least and the greatest.
    void attend(const living& l) {
        if (l.ids.size() == l.first_kept)
            return;
        std::array<float, dim> q{0.5f}, out{};
        expect(static_cast<bool>(cache_.try_attend(l.id, 0, {q.data(), 1, 1, dim}, {out.data(), 1, 1, dim})),
               "attend");
        for (const float v : out)
            expect(v >= 0.0f && v <= 2.001f, "attention");
    }

    kv1::kv_cache& cache_;
    std::span<const living> shared_;
    kv1_test::generator random_;
    std::vector<living> mine_;
};

} // namespace

TEST_CASE("eight threads that fork, cut, drop, share and evict lose nothing and leak nothing",
          "[cache][stress]") {
    kv1::cache_description d;
    d.layers.assign(layers, {1, dim, dim, kv_format::fp16, kv_format::fp16});
    d.page_tokens = page;
    d.capacity_tokens = 40 * page; // eight workers with four sequences of six pages do not fit
    kv1::kv_cache cache(d);
    std::vector<living> shared(3);
    for (std::size_t i = 0; i < shared.size(); ++i) {
        shared[i].id = cache.create_sequence();
        for (std::size_t t = 0; t < 10 + 17 * i; ++t) {
            shared[i].ids.push_back(static_cast<std::int32_t>((t * t + i) % 3));
            const std::vector<float> x(dim, static_cast<float>(shared[i].ids.back()));
            for (std::size_t layer = 0; layer < layers; ++layer)
                cache.append(shared[i].id, layer, {x.data(), 1, 1, dim}, {x.data(), 1, 1, dim});
        }
    }
    std::vector<worker> all;
    for (std::size_t w = 0; w < workers; ++w)
        all.emplace_back(cache, shared, w);
    std::vector<std::thread> threads;
    for (worker& w : all)
        threads.emplace_back([&w] { w(wanted_operations() / workers); });
    for (std::thread& t : threads)
        t.join();
    std::size_t exhausted = 0, matched = 0, reloaded = 0;
    for (const worker& w : all) {
        INFO((w.wrong == nullptr ? "nothing" : w.wrong));
        REQUIRE(w.wrong == nullptr);
        exhausted += w.exhausted;
        reloaded += w.reloaded;
        matched += w.matched;
    }
    REQUIRE(exhausted > 0);
    REQUIRE(matched > 0);
    REQUIRE(reloaded > 0);
    cache.validate();
    for (const living& l : shared)
        cache.destroy_sequence(l.id);
    cache.prefixes().clear();
    cache.validate();
    REQUIRE(cache.statistics().pages_in_use == 0);
    REQUIRE(cache.statistics().sequences == 0);
}
