// SPDX-License-Identifier: Apache-2.0
//
// The prefix index in what is saved: found again by tokens and salts, page for page, whole or not at all.
#include "compare.hpp"
#include "failing_new.hpp"
#include "random.hpp"
#include "saved_bytes.hpp"

#include "../fuzz/saved_body.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/cache_io.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <span>
#include <string>
#include <vector>

using kv1::errc;
using kv1::kv_cache;
using kv1::kv_format;
using kv1::prefix_salt;
using kv1::sequence_id;
using kv1::token_id;

namespace {

using bytes = kv1_test::saved_bytes;
using tokens = std::vector<token_id>;

constexpr std::size_t page = 16;
constexpr kv1::save_options with_prefixes{.prefixes = true};

// Bodies, a sliding window, fp16 sinks that end within the second page, and keys per channel.
kv1::cache_description described(std::size_t capacity = 512) {
    kv1::cache_description d;
    d.layers = {{2, 8, 6, kv_format::affine2, kv_format::affine4},
                {1, 8, 8, kv_format::affine3, kv_format::fp32, 30},
                {1, 8, 8, kv_format::affine2, kv_format::affine2}};
    d.layers[2].key_axis = kv1::quantization_axis::per_channel;
    d.capacity_tokens = capacity;
    d.page_tokens = page;
    d.fp16_sinks = 20;
    return d;
}

tokens prompt(std::size_t n, token_id first) {
    tokens t(n);
    for (std::size_t i = 0; i < n; ++i)
        t[i] = static_cast<token_id>(
            i < 2 * page ? i : i * 31 + static_cast<std::size_t>(first)); // two pages alike
    return t;
}

// Keys and values are a function of the tokens before them, as a model's are.
void run(kv_cache& cache, sequence_id id, std::span<const token_id> t, prefix_salt salt) {
    const std::size_t known = cache.length(id);
    for (std::size_t layer = 0; layer < cache.layers(); ++layer) {
        const kv1::layer_description& l = cache.description().layers[layer];
        std::vector<float> k, v;
        std::uint64_t history = salt.low;
        for (std::size_t i = 0; i < t.size(); ++i) {
            history = history * 1000003 + static_cast<std::uint64_t>(t[i]);
            if (i < known)
                continue;
            kv1_test::generator g(history);
            for (std::vector<float>* side : {&k, &v}) {
                const auto x =
                    kv1_test::normal_values(g, l.kv_heads * (side == &k ? l.key_dim : l.value_dim));
                side->insert(side->end(), x.begin(), x.end());
            }
        }
        const std::size_t n = t.size() - known;
        cache.append(id, layer, {k.data(), n, l.kv_heads, l.key_dim}, {v.data(), n, l.kv_heads, l.value_dim});
    }
}

// Runs a prompt and keeps it in the index, before a commit lets the window free pages; the sequence goes.
void store(kv_cache& cache, const tokens& t, prefix_salt salt = {}, bool partial = false) {
    const sequence_id id = cache.create_sequence();
    run(cache, id, t, salt);
    cache.store_prefix(id, t, salt, partial);
    cache.destroy_sequence(id);
}

std::vector<float> attention(const kv_cache& cache, sequence_id id) {
    std::vector<float> all;
    for (std::size_t layer = 0; layer < cache.layers(); ++layer) {
        kv1_test::generator g(5);
        const kv1::layer_description& l = cache.description().layers[layer];
        const std::vector<float> q = kv1_test::normal_values(g, 2 * l.kv_heads * l.key_dim);
        std::vector<float> out(2 * l.kv_heads * l.value_dim);
        cache.attend(id, layer, {q.data(), 1, 2 * l.kv_heads, l.key_dim},
                     {out.data(), 1, 2 * l.kv_heads, l.value_dim});
        all.insert(all.end(), out.begin(), out.end());
    }
    return all;
}

// A prompt goes on from what is known of it: how much, and what it then sees.
struct outcome {
    std::size_t known;
    std::vector<float> seen;
};
outcome go_on(kv_cache& cache, const tokens& t, prefix_salt salt = {}) {
    const kv1::prefix_match match = cache.create_from_prefix(std::span(t).first(t.size() - 1), salt);
    run(cache, match.sequence, t, salt);
    cache.commit(match.sequence);
    outcome o{match.tokens, attention(cache, match.sequence)};
    cache.destroy_sequence(match.sequence);
    return o;
}

bytes saved(const kv_cache& cache, std::span<const sequence_id> ids,
            const kv1::save_options& options = with_prefixes) {
    const bytes b = kv1_test::try_saved(cache, ids, options).value();
    REQUIRE(b.size() == kv1::saved_bytes(cache, ids, options));
    return b;
}

constexpr prefix_salt tenant{3, 9};

// Two prompts that share two pages, one of them open at the end, and one of a tenant's.
void store_three(kv_cache& cache) {
    store(cache, prompt(70, 5));
    store(cache, prompt(55, 800), {}, true);
    store(cache, prompt(40, 5), tenant);
}

} // namespace

TEST_CASE("prefixes outlive the cache that stored them", "[io][prefix]") {
    kv_cache cache(described());
    store_three(cache);
    const bytes b = saved(cache, {});
    kv_cache fresh(described());
    REQUIRE(kv1::load(fresh, kv1::memory_source(b), {}) == 0);
    fresh.validate();
    REQUIRE(fresh.prefixes().pages() == cache.prefixes().pages());
    REQUIRE(fresh.statistics().pages_in_use ==
            cache.statistics().pages_in_use); // shared ones are shared again
    REQUIRE(saved(fresh, {}) == b);           // the order of use too
    const struct {
        tokens t;
        prefix_salt salt;
        std::size_t known;
    } cases[] = {{prompt(80, 5), {}, 64},     {prompt(80, 800), {}, 55}, {prompt(80, 800), tenant, 32},
                 {prompt(60, 5), tenant, 32}, {prompt(33, 7), {}, 32},   {prompt(80, 5), {3, 8}, 0},
                 {{1, 2, 3, 4}, {}, 0},       {prompt(50, 5), {}, 48}};
    for (const auto& [t, salt, known] : cases) {
        const outcome there = go_on(fresh, t, salt), here = go_on(cache, t, salt);
        REQUIRE(there.known == known);
        REQUIRE(here.known == known);
        REQUIRE(kv1_test::same_bits(there.seen, here.seen));
    }
    fresh.validate();
}

TEST_CASE("sequences and prefixes are saved together, and share what they shared", "[io][prefix]") {
    kv_cache cache(described());
    const tokens t = prompt(70, 5);
    const sequence_id id = cache.create_sequence();
    run(cache, id, t, {});
    cache.store_prefix(id, t, {}, true);
    const bytes alone = saved(cache, {&id, 1}, {}), both = saved(cache, {&id, 1});
    REQUIRE(both.size() < alone.size() + 1000); // tokens and numbers of pages, no page twice
    kv_cache fresh(described());
    sequence_id back;
    REQUIRE(kv1::load(fresh, kv1::memory_source(both), {&back, 1}) == 1);
    fresh.validate();
    REQUIRE(fresh.statistics().pages_in_use == cache.statistics().pages_in_use);
    REQUIRE(kv1_test::same_bits(attention(fresh, back), attention(cache, id)));
    run(fresh, back, prompt(90, 5), {}); // the open page is copied, not written to
    REQUIRE(go_on(fresh, prompt(80, 5)).known == 70);
    fresh.validate();
    // without being asked for they stay behind
    REQUIRE(kv1::load(fresh, kv1::memory_source(alone), {&back, 1}) == 1);
    kv_cache none(described());
    REQUIRE(kv1::load(none, kv1::memory_source(alone), {&back, 1}) == 1);
    REQUIRE(none.prefixes().pages() == 0);
    REQUIRE(kv1::try_swap_in(none, both).code() == errc::bad_format);
    REQUIRE(none.prefixes().pages() == 0);
}

TEST_CASE("what is loaded joins what the index knows", "[io][prefix]") {
    kv_cache cache(described()), other(described());
    store_three(cache);
    store(other, prompt(60, 5)); // three of the pages that cache knows, by the same prompt
    store(other, prompt(40, 77));
    const std::size_t pages = other.prefixes().pages(), in_use = other.statistics().pages_in_use;
    kv1::load(other, kv1::memory_source(saved(cache, {})), {});
    other.validate();
    REQUIRE(other.prefixes().pages() == pages + cache.prefixes().pages() - 3);
    REQUIRE(go_on(other, prompt(80, 5)).known == 64);
    REQUIRE(go_on(other, prompt(80, 77)).known == 32);
    REQUIRE(kv1_test::same_bits(go_on(other, prompt(80, 800)).seen, go_on(cache, prompt(80, 800)).seen));
    // a second time there is nothing new in it
    const std::size_t then = other.statistics().pages_in_use;
    REQUIRE(then > in_use);
    kv1::load(other, kv1::memory_source(saved(cache, {})), {});
    REQUIRE(other.statistics().pages_in_use == then);
    other.validate();
}

TEST_CASE("loaded prefixes are evicted after those that were used before them", "[io][prefix]") {
    kv_cache cache(described()), fresh(described());
    store(cache, prompt(40, 5), {1, 1});
    store(cache, prompt(40, 5), {2, 2});
    go_on(cache, prompt(40, 5), {1, 1}); // used last
    store(fresh, prompt(40, 5), {3, 3});
    kv1::load(fresh, kv1::memory_source(saved(cache, {})), {});
    const prefix_salt order[] = {{3, 3}, {2, 2}, {1, 1}};
    for (std::size_t gone = 0; gone < 3; ++gone) {
        REQUIRE(fresh.prefixes().evict(2) == 2);
        for (std::size_t i = 0; i < 3; ++i) {
            const auto pin = fresh.prefixes().pin(order[i], prompt(40, 5)); // looks without using
            REQUIRE(static_cast<bool>(pin) == (i > gone));
            if (pin)
                REQUIRE(fresh.prefixes().unpin(*pin));
        }
    }
    REQUIRE(fresh.statistics().pages_in_use == 0);
}

TEST_CASE("events tell of loaded prefixes, parents before what extends them", "[io][prefix]") {
    kv_cache cache(described());
    store(cache, prompt(70, 5));
    kv1::cache_description d = described();
    d.prefix_events = 100;
    kv_cache fresh(d);
    kv1::load(fresh, kv1::memory_source(saved(cache, {})), {});
    std::vector<kv1::prefix_event> events(100);
    events.resize(fresh.prefixes().take_events(events));
    REQUIRE(events.size() == 4);
    for (std::size_t i = 0; i < 4; ++i) {
        REQUIRE(events[i].kind == kv1::prefix_event_kind::stored);
        REQUIRE((i == 0 || events[i].previous == events[i - 1].hash));
    }
}

TEST_CASE("pins are not saved", "[io][prefix]") {
    kv_cache cache(described());
    store(cache, prompt(40, 5));
    const auto pin = cache.prefixes().pin({}, prompt(40, 5));
    REQUIRE(pin);
    kv_cache fresh(described());
    kv1::load(fresh, kv1::memory_source(saved(cache, {})), {});
    REQUIRE(cache.prefixes().evict(10) == 0);
    REQUIRE(fresh.prefixes().evict(10) == 2);
}

TEST_CASE("prefixes that find no room are not loaded, not even in part", "[io][prefix]") {
    kv_cache cache(described());
    store_three(cache);
    const bytes b = saved(cache, {});
    kv_cache small(described(6 * page));
    const sequence_id id = small.create_sequence();
    run(small, id, prompt(50, 1), {});
    REQUIRE(kv1::try_load(small, kv1::memory_source(b), {}).code() == errc::capacity_exceeded);
    REQUIRE(small.prefixes().pages() == 0);
    small.validate();
    // room that its own prefixes take is given up
    kv_cache full(described(12 * page));
    store(full, prompt(70, 300), {8, 8});
    store(full, prompt(70, 300), {9, 9});
    kv1::load(full, kv1::memory_source(b), {});
    full.validate();
    REQUIRE(go_on(full, prompt(60, 5)).known == 48); // keys per channel are shared by whole pages
}

TEST_CASE("operator new that fails anywhere leaves neither sequences nor prefixes behind", "[io][prefix]") {
    kv_cache cache(described());
    store_three(cache);
    sequence_id id = cache.create_sequence();
    run(cache, id, prompt(50, 5), {});
    const bytes b = saved(cache, {&id, 1});
    std::size_t failures = 0;
    for (std::size_t allowed = 0;; ++allowed) {
        kv_cache fresh(described());
        errc code{};
        bool failed = false;
        {
            const kv1_test::failing_new failing(allowed);
            code = kv1::try_load(fresh, kv1::memory_source(b), {&id, 1}).code();
            failed = failing.failed();
        }
        fresh.validate();
        REQUIRE(code == (failed ? errc::out_of_memory : errc::ok));
        if (!failed) {
            REQUIRE(fresh.prefixes().pages() == cache.prefixes().pages());
            break;
        }
        REQUIRE(fresh.prefixes().pages() == 0);
        REQUIRE(fresh.statistics().pages_in_use == 0);
        REQUIRE(fresh.statistics().sequences == 0);
        ++failures;
    }
    REQUIRE(failures >= 15);
    bytes memory(b.size());
    failures = 0;
    for (std::size_t allowed = 0;; ++allowed) {
        errc code{};
        bool failed = false;
        {
            const kv1_test::failing_new failing(allowed);
            code = kv1::try_save(cache, {}, kv1::memory_sink(memory), with_prefixes).code();
            failed = failing.failed();
        }
        cache.validate(); // no reference is left
        REQUIRE(code == (failed ? errc::out_of_memory : errc::ok));
        if (!failed)
            break;
        ++failures;
    }
    REQUIRE(failures >= 8);
}

TEST_CASE("an index without prefixes is saved as one", "[io][prefix]") {
    kv_cache cache(described());
    REQUIRE(saved(cache, {}) == saved(cache, {}, {}));
    kv_cache fresh(described());
    store(fresh, prompt(40, 5));
    REQUIRE(kv1::load(fresh, kv1::memory_source(saved(cache, {})), {}) == 0);
    REQUIRE(fresh.prefixes().pages() == 2);
}

TEST_CASE("prefix nodes that lie under right checksums are refused, whatever they say", "[io][prefix]") {
    kv_cache cache(described());
    store_three(cache);
    const bytes b = saved(cache, {});
    const std::size_t first = kv1_test::saved_places::fixed_part, // of the tables; with them the nodes end
        end = first + kv1_test::number_at(b, kv1_test::saved_places::table_size, 8);
    std::size_t begin = end; // of the nodes
    for (const std::size_t tokens : {16u, 16u, 16u, 16u, 7u, 16u, 16u, 16u})
        begin -= 8 + tokens * 4 + 4 * 4;
    kv_cache fresh(described());
    kv1_test::generator g(1);
    std::size_t refused = 0;
    for (std::size_t at = begin - 48; at < end; ++at)
        for (const unsigned value : {0u, 1u, 2u, 0x80u, 0xffu, static_cast<unsigned>(g.below(256))}) {
            bytes lie = b;
            lie[at] = static_cast<std::byte>(value);
            kv1_test::reseal(lie);
            const auto loaded = kv1::try_load(fresh, kv1::memory_source(lie), {});
            fresh.validate(); // a lie may be possible, never harmful
            if (loaded) {
                for (const prefix_salt salt : {prefix_salt{}, tenant})
                    go_on(fresh, prompt(80, 800), salt);
                fresh.validate();
                fresh.prefixes().clear();
            } else {
                REQUIRE((loaded.code() == errc::bad_format || loaded.code() == errc::different_cache ||
                         loaded.code() == errc::capacity_exceeded));
                ++refused;
            }
            REQUIRE(fresh.statistics().pages_in_use == 0);
            REQUIRE(fresh.prefixes().pages() == 0);
        }
    REQUIRE(refused > 500);
}

TEST_CASE("changed bytes of saved caches do no harm", "[io][prefix]") {
    kv1_test::saved_body::tallies t;
    for (std::uint64_t seed = 0; seed < 400; ++seed) {
        kv1_test::generator g(seed);
        std::vector<std::uint8_t> input(1 + 3 * g.below(4));
        for (std::uint8_t& b : input)
            b = static_cast<std::uint8_t>(g.bits());
        input[0] = static_cast<std::uint8_t>(seed);
        INFO("seed " << seed);
        REQUIRE_NOTHROW(kv1_test::saved_body::run(input, t));
    }
    for (const std::size_t count : {t.refused, t.loaded, t.sequences, t.prefixes})
        REQUIRE(count >= 20);
}

TEST_CASE("the fuzzer's corpus of saved caches does no harm", "[io][prefix]") {
    std::size_t files = 0;
    kv1_test::saved_body::tallies t;
    for (const auto& entry :
         std::filesystem::directory_iterator(std::filesystem::path(KV1_FUZZ_SEED_DIR) / "saved")) {
        std::ifstream in(entry.path(), std::ios::binary);
        const std::string text(std::istreambuf_iterator<char>(in), {});
        INFO(entry.path().filename().string());
        REQUIRE_NOTHROW(
            kv1_test::saved_body::run({reinterpret_cast<const std::uint8_t*>(text.data()), text.size()}, t));
        ++files;
    }
    REQUIRE(files >= 10);
}
