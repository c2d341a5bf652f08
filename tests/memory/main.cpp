// SPDX-License-Identifier: Apache-2.0
//
// The whole life of a cache through the try_ forms, with each allocation of each call failing in turn: every
// failure is a status, and none changes the cache. Compiled twice, with exceptions and without. operator new
// throws where it is not asked to do otherwise, which ends a program without exceptions.
#include "failing_new.hpp"

#include <kv1/cache_file.hpp>
#include <kv1/calibration_file.hpp>
#include <kv1/kv1.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <numeric>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

static_assert(noexcept(kv1::try_tree_mask({})));

namespace {

int failures = 0;
std::size_t failed_allocations = 0;

void expect(bool holds, const char* what) {
    if (!holds) {
        std::fprintf(stderr, "%s\n", what);
        ++failures;
    }
}

// call(argument) at its first, second, ... failing allocation gives out_of_memory, and then ok. Arguments are
// made where nothing fails.
template <class Prepare, class Call>
void fails_cleanly(const char* what, Prepare&& prepare, Call&& call) {
    for (std::size_t n = 0; n < 1000; ++n) {
        auto argument = prepare();
        kv1::errc code{};
        bool failed = false;
        {
            const kv1_test::failing_new guard(n);
            code = call(argument);
            failed = guard.failed();
        }
        expect(code == (failed ? kv1::errc::out_of_memory : kv1::errc::ok), what);
        if (!failed)
            return;
        ++failed_allocations;
    }
    expect(false, what);
}

// The same of a call that changes a cache, which stays valid, and lengths and pages what they were.
template <class Call>
void leaves_unchanged(const char* what, const kv1::kv_cache& cache, Call&& call) {
    std::size_t pages = cache.available_pages(), sequences = cache.statistics().sequences;
    bool fine = true;
    const auto unchanged = [&] {
        fine = fine && cache.try_validate() && cache.available_pages() == pages &&
               cache.statistics().sequences == sequences;
        return 0;
    };
    fails_cleanly(what, unchanged, [&](int) { return call(); });
    expect(fine, what);
}

// Two layers of every kind: keys per channel and fp16 copies; fitted, rotated, centred and weighted; a
// window.
kv1::cache_description everything() {
    kv1::cache_description d = kv1::uniform_cache(3, {1, 16, 16}, 256, 16);
    d.fp16_sinks = 4;
    d.fp16_window = 8;
    d.prefix_events = 4;
    d.layers[1].key_format = kv1::kv_format::compact3;
    d.layers[1].key_encoding = {.levels = kv1::level_choice::least_squares, .hadamard = 16};
    d.layers[1].key_encoding.means.assign(16, 0.25f);
    d.layers[1].key_encoding.error_weights.assign(16 * 16, 0.0f);
    for (std::size_t c = 0; c < 16; ++c)
        d.layers[1].key_encoding.error_weights[c * 17] = 1.0f + static_cast<float>(c);
    d.layers[1].value_encoding = d.layers[1].key_encoding;
    d.layers[1].value_format = kv1::kv_format::affine4;
    d.layers[2].sliding_window = 20;
    d.layers[2].key_axis = kv1::quantization_axis::per_channel;
    return d;
}

void create_and_grow() {
    fails_cleanly("create from a description that is moved", everything,
                  [](kv1::cache_description& d) { return kv1::kv_cache::create(std::move(d)).code(); });
#if KV1_EXCEPTIONS
    fails_cleanly("create from a description that is copied", everything,
                  [](const kv1::cache_description& d) { return kv1::kv_cache::create(d).code(); });
#else
    const kv1::cache_description d = everything();
    kv1::errc code{};
    {
        const kv1_test::failing_new guard(0);
        code = kv1::kv_cache::create(d).code();
    }
    expect(code == kv1::errc::out_of_memory, "memory for a copy is sought");
#endif
    auto cache = kv1::kv_cache::create(everything());
    expect(static_cast<bool>(cache), "create");
    if (cache)
        leaves_unchanged("grow", *cache, [&] {
            const kv1::errc outcome = cache->try_grow(1024).code();
            const std::size_t capacity = cache->description().capacity_tokens;
            expect(capacity == (outcome == kv1::errc::ok ? 1024u : 256u), "the capacity after growing");
            return outcome;
        });
    fails_cleanly(
        "make a pool", [] { return 7u; },
        [](unsigned n) { return kv1::detail::page_pool::create(n).code(); });
    fails_cleanly(
        "tree mask",
        [] {
            return std::array{-1, 0, 1};
        },
        [](const std::array<int, 3>& parents) { return kv1::try_tree_mask(parents).code(); });
}

void policies() {
    static constexpr std::string_view text = "c3+ls+basis+had+mean+ew,c2+ls+had/7:c2/0:4@4:8";
    const std::vector<float> means(16, 0.25f), weights(16 * 16, 1.0f);
    const std::vector<kv1::layer_calibration> parts(8, {means, means, weights, weights, weights, weights});
    const auto policy = kv1::try_parse_policy(text);
    expect(static_cast<bool>(policy), "parse a policy");
    if (!policy)
        return;
    const auto parse = [](std::string_view t) { return kv1::try_parse_policy(t).code(); };
    const auto describe = [&](kv1::cache_description& shape) {
        return kv1::try_describe_cache(*policy, std::move(shape), parts).code();
    };
    const auto shape = [] { return kv1::uniform_cache(8, {1, 16, 16}, 64); };
#if KV1_EXCEPTIONS
    fails_cleanly(
        "parse a policy", [] { return text; }, parse);
    fails_cleanly("the cache of a policy", shape, describe);
#else
    kv1::cache_description d = shape();
    kv1::errc parsed{}, described{};
    {
        const kv1_test::failing_new guard(0);
        parsed = parse(text);
        described = describe(d);
    }
    expect(parsed == kv1::errc::out_of_memory, "memory for a policy's layers is sought");
    expect(described == kv1::errc::out_of_memory, "memory for calibrated parts is sought");
#endif
    const kv1_test::failing_new guard(0); // without layers of its own a policy takes none
    expect(parse("balanced@64:256") == kv1::errc::ok && parse("2,x") == kv1::errc::invalid_argument,
           "a policy without layers");
}

void calibrations() {
    const auto policy = kv1::try_parse_policy("c3+ls+basis+had+mean+ew,c2+ls+basis+had+ew@4:8");
    kv1::cache_description shape = kv1::uniform_cache(2, {2, 8, 4}, 64);
#if KV1_EXCEPTIONS
    shape.layers[1].rotary = {kv1::rotary_frequencies(100.0, 8)};
#endif
    const std::vector<float> w(6 * 4 * 4, 0.5f), x(40 * 4 * 8, 0.25f);
    const auto begun = [&] {
        auto c = kv1::calibrator::create(*policy, shape);
        for (std::size_t layer = 0; c && layer < 2; ++layer)
            expect(static_cast<bool>(c->try_set_output_projection(layer, {w.data(), 6, 4, 4})), "projection");
        return c;
    };
    const auto add = [&](kv1::calibrator& c, std::size_t layer) {
        return c.try_add(layer, {x.data(), 40, 4, 8}, {x.data(), 40, 2, 8}, {x.data(), 40, 2, 4}).code();
    };
    fails_cleanly(
        "a calibrator", [] { return 0; },
        [&](int) { return kv1::calibrator::create(*policy, shape).code(); });
    fails_cleanly("an output projection", begun, [&](kv1::result<kv1::calibrator>& c) {
        return c->try_set_output_projection(0, {w.data(), 6, 4, 4}).code();
    });
    fails_cleanly("tokens of a calibration", begun,
                  [&](kv1::result<kv1::calibrator>& c) { return add(*c, 0); });
    auto c = begun();
    if (!c)
        return;
    expect(add(*c, 0) == kv1::errc::ok && add(*c, 1) == kv1::errc::ok, "tokens of a calibration");
    fails_cleanly(
        "parts of a calibration", [] { return 0; }, [&](int) { return c->try_finish().code(); });
    const auto found = c->try_finish();
    expect(static_cast<bool>(found), "parts of a calibration");
    if (!found)
        return;
    std::vector<std::byte> memory(1 << 14);
    const auto save = [&] { return kv1::try_save_calibration(*found, kv1::memory_sink(memory)).code(); };
    const auto describe = [&](kv1::cache_description& d) {
        return kv1::try_describe_cache(*found, std::move(d)).code();
    };
#if KV1_EXCEPTIONS
    fails_cleanly(
        "save a calibration", [] { return 0; }, [&](int) { return save(); });
    fails_cleanly(
        "the cache of a calibration", [&] { return shape; }, describe);
#else
    kv1::cache_description d = shape;
    kv1::errc saved{}, described{};
    {
        const kv1_test::failing_new guard(0);
        saved = save();
        described = describe(d);
    }
    expect(saved == kv1::errc::out_of_memory, "memory for a policy's text is sought");
    expect(described == kv1::errc::out_of_memory, "memory for calibrated parts is sought");
    expect(save() == kv1::errc::ok, "save a calibration");
#endif
    fails_cleanly(
        "load a calibration", [] { return 0; },
        [&](int) { return kv1::try_load_calibration(kv1::memory_source(memory)).code(); });
}

void steps_of_layers_of_every_kind() {
    auto made = kv1::kv_cache::create(everything());
    expect(static_cast<bool>(made), "create");
    if (!made)
        return;
    kv1::kv_cache& cache = *made;
    const std::vector<float> x(40 * 16, 0.5f);
    std::array<float, 16> out{};
    const kv1::sequence_id id = *cache.try_create_sequence();
    for (int step = 0; step < 2; ++step) {
        for (std::size_t layer = 0; layer < 3; ++layer) {
            leaves_unchanged("append", cache, [&] {
                return cache.try_append(id, layer, {x.data(), 40, 1, 16}, {x.data(), 40, 1, 16}).code();
            });
            expect(
                static_cast<bool>(cache.try_attend(id, layer, {x.data(), 1, 1, 16}, {out.data(), 1, 1, 16})),
                "attend");
        }
        const kv1_test::failing_new guard(1000);
        expect(static_cast<bool>(cache.try_commit(id)), "commit");
    }
    const std::size_t before = cache.available_pages();
    kv1::sequence_id twin;
    leaves_unchanged("fork", cache, [&] {
        const auto r = cache.try_fork(id);
        if (r)
            twin = *r;
        return r.code();
    });
    leaves_unchanged("append to a shared page", cache, [&] {
        return cache.try_append(twin, 0, {x.data(), 1, 1, 16}, {x.data(), 1, 1, 16}).code();
    });
    expect(static_cast<bool>(cache.try_destroy_sequence(twin)), "destroy");
    expect(cache.available_pages() == before, "all pages come back");
}

void long_attention() {
    auto made = kv1::kv2_cache::create(kv1::uniform_cache(1, {1, 16, 16}, 32768));
    expect(static_cast<bool>(made), "create");
    if (!made)
        return;
    kv1::kv2_cache& cache = *made;
    const kv1::sequence_id id = *cache.try_create_sequence();
    const std::vector<float> x(20000 * 16, 0.5f);
    std::array<float, 16> out{};
    expect(static_cast<bool>(cache.try_append(id, 0, {x.data(), 20000, 1, 16}, {x.data(), 20000, 1, 16})),
           "append");
    fails_cleanly(
        "attend to many tokens", [] { return 0; },
        [&](int) {
            return cache.try_attend(id, 0, {x.data(), 1, 1, 16}, {out.data(), 1, 1, 16}).code();
        });
}

void life_of_a_cache() {
    kv1::cache_description d = kv1::uniform_cache(2, {1, 16, 16}, 256, 16);
    auto made = kv1::kv_cache::create(d);
    expect(static_cast<bool>(made), "create");
    if (!made)
        return;
    kv1::kv_cache& cache = *made;
    const std::vector<float> x(80 * 16, 0.5f);
    std::array<float, 16> out{};
    kv1::sequence_id id, twin;
    leaves_unchanged("create a sequence", cache, [&] {
        const auto r = cache.try_create_sequence();
        if (r)
            id = *r;
        return r.code();
    });
    for (const std::size_t layer : {0u, 1u})
        leaves_unchanged("append", cache, [&] {
            return cache.try_append(id, layer, {x.data(), 40, 1, 16}, {x.data(), 40, 1, 16}).code();
        });
    leaves_unchanged("fork", cache, [&] {
        const auto r = cache.try_fork(id);
        if (r)
            twin = *r;
        return r.code();
    });
    expect(static_cast<bool>(cache.try_attend(twin, 1, {x.data(), 1, 1, 16}, {out.data(), 1, 1, 16})),
           "attend");
    std::vector<std::int32_t> tokens(40);
    std::iota(tokens.begin(), tokens.end(), 0);
    leaves_unchanged("store", cache, [&] { return cache.try_store_prefix(id, tokens).code(); });
    leaves_unchanged("drop", cache, [&] { return cache.try_drop_pages(twin, 0, 1).code(); });
    expect(cache.try_truncate(twin, 41).code() == kv1::errc::out_of_range, "truncate too far");
    expect(static_cast<bool>(cache.try_truncate(twin, 33)), "truncate");
    leaves_unchanged("create from a prefix", cache, [&] {
        const auto r = cache.try_create_from_prefix(tokens);
        return r ? cache.try_destroy_sequence(r->sequence).code() : r.code();
    });
    const std::array<std::size_t, 2> indptr{0, 1};
    leaves_unchanged("append a batch", cache, [&] {
        return cache.try_append({&id, 1}, 0, indptr, {x.data(), 1, 1, 16}, {x.data(), 1, 1, 16}).code();
    });
    expect(static_cast<bool>(cache.try_truncate(id, 40)), "truncate");
    const auto path = std::filesystem::temp_directory_path() /
                      (KV1_EXCEPTIONS ? "kv1_memory_exceptions.kv1" : "kv1_memory_no_exceptions.kv1");
    const kv1::save_options with_prefixes{.model = {}, .prefixes = true};
    leaves_unchanged("save to a file", cache, [&] {
        return kv1::try_save_file(cache, {&id, 1}, path, with_prefixes).code();
    });
    leaves_unchanged("save over a file", cache, [&] {
        return kv1::try_save_file(cache, {&id, 1}, path, with_prefixes).code();
    });
    kv1::sequence_id loaded;
    leaves_unchanged("load from a file", cache, [&] {
        const auto r = kv1::try_load_file(cache, path, {&loaded, 1});
        return r ? cache.try_destroy_sequence(loaded).code() : r.code();
    });
    std::filesystem::remove(path);
    std::vector<std::byte> memory(1 << 16);
    leaves_unchanged("swap out", cache, [&] { return kv1::try_swap_out(cache, twin, memory).code(); });
    expect(cache.try_length(twin).code() == kv1::errc::invalid_sequence, "a stale handle");
    leaves_unchanged("swap in", cache, [&] { return kv1::try_swap_in(cache, memory).code(); });
    memory[70] ^= std::byte{1};
    expect(kv1::try_swap_in(cache, memory).code() == kv1::errc::checksum_mismatch, "a flipped bit");
    expect(cache.try_append(id, 0, {x.data(), 80, 1, 16}, {x.data(), 80, 1, 16}).code() == kv1::errc::ok,
           "append");
    for (int i = 0; i < 3; ++i)
        expect(cache.try_append(id, 0, {x.data(), 80, 1, 16}, {x.data(), 80, 1, 16}).code() ==
                   (i == 0 ? kv1::errc::ok : kv1::errc::capacity_exceeded),
               "a full pool");
}

} // namespace

// A slot store, with codes that fit no vector by themselves (so that pages are kept), copies, a list, masks, and means that
// turn where slots have positions in no order.
void life_of_a_slot_store() {
    const auto description = [] {
        kv1::slot_store_description d;
        kv1::layer_description turning{1, 16, 16, kv1::kv_format::compact2};
        turning.key_encoding.levels = kv1::level_choice::least_squares;
        turning.key_encoding.means.assign(16, 0.5f);
        turning.rotary.frequencies = {1.0f, 0.5f};
        d.layers = {everything().layers[1], turning};
        d.slots = 64;
        d.page_tokens = 16;
        d.fp16_slots = 48;
        d.fp16_sinks = 1;
        d.fp16_window = 2;
        return d;
    };
    fails_cleanly("create a slot store", description, [](kv1::slot_store_description& d) {
        return kv1::slot_store::create(std::move(d)).code();
    });
    auto made = kv1::slot_store::create(description());
    expect(static_cast<bool>(made), "create a slot store");
    if (!made)
        return;
    kv1::slot_store& store = *made;
    std::vector<float> k(20 * 16), out(16), q(16, 1.0f);
    for (std::size_t i = 0; i < k.size(); ++i)
        k[i] = static_cast<float>(i * 7 % 13) * (i == 5 ? 1500.0f : 1.0f);
    std::vector<std::uint32_t> slots(20);
    for (std::size_t i = 0; i < slots.size(); ++i)
        slots[i] = static_cast<std::uint32_t>(63 - 3 * i);
    const kv1::tensor_view x(k.data(), 20, 1, 16);
    const std::size_t raw = store.raw_bytes(0);
    std::vector<std::byte> bytes(20 * raw), before(bytes);
    const auto unchanged = [&] {
        static_cast<void>(store.try_export_raw(0, slots, bytes));
        expect(bytes == before && store.fp16_slots_in_use(0) == 0, "a write that fails changes nothing");
        return 0;
    };
    static_cast<void>(store.try_export_raw(0, slots, before));
    fails_cleanly("write slots", unchanged, [&](int) { return store.try_write(0, slots, x, x).code(); });
    static_cast<void>(store.try_export_raw(0, slots, before));
    store.flush();
    expect(store.try_write(0, std::span(slots).first(3), x.slice(0, 3), x.slice(0, 3)).code() ==
               kv1::errc::ok,
           "write some slots");
    const std::vector<float> mask(64);
    const std::vector<std::uint8_t> visible(20, 1);
    const kv1::slot_stream streams[] = {
        {1, kv1::slot_view::list(slots), kv1::slot_mask::causal()},
        {1, kv1::slot_view::list(slots), kv1::slot_mask::bytes(visible, 20)},
        {1, kv1::slot_view::list(slots), kv1::slot_mask::additive(mask.data(), 20)},
        {1, kv1::slot_view::range(0, 64), kv1::slot_mask::additive(mask.data(), 64)}};
    for (const kv1::slot_stream& stream : streams) {
        fails_cleanly(
            "attend to slots", [] { return 0; },
            [&](int) {
                return store.try_attend(0, {&stream, 1}, {q.data(), 1, 1, 16}, {out.data(), 1, 1, 16}).code();
            });
        fails_cleanly(
            "plan to attend to slots", [] { return 0; },
            [&](int) {
                return store.try_plan_attention(0, {&stream, 1}, {q.data(), 1, 1, 16}, {out.data(), 1, 1, 16})
                    .code();
            });
    }
    std::vector<std::int32_t> positions(20);
    for (std::size_t i = 0; i < positions.size(); ++i)
        positions[i] = static_cast<std::int32_t>(i * 7 % 20);
    expect(store.try_write(1, slots, positions, x, x).code() == kv1::errc::ok,
           "write slots of turning means");
    static_cast<void>(store.try_release_fp16(slots));
    fails_cleanly(
        "attend where means turn", [] { return 0; },
        [&](int) {
            return store.try_attend(1, {streams, 1}, {q.data(), 1, 1, 16}, {out.data(), 1, 1, 16}).code();
        });
    const kv1::slot_sequence sequence{kv1::slot_view::list(slots)};
    fails_cleanly(
        "settle", [&] { return store.fp16_slots_in_use(0); },
        [&](std::size_t copies) {
            const kv1::errc code = store.try_settle({&sequence, 1}).code();
            expect(code == kv1::errc::ok || store.fp16_slots_in_use(0) == copies,
                   "settle() does all or nothing");
            return code;
        });
    const std::vector<std::uint32_t> others{1, 0, 5};
    fails_cleanly(
        "copy slots", [] { return 0; },
        [&](int) { return store.try_copy(0, std::span(slots).first(3), others).code(); });
    fails_cleanly(
        "import slots in no order", [] { return 0; },
        [&](int) { return store.try_import_raw(0, slots, before).code(); });
}

int main() {
    create_and_grow();
    policies();
    calibrations();
    steps_of_layers_of_every_kind();
    long_attention();
    life_of_a_cache();
    life_of_a_slot_store();
    expect(failed_allocations > 100, "allocations are seen to fail");
    std::printf("%zu failed allocations, %d failures\n", failed_allocations, failures);
    return failures == 0 ? 0 : 1;
}
