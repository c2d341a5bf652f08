// SPDX-License-Identifier: Apache-2.0
//
// A layer's bytes under books of an engine's own, without sequences: they are what a cache makes of the same
// vectors.
#include "layers.hpp"
#include "random.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/detail/layer_store.hpp>
#include <kv1/kv_cache.hpp>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace {

using kv1::kv_side;
namespace detail = kv1::detail;

constexpr std::size_t page = 32, tokens = 75, kv_heads = 2, query_heads = 6;

// Memory that the engine owns.
class lent_memory final : public detail::memory_source {
public:
    explicit lent_memory(std::size_t bytes) : lines_(bytes / kv1::line_bytes) {}
    std::byte* allocate(std::size_t bytes) noexcept override {
        return bytes <= lines_.size() * kv1::line_bytes ? reinterpret_cast<std::byte*>(lines_.data())
                                                        : nullptr;
    }
    void deallocate(std::byte*, std::size_t) noexcept override {}

private:
    std::vector<detail::memory_line> lines_;
};

// Eight blocks of one layer.
struct engine_layer {
    static constexpr std::size_t blocks = 8;

    explicit engine_layer(const kv1::layer_description& l)
        : shape(l), memory(blocks * l.kv_heads * kv1::layout_of(l, page).bytes()),
          body{kv1::layout_of(l, page), 0, l.kv_heads, 0, l.kv_heads * kv1::layout_of(l, page).bytes(),
               detail::arena(memory)} {
        REQUIRE(encodings.make(page, kernels));
        REQUIRE(body.allocate(body.arena, blocks, false));
        for (std::uint32_t b = 0; b < blocks; ++b)
            body.clear(b);
    }
    [[nodiscard]] detail::layer_store store() const {
        return {encodings, kernels, body, nullptr, nullptr, scratches};
    }

    kv1::layer_description shape;
    lent_memory memory;
    detail::kernel_set kernels = detail::kernel_set::of<kv1::all_formats>();
    detail::layer_encodings encodings{shape};
    mutable detail::scratch_pool scratches;
    detail::plane body;
};

struct vectors {
    std::vector<float> keys, values;
    std::size_t key_dim, value_dim;

    vectors(kv1_test::generator& g, const kv1::layer_description& l)
        : keys(kv1_test::normal_values(g, tokens * kv_heads * l.key_dim)),
          values(kv1_test::normal_values(g, tokens * kv_heads * l.value_dim)), key_dim(l.key_dim),
          value_dim(l.value_dim) {}
    [[nodiscard]] kv1::tensor_view key_view(std::size_t first, std::size_t n) const {
        return {keys.data() + first * kv_heads * key_dim, n, kv_heads, key_dim};
    }
    [[nodiscard]] kv1::tensor_view value_view(std::size_t first, std::size_t n) const {
        return {values.data() + first * kv_heads * value_dim, n, kv_heads, value_dim};
    }
};

std::vector<kv1::layer_description> layers() {
    std::vector<kv1::layer_description> all = kv1_test::layers_of_each_kind(kv_heads);
    kv1::layer_description turning =
        all[3]; // encoded; half of the channels, and both sides in a basis: another order
    turning.rotary = {kv1::rotary_frequencies(10000.0, 32), kv1::rotary_pairs::interleaved, 16};
    for (kv1::vector_encoding* e : {&turning.key_encoding, &turning.value_encoding}) {
        e->basis.assign(kv_heads * 64 * 64, 0.0f);
        for (std::size_t i = 0; i < kv_heads * 64; ++i)
            e->basis[i * 64 + (i * 11 + 3) % 64] = 1.0f;
    }
    all.push_back(turning);
    return all;
}

// Writes all tokens in an order of no meaning, some of them over others' vectors.
void write_shuffled(kv1_test::generator& g, const detail::layer_store& store, const std::uint32_t* table,
                    const vectors& x) {
    kv1::inline_executor alone;
    std::vector<std::uint32_t> order(tokens);
    std::iota(order.begin(), order.end(), 0u);
    for (std::size_t pass = 0; pass < 2; ++pass) {
        for (std::size_t i = tokens; i > 1; --i)
            std::swap(order[i - 1], order[g.below(i)]);
        for (std::size_t i = 0; i < tokens;) {
            const std::size_t n = std::min(tokens - i, g.between(1, 20));
            vectors some = x;
            for (std::size_t k = 0; k < n; ++k) {
                // in the first pass another token's
                const std::size_t from = pass == 0 ? g.below(tokens) : order[i + k];
                std::memcpy(some.keys.data() + k * kv_heads * x.key_dim,
                            x.keys.data() + from * kv_heads * x.key_dim, kv_heads * x.key_dim * 4);
                std::memcpy(some.values.data() + k * kv_heads * x.value_dim,
                            x.values.data() + from * kv_heads * x.value_dim, kv_heads * x.value_dim * 4);
            }
            REQUIRE(store.write({{table, 0, order.data() + i}}, some.key_view(0, n), some.value_view(0, n),
                                alone));
            i += n;
        }
    }
}

} // namespace

TEST_CASE("slots that are written to in any order, and over others, hold what a cache holds", "[slots]") {
    kv1_test::generator g(1801);
    const std::uint32_t table[] = {6, 1, 4};
    for (const kv1::layer_description& l : layers()) {
        CAPTURE(std::string(kv1::to_string(l.key_format)), std::string(kv1::to_string(l.value_format)));
        const vectors x(g, l);
        const engine_layer mine(l);
        const detail::layer_store store = mine.store();
        write_shuffled(g, store, table, x);

        kv1::cache_description d;
        d.layers = {l};
        d.capacity_tokens = 4 * page;
        d.page_tokens = page;
        kv1::kv_cache cache(d);
        const kv1::sequence_id id = cache.create_sequence();
        cache.append(id, 0, x.key_view(0, tokens), x.value_view(0, tokens));
        std::int32_t indptr[2], indices[3], last[1];
        REQUIRE(cache.export_block_tables({&id, 1}, 0, {indptr, indices, last}) == 3);
        for (std::size_t p = 0; p < 3; ++p)
            for (std::size_t head = 0; head < kv_heads; ++head) {
                const auto theirs = cache.page(0, head, static_cast<std::uint32_t>(indices[p]));
                REQUIRE(std::memcmp(store.body().page(table[p], head), theirs.data(), theirs.size()) == 0);
            }

        std::vector<float> row(l.key_dim), expected(l.key_dim);
        store.read(kv_side::key, {table[2], 5}, 1, 2 * page + 5, row);
        cache.read(id, 0, kv_side::key, 1, 2 * page + 5, 1, expected);
        REQUIRE(row == expected);
    }
}

TEST_CASE("attention over a block table is a cache's attention, bit for bit", "[slots]") {
    kv1_test::generator g(1802);
    const std::uint32_t table[] = {3, 7, 0};
    constexpr std::size_t queries = 9;
    kv1::inline_executor alone;
    for (const kv1::layer_description& l : layers()) {
        CAPTURE(std::string(kv1::to_string(l.key_format)), std::string(kv1::to_string(l.value_format)));
        const vectors x(g, l);
        const engine_layer mine(l);
        const detail::layer_store store = mine.store();
        REQUIRE(store.write({{table}}, x.key_view(0, tokens), x.value_view(0, tokens), alone));
        kv1::cache_description d;
        d.layers = {l};
        d.capacity_tokens = 4 * page;
        d.page_tokens = page;
        kv1::kv_cache cache(d);
        const kv1::sequence_id id = cache.create_sequence();
        cache.append(id, 0, x.key_view(0, tokens), x.value_view(0, tokens));

        const std::vector<float> q = kv1_test::normal_values(g, queries * query_heads * l.key_dim);
        const kv1::tensor_view query(q.data(), queries, query_heads, l.key_dim);
        for (const bool causal : {false, true}) {
            kv1::attention_options options;
            options.mask = causal ? kv1::attention_mask::causal() : kv1::attention_mask::none();
            options.soft_cap = 20.0f;
            std::vector<float> out(queries * query_heads * l.value_dim), expected(out.size());
            std::vector<float> lse(queries * query_heads), expected_lse(lse.size());
            options.log_sum_exp = expected_lse;
            cache.attend(id, 0, query, {expected.data(), queries, query_heads, l.value_dim}, options);

            options.log_sum_exp = lse;
            detail::attention_job job = store.job(store.body(), table, query_heads, options);
            job.last_token = tokens;
            job.visible_base = causal ? tokens - queries + 1 : tokens;
            job.visible_step = causal ? 1 : 0;
            job.first_position = static_cast<std::ptrdiff_t>(tokens - queries);
            REQUIRE(
                store.attend(job, query, {out.data(), queries, query_heads, l.value_dim}, options, alone));
            REQUIRE(out == expected);
            REQUIRE(lse == expected_lse);
        }
    }
}

TEST_CASE("slots are moved as they are stored, blocks copied and cleared", "[slots]") {
    kv1_test::generator g(1803);
    const std::uint32_t table[] = {0, 1, 2};
    kv1::inline_executor alone;
    for (const kv1::layer_description& l : layers()) {
        CAPTURE(std::string(kv1::to_string(l.key_format)), std::string(kv1::to_string(l.value_format)));
        const vectors x(g, l);
        engine_layer mine(l);
        const detail::layer_store store = mine.store();
        REQUIRE(store.write({{table}}, x.key_view(0, tokens), x.value_view(0, tokens), alone));
        const kv1::section_layout& s = store.section(kv_side::value);
        std::vector<std::byte> packed(kv1::packed_bytes(l.value_format, l.value_dim));
        const auto metadata = s.traits().metadata;
        std::vector<kv1::float16> scales(metadata != detail::metadata_kind::none ? s.groups() : 0);
        std::vector<kv1::float16> minima(metadata == detail::metadata_kind::scale_and_minimum ? s.groups()
                                                                                              : 0);
        REQUIRE(detail::fits(s, 1, packed.size(), scales.size(), minima.size()));
        store.read_row(kv_side::value, {1, 20}, 0, {packed, scales, minima}, 0);
        store.write_row(kv_side::value, {5, 3}, 1, {packed, scales, minima}, 0);
        std::vector<float> from(l.value_dim), to(l.value_dim);
        store.read(kv_side::value, {1, 20}, 0, 20, from);
        store.read(kv_side::value, {5, 3}, 1, 3, to);
        REQUIRE(from == to);

        mine.body.copy(1, 6);
        REQUIRE(std::memcmp(mine.body.block(6), mine.body.block(1), mine.body.block_bytes) == 0);
        mine.body.clear(6);
        REQUIRE(std::memcmp(mine.body.block(6), mine.body.block(7), mine.body.block_bytes) == 0);
    }
}

TEST_CASE("a layer that no cache can have is refused without one", "[slots]") {
    const detail::kernel_set kernels = detail::kernel_set::of<kv1::all_formats>();
    kv1::layer_description l{kv_heads, 64, 64};
    REQUIRE(detail::layer_encodings{l}.make(page, kernels));
    REQUIRE(detail::layer_encodings{l}.make(page, kernels.only(0)).code() == kv1::errc::unsupported_format);
    l.key_encoding.means.assign(3, 0.0f);
    REQUIRE(detail::layer_encodings{l}.make(page, kernels).code() == kv1::errc::shape_mismatch);
    l = {kv_heads, 0, 64};
    REQUIRE(detail::layer_encodings{l}.make(page, kernels).code() == kv1::errc::invalid_argument);
}
