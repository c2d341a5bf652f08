// SPDX-License-Identifier: Apache-2.0
//
// block_table and slot_table by themselves.
#include "failing_new.hpp"
#include "random.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/detail/block_table.hpp>
#include <kv1/detail/slot_table.hpp>

#include <algorithm>
#include <map>
#include <optional>
#include <vector>

using kv1::detail::block_table;
using kv1::detail::page_hole;

namespace {

// Pages 0 ... n - 1 in blocks 100, 101, ...
block_table table_of(std::uint32_t n) {
    block_table t;
    REQUIRE(t.reserve(n));
    for (std::uint32_t i = 0; i < n; ++i)
        t.push_back(100 + i);
    return t;
}

std::vector<std::uint32_t> blocks_of(const block_table& t) { return {t.blocks().begin(), t.blocks().end()}; }

} // namespace

TEST_CASE("a table without holes maps every page to its place", "[blocks]") {
    const block_table t = table_of(3);
    REQUIRE(t.pages() == 3);
    REQUIRE(t.find(2) == 2u);
    REQUIRE_FALSE(t.find(3).has_value());
    REQUIRE(t.kept_before(40, 16) == 40);
}

TEST_CASE("dropped pages leave a hole and move nobody", "[blocks]") {
    block_table t = table_of(6);
    std::vector<std::uint32_t> released;
    const auto release = [&](std::uint32_t b) { released.push_back(b); };
    REQUIRE(t.reserve_hole());
    t.drop(1, 3, release);
    REQUIRE(released == std::vector<std::uint32_t>{101, 102});
    REQUIRE(t.pages() == 6);
    REQUIRE(t.find(0) == 0u);
    REQUIRE_FALSE(t.find(1).has_value());
    REQUIRE_FALSE(t.find(2).has_value());
    REQUIRE(t.find(3) == 1u);
    REQUIRE(blocks_of(t) == std::vector<std::uint32_t>{100, 103, 104, 105});
    // positions to places: 16 tokens a page
    REQUIRE(t.kept_before(16, 16) == 16);
    REQUIRE(t.kept_before(17, 16) == 16);
    REQUIRE(t.kept_before(48, 16) == 16);
    REQUIRE(t.kept_before(49, 16) == 17);
    REQUIRE(t.valid());
    // a neighbour joins the hole, an overlap too
    REQUIRE(t.reserve_hole());
    t.drop(3, 4, release);
    REQUIRE(t.reserve_hole());
    t.drop(2, 5, release);
    REQUIRE(t.holes().size() == 1);
    REQUIRE(t.holes()[0] == page_hole{1, 5});
    REQUIRE(released == std::vector<std::uint32_t>{101, 102, 103, 104});
    REQUIRE(t.valid());
}

TEST_CASE("truncating cuts holes like pages", "[blocks]") {
    std::vector<std::uint32_t> released;
    const auto release = [&](std::uint32_t b) { released.push_back(b); };
    block_table t = table_of(8);
    REQUIRE(t.reserve_hole());
    t.drop(1, 2, release);
    REQUIRE(t.reserve_hole());
    t.drop(4, 6, release);
    released.clear();
    t.truncate(5, release); // within the second hole
    REQUIRE(released == std::vector<std::uint32_t>{107, 106});
    REQUIRE(t.pages() == 5);
    REQUIRE(t.holes().back() == page_hole{4, 5});
    t.truncate(4, release);
    REQUIRE(t.holes().size() == 1);
    t.truncate(1, release);
    REQUIRE(t.holes().empty());
    REQUIRE(blocks_of(t) == std::vector<std::uint32_t>{100});
    t.truncate(0, release);
    REQUIRE(t.pages() == 0);
    REQUIRE(t.valid());
}

TEST_CASE("a table equals a list of optional blocks under random changes", "[blocks]") {
    for (std::uint64_t seed = 0; seed < 200; ++seed) {
        kv1_test::generator g(seed);
        block_table t;
        std::vector<std::optional<std::uint32_t>> model;
        std::vector<std::uint32_t> released, expected;
        const auto release = [&](std::uint32_t b) { released.push_back(b); };
        std::uint32_t next = 0;
        for (int step = 0; step < 60; ++step) {
            switch (g.below(6)) {
            case 0:
            case 1:
                REQUIRE(t.reserve(1));
                t.push_back(next);
                model.emplace_back(next++);
                break;
            case 2: {
                const std::size_t n = g.below(model.size() + 1);
                t.truncate(n, release);
                for (; model.size() > n; model.pop_back())
                    if (model.back())
                        expected.push_back(*model.back());
                break;
            }
            case 3:
                if (!model.empty()) {
                    const std::size_t first = g.below(model.size()),
                                      last = g.between(first + 1, model.size());
                    REQUIRE(t.reserve_hole());
                    t.drop(static_cast<std::uint32_t>(first), static_cast<std::uint32_t>(last), release);
                    for (std::size_t i = first; i < last; ++i) {
                        if (model[i])
                            expected.push_back(*model[i]);
                        model[i].reset();
                    }
                }
                break;
            case 4: { // pages that were never there
                const std::size_t n = g.between(1, 3);
                REQUIRE(t.reserve_hole());
                t.append_hole(static_cast<std::uint32_t>(n));
                model.resize(model.size() + n);
                break;
            }
            case 5:
                if (const std::size_t p = g.below(model.size() + 1); p < model.size() && !model[p]) {
                    REQUIRE(t.reserve(1));
                    REQUIRE(t.reserve_hole());
                    t.fill(static_cast<std::uint32_t>(p), next);
                    model[p] = next++;
                }
                break;
            }
            REQUIRE(t.valid());
            REQUIRE(released == expected);
            REQUIRE(t.pages() == model.size());
            std::size_t kept = 0, next_kept = model.size();
            for (std::size_t p = model.size(); p-- > 0;) {
                next_kept = model[p] ? p : next_kept;
                REQUIRE(t.next_kept(p) == next_kept);
            }
            for (std::size_t p = 0; p < model.size(); ++p) {
                const auto place = t.find(p);
                REQUIRE(place.has_value() == model[p].has_value());
                REQUIRE(t.hole_at(p).has_value() != model[p].has_value());
                REQUIRE(t.kept_before(p * 10, 10) == kept * 10);
                REQUIRE(t.kept_before(p * 10 + 3, 10) == kept * 10 + (place ? 3 : 0));
                if (place) {
                    REQUIRE(*place == kept);
                    REQUIRE(t.blocks()[*place] == *model[p]);
                    ++kept;
                }
            }
        }
        block_table copy;
        REQUIRE(copy.assign(t));
        REQUIRE(blocks_of(copy) == blocks_of(t));
        REQUIRE(std::equal(copy.holes().begin(), copy.holes().end(), t.holes().begin(), t.holes().end()));
    }
}

TEST_CASE("a table without memory for a copy stays as it was", "[blocks]") {
    block_table t = table_of(3), other = table_of(50);
    REQUIRE(other.reserve_hole());
    other.drop(2, 3, [](std::uint32_t) {});
    for (const std::size_t allowed : {0u, 1u}) {
        bool copied = true;
        {
            const kv1_test::failing_new failing(allowed);
            copied = t.assign(other);
        }
        REQUIRE_FALSE(copied);
        REQUIRE(blocks_of(t) == std::vector<std::uint32_t>{100, 101, 102});
    }
}

TEST_CASE("slots give handles that go stale, and objects that stay where they are", "[slots]") {
    kv1::detail::slot_table<int> table;
    std::map<std::uint32_t, std::pair<kv1::sequence_id, int*>> living;
    std::vector<kv1::sequence_id> stale;
    kv1_test::generator g(1);
    for (int i = 0; i < 3000; ++i) {
        if (living.empty() || g.chance(0.55)) {
            const auto slot = table.reserve();
            REQUIRE(slot.has_value());
            table.object(*slot) = i;
            const kv1::sequence_id id = table.publish(*slot);
            REQUIRE(living.emplace(*slot, std::pair(id, table.find(id))).second);
            REQUIRE(*table.find(id) == i);
        } else {
            auto it = living.begin();
            std::advance(it, g.below(living.size()));
            const kv1::sequence_id id = it->second.first;
            REQUIRE(table.retire(id) == it->second.second);
            REQUIRE(table.find(id) == nullptr);
            REQUIRE(table.retire(id) == nullptr); // a second time
            table.recycle(id.slot);
            stale.push_back(id);
            living.erase(it);
        }
    }
    for (const auto& [slot, entry] : living)
        REQUIRE(table.find(entry.first) == entry.second);
    for (const kv1::sequence_id id : stale)
        REQUIRE(table.find(id) == nullptr);
    std::size_t seen = 0;
    table.for_each([&](kv1::sequence_id id, int) { seen += living.contains(id.slot) ? 1u : 0u; });
    REQUIRE(seen == living.size());
    REQUIRE(table.find({0, 0}) == nullptr);
    REQUIRE(table.find({4000000000u, 1}) == nullptr);
    table.cancel(*table.reserve()); // never came alive
}

TEST_CASE("a slot table without memory gives no slot", "[slots]") {
    kv1::detail::slot_table<int> table;
    std::size_t failures = 0;
    for (std::size_t allowed = 0;; ++allowed) {
        const kv1_test::failing_new failing(allowed);
        const auto slot = table.reserve();
        if (slot)
            break;
        ++failures;
    }
    REQUIRE(failures == 2); // the list of free slots, and the first slots
}
