// SPDX-License-Identifier: Apache-2.0
//
// Every call makes do with 64 KiB of its thread's stack, in every format on every target: it runs on a thread
// that has no more. Calls that split their work do all of it there, so that the same holds of executors'
// threads. Unoptimized, compilers give each value of each inlined function a place of its own: 256 KiB.
#if defined(__unix__)
#include "formats.hpp"
#include "random.hpp"
#include "small_stack.hpp"
#include "targets.hpp"
#include "temporary_folder.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/c_api.hpp>
#include <kv1/convert.hpp>
#include <kv1/fake_quantize.hpp>
#include <kv1/kv1.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

// sanitizers make frames larger
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define KV1_TEST_FRAMES_AS_THEY_ARE 0
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define KV1_TEST_FRAMES_AS_THEY_ARE 0
#endif
#endif
#if !defined(KV1_TEST_FRAMES_AS_THEY_ARE)
#define KV1_TEST_FRAMES_AS_THEY_ARE 1
#endif

#if KV1_TEST_FRAMES_AS_THEY_ARE

using kv1::kv_format;
using kv1_test::normal_values;

namespace {

#if defined(__OPTIMIZE__)
constexpr std::size_t stack_bytes = 64 << 10;
#else
constexpr std::size_t stack_bytes = 256 << 10;
#endif

// Makes calls one by one, and keeps what took most.
class small_calls {
public:
    // call() says whether it did what it should.
    template <class F>
    void operator()(const std::string& what, F&& call) {
        bool done = false;
        const std::size_t used = stack_([&]() noexcept { done = call(); });
        INFO(what);
        REQUIRE(done);
        if (used > most_) {
            most_ = used;
            which_ = what;
        }
    }
    [[nodiscard]] std::size_t most() const noexcept { return most_; }
    [[nodiscard]] const std::string& which() const noexcept { return which_; }

private:
    kv1_test::small_stack stack_{stack_bytes};
    std::size_t most_ = 0;
    std::string which_;
};

enum class kind { plain, encoded, weighted, grouped, per_channel, per_channel_weighted, fp16_window, wide };

constexpr std::array all_kinds{kind::plain,       kind::encoded,     kind::weighted,
                               kind::grouped,     kind::per_channel, kind::per_channel_weighted,
                               kind::fp16_window, kind::wide};

// A cache of a layer, or none where the format does not go with the kind.
std::optional<kv1::cache_description> describe(kv_format f, kind k) {
    const kv1::detail::format_traits t = kv1::detail::traits_of(f);
    const bool levels_differ = t.metadata == kv1::detail::metadata_kind::scale_and_minimum ||
                               t.metadata == kv1::detail::metadata_kind::compact;
    const bool coded = t.code_bits != 0;
    constexpr std::size_t heads = 2, dim = 64;
    kv1::layer_description l{heads, dim, dim, f, f};
    kv1_test::generator g(1);
    const auto encode = [&](bool weighted) {
        for (kv1::vector_encoding* e : {&l.key_encoding, &l.value_encoding}) {
            e->hadamard = 64;
            e->means = normal_values(g, heads * dim);
            if (levels_differ)
                e->levels = weighted ? kv1::level_choice::clip_search : kv1::level_choice::least_squares;
            if (weighted) {
                e->error_weights.assign(heads * dim * dim, 0.25f);
                for (std::size_t i = 0; i < heads * dim; ++i)
                    e->error_weights[i * dim + i % dim] += 1.0f;
                e->basis.assign(heads * dim * dim, 0.0f);
                for (std::size_t i = 0; i < heads * dim; ++i) // channels in another order
                    e->basis[i * dim + (i * 5 + 1) % dim] = 1.0f;
            }
        }
        if (weighted)
            l.rotary.frequencies = kv1::rotary_frequencies(10000.0, dim / 2);
    };
    const bool by_channel = levels_differ && t.code_bits <= 4;
    switch (k) {
    case kind::plain:
        break;
    case kind::encoded:
        if (!coded)
            return std::nullopt;
        encode(false);
        break;
    case kind::weighted:
        if (!levels_differ)
            return std::nullopt;
        encode(true);
        break;
    case kind::grouped:
        if (!levels_differ)
            return std::nullopt;
        l.key_group = l.value_group = 32;
        l.key_encoding.levels = kv1::level_choice::least_squares;
        break;
    case kind::per_channel:
    case kind::per_channel_weighted:
        if (!by_channel)
            return std::nullopt;
        encode(k == kind::per_channel_weighted);
        l.key_axis = kv1::quantization_axis::per_channel;
        break;
    case kind::fp16_window:
        break;
    case kind::wide: // more channels than are encoded side by side
        l.kv_heads = 1;
        l.key_dim = l.value_dim = 1056;
        if (levels_differ)
            l.key_encoding.levels = l.value_encoding.levels = kv1::level_choice::clip_search;
    }
    kv1::cache_description d = kv1::uniform_cache(1, l, 256, 16);
    if (k == kind::fp16_window) {
        d.fp16_sinks = 2;
        d.fp16_window = 8;
    }
    return d;
}

template <class T>
kv1::tensor_view view(const std::vector<T>& x, std::size_t heads, std::size_t dim) {
    return {x.data(), x.size() / heads / dim, heads, dim};
}

std::vector<kv1::float16> halves_of(std::span<const float> x) { return {x.begin(), x.end()}; }

// Room for rows of a section as they are exported.
struct exported_rows {
    std::vector<std::byte> packed;
    std::vector<kv1::float16> scales, minima;

    exported_rows(const kv1::section_layout& s, std::size_t rows)
        : packed(rows * kv1::packed_bytes(s.format, s.channels)),
          scales(s.traits().metadata == kv1::detail::metadata_kind::none ? 0 : rows * s.groups()),
          minima(s.traits().metadata == kv1::detail::metadata_kind::scale_and_minimum ? rows * s.groups()
                                                                                      : 0) {}
    [[nodiscard]] kv1::row_buffers room() { return {packed, scales, minima}; }
    [[nodiscard]] kv1::const_row_buffers rows() const { return {packed, scales, minima}; }
};

// Each call of a cache once, or more often where it goes several ways.
void use_cache(small_calls& call, const kv1::cache_description& d, const std::string& name,
               const std::filesystem::path& file) {
    const kv1::layer_description& l = d.layers[0];
    const std::size_t heads = l.kv_heads, query_heads = 3 * heads, key = l.key_dim, value = l.value_dim;
    constexpr std::size_t many = 25;
    const std::size_t most_queries = key > 1024 ? 2 : many; // the scalar target is slow
    kv1_test::generator g(2);
    const std::vector<float> k = normal_values(g, many * heads * key),
                             v = normal_values(g, many * heads * value),
                             q = normal_values(g, many * query_heads * key);
    const std::vector<kv1::float16> halves_k = halves_of(k), halves_v = halves_of(v);
    std::vector<float> out(many * query_heads * value), lse(many * query_heads);
    std::vector<float> too_large = k;
    too_large.back() = 1e30f; // plain fp32 alone holds it
    const bool per_channel = l.key_axis == kv1::quantization_axis::per_channel;
    const kv1::mutable_tensor_view outputs{out.data(), many, query_heads, value};
    const auto on = [&](const char* what) { return name + ", " + what; };

    std::optional<kv1::kv_cache> made;
    call(on("create"), [&] {
        auto cache = kv1::kv_cache::create(d);
        if (cache)
            made.emplace(std::move(*cache));
        return made.has_value();
    });
    kv1::kv_cache& cache = *made;
    kv1::sequence_id id{}, other{};
    call(on("create_sequence"), [&] {
        const auto a = cache.try_create_sequence(), b = cache.try_create_sequence();
        id = *a;
        other = *b;
        return a && b;
    });
    call(on("append"), [&] {
        return static_cast<bool>(
            cache.try_append(id, 0, view(k, heads, key).slice(0, 1), view(v, heads, value).slice(0, 1)));
    });
    call(on("append of halves"), [&] {
        return static_cast<bool>(
            cache.try_append(id, 0, view(halves_k, heads, key), view(halves_v, heads, value)));
    });
    call(on("refused append"), [&] {
        const auto s = cache.try_append(id, 0, view(too_large, heads, key), view(v, heads, value));
        return s ? static_cast<bool>(cache.try_truncate(id, many + 1))
                 : s.code() == kv1::errc::not_representable;
    });
    const std::array ids{id, other};
    const std::array<std::size_t, 3> indptr{0, 8, many};
    call(on("append to several"), [&] {
        return static_cast<bool>(
            cache.try_append(ids, 0, indptr, view(k, heads, key), view(v, heads, value)));
    });
    for (const kv1::precision mode : {kv1::precision::fast, kv1::precision::exact})
        for (const std::size_t queries : {std::size_t{1}, most_queries})
            call(on("attend"), [&, mode, queries] {
                return static_cast<bool>(cache.try_attend(
                    id, 0, view(q, query_heads, key).slice(0, queries), outputs.slice(0, queries),
                    {.mode = mode, .log_sum_exp = std::span(lse).first(queries * query_heads)}));
            });
    const std::vector<float> per_head(query_heads, 0.25f);
    call(on("attend with options"), [&] {
        return static_cast<bool>(cache.try_attend(
            id, 0, view(q, query_heads, key).slice(0, most_queries), outputs.slice(0, most_queries),
            {.window = 20, .soft_cap = 10.0f, .sink_logits = per_head}));
    });
    call(on("attend for several"), [&] {
        return static_cast<bool>(
            cache.try_attend(ids, 0, indptr, view(q, query_heads, key), outputs, {.log_sum_exp = lse}));
    });
    call(on("read"), [&] {
        return static_cast<bool>(
            cache.try_read(id, 0, kv1::kv_side::key, 0, 0, 20, std::span(out).first(20 * key)));
    });
    exported_rows key_rows(cache.layout(0).keys(), heads), value_rows(cache.layout(0).values(), heads);
    if (!per_channel)
        call(on("rows"), [&] {
            const auto one = [&](kv1::kv_side side, exported_rows& rows) {
                kv1::row_buffers all = rows.room();
                const std::size_t bytes = all.packed.size() / heads, pairs = all.scales.size() / heads;
                return cache.try_export_rows(id, 0, side, 0, 3, 1,
                                             {all.packed.first(bytes), all.scales.first(pairs),
                                              all.minima.first(all.minima.empty() ? 0 : pairs)});
            };
            const bool got = one(kv1::kv_side::key, key_rows) && one(kv1::kv_side::value, value_rows);
            const auto s = cache.try_append_rows(id, 0, 1, key_rows.rows(), value_rows.rows());
            return got && (s || d.fp16_window != 0);
        });
    std::vector<std::int32_t> starts(3), blocks(64), last(2);
    call(on("inspection"), [&] {
        const auto all = cache.statistics();
        return all.sequences == 2 && cache.try_statistics(id) && cache.try_validate() &&
               cache.try_length(id) && cache.try_page(0, 0, 0) &&
               cache.try_export_block_tables(ids, 0, {starts, blocks, last});
    });
    call(on("commit and cuts"), [&] {
        const auto twin = cache.try_fork(id);
        return cache.try_commit(id) && twin && cache.try_drop_pages(*twin, 1, 1) &&
               cache.try_truncate(*twin, 16) && cache.try_destroy_sequence(*twin) && cache.try_rollback(id);
    });
    const std::vector<kv1::token_id> tokens(32, kv1::token_id{7});
    call(on("prefixes"), [&] {
        const auto stored = cache.try_store_prefix(other, std::span(tokens).first(16));
        const auto found = cache.try_create_from_prefix(tokens);
        return stored && found && cache.try_destroy_sequence(found->sequence);
    });
    call(on("grow"), [&] { return static_cast<bool>(cache.try_grow(512)); });
    std::vector<std::byte> saved(*kv1::try_saved_bytes(cache, ids));
    call(on("save and load"), [&] {
        std::array<kv1::sequence_id, 2> loaded;
        const auto s = kv1::try_save(cache, ids, kv1::memory_sink(saved));
        const auto n = kv1::try_load(cache, kv1::memory_source(saved), loaded);
        return s && n && cache.try_destroy_sequence(loaded[0]) && cache.try_destroy_sequence(loaded[1]);
    });
    call(on("save and load a file"), [&] {
        std::array<kv1::sequence_id, 2> loaded;
        const auto s = kv1::try_save_file(cache, ids, file);
        const auto n = kv1::try_load_file(cache, file, loaded);
        return s && n && cache.try_destroy_sequence(loaded[0]) && cache.try_destroy_sequence(loaded[1]);
    });
    call(on("swap out and in"),
         [&] { return kv1::try_swap_out(cache, other, saved) && kv1::try_swap_in(cache, saved); });
    call(on("an exception"), [&] {
        try {
            cache.append(id, 0, view(k, heads, key).slice(0, 2), view(v, heads, value).slice(0, 1));
            return false;
        } catch (const kv1::error& e) {
            return e.code() == kv1::errc::shape_mismatch;
        }
    });
    call(on("destroy"), [&] {
        made.reset();
        return true;
    });
}

// Vectors without a cache.
template <class Q>
void use_quantizer(small_calls& call, const std::string& name) {
    kv1_test::generator g(3);
    for (const std::size_t n : {std::size_t{100}, std::size_t{4096}}) {
        const std::vector<float> x = normal_values(g, n);
        std::vector<float> back(n);
        std::vector<std::uint8_t> codes(n);
        std::vector<std::byte> row(kv1::packed_size<Q::bits>(n));
        typename Q::metadata m{};
        call(name + ", quantize", [&] { return static_cast<bool>(Q::quantize(x, codes, m)); });
        call(name + ", quantize on the target",
             [&] { return static_cast<bool>(kv1::try_quantize<Q>(x, codes, m)); });
        call(name + ", rows", [&] {
            return kv1::try_encode_row<Q>(x, row, m) && kv1::try_decode_row<Q>(row, m, back) &&
                   kv1::packed_span<Q::bits>(row, n).try_unpack(codes) &&
                   kv1::packed_span<Q::bits>(row, n).try_pack(codes);
        });
    }
}

template <class Q>
void use_quantizers(small_calls& call, const std::string& name) {
    use_quantizer<Q>(call, name);
    use_quantizer<kv1::least_squares<Q>>(call, name + ", least squares");
    use_quantizer<kv1::clip_search<Q>>(call, name + ", clip search");
}

} // namespace

TEST_CASE("every call on slots makes do with little stack, in every format", "[stack][slots]") {
    constexpr std::size_t many = 20;
    const std::vector<std::uint8_t> visible(many * 64, 1);
    kv1_test::generator g(5);
    const std::vector<float> mask = normal_values(g, many * 64);
    std::vector<std::uint32_t> slots;
    for (std::uint32_t i = 0; i < many; ++i)
        slots.push_back(i * 13 % 64);
    kv1_test::for_each_target([&](kv1::target) {
        small_calls call;
        for (const kv_format f : kv1::all_kv_formats)
            for (const kind k : {kind::plain, kind::encoded, kind::weighted, kind::wide}) {
                const auto d = describe(f, k);
                if (!d)
                    continue;
                const kv1::layer_description& l = d->layers[0];
                kv1::slot_store_description description;
                description.layers = {l};
                description.layers[0].rotary = {};
                description.slots = 64;
                description.page_tokens = 16;
                description.fp16_slots = 32;
                kv1::slot_store store(description);
                const std::size_t heads = l.kv_heads, queries = k == kind::wide ? 1 : 3;
                std::vector<float> x = normal_values(g, many * heads * l.key_dim), out(x.size());
                x[7] = 9000.0f; // pages are kept
                const std::vector<float> q = normal_values(g, queries * heads * l.key_dim);
                const auto some = [&](std::size_t n) { return std::span(slots).first(n); };
                call("write", [&] {
                    for (const std::size_t n : {std::size_t{3}, many}) { // in one task, and by KV heads
                        store.flush();
                        const kv1::tensor_view v(x.data(), n, heads, l.key_dim);
                        if (!store.try_write(0, some(n), v, v))
                            return false;
                    }
                    return true;
                });
                const kv1::slot_stream streams[] = {
                    {queries, kv1::slot_view::list(slots), kv1::slot_mask::causal()},
                    {queries, kv1::slot_view::list(slots), kv1::slot_mask::bytes(visible, many)},
                    {queries, kv1::slot_view::range(3, 60), kv1::slot_mask::additive(mask.data(), 64)}};
                for (const kv1::slot_stream& s : streams)
                    call("attend", [&] {
                        return static_cast<bool>(store.try_attend(0, {&s, 1},
                                                                  {q.data(), queries, heads, l.key_dim},
                                                                  {out.data(), queries, heads, l.value_dim}));
                    });
                call("rows", [&] {
                    std::vector<std::byte> raw(many * store.raw_bytes(0));
                    const kv1::slot_sequence sequence{kv1::slot_view::list(slots)};
                    return store.try_read(0, kv1::kv_side::key, 0, some(1),
                                          std::span(out).first(l.key_dim)) &&
                           store.try_copy(0, some(3), std::span(slots).last(3)) &&
                           store.try_settle({&sequence, 1}) && store.try_export_raw(0, slots, raw) &&
                           store.try_import_raw(0, slots, raw);
                });
            }
        CAPTURE(call.which());
        REQUIRE(call.most() > 1024);
        REQUIRE(call.most() <= stack_bytes);
    });
}

TEST_CASE("every call on a cache makes do with little stack, in every format", "[stack]") {
    const kv1_test::temporary_folder folder;
    std::size_t caches = 0;
    kv1_test::for_each_target([&](kv1::target t) {
        small_calls call;
        for (const kv_format f : kv1::all_kv_formats)
            for (const kind k : all_kinds)
                if (const auto d = describe(f, k)) {
                    use_cache(call, *d,
                              std::string(to_string(t)) + ", " + std::string(to_string(f)) + ", kind " +
                                  std::to_string(static_cast<int>(k)),
                              folder.path() / "sequences");
                    ++caches;
                }
        CAPTURE(call.which());
        REQUIRE(call.most() > 1024);
        REQUIRE(call.most() <= stack_bytes);
    });
    REQUIRE(caches >= 60);
}

TEST_CASE("attention by ranges of tokens, and joined from parts, makes do with little stack", "[stack]") {
    constexpr std::size_t tokens = 4224, dim = 32;
    kv1_test::generator g(4);
    const std::vector<float> k = normal_values(g, tokens * dim), v = normal_values(g, tokens * dim),
                             q = normal_values(g, dim);
    std::vector<float> out(dim);
    kv1::layer_description l{1, dim, dim};
    l.key_encoding.means = normal_values(g, dim);
    kv1_test::for_each_target([&](kv1::target) {
        small_calls call;
        for (const bool dropped : {false, true}) {
            kv1::kv_cache cache(kv1::uniform_cache(1, l, tokens));
            const kv1::sequence_id id = cache.create_sequence();
            cache.append(id, 0, view(k, 1, dim), view(v, 1, dim));
            if (dropped)
                cache.drop_pages(id, 3, 1);
            call("attend", [&] {
                return static_cast<bool>(cache.try_attend(
                    id, 0, view(q, 1, dim), {out.data(), 1, 1, dim},
                    {.window = dropped ? tokens - 100 : 0})); // from amid what is left of it on
            });
        }
        REQUIRE(call.most() > 1024);
        REQUIRE(call.most() <= stack_bytes);
    });
}

TEST_CASE("calls on vectors make do with little stack", "[stack]") {
    constexpr std::size_t channels = 4096;
    kv1_test::generator g(5);
    const std::vector<float> x = normal_values(g, 2 * channels);
    std::vector<float> y(x.size()), lse(2);
    std::vector<kv1::float16> halves(x.size());
    kv1_test::for_each_target([&](kv1::target) {
        small_calls call;
        for (const kv_format f : kv1_test::coded_formats())
            kv1_test::with_type_of(f, [&]<class F>() {
                constexpr kv1::format_info format = kv1::info_of(kv1::kv_format_of<F>);
                if constexpr (format.fits_levels)
                    use_quantizers<F>(call, std::string(to_string(f)));
                else if constexpr (format.code_bits != 0)
                    use_quantizer<F>(call, std::string(to_string(f)));
                return true;
            });
        call("convert", [&] {
            return kv1::try_convert(std::span(x), std::span(halves)) &&
                   kv1::try_convert(std::span<const kv1::float16>(halves), std::span(y));
        });
        call("hadamard_transform", [&] {
            kv1::hadamard_transform(y, channels);
            return true;
        });
        call("merge_attention", [&] {
            const std::array parts{kv1::attention_part{x, lse}, kv1::attention_part{x, lse}};
            return static_cast<bool>(kv1::try_merge_attention(parts, channels, y));
        });
        for (const kv_format f : kv1::all_kv_formats)
            for (const auto levels : {kv1::level_choice::min_max, kv1::level_choice::least_squares})
                call("fake_quantize, " + std::string(to_string(f)), [&] {
                    const kv1::fake_quantize_options o{
                        .levels = levels,
                        .gradient = kv1::fake_quantize_options::gradient_rule::fixed_codes,
                        .hadamard = true};
                    return kv1::try_fake_quantize(f, channels, x, y, o) &&
                           kv1::try_fake_quantize_gradient(f, channels, x, x, y, o);
                });
        CAPTURE(call.which());
        REQUIRE(call.most() > 1024);
        REQUIRE(call.most() <= stack_bytes);
    });
}

TEST_CASE("values in keys are appended and attended with 64 KiB of stack", "[stack]") {
    constexpr std::size_t key = 576, value = 512, tokens = 40, heads = 16;
    kv1_test::generator g(7);
    const std::vector<float> k = normal_values(g, tokens * key), q = normal_values(g, heads * key);
    std::vector<float> out(heads * value);
    kv1_test::for_each_target([&](kv1::target) {
        small_calls call;
        for (const kv_format f : kv1::all_kv_formats) {
            kv1::kv_cache cache(kv1::uniform_cache(1, kv1::latent_layer(key, value, f), 64));
            const kv1::sequence_id id = cache.create_sequence();
            const std::string name(to_string(f));
            call("append, " + name, [&] {
                return static_cast<bool>(cache.try_append(id, 0, {k.data(), tokens, 1, key}));
            });
            for (const kv1::precision mode : {kv1::precision::fast, kv1::precision::exact})
                call("attend, " + name, [&] {
                    return static_cast<bool>(cache.try_attend(id, 0, {q.data(), 1, heads, key},
                                                              {out.data(), 1, heads, value}, {.mode = mode}));
                });
        }
        CAPTURE(call.which());
        REQUIRE(call.most() > 1024);
        REQUIRE(call.most() <= stack_bytes);
    });
}

TEST_CASE("the C interface makes do with little stack", "[stack]") {
    constexpr std::size_t dim = 64, tokens = 40;
    kv1_test::generator g(6);
    const std::vector<float> x = normal_values(g, tokens * dim);
    std::vector<float> out(tokens * dim);
    std::vector<unsigned char> memory(1 << 16);
    kv1_test::for_each_target([&](kv1::target) {
        small_calls call;
        for (const kv1_axis axis : {KV1_PER_TOKEN, KV1_PER_CHANNEL}) {
            kv1_layer layer;
            kv1_layer_init(&layer);
            layer.kv_heads = 1;
            layer.key_dim = layer.value_dim = dim;
            layer.key_format = KV1_CODEBOOK2;
            layer.value_format = KV1_AFFINE3;
            layer.key_axis = axis;
            kv1_cache_options options;
            kv1_cache_options_init(&options);
            options.layers = &layer;
            options.distinct_layers = options.layer_count = 1;
            options.capacity_tokens = 64;
            options.page_tokens = 16;
            kv1_cache* cache = nullptr;
            kv1_sequence id{};
            kv1_error error{};
            const kv1_tensor in = kv1_contiguous(x.data(), KV1_FP32, tokens, 1, dim);
            call("kv1_cache_create", [&] {
                return kv1_cache_create(&options, &cache, &error) == KV1_OK &&
                       kv1_sequence_create(cache, &id, &error) == KV1_OK;
            });
            call("kv1_append", [&] { return kv1_append(cache, id, 0, in, in, nullptr, &error) == KV1_OK; });
            call("kv1_attend", [&] {
                return kv1_attend(cache, id, 0, in,
                                  kv1_contiguous_output(out.data(), KV1_FP32, tokens, 1, dim), nullptr,
                                  nullptr, &error) == KV1_OK;
            });
            call("kv1_attend_batch", [&] {
                const std::size_t indptr[] = {0, tokens};
                return kv1_attend_batch(cache, &id, indptr, 1, 0, in,
                                        kv1_contiguous_output(out.data(), KV1_FP32, tokens, 1, dim), nullptr,
                                        nullptr, &error) == KV1_OK;
            });
            call("kv1_swap_out", [&] { // and back, under another handle
                return kv1_swap_out(cache, id, memory.data(), memory.size(), &error) == KV1_OK &&
                       kv1_swap_in(cache, memory.data(), memory.size(), &id, &error) == KV1_OK;
            });
            call("kv1_describe", [&] {
                char text[200];
                return kv1_attend(cache, {9, 9}, 0, in, {}, nullptr, nullptr, &error) != KV1_OK &&
                       kv1_describe(&error, text, sizeof text) > 0;
            });
            call("kv1_cache_destroy", [&] {
                kv1_cache_destroy(cache);
                return true;
            });
        }
        REQUIRE(call.most() > 1024);
        REQUIRE(call.most() <= stack_bytes);
    });
}

#endif
#endif
