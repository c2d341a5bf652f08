// SPDX-License-Identifier: Apache-2.0
//
// However tokens come in, the pages hold the same bytes.
#include "compare.hpp"
#include "random.hpp"
#include "recording_allocator.hpp"
#include "reference_row.hpp"
#include "targets.hpp"
#include "thread_executor.hpp"

#include <catch2/catch_template_test_macros.hpp>

#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <functional>
#include <span>
#include <vector>

using kv1::kv_format;
using kv1::tensor_view;
using kv1_test::allocation_log;
using kv1_test::open_cache;

namespace {

constexpr std::size_t tokens = 77, heads = 3, key_dim = 37, value_dim = 50, page_tokens = 32;

kv1::cache_description every_format() {
    kv1::cache_description d;
    for (const kv_format f : kv1::all_kv_formats)
        d.layers.push_back({heads, key_dim, value_dim, f, f});
    d.capacity_tokens = 128;
    d.page_tokens = page_tokens;
    return d;
}

struct input {
    std::vector<float> keys, values; // [token][head][channel], exact in fp16 and bf16
};

input random_input(std::uint64_t seed) {
    kv1_test::generator g(seed);
    input x{kv1_test::normal_values(g, tokens * heads * key_dim),
            kv1_test::normal_values(g, tokens * heads * value_dim)};
    for (std::vector<float>* all : {&x.keys, &x.values})
        for (float& v : *all)
            v = kv1::bfloat16(static_cast<float>(kv1::float16(v)));
    return x;
}

// All arenas after fill(cache, sequence, layer) has stored the tokens of every layer.
std::vector<std::byte>
bytes_after(const std::function<void(open_cache&, kv1::sequence_id, std::size_t)>& fill) {
    allocation_log log;
    open_cache cache(every_format(), kv1_test::recording_allocator<std::byte>(log));
    const kv1::sequence_id id = cache.create_sequence();
    for (std::size_t layer = 0; layer < cache.layers(); ++layer) {
        fill(cache, id, layer);
        REQUIRE(cache.length(id, layer) == tokens);
    }
    return kv1_test::arena_bytes(log);
}

// What the arenas must hold, from the definitions: pages are handed out in order, all else is zero.
std::vector<std::byte> expected_bytes(const input& x) {
    const kv1::cache_description d = every_format();
    std::vector<std::byte> all;
    for (const kv1::layer_description& l : d.layers) {
        const kv1::page_layout layout(l.key_format, l.key_dim, l.value_format, l.value_dim, d.page_tokens);
        const std::size_t start = all.size(), blocks = d.capacity_tokens / d.page_tokens;
        all.resize(start + blocks * heads * layout.bytes());
        for (std::size_t token = 0; token < tokens; ++token)
            for (std::size_t head = 0; head < heads; ++head) {
                std::byte* page = all.data() + start + (token / page_tokens * heads + head) * layout.bytes();
                for (const kv1::section_layout* s : {&layout.keys(), &layout.values()}) {
                    const float* v =
                        (s->keys ? x.keys : x.values).data() + (token * heads + head) * s->channels;
                    const kv1_test::reference_row row =
                        kv1_test::make_reference_row(s->format, {v, s->channels});
                    for (std::size_t c = 0; c < s->channels; ++c) {
                        std::uint32_t code = 0;
                        if (!row.codes.empty())
                            code = row.codes[c];
                        else
                            std::memcpy(&code, row.packed.data() + c * row.packed.size() / s->channels,
                                        row.packed.size() / s->channels);
                        kv1::detail::store_code(*s, page, token % page_tokens, c, code);
                    }
                    kv1::detail::store_metadata(*s, page, token % page_tokens, {row.scale, row.minimum});
                }
            }
    }
    return all;
}

tensor_view slice(const std::vector<float>& x, std::size_t first, std::size_t count, std::size_t dim) {
    return {x.data() + first * heads * dim, count, heads, dim};
}

void require_same(const std::vector<std::byte>& found, const std::vector<std::byte>& expected) {
    REQUIRE(found.size() == expected.size());
    CAPTURE(kv1_test::first_difference(found, expected));
    REQUIRE(found == expected);
}

} // namespace

TEST_CASE("many tokens at once, ragged pieces and single tokens give the layout's bytes on every target",
          "[append]") {
    const input x = random_input(1);
    const std::vector<std::byte> expected = expected_bytes(x);
    kv1_test::for_each_target([&](kv1::target) {
        require_same(bytes_after([&](open_cache& cache, kv1::sequence_id id, std::size_t layer) {
                         cache.append(id, layer, slice(x.keys, 0, tokens, key_dim),
                                      slice(x.values, 0, tokens, value_dim));
                     }),
                     expected);
        require_same(bytes_after([&](open_cache& cache, kv1::sequence_id id, std::size_t layer) {
                         for (std::size_t t = 0; t < tokens; ++t)
                             cache.append(id, layer, slice(x.keys, t, 1, key_dim),
                                          slice(x.values, t, 1, value_dim));
                     }),
                     expected);
        require_same(bytes_after([&](open_cache& cache, kv1::sequence_id id, std::size_t layer) {
                         kv1_test::generator g(layer);
                         for (std::size_t t = 0; t < tokens;) {
                             const std::size_t n = std::min(g.between(0, 40), tokens - t);
                             cache.append(id, layer, slice(x.keys, t, n, key_dim),
                                          slice(x.values, t, n, value_dim));
                             t += n;
                         }
                     }),
                     expected);
    });
}

TEMPLATE_TEST_CASE("equal values of any scalar type give equal bytes", "[append]", float, kv1::float16,
                   kv1::bfloat16) {
    const input x = random_input(2);
    const std::vector<std::byte> expected = expected_bytes(x);
    std::vector<TestType> keys, values;
    for (const float v : x.keys)
        keys.push_back(static_cast<TestType>(v));
    for (const float v : x.values)
        values.push_back(static_cast<TestType>(v));
    kv1_test::for_each_target([&](kv1::target) {
        require_same(bytes_after([&](open_cache& cache, kv1::sequence_id id, std::size_t layer) {
                         cache.append(id, layer, {keys.data(), tokens, heads, key_dim},
                                      {values.data(), tokens, heads, value_dim});
                     }),
                     expected);
        // K and V need not have one type
        require_same(bytes_after([&](open_cache& cache, kv1::sequence_id id, std::size_t layer) {
                         cache.append(id, layer, {keys.data(), tokens, heads, key_dim},
                                      {x.values.data(), tokens, heads, value_dim});
                     }),
                     expected);
    });
}

TEMPLATE_TEST_CASE("strides say where vectors are: head-major, padded, backwards", "[append]", float,
                   kv1::float16) {
    const input x = random_input(3);
    const std::vector<std::byte> expected = expected_bytes(x);
    struct placed {
        std::vector<TestType> data;
        std::ptrdiff_t origin, token_stride, head_stride;
    };
    // The tensor laid out anew, NaN in all that is not a value.
    const auto place = [](const std::vector<float>& source, std::size_t dim, std::ptrdiff_t token_stride,
                          std::ptrdiff_t head_stride) {
        const auto t = static_cast<std::ptrdiff_t>(tokens), h = static_cast<std::ptrdiff_t>(heads);
        const std::ptrdiff_t origin =
            (token_stride < 0 ? -token_stride * (t - 1) : 0) + (head_stride < 0 ? -head_stride * (h - 1) : 0);
        const std::size_t size =
            static_cast<std::size_t>(std::abs(token_stride) * (t - 1) + std::abs(head_stride) * (h - 1)) +
            dim;
        placed p{std::vector<TestType>(size, static_cast<TestType>(std::numeric_limits<float>::quiet_NaN())),
                 origin, token_stride, head_stride};
        for (std::ptrdiff_t token = 0; token < t; ++token)
            for (std::ptrdiff_t head = 0; head < h; ++head)
                for (std::size_t c = 0; c < dim; ++c)
                    p.data[static_cast<std::size_t>(origin + token * token_stride + head * head_stride) + c] =
                        static_cast<TestType>(source[static_cast<std::size_t>(token * h + head) * dim + c]);
        return p;
    };
    const auto view = [](const placed& p, std::size_t dim) {
        return tensor_view(p.data.data() + p.origin, tokens, heads, dim, p.token_stride, p.head_stride);
    };
    const auto n = static_cast<std::ptrdiff_t>(tokens), h = static_cast<std::ptrdiff_t>(heads);
    kv1_test::for_each_target([&](kv1::target) {
        for (int kind = 0; kind < 4; ++kind) {
            const auto make = [&](const std::vector<float>& source, std::size_t dim) {
                const auto d = static_cast<std::ptrdiff_t>(dim);
                switch (kind) {
                case 0:
                    return place(source, dim, d, d * n); // head-major
                case 1:
                    return place(source, dim, (d + 5) * h + 7, d + 5); // padded
                case 2:
                    return place(source, dim, -d * h, d); // last token first
                default:
                    return place(source, dim, d, -(d * n + 1)); // head-major, last head first
                }
            };
            const placed k = make(x.keys, key_dim), v = make(x.values, value_dim);
            require_same(bytes_after([&](open_cache& cache, kv1::sequence_id id, std::size_t layer) {
                             cache.append(id, layer, view(k, key_dim), view(v, value_dim));
                         }),
                         expected);
        }
    });
}

TEST_CASE("an executor's threads write the same bytes, one task a KV head", "[append]") {
    const input x = random_input(4);
    const std::vector<std::byte> expected = expected_bytes(x);
    kv1_test::for_each_target([&](kv1::target) {
        for (const std::size_t workers : {std::size_t{1}, std::size_t{2}, std::size_t{5}}) {
            kv1_test::thread_executor run(workers);
            require_same(bytes_after([&](open_cache& cache, kv1::sequence_id id, std::size_t layer) {
                             cache.append(id, layer, slice(x.keys, 0, tokens, key_dim),
                                          slice(x.values, 0, tokens, value_dim), run);
                         }),
                         expected);
            REQUIRE(run.tasks() == heads * kv1::all_kv_formats.size());
        }
    });
}

TEST_CASE("a page that another sequence used before holds nothing of it", "[append]") {
    const input x = random_input(5), y = random_input(6);
    const std::vector<std::byte> expected = expected_bytes(x);
    kv1_test::for_each_target([&](kv1::target) {
        allocation_log log;
        open_cache cache(every_format(), kv1_test::recording_allocator<std::byte>(log));
        const auto fill = [&](const input& in) {
            const kv1::sequence_id id = cache.create_sequence();
            for (std::size_t layer = 0; layer < cache.layers(); ++layer)
                cache.append(id, layer, slice(in.keys, 0, tokens, key_dim),
                             slice(in.values, 0, tokens, value_dim));
            return id;
        };
        cache.destroy_sequence(fill(y));
        // the pages come back last freed first: compare what rows say, not where they lie
        const kv1::sequence_id id = fill(x);
        std::vector<float> values(tokens * value_dim);
        for (std::size_t layer = 0; layer < cache.layers(); ++layer) {
            cache.read(id, layer, kv1::kv_side::value, 1, 0, tokens, values);
            for (std::size_t t = 0; t < tokens; ++t) {
                const std::span<const float> row(x.values.data() + (t * heads + 1) * value_dim, value_dim);
                REQUIRE(kv1_test::same_bits(
                    kv1_test::make_reference_row(every_format().layers[layer].value_format, row).values,
                    std::span(values).subspan(t * value_dim, value_dim)));
            }
        }
        // the pages lie in another order, but hold the same bytes: no trace of y in unfilled tokens
        std::vector<std::byte> found = kv1_test::arena_bytes(log), wanted = expected;
        std::ranges::sort(found);
        std::ranges::sort(wanted);
        REQUIRE(found == wanted);
    });
}
