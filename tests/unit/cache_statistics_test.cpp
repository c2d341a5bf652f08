// SPDX-License-Identifier: Apache-2.0
//
// What a cache says it holds and costs.
#include "small_cache.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/kv1.hpp>

#include <cmath>
#include <cstddef>
#include <vector>

using kv1::kv2_cache;
using kv1::kv_cache;
using kv1::kv_format;
using kv1::sequence_id;
using kv1_test::batch;
using kv1_test::small_cache;

TEST_CASE("statistics count tokens, pages and bytes", "[cache]") {
    kv_cache cache(small_cache());
    const kv1::cache_statistics empty = cache.statistics();
    REQUIRE(empty.sequences == 0);
    REQUIRE(empty.tokens == 0);
    REQUIRE(empty.layers == 2);
    REQUIRE(empty.pages_in_use == 0);
    REQUIRE(empty.pages_total == 4);
    REQUIRE(empty.bytes_in_use == 0);
    REQUIRE(empty.bytes_stored == 0);
    REQUIRE(empty.shrink_vs_fp16() == 0.0);
    const std::size_t block = 2 * (cache.layout(0).bytes() + cache.layout(1).bytes());
    REQUIRE(empty.bytes_reserved == 4 * block);

    const sequence_id a = cache.create_sequence(), b = cache.create_sequence();
    const batch twenty(20), five(5);
    cache.append(a, 0, twenty.keys(), twenty.values());
    cache.append(a, 1, five.keys(), five.values());
    cache.append(b, 1, five.keys(), five.values());
    const kv1::cache_statistics s = cache.statistics(a);
    REQUIRE(s.sequences == 1);
    REQUIRE(s.tokens == 20);
    REQUIRE(s.pages_in_use == 2);
    REQUIRE(s.bytes_in_use == 2 * block);
    // affine2 of 20: 5 + 4, affine4 of 24: 12 + 4, fp16 of 20: 40, scaled binary of 24: 3 + 2
    REQUIRE(s.bytes_stored == 20 * 2 * (9 + 16) + 5 * 2 * (40 + 5));
    REQUIRE(s.bytes_as_fp16 == 25 * 2 * 2 * 44);
    REQUIRE(s.shrink_vs_fp16() == static_cast<double>(s.bytes_as_fp16) / static_cast<double>(s.bytes_stored));
    const kv1::cache_statistics all = cache.statistics();
    REQUIRE(all.sequences == 2);
    REQUIRE(all.tokens == 25);
    REQUIRE(all.pages_in_use == 3);
    REQUIRE(all.bytes_stored == s.bytes_stored + 5 * 2 * 45);
}

TEST_CASE("2 bits at head_dim 32 are 12 bytes a vector and 5.33 times smaller than fp16", "[cache]") {
    kv2_cache cache(kv1::uniform_cache(10, {2, 32, 32}, 128));
    const sequence_id id = cache.create_sequence();
    const std::vector<float> x(100 * 2 * 32, 0.5f);
    for (std::size_t layer = 0; layer < 10; ++layer)
        cache.append(id, layer, {x.data(), 100, 2, 32}, {x.data(), 100, 2, 32});
    const kv1::cache_statistics s = cache.statistics(id);
    REQUIRE(s.bytes_stored == 100 * 10 * 2 * 2 * 12);
    REQUIRE(s.bytes_in_use == 128 * 10 * 2 * 2 * 12); // nothing is lost to the layout
    REQUIRE(std::fabs(s.shrink_vs_fp16() - 64.0 / 12.0) < 1e-12);
    REQUIRE(to_string(s) ==
            "100 tokens x 10 layers in 46.88 KiB (fp16: 250.00 KiB, 5.33x smaller), 2 of 2 pages, "
            "60.00 KiB in use");
    REQUIRE(to_string(kv1::cache_statistics{}) ==
            "0 tokens x 0 layers in 0 B (fp16: 0 B, 0.00x smaller), 0 of 0 pages, 0 B in use");
}

TEST_CASE("a cache with metadata by groups counts all of them", "[cache]") {
    kv1::layer_description l{2, 128, 64, kv_format::affine2, kv_format::compact3};
    l.key_group = l.value_group = 32;
    kv_cache cache(kv1::uniform_cache(1, l, 64));
    const sequence_id id = cache.create_sequence();
    const std::vector<float> k(3 * 2 * 128, 1.0f), v(3 * 2 * 64, 2.0f);
    cache.append(id, 0, {k.data(), 3, 2, 128}, {v.data(), 3, 2, 64});
    REQUIRE(cache.statistics().bytes_stored == 3 * 2 * (32 + 4 * 4 + 24 + 2 * 2));
    REQUIRE(kv1::bytes_per_page(cache.description()) == 2 * 64 * (32 + 4 * 4 + 24 + 2 * 2));
}

TEST_CASE("statistics of an empty sequence and of a destroyed one are zero and an error", "[cache]") {
    kv_cache cache(small_cache());
    const sequence_id id = cache.create_sequence();
    REQUIRE(cache.statistics(id).tokens == 0);
    REQUIRE(cache.statistics(id).sequences == 1);
    cache.destroy_sequence(id);
    REQUIRE(cache.statistics().sequences == 0);
}
