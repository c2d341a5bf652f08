// SPDX-License-Identifier: Apache-2.0
//
// Row format in and out of the tile layout, exact on every target.
#include "compare.hpp"
#include "random.hpp"
#include "reference_row.hpp"
#include "targets.hpp"

#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <cstring>
#include <span>
#include <string>
#include <vector>

using kv1::kv_format;
using kv1::kv_side;
using kv1_test::tally;

namespace {

struct shape {
    std::size_t heads, key_dim, value_dim, tokens, page_tokens;
};

// One layer a format, on both sides; everything exported and read back must be the reference's.
void check_shape(const shape& s, std::uint64_t seed, tally& t) {
    kv1::cache_description d;
    for (const kv_format f : kv1::all_kv_formats)
        d.layers.push_back({s.heads, s.key_dim, s.value_dim, f, f});
    d.capacity_tokens = s.tokens + 2 * s.page_tokens;
    d.page_tokens = s.page_tokens;
    kv1::kv_cache cache(d);
    const kv1::sequence_id other = cache.create_sequence(), id = cache.create_sequence();
    kv1_test::generator g(seed);
    for (std::size_t layer = 0; layer < d.layers.size(); ++layer) {
        const kv_format f = d.layers[layer].key_format;
        const std::vector<float> k = kv1_test::normal_values(g, s.tokens * s.heads * s.key_dim, 2.0f, 0.5f);
        const std::vector<float> v = kv1_test::normal_values(g, s.tokens * s.heads * s.value_dim);
        // another sequence's pages lie in between
        cache.append(other, layer, {k.data(), 1, s.heads, s.key_dim}, {v.data(), 1, s.heads, s.value_dim});
        cache.append(id, layer, {k.data(), s.tokens, s.heads, s.key_dim},
                     {v.data(), s.tokens, s.heads, s.value_dim});
        for (const kv_side side : {kv_side::key, kv_side::value}) {
            const bool keys = side == kv_side::key;
            const std::size_t dim = keys ? s.key_dim : s.value_dim, width = kv1::packed_bytes(f, dim);
            const std::size_t metadata = kv1::row_bytes(f, dim) - width;
            for (std::size_t head = 0; head < s.heads; ++head) {
                const std::size_t first = head == 0 ? 0 : g.below(s.tokens), count = s.tokens - first;
                std::vector<std::byte> packed(count * width, std::byte{0xff});
                std::vector<kv1::float16> scales(metadata >= 2 ? count : 0),
                    minima(metadata == 4 ? count : 0);
                std::vector<float> values(count * dim);
                cache.export_rows(id, layer, side, head, first, count, {packed, scales, minima});
                cache.read(id, layer, side, head, first, count, values);
                for (std::size_t i = 0; i < count; ++i) {
                    const float* x = (keys ? k : v).data() + ((first + i) * s.heads + head) * dim;
                    const kv1_test::reference_row row = kv1_test::make_reference_row(f, {x, dim});
                    const std::string where = std::string(to_string(f)) + (keys ? " K" : " V");
                    t.expect(std::equal(row.packed.begin(), row.packed.end(),
                                        packed.begin() + static_cast<std::ptrdiff_t>(i * width)),
                             where, dim, head, first + i, "packed");
                    t.expect(metadata < 2 || scales[i].bits() == row.scale, where, dim, head, first + i,
                             "scale");
                    t.expect(metadata < 4 || minima[i].bits() == row.minimum, where, dim, head, first + i,
                             "minimum");
                    t.expect(kv1_test::same_bits(row.values, std::span(values).subspan(i * dim, dim)), where,
                             dim, head, first + i, "values");
                }
            }
        }
    }
}

} // namespace

TEST_CASE("exported rows and read values are the quantizer's, whatever the shape", "[rows]") {
    kv1_test::for_each_target([&](kv1::target) {
        tally t;
        std::uint64_t seed = 1;
        for (std::size_t d = 1; d <= 40; ++d)
            check_shape({1, d, 41 - d, 1 + d % 37, 16}, ++seed, t);
        for (const std::size_t d :
             {std::size_t{48}, std::size_t{63}, std::size_t{64}, std::size_t{65}, std::size_t{80},
              std::size_t{96}, std::size_t{127}, std::size_t{128}, std::size_t{192}, std::size_t{256}})
            check_shape({2, d, 256 - d + 1, 67, 48}, ++seed, t);
        for (const std::size_t tokens : {std::size_t{1}, std::size_t{15}, std::size_t{16}, std::size_t{17},
                                         std::size_t{63}, std::size_t{64}, std::size_t{65}, std::size_t{129}})
            check_shape({3, 20, 36, tokens, 64}, ++seed, t);
        check_shape({1, 4096, 4095, 3, 16}, ++seed, t);
        check_shape({1, 33, 31, 300, 256}, ++seed, t);
        KV1_REQUIRE_CLEAN(t);
    });
}

TEST_CASE("exported rows decode to what read gives", "[rows]") {
    kv1::kv2_cache cache(kv1::uniform_cache(1, {1, 50, 50}, 64));
    const auto id = cache.create_sequence();
    kv1_test::generator g(3);
    const std::vector<float> x = kv1_test::normal_values(g, 7 * 50);
    cache.append(id, 0, {x.data(), 7, 1, 50}, {x.data(), 7, 1, 50});
    std::vector<std::byte> packed(7 * 13);
    std::vector<kv1::float16> scales(7), minima(7);
    cache.export_rows(id, 0, kv_side::value, 0, 0, 7, {packed, scales, minima});
    std::vector<float> values(7 * 50), decoded(50);
    cache.read(id, 0, kv_side::value, 0, 0, 7, values);
    for (std::size_t i = 0; i < 7; ++i) {
        const std::vector<std::byte> row(packed.begin() + static_cast<std::ptrdiff_t>(13 * i),
                                         packed.begin() + static_cast<std::ptrdiff_t>(13 * i + 13));
        for (std::size_t c = 0; c < 50; ++c)
            decoded[c] = kv1::affine<2>::dequantize(
                static_cast<std::uint8_t>(std::to_integer<unsigned>(row[c / 4]) >> (2 * (c % 4)) & 3u),
                {scales[i], minima[i]});
        REQUIRE(kv1_test::same_bits(decoded, std::span(values).subspan(50 * i, 50)));
    }
}
