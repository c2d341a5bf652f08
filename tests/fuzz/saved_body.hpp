// SPDX-License-Identifier: Apache-2.0
//
// What holds for bytes that say they are a saved cache, whatever they are. Throws std::logic_error where it
// does not.
#pragma once

#include "random.hpp"
#include "saved_bytes.hpp"

#include <kv1/kv_cache.hpp>

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

namespace kv1_test {

/// A small cache whose sequences and prefixes are saved, changed and loaded again.
class saved_body {
public:
    /// How often bytes were refused, loaded though they were changed, and loaded with sequences or prefixes.
    struct tallies {
        std::size_t refused = 0, loaded = 0, sequences = 0, prefixes = 0;
    };

    /// The first byte is a choice; then come changes of three bytes each: place, in two, and value. Without
    /// changes the bytes are loaded as they are.
    static void run(std::span<const std::uint8_t> input, tallies& t) {
        if (input.empty())
            return;
        const std::uint8_t choice = input[0];
        const world w(choice);
        saved_bytes b = w.saved;
        // tables are small and pages large: most changes are to hit the tables
        const std::size_t tables =
            saved_places::fixed_part + static_cast<std::size_t>(number_at(b, saved_places::table_size, 8));
        for (std::size_t i = 1; i + 3 <= input.size(); i += 3) {
            const std::size_t place = input[i] | (input[i + 1] & 0x7fu) << 8u;
            const bool anywhere = (input[i + 1] & 0x80u) != 0;
            b[place % (anywhere ? b.size() : tables)] = static_cast<std::byte>(input[i + 2]);
        }
        const bool changed = b != w.saved;
        if ((choice & 4) != 0)
            reseal(b);
        if ((choice & 8) != 0 && !changed)
            b.resize(b.size() / 2);

        kv1::kv_cache cache(describe(choice));
        std::vector<kv1::sequence_id> ids(4);
        const kv1::load_options options{.model = model()};
        const auto loaded = (choice & 16) != 0 ? kv1::try_load(cache, one_way{b}, ids, options)
                                               : kv1::try_load(cache, kv1::memory_source(b), ids, options);
        valid(cache);
        if (!loaded) {
            require(cache.statistics().pages_in_use == 0 && cache.statistics().sequences == 0 &&
                        cache.prefixes().pages() == 0,
                    "a load that fails leaves nothing");
            require(changed || (choice & 8) != 0, "what was saved is loaded");
            ++t.refused;
            return;
        }
        require(!changed || (choice & 4) != 0, "changed bytes are refused");
        t.loaded += changed ? 1 : 0;
        t.sequences += *loaded;
        t.prefixes += cache.prefixes().pages();
        use(cache, std::span(ids).first(*loaded));
    }

private:
    static constexpr std::size_t page = 16;

    static kv1::model_fingerprint model() { return kv1::fingerprint_of("model"); }

    static kv1::cache_description describe(std::uint8_t choice) {
        using enum kv1::kv_format;
        kv1::cache_description d;
        d.layers = {{1, 8, 6, affine2, fp32}, {2, 5, 7, fp16, scaled_binary}};
        if ((choice & 1) != 0) {
            d.layers.push_back({1, 8, 8, affine2, affine2, 20});
            d.layers[0].key_axis = kv1::quantization_axis::per_channel;
        }
        if ((choice & 2) != 0)
            d.fp16_sinks = 20;
        if ((choice & 32) != 0) {
            d.layers[0].rotary = {kv1::rotary_frequencies(10000.0, 6), kv1::rotary_pairs::interleaved, 2};
            d.layers[0].key_encoding.means.assign(8, 1.5f);
            d.first_position = (std::uint64_t{1} << 48) - 1;
        }
        d.page_tokens = page;
        d.capacity_tokens = 20 * page;
        return d;
    }

    static void require(bool holds, const char* what) {
        if (!holds)
            throw std::logic_error(what);
    }
    static void valid(const kv1::kv_cache& cache) {
        require(static_cast<bool>(cache.try_validate()), "the cache is valid");
    }

    static std::vector<kv1::token_id> prompt(std::size_t n, kv1::token_id last) {
        std::vector<kv1::token_id> t(n, 7);
        for (std::size_t i = page; i < n; ++i)
            t[i] = last;
        return t;
    }

    static kv1::status append(kv1::kv_cache& cache, kv1::sequence_id id, std::size_t n) {
        for (std::size_t layer = 0; layer < cache.layers(); ++layer) {
            const kv1::layer_description& l = cache.description().layers[layer];
            generator g(layer + n);
            const std::vector<float> k = normal_values(g, n * l.kv_heads * l.key_dim),
                                     v = normal_values(g, n * l.kv_heads * l.value_dim);
            if (const kv1::status s = cache.try_append(id, layer, {k.data(), n, l.kv_heads, l.key_dim},
                                                       {v.data(), n, l.kv_heads, l.value_dim});
                !s)
                return s;
        }
        return {};
    }

    struct world {
        saved_bytes saved;
        explicit world(std::uint8_t choice) {
            kv1::kv_cache cache(describe(choice));
            const auto a = cache.create_sequence();
            require(static_cast<bool>(append(cache, a, 37)), "append");
            cache.store_prefix(a, prompt(37, 1), {}, true);
            const auto b = cache.fork(a);
            require(static_cast<bool>(append(cache, a, 3)), "append");
            cache.commit(a);
            cache.drop_pages(b, 1, 1);
            const kv1::prefix_match m = cache.create_from_prefix(prompt(20, 2), {});
            require(static_cast<bool>(append(cache, m.sequence, 33 - m.tokens)), "append");
            cache.store_prefix(m.sequence, prompt(33, 2));
            const kv1::sequence_id ids[] = {a, b};
            saved = try_saved(cache, ids, {.model = model(), .prefixes = true}).value();
        }
    };

    // Whatever was loaded is a cache as others: numbers come out of it, and it goes on.
    static void use(kv1::kv_cache& cache, std::span<const kv1::sequence_id> ids) {
        std::vector<kv1::sequence_id> all(ids.begin(), ids.end());
        for (const kv1::token_id last : {1, 2, 3})
            if (const auto m = cache.try_create_from_prefix(prompt(40, last)); m)
                all.push_back(m->sequence);
        valid(cache);
        for (const kv1::sequence_id id : all) {
            attend(cache, id);
            const kv1::status s = append(cache, id, 2);
            require(s || s.code() == kv1::errc::capacity_exceeded, "append to what was loaded");
            valid(cache);
        }
        for (const kv1::sequence_id id : all)
            require(static_cast<bool>(cache.try_destroy_sequence(id)), "destroy what was loaded");
        cache.prefixes().clear();
        require(cache.statistics().pages_in_use == 0, "every page comes back");
        valid(cache);
    }
    static void attend(const kv1::kv_cache& cache, kv1::sequence_id id) {
        if (cache.length(id) == 0)
            return;
        for (std::size_t layer = 0; layer < cache.layers(); ++layer) {
            const kv1::layer_description& l = cache.description().layers[layer];
            const std::vector<float> q(l.kv_heads * l.key_dim,
                                       0.0f); // sums of whatever finite values there are
            std::vector<float> out(l.kv_heads * l.value_dim);
            const kv1::status s = cache.try_attend(id, layer, {q.data(), 1, l.kv_heads, l.key_dim},
                                                   {out.data(), 1, l.kv_heads, l.value_dim});
            require(s || s.code() == kv1::errc::out_of_range || s.code() == kv1::errc::dropped_tokens,
                    "attention over what was loaded");
        }
    }
};

} // namespace kv1_test
