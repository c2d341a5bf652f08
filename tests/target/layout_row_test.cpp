// SPDX-License-Identifier: Apache-2.0
//
// Row format in and out of the tile layout, exact on every target.
#include "compare.hpp"
#include "formats.hpp"
#include "random.hpp"
#include "reference_row.hpp"
#include "targets.hpp"

#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <cstring>
#include <limits>
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

// A row of groups, each as the reference stores a vector of its own.
kv1_test::reference_row grouped_row(kv_format f, std::span<const float> x, std::size_t group,
                                    std::vector<std::uint16_t>& scales, std::vector<std::uint16_t>& minima) {
    kv1_test::reference_row all;
    for (std::size_t c = 0; c < x.size(); c += group) {
        const kv1_test::reference_row own = kv1_test::make_reference_row(f, x.subspan(c, group));
        all.codes.insert(all.codes.end(), own.codes.begin(), own.codes.end());
        all.values.insert(all.values.end(), own.values.begin(), own.values.end());
        scales.push_back(own.scale);
        minima.push_back(own.minimum);
    }
    all.packed = kv1_test::packed_model(all.codes, kv1::detail::traits_of(f).code_bits);
    return all;
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

TEST_CASE("a group of channels is stored as a vector of its own, and goes out and in as one", "[layout]") {
    constexpr std::size_t heads = 2, dim = 96, group = 32, groups = dim / group, count = 37;
    using enum kv_format;
    kv1_test::for_each_target([&](kv1::target) {
        tally t;
        for (const kv_format f : kv1_test::fitted_formats()) {
            kv1::layer_description l{heads, dim, dim, f, f};
            l.key_group = l.value_group = group;
            kv1::kv_cache cache(kv1::uniform_cache(1, l, 256, 16));
            const kv1::sequence_id id = cache.create_sequence(), twin = cache.create_sequence();
            kv1_test::generator g(17);
            std::vector<float> x = kv1_test::normal_values(g, count * heads * dim);
            for (std::size_t i = 0; i < x.size(); i += 41)
                x[i] *= 20.0f;
            const kv1::tensor_view all{x.data(), count - 1, heads, dim};
            const kv1::tensor_view last{x.data() + (count - 1) * heads * dim, 1, heads, dim};
            cache.append(id, 0, all, all);
            cache.append(id, 0, last, last);
            const std::size_t width = kv1::packed_bytes(f, dim);
            const std::size_t pairs = count * heads * groups;
            const bool minimum = kv1::row_bytes(f, dim, group) - width == 4 * groups;
            for (const kv_side side : {kv_side::key, kv_side::value}) {
                std::vector<std::byte> packed(count * heads * width);
                std::vector<kv1::float16> scales(pairs), minima(minimum ? pairs : 0);
                for (std::size_t row = 0; row < count * heads; ++row) {
                    std::vector<std::uint16_t> its_scales, its_minima;
                    const kv1_test::reference_row expected =
                        grouped_row(f, std::span(x).subspan(row * dim, dim), group, its_scales, its_minima);
                    const auto packed_row = std::span(packed).subspan(row * width, width);
                    const auto own = [&](std::vector<kv1::float16>& m) {
                        return m.empty() ? std::span<kv1::float16>{}
                                         : std::span(m).subspan(row * groups, groups);
                    };
                    cache.export_rows(id, 0, side, row % heads, row / heads, 1,
                                      {packed_row, own(scales), own(minima)});
                    std::vector<float> values(dim);
                    cache.read(id, 0, side, row % heads, row / heads, 1, values);
                    t.expect(std::ranges::equal(packed_row, expected.packed), to_string(f), row, "packed");
                    t.expect(kv1_test::same_bits(values, expected.values), to_string(f), row, "values");
                    for (std::size_t k = 0; k < groups; ++k) {
                        t.expect(own(scales)[k].bits() == its_scales[k], to_string(f), row, k, "scale");
                        t.expect(!minimum || own(minima)[k].bits() == its_minima[k], to_string(f), row, k,
                                 "minimum");
                    }
                }
                if (side == kv_side::value) { // rows of both sides are alike
                    cache.append_rows(twin, 0, count, {packed, scales, minima}, {packed, scales, minima});
                    std::vector<float> here(count * dim), there(here.size());
                    cache.read(id, 0, side, 1, 0, count, here);
                    cache.read(twin, 0, side, 1, 0, count, there);
                    t.expect(kv1_test::same_bits(here, there), to_string(f), "in again");
                    std::vector<kv1::float16> few(scales.begin(), scales.end() - 1);
                    t.expect(
                        cache.try_append_rows(twin, 0, count, {packed, scales, minima}, {packed, few, minima})
                                .code() == kv1::errc::shape_mismatch,
                        to_string(f), "a scale is missing");
                    scales[pairs - 1] = kv1::float16::from_bits(0x7c00u);
                    t.expect(cache.try_append_rows(twin, 0, count, {packed, scales, minima},
                                                   {packed, scales, minima})
                                     .code() == kv1::errc::non_finite,
                             to_string(f), "an infinite scale");
                }
            }
            std::vector<float> bad(x.begin(), x.begin() + heads * dim);
            bad[dim + 70] = std::numeric_limits<float>::infinity();
            const kv1::tensor_view v{bad.data(), 1, heads, dim};
            const kv1::status s = cache.try_append(id, 0, v, v);
            t.expect(s.code() == kv1::errc::non_finite && s.where().kv_head == 1 && s.where().channel == 70,
                     to_string(f), s.message());
        }
        KV1_REQUIRE_CLEAN(t);
    });
}
