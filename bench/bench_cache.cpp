// SPDX-License-Identifier: Apache-2.0
//
// What the cache costs besides its kernels, on one thread.
//
//   cache/step/<shape>/<whole|kernels>  one decode step: in every layer, each sequence appends a token and attends.
//                                       kernels: the jobs that the cache makes for this, prepared beforehand. The
//                                       difference of the two is the cache's own time.
//   cache/fork/<tokens>                 fork and destroy
//   cache/cycle                         create, append a token to every layer, commit, destroy
//   cache/save, cache/load              a sequence to memory and back

#include "support.hpp"

#include <kv1/cache_io.hpp>
#include <kv1/detail/append.hpp>

#include <array>
#include <memory>

namespace {

struct step_shape {
    const char* name;
    std::size_t sequences, tokens, layers;
    bench::attention_shape heads;
};

constexpr step_shape small{"64x512/kv1-8m", 64, 512, 8, {8, 2, 32}};
constexpr step_shape large{"64x2048/kv8/d128", 64, 2048, 1, {32, 8, 128}};

struct world {
    step_shape shape;
    kv1::kv2_cache cache;
    std::vector<kv1::sequence_id> ids;
    std::vector<std::size_t> indptr;
    std::vector<float> k, v, q, out;

    explicit world(const step_shape& s)
        : shape(s), cache(kv1::uniform_cache(s.layers, {s.heads.kv_heads, s.heads.head_dim, s.heads.head_dim},
                                             s.sequences * (s.tokens + 64))) {
        const std::size_t row = s.heads.kv_heads * s.heads.head_dim;
        const std::vector<float> x = bench::normal_values(s.tokens * row, 1);
        indptr.push_back(0);
        for (std::size_t i = 0; i < s.sequences; ++i) {
            ids.push_back(cache.create_sequence());
            indptr.push_back(i + 1);
            for (std::size_t layer = 0; layer < s.layers; ++layer)
                cache.append(ids[i], layer, {x.data(), s.tokens, s.heads.kv_heads, s.heads.head_dim},
                             {x.data(), s.tokens, s.heads.kv_heads, s.heads.head_dim});
            cache.commit(ids[i]);
        }
        k = bench::normal_values(s.sequences * row, 2);
        v = bench::normal_values(s.sequences * row, 3);
        q = bench::normal_values(s.sequences * s.heads.heads * s.heads.head_dim, 4);
        out.resize(q.size());
    }
    [[nodiscard]] kv1::tensor_view slice(const std::vector<float>& x, std::size_t heads) const {
        return {x.data(), shape.sequences, heads, shape.heads.head_dim};
    }
    [[nodiscard]] kv1::mutable_tensor_view outputs() {
        return {out.data(), shape.sequences, shape.heads.heads, shape.heads.head_dim};
    }
};

void whole_step(benchmark::State& state, const step_shape& shape) {
    world w(shape);
    for (auto _ : state) {
        for (std::size_t layer = 0; layer < shape.layers; ++layer) {
            w.cache.append(w.ids, layer, w.indptr, w.slice(w.k, shape.heads.kv_heads),
                           w.slice(w.v, shape.heads.kv_heads));
            w.cache.attend(w.ids, layer, w.indptr, w.slice(w.q, shape.heads.heads), w.outputs());
        }
        for (const kv1::sequence_id id : w.ids)
            w.cache.commit(id);
        benchmark::DoNotOptimize(w.out.data());
        for (const kv1::sequence_id id : w.ids) // every step has the same length
            w.cache.truncate(id, shape.tokens);
    }
    state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(shape.sequences));
}

// The kernels' share: runs jobs that were prepared beforehand.
void kernels_of_step(benchmark::State& state, const step_shape& shape) {
    world w(shape);
    for (std::size_t layer = 0; layer < shape.layers; ++layer)
        w.cache.append(w.ids, layer, w.indptr, w.slice(w.k, shape.heads.kv_heads),
                       w.slice(w.v, shape.heads.kv_heads));
    struct unit {
        kv1::detail::append_job append;
        kv1::detail::attention_job attend;
        std::size_t head;
    };
    std::vector<unit> units;
    const auto scratch = std::make_unique<kv1::detail::attention_scratch>();
    std::vector<std::vector<std::int32_t>> tables;
    std::vector<kv1::page_layout> layouts(shape.layers);
    const kv1::target t = kv1::current_target();
    const auto* kernels =
        kv1::detail::format_registry<kv1::kv2_cache::formats_type>::find(t, kv1::kv_format::affine2);
    const kv1::tensor_view k = w.slice(w.k, shape.heads.kv_heads), v = w.slice(w.v, shape.heads.kv_heads),
                           q = w.slice(w.q, shape.heads.heads);
    const kv1::mutable_tensor_view out = w.outputs();
    for (std::size_t layer = 0; layer < shape.layers; ++layer) {
        layouts[layer] = w.cache.layout(layer);
        const std::byte* arena = w.cache.page(layer, 0, 0).data(); // block 0 was handed out first
        const std::size_t block_bytes = shape.heads.kv_heads * layouts[layer].bytes();
        for (std::size_t i = 0; i < shape.sequences; ++i) {
            std::array<std::int32_t, 2> indptr{};
            std::array<std::int32_t, 1> last{};
            auto& table = tables.emplace_back(w.cache.count_blocks({&w.ids[i], 1}, layer));
            w.cache.export_block_tables({&w.ids[i], 1}, layer, {indptr, table, last});
            const auto* blocks = reinterpret_cast<const std::uint32_t*>(table.data());
            for (std::size_t h = 0; h < shape.heads.kv_heads; ++h) {
                unit u{{&kv1::detail::common_kernels(), &layouts[layer], arena, block_bytes, blocks,
                        shape.tokens, k.slice(i, 1), v.slice(i, 1)},
                       {},
                       h};
                kv1::detail::attention_job& a = u.attend;
                a.target = &kv1::detail::common_kernels();
                a.key_kernels = a.value_kernels = kernels;
                a.mode = kv1::precision::fast;
                a.scratch = scratch.get();
                a.layout = &layouts[layer];
                a.pages = arena + h * layouts[layer].bytes();
                a.block_stride = block_bytes;
                a.block_table = blocks;
                a.last_token = a.visible_base = shape.tokens + 1;
                a.visible_step = 1;
                a.head_group = a.rows = shape.heads.heads / shape.heads.kv_heads;
                a.queries = q.at(i, h * a.head_group);
                a.query_token_stride = q.token_stride();
                a.query_head_stride = q.head_stride();
                a.scale = 0.1f;
                a.outputs = out.at(i, h * a.head_group);
                a.output_token_stride = out.token_stride();
                a.output_head_stride = out.head_stride();
                units.push_back(u);
            }
        }
    }
    for (auto _ : state) {
        const std::size_t of_layer = shape.sequences * shape.heads.kv_heads;
        for (std::size_t first = 0; first < units.size(); first += of_layer) {
            for (std::size_t i = first; i < first + of_layer; ++i)
                static_cast<void>(kv1::detail::append_head(units[i].append, units[i].head));
            for (std::size_t i = first; i < first + of_layer; ++i)
                units[i].attend.target->attend_rows(units[i].attend);
        }
        benchmark::DoNotOptimize(w.out.data());
    }
    state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(shape.sequences));
}

void fork(benchmark::State& state, std::size_t tokens) {
    kv1::kv_cache cache(kv1::uniform_cache(32, {1, 32, 32}, tokens));
    const kv1::sequence_id id = bench::fill(cache, tokens);
    for (auto _ : state)
        cache.destroy_sequence(cache.fork(id));
}

void cycle(benchmark::State& state) {
    kv1::kv2_cache cache(kv1::uniform_cache(8, {2, 32, 32}, 1024));
    const std::vector<float> x = bench::normal_values(64, 1);
    for (auto _ : state) {
        const kv1::sequence_id id = cache.create_sequence();
        for (std::size_t layer = 0; layer < 8; ++layer)
            cache.append(id, layer, {x.data(), 1, 2, 32}, {x.data(), 1, 2, 32});
        cache.commit(id);
        cache.destroy_sequence(id);
    }
}

void save_or_load(benchmark::State& state, bool load) {
    kv1::kv_cache cache(kv1::uniform_cache(4, {8, 128, 128}, 2 * 4096));
    const kv1::sequence_id id = bench::fill(cache, 4096);
    std::vector<std::byte> memory(kv1::saved_bytes(cache, {&id, 1}));
    const auto save = [&] { kv1::save(cache, {&id, 1}, kv1::memory_sink(memory)); };
    save();
    for (auto _ : state) {
        if (load)
            cache.destroy_sequence(kv1::swap_in(cache, memory));
        else
            save();
    }
    state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(memory.size()));
}

} // namespace

int main(int argc, char** argv) {
    for (const step_shape& shape : {small, large}) {
        const std::string name = std::string("cache/step/") + shape.name;
        benchmark::RegisterBenchmark((name + "/whole").c_str(),
                                     [shape](benchmark::State& state) { whole_step(state, shape); });
        benchmark::RegisterBenchmark((name + "/kernels").c_str(),
                                     [shape](benchmark::State& state) { kernels_of_step(state, shape); });
    }
    for (const std::size_t tokens : {std::size_t{2048}, std::size_t{32768}})
        benchmark::RegisterBenchmark(("cache/fork/" + std::to_string(tokens)).c_str(),
                                     [tokens](benchmark::State& state) { fork(state, tokens); });
    benchmark::RegisterBenchmark("cache/cycle", cycle);
    benchmark::RegisterBenchmark("cache/save", [](benchmark::State& state) { save_or_load(state, false); });
    benchmark::RegisterBenchmark("cache/load", [](benchmark::State& state) { save_or_load(state, true); });
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv))
        return 1;
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
}
