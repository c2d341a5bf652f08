// SPDX-License-Identifier: Apache-2.0
//
// Outputs and log-sum-exp of a cache over ranks, within derived bounds of the truth, and so of one cache that
// holds everything, whatever was done to its sequences.
#include "side_by_side.hpp"

#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

using context_parallel::cache_options;
using context_parallel::distribution;
using context_parallel::inputs;
using context_parallel::joining;
using kv1::kv_format;
using kv1_test::side_by_side;

namespace {

struct case_of_cache {
    std::string name;
    kv1::cache_description d;
};

constexpr std::size_t kv_heads = 2, key_dim = 32, value_dim = 16, page = 16, capacity = 2048;

kv1::layer_description layer(kv_format key, kv_format value, std::size_t window = 0) {
    kv1::layer_description l{kv_heads, key_dim, value_dim, key, value};
    l.sliding_window = window;
    return l;
}

std::vector<case_of_cache> cases() {
    std::vector<case_of_cache> all;
    const auto add = [&](const char* name, std::vector<kv1::layer_description> layers, std::size_t sinks,
                         std::size_t window) {
        kv1::cache_description d;
        d.layers = std::move(layers);
        d.capacity_tokens = capacity;
        d.page_tokens = page;
        d.fp16_sinks = sinks;
        d.fp16_window = window;
        all.push_back({name, d});
    };
    add("two bits", {layer(kv_format::affine2, kv_format::affine2)}, 0, 0);
    add("fp16 beside one bit",
        {layer(kv_format::fp16, kv_format::fp16), layer(kv_format::binary, kv_format::affine8)}, 0, 0);
    add("sinks", {layer(kv_format::affine3, kv_format::affine2)}, 19, 0);
    add("a window",
        {layer(kv_format::affine2, kv_format::codebook2), layer(kv_format::codebook4, kv_format::codebook4)},
        0, 21);
    kv1::layer_description fitted = layer(kv_format::compact3, kv_format::compact2);
    fitted.key_encoding = {.levels = kv1::level_choice::least_squares, .hadamard = key_dim};
    fitted.value_encoding = {.levels = kv1::level_choice::least_squares, .hadamard = value_dim};
    fitted.key_encoding.means.assign(kv_heads * key_dim, 0.25f);
    add("fitted, rotated and centred, sinks and a window", {fitted, layer(kv_format::fp32, kv_format::fp16)},
        4, 32);
    kv1::layer_description retained = layer(kv_format::affine2, kv_format::affine3, 24);
    retained.window_retention = 20;
    add("sliding windows of several sizes beside sinks and a window",
        {layer(kv_format::affine2, kv_format::affine2, 5), layer(kv_format::affine4, kv_format::affine2, 40),
         layer(kv_format::affine2, kv_format::affine2), layer(kv_format::affine8, kv_format::fp16, 100),
         retained},
        3, 17);
    kv1::layer_description by_channel = layer(kv_format::affine2, kv_format::affine2);
    by_channel.key_axis = kv1::quantization_axis::per_channel;
    kv1::layer_description latent{1, key_dim, value_dim, kv_format::compact3, kv_format::compact3};
    latent.values_in_keys = true;
    add("values in keys", {latent}, 0, 0);
    add("values in keys, sinks and a window", {latent, layer(kv_format::affine2, kv_format::affine2)}, 3, 20);
    add("keys per channel", {by_channel}, 0, 0);
    add("keys per channel, sinks and a window", {by_channel}, 5, 20);
    return all;
}

// Random steps on a few sequences; every rank draws the same.
void exercise(const case_of_cache& c, const cache_options& options, std::uint64_t seed, int steps) {
    side_by_side both(c.d, options);
    kv1_test::generator g(seed);
    std::vector<side_by_side::pair> alive{both.create(1), both.create(2)};
    for (int step = 0; step < steps; ++step) {
        const std::size_t which = g.below(alive.size()), what = g.below(8);
        side_by_side::pair& p = alive[which];
        const std::size_t length = p.model.layers[0].size();
        INFO(c.name << ", seed " << seed << ", step " << step << ", operation " << what << ", length "
                    << length);
        switch (what) {
        case 0: // decode and commit
        case 1:
            for (int i = 0; i < 3; ++i) {
                side_by_side::pair* const batch = &p;
                const std::size_t count = 1;
                for (std::size_t l = 0; l < c.d.layers.size(); ++l)
                    both.append_and_check({&batch, 1}, l, {&count, 1}, step, {});
                both.commit(p);
            }
            break;
        case 2: { // prefill in one call, with all its queries
            const std::size_t n = g.between(1, 75);
            both.append(p, n, step);
            both.check(p, n);
            both.commit(p);
            break;
        }
        case 3: { // a batch of all sequences, ragged
            std::vector<side_by_side::pair*> batch;
            std::vector<std::size_t> counts;
            for (side_by_side::pair& one : alive) {
                batch.push_back(&one);
                counts.push_back(g.between(1, 20));
            }
            for (std::size_t l = 0; l < c.d.layers.size(); ++l) {
                side_by_side::question ask{g.chance(0.5) ? 0 : g.between(1, 30), g.chance(0.5), 0};
                if (g.chance(0.4))
                    ask.masks = g.between(1, 1000000);
                if (g.chance(0.5)) {
                    both.append_and_check(batch, l, counts, step, ask);
                } else {
                    both.append(batch, l, counts, step);
                    both.check(batch, l, counts, ask);
                }
            }
            if (g.chance(0.7))
                for (side_by_side::pair& one : alive)
                    both.commit(one);
            break;
        }
        case 4:
            if (alive.size() < 4)
                alive.push_back(both.fork(p));
            break;
        case 5: { // guesses that are cut off, within what any window has kept
            const std::size_t guessed = g.between(1, 6), kept = g.below(guessed + 1);
            both.commit(p);
            both.append(p, guessed, step);
            both.check(p, guessed);
            both.rules.truncate(p.model, length + kept);
            both.single.truncate(p.id, length + kept);
            both.distributed.truncate(p.s, length + kept);
            REQUIRE(both.distributed.length(p.s) == length + kept);
            break;
        }
        case 6: { // anywhere, where one cache allows it
            const std::size_t to = g.below(length + 1);
            const kv1::errc allowed = both.rules.can_truncate(p.model, to);
            kv1::errc code = kv1::errc::ok;
            try {
                both.distributed.truncate(p.s, to);
            } catch (const context_parallel::rank_error& e) {
                code = e.code();
            }
            REQUIRE(code == allowed);
            REQUIRE(both.distributed.length(p.s) == (code == kv1::errc::ok ? to : length));
            if (code != kv1::errc::ok)
                break;
            both.rules.truncate(p.model, to);
            both.single.truncate(p.id, to);
            break;
        }
        case 7: { // a step that is undone, half of it
            both.commit(p);
            side_by_side::pair* const one = &p;
            const std::size_t n = g.between(1, 20);
            for (std::size_t l = 0; l < (c.d.layers.size() + 1) / 2; ++l)
                both.append({&one, 1}, l, {&n, 1}, step);
            both.rules.truncate(p.model, length);
            both.single.rollback(p.id);
            both.distributed.rollback(p.s);
            REQUIRE(both.distributed.length(p.s, 0) == length);
            if (alive.size() > 2) {
                both.destroy(p);
                alive.erase(alive.begin() + static_cast<std::ptrdiff_t>(which));
            }
            break;
        }
        }
        side_by_side::pair& some = alive[g.below(alive.size())];
        INFO("then a sequence of " << some.model.layers[0].size() << ", committed "
                                   << some.model.committed.value_or(0) << ", given up "
                                   << Catch::StringMaker<std::vector<std::size_t>>::convert(
                                          some.model.given_up));
        if (!some.model.layers[0].empty())
            both.check(some, 1);
        both.distributed.local().validate();
    }
}

} // namespace

TEST_CASE("a cache over ranks is one cache, pages dealt round robin", "[distributed]") {
    std::uint64_t seed = 1;
    for (const case_of_cache& c : cases())
        for (const joining join : {joining::in_rank_order, joining::reduced})
            exercise(c, {.join = join}, ++seed, 14);
}

TEST_CASE("a cache over ranks is one cache, in contiguous ranges", "[distributed]") {
    std::uint64_t seed = 100;
    for (const case_of_cache& c : cases())
        exercise(c,
                 {.positions =
                      distribution::ranges(static_cast<std::size_t>(kv1_test::ranks_of_world()), 150, page)},
                 ++seed, 12);
}

TEST_CASE("rank 0 alone may hold keys, values and queries", "[distributed]") {
    std::uint64_t seed = 200;
    for (const case_of_cache& c : cases())
        for (const joining join : {joining::in_rank_order, joining::reduced})
            exercise(c, {.from = inputs::of_root, .join = join}, ++seed, 8);
}

TEST_CASE("queries that see far beyond their own tokens, under a sliding window", "[distributed]") {
    kv1::cache_description d =
        kv1::uniform_cache(1, layer(kv_format::affine2, kv_format::affine2, 5), capacity, page);
    side_by_side both(d, {});
    for (std::uint64_t seed = 1; seed <= 6; ++seed) { // some masks show everything
        side_by_side::pair p = both.create(seed);
        side_by_side::pair* const one = &p;
        const std::size_t n = 140;
        both.append_and_check({&one, 1}, 0, {&n, 1}, 0, {0, false, seed});
        both.destroy(p);
    }
}

TEST_CASE("joined in order of ranks, all ranks have the same bits, in every run", "[distributed]") {
    kv1::cache_description d =
        kv1::uniform_cache(1, layer(kv_format::affine2, kv_format::affine2), capacity, page);
    d.fp16_window = 20;
    kv1_test::generator g(3);
    const std::size_t n = 150, heads = 4;
    const auto k = kv1_test::normal_values(g, n * kv_heads * key_dim),
               v = kv1_test::normal_values(g, n * kv_heads * value_dim),
               q = kv1_test::normal_values(g, n * heads * key_dim);
    std::vector<std::vector<float>> runs;
    for (int run = 0; run < 2; ++run) {
        context_parallel::distributed_cache cache(MPI_COMM_WORLD, d);
        const auto s = cache.create_sequence();
        cache.append(s, 0, {k.data(), n, kv_heads, key_dim}, {v.data(), n, kv_heads, value_dim});
        std::vector<float> out(n * heads * value_dim);
        cache.attend(s, 0, {q.data(), n, heads, key_dim}, {out.data(), n, heads, value_dim});
        std::vector<float> of_root = out;
        MPI_Bcast(of_root.data(), static_cast<int>(out.size()), MPI_FLOAT, 0, MPI_COMM_WORLD);
        REQUIRE(kv1_test::same_bits(out, of_root));
        runs.push_back(out);
    }
    REQUIRE(kv1_test::same_bits(runs[0], runs[1]));
}

TEST_CASE("one rank gives one cache's bits, on both paths and in other types", "[distributed]") {
    const kv1::cache_description d =
        kv1::uniform_cache(1, layer(kv_format::compact3, kv_format::compact2), capacity, page);
    kv1_test::generator g(4);
    const std::size_t n = 70, heads = 4;
    std::vector<kv1::float16> k, v;
    std::vector<kv1::bfloat16> q;
    for (std::size_t i = 0; i < n * kv_heads * key_dim; ++i)
        k.emplace_back(g.normal());
    for (std::size_t i = 0; i < n * kv_heads * value_dim; ++i)
        v.emplace_back(g.normal());
    for (std::size_t i = 0; i < n * heads * key_dim; ++i)
        q.emplace_back(g.normal());
    kv1::kv_cache single(d);
    context_parallel::distributed_cache cache(MPI_COMM_SELF, d);
    const auto id = single.create_sequence();
    const auto s = cache.create_sequence();
    single.append(id, 0, {k.data(), n, kv_heads, key_dim}, {v.data(), n, kv_heads, value_dim});
    cache.append(s, 0, {k.data(), n, kv_heads, key_dim}, {v.data(), n, kv_heads, value_dim});
    for (const kv1::precision mode : {kv1::precision::fast, kv1::precision::exact}) {
        std::vector<kv1::float16> a(n * heads * value_dim), b(a);
        single.attend(id, 0, {q.data(), n, heads, key_dim}, {a.data(), n, heads, value_dim}, {.mode = mode});
        cache.attend(s, 0, {q.data(), n, heads, key_dim}, {b.data(), n, heads, value_dim}, {.mode = mode});
        REQUIRE(kv1_test::same_bits(a, b));
    }
}

TEST_CASE("means that turn with their keys' positions, one range a rank", "[distributed]") {
    const auto ranks = static_cast<std::size_t>(kv1_test::ranks_of_world());
    kv1::layer_description l = layer(kv_format::compact3, kv_format::compact2);
    l.rotary.frequencies = kv1::rotary_frequencies(100.0, key_dim);
    l.key_encoding = {.levels = kv1::level_choice::least_squares, .hadamard = key_dim};
    kv1_test::generator g(9);
    l.key_encoding.means = kv1_test::normal_values(g, kv_heads * key_dim);
    for (float& m : l.key_encoding.means)
        m *= 4.0f;
    const std::size_t n = 10 * page, heads = 4;
    kv1::cache_description d = kv1::uniform_cache(1, l, n, page);
    d.first_position = 1000;
    const distribution d_of_ranks = distribution::ranges(ranks, n, page);
    kv1::kv_cache single(d);
    context_parallel::distributed_cache cache(MPI_COMM_WORLD, d, {.positions = d_of_ranks});
    const auto id = single.create_sequence();
    const auto s = cache.create_sequence();
    const auto k = kv1_test::normal_values(g, n * kv_heads * key_dim),
               v = kv1_test::normal_values(g, n * kv_heads * value_dim),
               q = kv1_test::normal_values(g, heads * key_dim);
    for (const auto& [first, count] :
         {std::pair<std::size_t, std::size_t>{0, 37}, {37, n - 38}, {n - 1, 1}}) {
        const kv1::tensor_view keys(k.data() + first * kv_heads * key_dim, count, kv_heads, key_dim),
            values(v.data() + first * kv_heads * value_dim, count, kv_heads, value_dim);
        single.append(id, 0, keys, values);
        cache.append(s, 0, keys, values);
    }
    // Each rank stores what one cache stores at those positions, and decodes it alike.
    const auto rank = static_cast<std::size_t>(cache.rank());
    const std::size_t first = d_of_ranks.position(rank, 0), own = d_of_ranks.owned_before(rank, n);
    double longest_key = 0.0;
    for (std::size_t h = 0; h < kv_heads; ++h) {
        std::vector<float> here(own * key_dim), there(n * key_dim);
        cache.local().read(cache.local(s), 0, kv1::kv_side::key, h, 0, own, here);
        single.read(id, 0, kv1::kv_side::key, h, 0, n, there);
        const auto from = there.begin() + static_cast<std::ptrdiff_t>(std::min(first, n) * key_dim);
        REQUIRE(kv1_test::same_bits(
            here, std::vector<float>(from, from + static_cast<std::ptrdiff_t>(own * key_dim))));
        for (std::size_t t = 0; t < n; ++t)
            longest_key = std::max(
                longest_key, std::sqrt(std::inner_product(&there[t * key_dim], &there[t * key_dim] + key_dim,
                                                          &there[t * key_dim], 0.0)));
    }
    std::vector<float> one(heads * value_dim), all(one);
    single.attend(id, 0, {q.data(), 1, heads, key_dim}, {one.data(), 1, heads, value_dim},
                  {.mode = kv1::precision::exact});
    cache.attend(s, 0, {q.data(), 1, heads, key_dim}, {all.data(), 1, heads, value_dim},
                 {.mode = kv1::precision::exact});
    // A score is a sum of key_dim products, and its mean's share one more, after a rotation of five steps: off by
    // gamma(2 key_dim + 16) of |q| (|k| + 2 |mean|). So weights are off by twice that, relatively, and outputs by
    // as much of the largest value. Both caches may be.
    double longest_query = 0.0, longest_mean = 0.0, largest_value = 0.0;
    for (std::size_t h = 0; h < heads; ++h)
        longest_query = std::max(
            longest_query,
            std::sqrt(std::inner_product(&q[h * key_dim], &q[h * key_dim] + key_dim, &q[h * key_dim], 0.0)));
    for (std::size_t h = 0; h < kv_heads; ++h)
        longest_mean =
            std::max(longest_mean, std::sqrt(std::inner_product(&l.key_encoding.means[h * key_dim],
                                                                &l.key_encoding.means[h * key_dim] + key_dim,
                                                                &l.key_encoding.means[h * key_dim], 0.0)));
    std::vector<float> values(n * value_dim);
    for (std::size_t h = 0; h < kv_heads; ++h) {
        single.read(id, 0, kv1::kv_side::value, h, 0, n, values);
        for (const float x : values)
            largest_value = std::max(largest_value, std::fabs(static_cast<double>(x)));
    }
    const double score = kv1_test::gamma(2.0 * key_dim + 16.0) * longest_query *
                         (longest_key + 2.0 * longest_mean) / std::sqrt(static_cast<double>(key_dim)),
                 bound = 2.0 * (std::expm1(2.0 * score) + kv1_test::gamma(2.0 * n + 16.0)) * largest_value;
    REQUIRE(bound < 0.05);
    for (std::size_t i = 0; i < one.size(); ++i)
        REQUIRE(std::fabs(static_cast<double>(all[i]) - static_cast<double>(one[i])) <= bound);

    // Positions end where the last rank's range does, and pages round robin are refused.
    try {
        cache.append(s, 0, {k.data(), ranks * page, kv_heads, key_dim},
                     {v.data(), ranks * page, kv_heads, value_dim});
        FAIL("there is no room");
    } catch (const context_parallel::rank_error& e) {
        REQUIRE(e.code() == kv1::errc::capacity_exceeded);
    }
    REQUIRE(cache.length(s, 0) == n);
    if (ranks > 1)
        REQUIRE_THROWS_AS(context_parallel::distributed_cache(MPI_COMM_WORLD, d),
                          context_parallel::rank_error);
}
