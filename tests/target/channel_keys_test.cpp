// SPDX-License-Identifier: Apache-2.0
//
// Keys quantized per channel, from their definition: a channel's keys of a full page are what the quantizer
// makes of them as one vector, rounded to fp16 before; those of the open page are that fp16.
#include "cache_model.hpp"
#include "compare.hpp"
#include "formats.hpp"
#include "random.hpp"
#include "targets.hpp"
#include "thread_executor.hpp"

#include <kv1/cache_io.hpp>
#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <limits>
#include <span>
#include <vector>

using kv1::errc;
using kv1::kv_format;
using kv1::kv_side;
using kv1::level_choice;
using kv1::quantization_axis;
using kv1_test::generator;

namespace {

constexpr std::size_t kv_heads = 2, key_dim = 24, value_dim = 16;

kv1::layer_description layer(kv_format f = kv_format::affine2) {
    kv1::layer_description l{kv_heads, key_dim, value_dim, f, kv_format::affine2};
    l.key_axis = quantization_axis::per_channel;
    return l;
}

struct tokens {
    std::vector<float> k, v;
    std::size_t count;
};
tokens some_tokens(std::size_t n, std::uint64_t seed) {
    generator g(seed);
    return {kv1_test::normal_values(g, n * kv_heads * key_dim, 1.0f, 1.0f),
            kv1_test::normal_values(g, n * kv_heads * value_dim), n};
}
kv1::status append(kv1::kv_cache& cache, kv1::sequence_id id, const tokens& t, std::size_t first,
                   std::size_t count, std::size_t at_layer = 0) {
    return cache.try_append(id, at_layer, {t.k.data() + first * kv_heads * key_dim, count, kv_heads, key_dim},
                            {t.v.data() + first * kv_heads * value_dim, count, kv_heads, value_dim});
}

// All keys of a head, as they are read.
std::vector<float> keys_of(const kv1::kv_cache& cache, kv1::sequence_id id, std::size_t head,
                           std::size_t at_layer = 0) {
    const std::size_t n = cache.length(id, at_layer);
    std::vector<float> x(n * key_dim);
    cache.read(id, at_layer, kv_side::key, head, 0, n, x);
    return x;
}

// What they are by the definition.
std::vector<float> expected_keys(const kv1::layer_description& l, const tokens& t, std::size_t n,
                                 std::size_t page, std::size_t head) {
    std::vector<std::vector<float>> rows;
    for (std::size_t i = 0; i < n; ++i) {
        const auto at = t.k.begin() + static_cast<std::ptrdiff_t>((i * kv_heads + head) * key_dim);
        std::vector<float> x(at, at + static_cast<std::ptrdiff_t>(key_dim));
        kv1_test::prepare(l.key_encoding, head, x);
        rows.push_back(kv1_test::through_format(kv_format::fp16, x));
    }
    for (std::size_t first = 0; first + page <= n; first += page)
        for (std::size_t c = 0; c < key_dim; ++c) {
            std::vector<float> x;
            for (std::size_t i = 0; i < page; ++i)
                x.push_back(rows[first + i][c]);
            x = kv1_test::through_format(l.key_format, x, l.key_encoding.levels);
            for (std::size_t i = 0; i < page; ++i)
                rows[first + i][c] = x[i];
        }
    std::vector<float> all;
    for (std::vector<float>& x : rows) {
        kv1_test::restore(l.key_encoding, head, x);
        all.insert(all.end(), x.begin(), x.end());
    }
    return all;
}

kv1::vector_encoding encoding(level_choice levels, bool turns) {
    generator g(3);
    kv1::vector_encoding e{levels};
    if (turns) {
        e.hadamard = 8;
        e.means = kv1_test::normal_values(g, kv_heads * key_dim);
    }
    return e;
}

std::vector<std::byte> bytes_of(const kv1::kv_cache& cache, kv1::sequence_id id) {
    std::vector<std::byte> bytes;
    REQUIRE(kv1::try_save(cache, {&id, 1}, [&](std::span<const std::byte> some) {
        bytes.insert(bytes.end(), some.begin(), some.end());
        return true;
    }));
    return bytes;
}

} // namespace

TEST_CASE("keys per channel are their channels' quantized vectors, on every target", "[channels]") {
    using enum kv_format;
    kv1_test::for_each_target([&](kv1::target) {
        kv1_test::tally t;
        for (const kv_format f : kv1_test::fitted_formats(4))
            for (const level_choice levels : {level_choice::min_max, level_choice::least_squares})
                for (const bool turns : {false, true})
                    for (const std::size_t page : {std::size_t{16}, std::size_t{48}, std::size_t{64}}) {
                        kv1::layer_description l = layer(f);
                        l.key_encoding = encoding(levels, turns);
                        kv1::kv_cache cache(kv1::uniform_cache(1, l, 4 * page, page));
                        const auto id = cache.create_sequence();
                        const tokens x = some_tokens(2 * page + 5, page);
                        REQUIRE(append(cache, id, x, 0, x.count));
                        for (std::size_t h = 0; h < kv_heads; ++h)
                            t.expect(kv1_test::same_bits(keys_of(cache, id, h),
                                                         expected_keys(l, x, x.count, page, h)),
                                     to_string(f), static_cast<int>(levels), turns, page, "head", h);
                    }
        KV1_REQUIRE_CLEAN(t);
    });
}

TEST_CASE("keys per channel: under error weights each channel makes up for those after it", "[channels]") {
    using enum kv_format;
    constexpr std::size_t page = 48;
    generator g(21);
    kv1::moment_estimator queries(kv_heads, key_dim);
    std::vector<float> q = kv1_test::normal_values(g, 100 * kv_heads * key_dim);
    for (std::size_t i = 0; i < q.size(); ++i) // channels go together, some more than others
        q[i] = i % key_dim == 0 ? 2.0f * q[i] : q[i] + 0.6f * q[i - 1];
    queries.add({q.data(), 100, kv_heads, key_dim});
    const std::vector<float> weights = queries.moments();
    const tokens x = some_tokens(page, 22);
    for (const kv_format f : {affine2, affine3, compact2, codebook2, codebook4})
        for (const bool turns : {false, true}) {
            kv1::layer_description plain = layer(f), l = layer(f);
            plain.key_encoding = l.key_encoding = encoding(level_choice::least_squares, turns);
            l.key_encoding.error_weights = weights;
            // the definition
            std::vector<float> expected[kv_heads];
            for (std::size_t h = 0; h < kv_heads; ++h) {
                std::vector<float> feedback(key_dim * key_dim);
                REQUIRE(kv1::detail::factor_weights(
                    std::span(weights).subspan(h * key_dim * key_dim, key_dim * key_dim), key_dim,
                    l.key_encoding.hadamard, feedback.data()));
                kv1::detail::feedback_matrices factors;
                REQUIRE(factors.begin(1, key_dim));
                factors.set(0, feedback.data());
                std::vector<std::vector<float>> wanted(key_dim), given, stored(key_dim);
                for (std::size_t c = 0; c < key_dim; ++c)
                    for (std::size_t t = 0; t < page; ++t) {
                        const auto at =
                            x.k.begin() + static_cast<std::ptrdiff_t>((t * kv_heads + h) * key_dim);
                        std::vector<float> key(at, at + static_cast<std::ptrdiff_t>(key_dim));
                        kv1_test::prepare(l.key_encoding, h, key);
                        wanted[c].push_back(kv1::float16(key[c]));
                    }
                given = wanted;
                for (std::size_t c = key_dim; c-- > 0;) {
                    stored[c] = kv1_test::through_format(f, wanted[c], level_choice::least_squares);
                    for (std::size_t j = 0; j < c; ++j)
                        for (std::size_t t = 0; t < page; ++t) {
                            const auto& row = *factors.of(0);
                            const float r = row.unit(j) * static_cast<float>(row.factor(j, c));
                            const float error = given[c][t] - stored[c][t];
                            const volatile float product = r * error; // no fma
                            wanted[j][t] += product;
                        }
                }
                for (std::size_t t = 0; t < page; ++t) {
                    std::vector<float> key;
                    for (std::size_t c = 0; c < key_dim; ++c)
                        key.push_back(stored[c][t]);
                    kv1_test::restore(l.key_encoding, h, key);
                    expected[h].insert(expected[h].end(), key.begin(), key.end());
                }
            }
            // what errors e cost, e^T W e over all tokens
            const auto cost = [&](const std::vector<float>& keys, std::size_t h) {
                double sum = 0.0;
                for (std::size_t t = 0; t < page; ++t)
                    for (std::size_t i = 0; i < key_dim; ++i)
                        for (std::size_t j = 0; j < key_dim; ++j) {
                            const auto error = [&](std::size_t c) {
                                return static_cast<double>(keys[t * key_dim + c]) -
                                       static_cast<double>(x.k[(t * kv_heads + h) * key_dim + c]);
                            };
                            sum += error(i) * static_cast<double>(weights[(h * key_dim + i) * key_dim + j]) *
                                   error(j);
                        }
                return sum;
            };
            kv1_test::for_each_target([&](kv1::target) {
                INFO(to_string(f) << (turns ? ", turned" : ""));
                kv1::kv_cache cache(kv1::uniform_cache(1, l, 2 * page, page)),
                    twin(kv1::uniform_cache(1, plain, 2 * page, page));
                const auto id = cache.create_sequence(), other = twin.create_sequence();
                REQUIRE(append(cache, id, x, 0, page));
                REQUIRE(append(twin, other, x, 0, page));
                for (std::size_t h = 0; h < kv_heads; ++h) {
                    REQUIRE(kv1_test::same_bits(keys_of(cache, id, h), expected[h]));
                    REQUIRE(cost(keys_of(cache, id, h), h) < 0.9 * cost(keys_of(twin, other, h), h));
                }
            });
        }
}

TEST_CASE("keys per channel: a page of 4096 tokens, a head dim that fills no lane", "[channels]") {
    kv1::layer_description l{1, 5, 3, kv_format::affine3, kv_format::binary};
    l.key_axis = quantization_axis::per_channel;
    kv1::kv_cache cache(kv1::uniform_cache(1, l, 8192, 4096));
    const auto id = cache.create_sequence();
    generator g(9);
    const std::vector<float> k = kv1_test::normal_values(g, 4100 * 5), v(4100 * 3, 1.0f);
    cache.append(id, 0, {k.data(), 4100, 1, 5}, {v.data(), 4100, 1, 3});
    std::vector<float> read(4100 * 5);
    cache.read(id, 0, kv_side::key, 0, 0, 4100, read);
    for (std::size_t c = 0; c < 5; ++c) {
        std::vector<float> x;
        for (std::size_t i = 0; i < 4096; ++i)
            x.push_back(kv1::float16(k[i * 5 + c]));
        x = kv1_test::through_format(kv_format::affine3, x);
        for (std::size_t i = 0; i < 4096; ++i)
            REQUIRE(read[i * 5 + c] == x[i]);
        REQUIRE(read[4098 * 5 + c] == static_cast<float>(kv1::float16(k[4098 * 5 + c])));
    }
}

TEST_CASE("keys per channel: however tokens come, the bytes are the same", "[channels]") {
    const tokens x = some_tokens(150, 1);
    std::vector<std::byte> bytes;
    for (const std::size_t step : {std::size_t{150}, std::size_t{1}, std::size_t{7}, std::size_t{32},
                                   std::size_t{33}, std::size_t{90}}) {
        for (const bool commits : {false, true}) {
            kv1::kv_cache cache(kv1::uniform_cache(1, layer(), 256, 32));
            const auto id = cache.create_sequence();
            for (std::size_t i = 0; i < 150; i += step) {
                REQUIRE(append(cache, id, x, i, std::min(step, 150 - i)));
                if (commits)
                    cache.commit(id);
                REQUIRE(cache.try_validate());
                // of fp16 keys there is the open page, and the page of the last commit
                REQUIRE(cache.statistics().bytes_fp16_copies <=
                        2 * 32 * kv_heads * key_dim * sizeof(kv1::float16));
            }
            cache.commit(id);
            if (bytes.empty())
                bytes = bytes_of(cache, id);
            REQUIRE(bytes_of(cache, id) == bytes);
        }
    }
}

TEST_CASE("keys per channel: threads make no difference", "[channels][threads]") {
    const tokens x = some_tokens(100, 2);
    kv1::kv_cache cache(kv1::uniform_cache(1, layer(), 256, 32)),
        twin(kv1::uniform_cache(1, layer(), 256, 32));
    const auto id = cache.create_sequence(), other = twin.create_sequence();
    kv1_test::thread_executor run(3);
    for (const auto& [first, count] : {std::pair{0u, 1u}, {1u, 50u}, {51u, 1u}, {52u, 48u}}) {
        REQUIRE(append(cache, id, x, first, count));
        REQUIRE(twin.try_append(other, 0, {x.k.data() + first * kv_heads * key_dim, count, kv_heads, key_dim},
                                {x.v.data() + first * kv_heads * value_dim, count, kv_heads, value_dim},
                                run));
    }
    REQUIRE(bytes_of(cache, id) == bytes_of(twin, other));
}

TEST_CASE("keys per channel: a cut within a full page is refused, but for the last commit's", "[channels]") {
    const tokens x = some_tokens(200, 4);
    const kv1::layer_description l = layer();
    kv1::kv_cache cache(kv1::uniform_cache(2, l, 512, 32));
    const auto id = cache.create_sequence();
    const auto grow = [&](std::size_t first, std::size_t count) {
        for (std::size_t i = 0; i < 2; ++i)
            REQUIRE(append(cache, id, x, first, count, i));
    };
    const auto holds = [&](std::size_t n) {
        for (std::size_t i = 0; i < 2; ++i)
            for (std::size_t h = 0; h < kv_heads; ++h)
                REQUIRE(kv1_test::same_bits(keys_of(cache, id, h, i), expected_keys(l, x, n, 32, h)));
        REQUIRE(cache.try_validate());
    };
    grow(0, 40);
    cache.commit(id);
    grow(40, 70); // pages 1 and 2 are full, 3 is open
    holds(110);
    const kv1::status within = cache.try_truncate(id, 70);
    REQUIRE(within.code() == errc::dropped_tokens);
    REQUIRE(within.where().layer == 0);
    holds(110);
    cache.truncate(id, 100); // the open page
    holds(100);
    cache.rollback(id); // the last commit lies in page 1, whose keys are still there
    holds(40);
    {
        kv1::kv_cache twin(kv1::uniform_cache(2, l, 512, 32)); // nothing of what was there is saved
        const auto fresh = twin.create_sequence();
        for (std::size_t i = 0; i < 2; ++i)
            REQUIRE(append(twin, fresh, x, 0, 40, i));
        twin.commit(fresh);
        REQUIRE(bytes_of(cache, id) == bytes_of(twin, fresh));
    }
    grow(40, 60);
    holds(100);
    cache.truncate(id, 50); // in its page, after it
    holds(50);
    cache.truncate(id, 36); // and before it
    holds(36);
    grow(36, 64);
    holds(100);
    cache.commit(id); // page 3
    grow(100, 60);
    cache.truncate(id, 97);
    holds(97);
    REQUIRE(cache.try_truncate(id, 36).code() == errc::dropped_tokens); // now it is gone
    cache.truncate(id, 64); // between pages there is nothing to open
    holds(64);
    grow(64, 30);
    holds(94);
}

TEST_CASE("keys per channel: layers may run ahead of each other by pages", "[channels]") {
    const tokens x = some_tokens(200, 5);
    const kv1::layer_description l = layer();
    kv1::kv_cache cache(kv1::uniform_cache(3, l, 512, 32));
    const auto id = cache.create_sequence();
    std::size_t length[3] = {};
    generator g(6);
    for (int step = 0; step < 60; ++step) {
        const std::size_t i = g.below(3), n = std::min(g.between(1, 80), 200 - length[i]);
        REQUIRE(append(cache, id, x, length[i], n, i));
        length[i] += n;
        REQUIRE(cache.try_validate());
        for (std::size_t k = 0; k < 3; ++k)
            REQUIRE(kv1_test::same_bits(keys_of(cache, id, 1, k), expected_keys(l, x, length[k], 32, 1)));
        // a refused append takes back the page that it opened, amid others or behind them
        tokens bad = some_tokens(40, 5);
        bad.v.back() = std::numeric_limits<float>::infinity();
        const std::size_t in_use = cache.statistics().pages_in_use;
        REQUIRE(append(cache, id, bad, 0, 40, g.below(3)).code() == errc::non_finite);
        REQUIRE(cache.statistics().pages_in_use == in_use);
        REQUIRE(cache.try_validate());
        if (step == 30) { // what one layer never held goes from all
            const std::size_t n2 = *std::min_element(length, length + 3) / 32 * 32;
            cache.truncate(id, n2);
            std::fill_n(length, 3, n2);
        }
    }
    REQUIRE(length[0] + length[1] + length[2] == 600);
}

TEST_CASE("keys per channel: prefixes are shared by whole pages, and by open ones as they are",
          "[channels]") {
    const tokens x = some_tokens(120, 7);
    const kv1::layer_description l = layer();
    kv1::kv_cache cache(kv1::uniform_cache(1, l, 1024, 32));
    std::vector<kv1::token_id> ids(120);
    for (std::size_t i = 0; i < ids.size(); ++i)
        ids[i] = static_cast<kv1::token_id>(i);
    const auto id = cache.create_sequence();
    REQUIRE(append(cache, id, x, 0, 100));
    REQUIRE(cache.store_prefix(id, std::span(ids).first(100), {}, true) == 100);
    const auto holds = [&](kv1::sequence_id some, std::size_t n) {
        for (std::size_t h = 0; h < kv_heads; ++h)
            REQUIRE(kv1_test::same_bits(keys_of(cache, some, h), expected_keys(l, x, n, 32, h)));
        REQUIRE(cache.try_validate());
    };
    const auto all = cache.create_from_prefix(ids);
    REQUIRE(all.tokens == 100); // the open page with it
    holds(all.sequence, 100);
    const auto some = cache.create_from_prefix(std::span(ids).first(98));
    REQUIRE(some.tokens == 98);
    holds(some.sequence, 98);
    const auto within = cache.create_from_prefix(std::span(ids).first(50));
    REQUIRE(within.tokens == 32); // a part of a full page can not be had
    holds(within.sequence, 32);
    REQUIRE(append(cache, within.sequence, x, 32, 80));
    holds(within.sequence, 112);
    REQUIRE(append(cache, all.sequence, x, 100, 20));
    holds(all.sequence, 120);
    holds(id, 100);
    // of a page that is full by now its first tokens are not kept
    REQUIRE(cache.store_prefix(within.sequence, std::span(ids).first(70), {.low = 1}, true) == 64);
    REQUIRE(cache.create_from_prefix(ids, {.low = 1}).tokens == 64);
}

TEST_CASE("keys per channel: what is saved is loaded, the page of the last commit with it",
          "[channels][io]") {
    const tokens x = some_tokens(120, 8);
    const kv1::layer_description l = layer(kv_format::compact3);
    kv1::kv_cache cache(kv1::uniform_cache(1, l, 512, 32)), other(kv1::uniform_cache(1, l, 512, 32));
    const auto id = cache.create_sequence();
    REQUIRE(append(cache, id, x, 0, 50));
    cache.commit(id);
    REQUIRE(append(cache, id, x, 50, 40));
    const std::vector<std::byte> bytes = bytes_of(cache, id);
    const auto twin = kv1::try_swap_in(other, bytes);
    REQUIRE(twin);
    REQUIRE(other.try_validate());
    REQUIRE(kv1_test::same_bits(keys_of(other, *twin, 1), keys_of(cache, id, 1)));
    other.rollback(*twin);
    REQUIRE(kv1_test::same_bits(keys_of(other, *twin, 1), expected_keys(l, x, 50, 32, 1)));
    REQUIRE(append(other, *twin, x, 50, 70));
    REQUIRE(kv1_test::same_bits(keys_of(other, *twin, 1), expected_keys(l, x, 120, 32, 1)));

    kv1::layer_description per_token = l;
    per_token.key_axis = quantization_axis::per_token;
    kv1::kv_cache differs(kv1::uniform_cache(1, per_token, 512, 32));
    const auto refused = kv1::try_swap_in(differs, bytes);
    REQUIRE(refused.code() == errc::different_cache);
    REQUIRE(std::string(refused.reason().message()).find("axis") != std::string::npos);
}

TEST_CASE("keys per channel: what can not be is refused, with the reason", "[channels]") {
    const auto refused = [](const kv1::layer_description& l, std::size_t page = 32) {
        const auto cache = kv1::kv_cache::create(kv1::uniform_cache(1, l, 8192, page));
        REQUIRE(cache.code() == errc::invalid_argument);
        REQUIRE(cache.reason().where().layer == 0);
        return std::string(cache.reason().message());
    };
    for (const kv_format f :
         {kv_format::fp16, kv_format::fp32, kv_format::affine8, kv_format::binary, kv_format::scaled_binary})
        REQUIRE(refused(layer(f)).find("at most 4 bits") != std::string::npos);
    kv1::layer_description l = layer();
    l.key_dim = 64;
    l.key_group = 32;
    REQUIRE(refused(l).find("groups") != std::string::npos);
    REQUIRE(refused(layer(), 4112).find("4096") != std::string::npos);
    REQUIRE(kv1::kv2_cache::create(kv1::uniform_cache(1, layer(), 64)).code() == errc::unsupported_format);

    kv1::kv_cache cache(kv1::uniform_cache(1, layer(), 256, 32));
    const auto id = cache.create_sequence();
    tokens x = some_tokens(100, 10);
    REQUIRE(append(cache, id, x, 0, 40));
    const std::vector<std::byte> before = bytes_of(cache, id);
    for (const auto& [value, code] : {std::pair(std::numeric_limits<float>::quiet_NaN(), errc::non_finite),
                                      std::pair(-std::numeric_limits<float>::infinity(), errc::non_finite),
                                      std::pair(70000.0f, errc::not_representable)})
        for (const std::size_t token :
             {std::size_t{41}, std::size_t{90}}) { // before and after pages got full
            const std::size_t at = (token * kv_heads + 1) * key_dim + 9;
            const float good = std::exchange(x.k[at], value);
            const kv1::status s = append(cache, id, x, 40, 60);
            REQUIRE(s.code() == code);
            REQUIRE(s.where().kv_head == 1);
            REQUIRE(s.where().token == static_cast<std::int64_t>(token - 40));
            REQUIRE(s.where().channel == 9);
            x.k[at] = good;
            REQUIRE(cache.try_validate());
            REQUIRE(bytes_of(cache, id) == before);
        }
    REQUIRE(append(cache, id, x, 40, 60));

    std::vector<std::byte> packed(kv1::packed_bytes(kv_format::affine2, key_dim));
    std::vector<kv1::float16> one(1);
    REQUIRE(cache.try_export_rows(id, 0, kv_side::key, 0, 0, 1, {packed, one, one}).code() ==
            errc::invalid_argument);
    std::vector<std::byte> values(kv1::packed_bytes(kv_format::affine2, value_dim));
    REQUIRE(cache.try_export_rows(id, 0, kv_side::value, 0, 0, 1, {values, one, one}));
    REQUIRE(cache.try_append_rows(id, 0, 1, {packed, one, one}, {values, one, one}).code() ==
            errc::invalid_argument);
}

TEST_CASE("keys per channel: no room for an open page leaves the cache as it was", "[channels]") {
    kv1::cache_description d = kv1::uniform_cache(1, layer(), 512, 32);
    d.fp16_capacity_tokens = 32; // one page
    kv1::kv_cache cache(d);
    const tokens x = some_tokens(100, 11);
    const auto id = cache.create_sequence(), other = cache.create_sequence();
    REQUIRE(append(cache, id, x, 0, 40));
    const std::vector<std::byte> before = bytes_of(cache, id);
    REQUIRE(append(cache, other, x, 0, 40).code() == errc::capacity_exceeded);
    REQUIRE(cache.length(other) == 0);
    REQUIRE(append(cache, id, x, 40, 30).code() == errc::capacity_exceeded); // the next page, beside this one
    REQUIRE(bytes_of(cache, id) == before);
    REQUIRE(cache.try_validate());
    REQUIRE(append(cache, id, x, 40, 24)); // fills the page, and frees it
    REQUIRE(append(cache, other, x, 0, 40));
    REQUIRE(cache.try_validate());
}

TEST_CASE("keys per channel: those of the open page lie in fp16 for who brings kernels", "[channels]") {
    kv1::kv_cache cache(kv1::uniform_cache(1, layer(), 256, 32));
    const auto id = cache.create_sequence();
    const tokens x = some_tokens(40, 12);
    REQUIRE(append(cache, id, x, 0, 40));
    const kv1::page_layout open(kv_format::fp16, key_dim, kv_format::fp16, 0, 32);
    const std::span<const std::byte> bytes = cache.open_keys(id, 0, 1);
    REQUIRE(bytes.size() == open.bytes());
    for (std::size_t t = 0; t < 8; ++t)
        for (std::size_t c = 0; c < key_dim; ++c)
            REQUIRE(kv1::detail::load_code(open.keys(), bytes.data(), t, c) ==
                    kv1::float16(x.k[((32 + t) * kv_heads + 1) * key_dim + c]).bits());
    REQUIRE(cache.try_open_keys(id, 0, 2).code() == errc::out_of_range);
    cache.truncate(id, 32);
    REQUIRE(cache.try_open_keys(id, 0, 1).code() == errc::out_of_range);
    kv1::kv_cache per_token(kv1::uniform_cache(1, {kv_heads, key_dim, value_dim}, 256, 32));
    const auto other = per_token.create_sequence();
    REQUIRE(append(per_token, other, x, 0, 40));
    REQUIRE(per_token.try_open_keys(other, 0, 0).code() == errc::out_of_range);
}

TEST_CASE("keys per channel: bytes are counted, of full pages and open ones", "[channels]") {
    kv1::layer_description l{1, 32, 32, kv_format::affine2, kv_format::compact2};
    l.key_axis = quantization_axis::per_channel;
    kv1::kv_cache cache(kv1::uniform_cache(1, l, 512, 64));
    const auto id = cache.create_sequence();
    const std::vector<float> x(200 * 32, 1.0f);
    cache.append(id, 0, {x.data(), 200, 1, 32}, {x.data(), 200, 1, 32});
    // 3 full pages with 4 bytes a channel; 8 tokens of fp16 keys
    REQUIRE(cache.statistics().bytes_stored == 192 * (8 + 10) + 3 * 32 * 4 + 8 * (64 + 10));
    REQUIRE(cache.layout(0).bytes() == 64 * (10 + 10));
}
