// SPDX-License-Identifier: Apache-2.0
//
// Layers whose values are the first channels of their keys: how they are described, filled, counted, saved,
// and what they refuse. Their attention: target/latent_test.cpp.
#include "compare.hpp"
#include "random.hpp"
#include "small_cache.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/cache_io.hpp>
#include <kv1/fake_quantize.hpp>
#include <kv1/kv_cache.hpp>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

using kv1::errc;
using kv1::kv_cache;
using kv1::kv_format;
using kv1::kv_side;
using kv1_test::normal_values;
using kv1_test::require_place;
using kv1_test::same_bits;

namespace {

constexpr std::size_t key_dim = 96, value_dim = 64;

kv1::cache_description description() {
    return kv1::uniform_cache(2, kv1::latent_layer(key_dim, value_dim), 512, 32);
}

std::vector<float> read(const kv_cache& cache, kv1::sequence_id id, kv_side side, std::size_t layer = 0) {
    const std::size_t n = cache.length(id, layer);
    std::vector<float> x(n * (side == kv_side::key ? key_dim : value_dim));
    cache.read(id, layer, side, 0, 0, n, x);
    return x;
}

std::vector<float> attended(const kv_cache& cache, kv1::sequence_id id, std::size_t layer = 0) {
    kv1_test::generator g(9);
    const std::vector<float> q = normal_values(g, 4 * key_dim);
    std::vector<float> out(4 * value_dim);
    cache.attend(id, layer, {q.data(), 1, 4, key_dim}, {out.data(), 1, 4, value_dim}, {.scale = 0.1f});
    return out;
}

void refused(const kv1::layer_description& l, errc code = errc::invalid_argument) {
    const auto made = kv_cache::create(kv1::uniform_cache(1, l, 64));
    REQUIRE(made.code() == code);
    require_place(made.reason(), 0, -1, -1, -1);
}

} // namespace

TEST_CASE("a vector of 576 channels that holds its values takes 148 bytes at 2 bits", "[cache][latent]") {
    kv_cache cache(kv1::uniform_cache(1, kv1::latent_layer(576, 512), 128));
    REQUIRE(cache.layout(0).bytes() == 64 * 148);
    REQUIRE(cache.layout(0).values_in_keys());
    REQUIRE(kv1::bytes_per_page(cache.description()) == 64 * 148);
    const kv1::sequence_id id = cache.create_sequence();
    kv1_test::generator g(1);
    const std::vector<float> k = normal_values(g, 70 * 576);
    cache.append(id, 0, {k.data(), 70, 1, 576});
    const kv1::cache_statistics s = cache.statistics(id);
    REQUIRE(s.bytes_stored == 70 * 148);
    REQUIRE(s.bytes_as_fp16 == 70 * 1152);
    REQUIRE(s.bytes_in_use == 2 * 64 * 148);
    kv1::layer_description apart = kv1::latent_layer(576, 512);
    apart.values_in_keys = false;
    REQUIRE(kv1::layout_of(apart, 64).bytes() == 64 * 280);
}

TEST_CASE("values in keys are the first channels of the keys as they are decoded", "[cache][latent]") {
    kv1_test::generator g(2);
    const std::vector<float> k = normal_values(g, 40 * key_dim);
    for (const kv_format f : kv1::all_kv_formats) {
        kv_cache cache(kv1::uniform_cache(1, kv1::latent_layer(key_dim, value_dim, f), 128, 32));
        const kv1::sequence_id id = cache.create_sequence();
        cache.append(id, 0, {k.data(), 40, 1, key_dim});
        const std::vector<float> keys = read(cache, id, kv_side::key),
                                 values = read(cache, id, kv_side::value);
        for (std::size_t t = 0; t < 40; ++t)
            REQUIRE(same_bits(std::span(keys).subspan(t * key_dim, value_dim),
                              std::span(values).subspan(t * value_dim, value_dim)));
    }
}

TEST_CASE("append takes the keys alone, or the keys' own view as values", "[cache][latent]") {
    kv_cache cache(description());
    kv1_test::generator g(3);
    const std::vector<float> k = normal_values(g, 40 * key_dim), other = k;
    const kv1::tensor_view keys(k.data(), 40, 1, key_dim);
    const kv1::sequence_id alone = cache.create_sequence(), twice = cache.create_sequence(),
                           cut = cache.create_sequence(), batched = cache.create_sequence();
    cache.append(alone, 0, keys);
    cache.append(twice, 0, keys, keys);
    cache.append(cut, 0, keys, {k.data(), 40, 1, value_dim, key_dim, key_dim});
    const std::vector<std::size_t> indptr{0, 40};
    cache.append({&batched, 1}, 0, indptr, keys);
    const std::vector<float> stored = read(cache, alone, kv_side::key), out = attended(cache, alone);
    for (const kv1::sequence_id id : {twice, cut, batched}) {
        REQUIRE(same_bits(read(cache, id, kv_side::key), stored));
        REQUIRE(same_bits(attended(cache, id), out));
    }

    const kv1::sequence_id id = cache.create_sequence();
    const auto no = [&](errc code, kv1::tensor_view given, kv1::tensor_view values) {
        const kv1::status s = cache.try_append(id, 1, given, values);
        REQUIRE(s.code() == code);
        require_place(s, 1, -1, -1, -1);
        REQUIRE(cache.length(id, 1) == 0);
    };
    no(errc::invalid_argument, keys, {other.data(), 40, 1, value_dim, key_dim, key_dim}); // other memory
    no(errc::invalid_argument, keys, {k.data(), 40, 1, value_dim});                       // other strides
    no(errc::invalid_argument, keys, {k.data(), 39, 1, key_dim});
    no(errc::invalid_argument, keys, {k.data(), 40, 1, 32, key_dim, key_dim});
    const float* null = nullptr;
    no(errc::invalid_argument, {null, 40, 1, key_dim}, {null, 0, 0, 0});
    no(errc::shape_mismatch, {k.data(), 40, 1, value_dim}, {null, 0, 0, 0});
    no(errc::shape_mismatch, {k.data(), 20, 2, key_dim}, {null, 0, 0, 0});

    kv_cache usual(kv1::uniform_cache(1, {1, key_dim, value_dim}, 64));
    const kv1::status s = usual.try_append(usual.create_sequence(), 0, keys);
    REQUIRE(s.code() == errc::shape_mismatch);
    require_place(s, 0, -1, -1, -1);
}

TEST_CASE("rows of values in keys go out, and come in with the keys", "[cache][latent]") {
    kv_cache cache(description());
    kv1_test::generator g(4);
    const std::vector<float> k = normal_values(g, 40 * key_dim);
    const kv1::sequence_id id = cache.create_sequence(), twin = cache.create_sequence();
    cache.append(id, 0, {k.data(), 40, 1, key_dim});
    std::vector<std::byte> packed(40 * 24), first(40 * 16);
    std::vector<kv1::float16> scales(40), minima(40), value_scales(40), value_minima(40);
    cache.export_rows(id, 0, kv_side::key, 0, 0, 40, {packed, scales, minima});
    cache.export_rows(id, 0, kv_side::value, 0, 0, 40, {first, value_scales, value_minima});
    for (std::size_t t = 0; t < 40; ++t) {
        REQUIRE(same_bits(std::span(packed).subspan(t * 24, 16), std::span(first).subspan(t * 16, 16)));
        REQUIRE(scales[t].bits() == value_scales[t].bits());
        REQUIRE(minima[t].bits() == value_minima[t].bits());
    }
    REQUIRE(cache.try_append_rows(twin, 0, 40, {packed, scales, minima}, {first, value_scales, value_minima})
                .code() == errc::shape_mismatch);
    cache.append_rows(twin, 0, 40, {packed, scales, minima}, {});
    REQUIRE(same_bits(attended(cache, twin), attended(cache, id)));
}

TEST_CASE("saved values in keys come back, and not to a cache that stores them apart",
          "[cache][latent][io]") {
    kv_cache cache(description());
    kv1_test::generator g(5);
    const std::vector<float> k = normal_values(g, 40 * key_dim);
    const kv1::sequence_id id = cache.create_sequence();
    for (const std::size_t layer : {0u, 1u})
        cache.append(id, layer, {k.data(), 40, 1, key_dim});
    cache.commit(id);
    std::vector<std::byte> saved;
    REQUIRE(kv1::try_save(cache, {&id, 1}, [&](std::span<const std::byte> some) {
        saved.insert(saved.end(), some.begin(), some.end());
        return true;
    }));
    kv_cache again(description());
    const auto loaded = kv1::try_swap_in(again, saved);
    REQUIRE(loaded.reason());
    REQUIRE(same_bits(attended(again, *loaded, 1), attended(cache, id, 1)));

    kv1::layer_description apart = kv1::latent_layer(key_dim, value_dim);
    apart.values_in_keys = false;
    kv_cache other(kv1::uniform_cache(2, apart, 128, 32));
    REQUIRE(kv1::try_swap_in(other, saved).code() == errc::different_cache);
}

TEST_CASE("forks, prefixes and truncation share pages of values in keys", "[cache][latent]") {
    kv_cache cache(description());
    kv1_test::generator g(6);
    const std::vector<float> k = normal_values(g, 50 * key_dim);
    const auto append = [&](kv1::sequence_id id, std::size_t first, std::size_t n) {
        for (const std::size_t layer : {0u, 1u})
            cache.append(id, layer, {k.data() + first * key_dim, n, 1, key_dim});
        cache.commit(id);
    };
    const kv1::sequence_id whole = cache.create_sequence();
    append(whole, 0, 50);
    const std::vector<float> out = attended(cache, whole);
    const kv1::sequence_id fork = cache.fork(whole);
    cache.truncate(fork, 35);
    append(fork, 35, 15);
    REQUIRE(same_bits(attended(cache, fork), out));
    const std::vector<kv1::token_id> tokens(50, 3);
    REQUIRE(cache.store_prefix(whole, tokens) == 32);
    const kv1::prefix_match match = cache.create_from_prefix(tokens);
    REQUIRE(match.tokens == 32);
    append(match.sequence, 32, 18);
    REQUIRE(same_bits(attended(cache, match.sequence), out));
    cache.validate();
}

TEST_CASE("values that cannot lie in keys are refused with the layer", "[cache][latent]") {
    const kv1::layer_description fits = kv1::latent_layer(key_dim, value_dim);
    REQUIRE(kv_cache::create(kv1::uniform_cache(1, fits, 64)).reason());
    const auto with = [&](auto change) {
        kv1::layer_description l = fits;
        change(l);
        return l;
    };
    refused(with([](auto& l) { l.value_dim = 97; }));
    refused(with([](auto& l) { l.value_format = kv_format::affine4; }));
    refused(with([](auto& l) { l.key_group = 32; }));   // and another of values
    refused(with([](auto& l) { l.value_group = 32; })); // and another of keys
    refused(with([](auto& l) {                          // a group on both sides
        l.key_group = l.value_group = 48;
    }));
    refused(with([](auto& l) {
        l.key_dim = 192;
        l.value_dim = 160;
        l.key_group = l.value_group = 64;
    }));
    refused(with([](auto& l) { l.value_encoding.hadamard = 32; }));
    refused(with([](auto& l) { l.value_encoding.means.assign(value_dim, 0.0f); }));
    refused(with([](auto& l) { l.key_axis = kv1::quantization_axis::per_channel; }));
    refused(with([](auto& l) { // a Hadamard block on both sides
        l.value_dim = 48;
        l.key_encoding.hadamard = 32;
    }));
    // a block of them would not fit its room
    refused(kv1::latent_layer(4096, 1040, kv_format::fp32));
    refused(kv1::latent_layer(4096, 2064, kv_format::fp16));
    refused(kv1::latent_layer(4096, 2736, kv_format::affine3));
    REQUIRE(
        kv_cache::create(kv1::uniform_cache(1, kv1::latent_layer(4096, 1024, kv_format::fp32), 64)).reason());
    REQUIRE(kv_cache::create(kv1::uniform_cache(1, kv1::latent_layer(4096, 4096, kv_format::affine8), 64))
                .reason());
    REQUIRE(kv_cache::create(kv1::uniform_cache(1, fits, 64)).reason());
}

TEST_CASE("room for values in keys holds a block of every layer that is allowed", "[cache][latent]") {
    for (const kv_format f : kv1::all_kv_formats)
        for (std::size_t dim = 1; dim <= 4096; ++dim)
            for (const std::size_t group : {std::size_t{0}, std::size_t{32}}) {
                if (group != 0 && (dim % group != 0 || kv1::detail::traits_of(f).code_bits < 2))
                    continue;
                const auto layout = kv1::page_layout::with_values_in_keys(f, dim, dim, 64, group);
                const std::size_t most = kv1::detail::longest_chunk(layout);
                if (most == 0)
                    continue;
                const kv1::section_layout transposed = kv1::detail::transposed_values(layout);
                REQUIRE(transposed.tokens >= most);
                REQUIRE(kv1::detail::transposed_bytes(transposed) <= kv1::detail::transposed_room);
                REQUIRE(most % kv1::detail::granule_of(layout) == 0);
            }
}
