// SPDX-License-Identifier: Apache-2.0
//
// What fails on one rank fails on all, with one error, and none keeps what another did not get.
#include "side_by_side.hpp"

#include "row_reduction.hpp"

#include <catch2/catch_test_macros.hpp>

#include <chrono>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <thread>
#include <utility>
#include <vector>

using context_parallel::distributed_cache;
using context_parallel::rank_error;
using kv1::errc;
using kv1::kv_format;

namespace {

constexpr std::size_t dim = 16, page = 16;
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

kv1::cache_description two_layers(std::size_t capacity = 512) {
    return kv1::uniform_cache(2, {1, dim, dim, kv_format::affine2, kv_format::affine2}, capacity, page);
}

// Tokens alike on all ranks, but for a NaN where asked for.
std::vector<float> tokens(std::size_t n, std::size_t nan_at = static_cast<std::size_t>(-1)) {
    kv1_test::generator g(n);
    std::vector<float> x = kv1_test::normal_values(g, n * dim);
    if (nan_at < n)
        x[nan_at * dim + 3] = not_a_number;
    return x;
}
void append(distributed_cache& cache, context_parallel::sequence s, std::size_t layer,
            const std::vector<float>& x) {
    cache.append(s, layer, {x.data(), x.size() / dim, 1, dim}, {x.data(), x.size() / dim, 1, dim});
}
std::vector<float> attend(distributed_cache& cache, context_parallel::sequence s, std::size_t layer) {
    const std::vector<float> q = tokens(1);
    std::vector<float> out(dim);
    cache.attend(s, layer, {q.data(), 1, 1, dim}, {out.data(), 1, 1, dim});
    return out;
}

struct failure {
    int rank = -2;
    errc code = errc::ok;
    std::string message;
};
// The error of a call; the same on every rank.
failure failing(const std::function<void()>& call) {
    failure f;
    try {
        call();
    } catch (const rank_error& e) {
        f = {e.rank(), e.code(), e.what()};
    }
    struct {
        int rank, code;
        std::size_t text;
    } mine{f.rank, static_cast<int>(f.code), std::hash<std::string>()(f.message)}, of_root = mine;
    MPI_Bcast(&of_root, sizeof of_root, MPI_BYTE, 0, MPI_COMM_WORLD);
    REQUIRE(of_root.rank == mine.rank);
    REQUIRE(of_root.code == mine.code);
    REQUIRE(of_root.text == mine.text);
    return f;
}
bool same_on_all(const std::vector<float>& x) {
    std::vector<float> of_root = x;
    MPI_Bcast(of_root.data(), static_cast<int>(x.size()), MPI_FLOAT, 0, MPI_COMM_WORLD);
    return kv1_test::same_bits(x, of_root);
}
int last_rank() { return kv1_test::ranks_of_world() - 1; }
bool is_last() { return kv1_test::rank_of_world() == last_rank(); }

} // namespace

TEST_CASE("caches that are described differently are refused on all ranks", "[failure]") {
    const auto differing = [&](const std::function<void(kv1::cache_description&)>& change) {
        kv1::cache_description d = two_layers();
        if (is_last())
            change(d);
        return failing([&] { distributed_cache cache(MPI_COMM_WORLD, d); });
    };
    const errc expected = last_rank() == 0 ? errc::ok : errc::invalid_argument;
    REQUIRE(differing([](auto& d) { d.layers[1].value_format = kv_format::affine4; }).code == expected);
    REQUIRE(differing([](auto& d) { d.fp16_window = 8; }).code == expected);
    REQUIRE(differing([](auto& d) { d.layers[0].key_encoding.means.assign(dim, 0.5f); }).code == expected);
    REQUIRE(differing([](auto& d) { d.layers[0].rotary.frequencies.assign(dim / 2, 0.1f); }).code ==
            expected);
    REQUIRE(differing([](auto& d) { d.first_position = 1; }).code == expected);
    const failure impossible = differing([](auto& d) { d.page_tokens = 7; });
    REQUIRE(impossible.code == errc::invalid_argument);
    REQUIRE(impossible.rank == last_rank());
}

TEST_CASE("calls that differ are an error on all ranks, and change nothing", "[failure]") {
    distributed_cache cache(MPI_COMM_WORLD, two_layers());
    const auto s = cache.create_sequence();
    append(cache, s, 0, tokens(40));
    append(cache, s, 1, tokens(40));
    cache.commit(s);
    const std::vector<float> before = attend(cache, s, 0);
    if (last_rank() > 0) {
        const auto code = [&](const std::function<void()>& last, const std::function<void()>& others) {
            return failing(is_last() ? last : others).code;
        };
        REQUIRE(code([&] { append(cache, s, 0, tokens(2)); }, [&] { append(cache, s, 0, tokens(3)); }) ==
                errc::invalid_argument);
        REQUIRE(code([&] { attend(cache, s, 0); }, [&] { append(cache, s, 0, tokens(3)); }) ==
                errc::invalid_argument);
        REQUIRE(code([&] { cache.commit(s); }, [&] { cache.truncate(s, 7); }) == errc::invalid_argument);
        REQUIRE(code([&] { static_cast<void>(cache.create_sequence()); },
                     [&] { cache.destroy_sequence(s); }) == errc::invalid_argument);
        REQUIRE(code([&] { cache.rollback(context_parallel::sequence{99}); }, [&] { cache.rollback(s); }) ==
                errc::invalid_sequence);
    }
    REQUIRE(cache.length(s) == 40);
    REQUIRE(kv1_test::same_bits(attend(cache, s, 0), before));
}

TEST_CASE("a rank that has lost tokens is named by all ranks", "[failure]") {
    distributed_cache cache(MPI_COMM_WORLD, two_layers());
    const auto s = cache.create_sequence();
    append(cache, s, 0, tokens(70));
    append(cache, s, 1, tokens(70));
    if (is_last())
        cache.local().truncate(cache.local(s), cache.local().length(cache.local(s)) - 1);
    for (const failure& f : {failing([&] { attend(cache, s, 1); }), failing([&] { cache.commit(s); }),
                             failing([&] { append(cache, s, 0, tokens(1)); })}) {
        REQUIRE(f.code == errc::broken_invariant);
        REQUIRE(f.rank == last_rank());
        REQUIRE(f.message.find("lost tokens") != std::string::npos);
    }
    cache.destroy_sequence(s);
}

TEST_CASE("where one rank is full, none keeps the tokens of the append", "[failure]") {
    // room for one page a rank
    const auto ranks = static_cast<std::size_t>(kv1_test::ranks_of_world());
    distributed_cache cache(MPI_COMM_WORLD, two_layers(page * ranks));
    const auto s = cache.create_sequence(), other = cache.create_sequence();
    append(cache, s, 0, tokens(page * ranks - 3));
    append(cache, s, 1, tokens(page * ranks - 3));
    const std::vector<float> before = attend(cache, s, 1);
    const failure f = failing([&] { append(cache, s, 0, tokens(4)); });
    REQUIRE(f.code == errc::capacity_exceeded);
    REQUIRE(f.rank == 0);
    REQUIRE(failing([&] { append(cache, other, 0, tokens(1)); }).code == errc::capacity_exceeded);
    REQUIRE(cache.length(s, 0) == page * ranks - 3);
    REQUIRE(kv1_test::same_bits(attend(cache, s, 0), attend(cache, s, 0)));
    REQUIRE(kv1_test::same_bits(attend(cache, s, 1), before));
    append(cache, s, 0, tokens(3)); // what fits still does
    append(cache, s, 1, tokens(3));
    REQUIRE(cache.commit(s) == page * ranks);
}

TEST_CASE("a step of which some ranks have a part is undone on all", "[failure]") {
    const kv1::cache_description d = two_layers();
    distributed_cache cache(MPI_COMM_WORLD, d), never_failed(MPI_COMM_WORLD, d);
    const auto s = cache.create_sequence(), t = never_failed.create_sequence();
    for (std::size_t layer = 0; layer < 2; ++layer) {
        append(cache, s, layer, tokens(20));
        append(never_failed, t, layer, tokens(20));
    }
    cache.commit(s);
    append(cache, s, 0, tokens(60));
    // token 45 of the call is position 65, in the fifth page; its neighbours in other pages are fine
    const failure f = failing([&] { append(cache, s, 1, tokens(60, 45)); });
    REQUIRE(f.code == errc::non_finite);
    REQUIRE(f.rank == static_cast<int>(cache.positions().owner(65)));
    REQUIRE(f.message.find("token 45") != std::string::npos);
    if (last_rank() > 0) { // others had theirs already
        REQUIRE(failing([&] { attend(cache, s, 1); }).code == errc::broken_invariant);
        REQUIRE(failing([&] { append(cache, s, 1, tokens(1)); }).code == errc::broken_invariant);
        REQUIRE(failing([&] { static_cast<void>(cache.fork(s)); }).code == errc::broken_invariant);
        REQUIRE(failing([&] { cache.truncate(s, 21); }).code == errc::out_of_range);
    }
    cache.rollback(s);
    REQUIRE(cache.length(s) == 20);
    cache.local().validate();
    for (std::size_t layer = 0; layer < 2; ++layer) {
        append(cache, s, layer, tokens(60));
        append(never_failed, t, layer, tokens(60));
        REQUIRE(kv1_test::same_bits(attend(cache, s, layer), attend(never_failed, t, layer)));
    }
}

TEST_CASE("an append that fails in the first layer of a step undoes itself", "[failure]") {
    distributed_cache cache(MPI_COMM_WORLD, two_layers());
    const auto s = cache.create_sequence(), other = cache.create_sequence();
    const std::vector<context_parallel::sequence> batch{other, s};
    for (std::size_t layer = 0; layer < 2; ++layer)
        append(cache, s, layer, tokens(20));
    const std::vector<float> before = attend(cache, s, 0), x = tokens(90, 80);
    const std::size_t indptr[] = {0, 30, 90};
    const failure f = failing([&] {
        cache.append(batch, 0, indptr, {x.data(), 90, 1, dim}, {x.data(), 90, 1, dim});
    });
    REQUIRE(f.code == errc::non_finite);
    REQUIRE(cache.length(s, 0) == 20);
    REQUIRE(cache.length(other, 0) == 0);
    REQUIRE(kv1_test::same_bits(attend(cache, s, 0), before));
    REQUIRE(cache.commit(s) == 20);
}

TEST_CASE("what only some ranks could undo can only be destroyed", "[failure]") {
    distributed_cache cache(MPI_COMM_WORLD, two_layers());
    const auto s = cache.create_sequence();
    for (std::size_t layer = 0; layer < 2; ++layer)
        append(cache, s, layer, tokens(70));
    cache.commit(s);
    append(cache, s, 0, tokens(3)); // layers disagree: no twin can be made
    if (is_last())
        cache.local().destroy_sequence(cache.local(s));
    const failure f = failing([&] { cache.rollback(s); });
    REQUIRE(f.code == errc::invalid_sequence);
    REQUIRE(f.rank == last_rank());
    if (last_rank() > 0) {
        for (const failure& later :
             {failing([&] { cache.rollback(s); }), failing([&] { attend(cache, s, 0); }),
              failing([&] { cache.commit(s); })})
            REQUIRE(later.code == errc::broken_invariant);
    }
    cache.destroy_sequence(s);
    REQUIRE(failing([&] { cache.commit(s); }).code == errc::invalid_sequence);
}

TEST_CASE("numbers that do not fit fp16 are refused where there is a window, on whichever rank",
          "[failure]") {
    kv1::cache_description d = two_layers();
    d.fp16_window = 4;
    distributed_cache cache(MPI_COMM_WORLD, d);
    const auto s = cache.create_sequence();
    std::vector<float> x = tokens(40);
    x[37 * dim + 2] = 1e5f;
    const failure f = failing([&] { append(cache, s, 0, x); });
    REQUIRE(f.code == errc::not_representable);
    REQUIRE(f.message.find("layer 0, KV head 0, token 37, channel 2") != std::string::npos);
    REQUIRE(cache.length(s, 0) == 0);
}

TEST_CASE("a NaN in a query is that row's alone, and no error", "[failure]") {
    distributed_cache cache(MPI_COMM_WORLD, two_layers());
    const auto s = cache.create_sequence();
    append(cache, s, 0, tokens(50));
    std::vector<float> q = tokens(2, 1), out(2 * dim), alone(dim);
    cache.attend(s, 0, {q.data(), 2, 1, dim}, {out.data(), 2, 1, dim});
    cache.attend(s, 0, {q.data(), 1, 1, dim}, {alone.data(), 1, 1, dim},
                 {.mask = kv1::attention_mask::causal_from(48)});
    out.resize(dim);
    REQUIRE(kv1_test::same_bits(out, alone));
}

TEST_CASE("a rank that failed says so by its rows, in both ways of joining", "[failure]") {
    using context_parallel::joining;
    context_parallel::agreement ranks(MPI_COMM_WORLD);
    context_parallel::row_reduction reduce;
    for (const joining how : {joining::in_rank_order, joining::reduced}) {
        std::vector<float> rows(3 * (dim + 1), 1.0f);
        if (is_last())
            std::fill(rows.begin() + dim + 1, rows.begin() + 2 * (dim + 1), not_a_number);
        reduce.prepare(ranks, rows.size(), how, false);
        reduce(ranks, rows, dim, how, false);
        REQUIRE(std::isnan(rows[dim + 1 + dim]));
        REQUIRE(std::fabs(rows[dim] - 1.0 - std::log(kv1_test::ranks_of_world())) < 1e-6);
        REQUIRE(std::fabs(rows[3 * (dim + 1) - 1] - rows[dim]) == 0.0f);
    }
}

TEST_CASE("what ranks do not join is refused", "[failure]") {
    distributed_cache cache(MPI_COMM_WORLD, two_layers());
    const auto s = cache.create_sequence();
    append(cache, s, 0, tokens(20));
    const std::vector<float> q = tokens(1), slope{0.5f};
    std::vector<float> out(dim);
    const std::vector<std::uint8_t> visible{1, 0, 1};
    const std::vector<kv1::attention_mask> two_masks(2);
    const auto code = [&](const kv1::attention_options& o) {
        return failing([&] { cache.attend(s, 0, {q.data(), 1, 1, dim}, {out.data(), 1, 1, dim}, o); }).code;
    };
    REQUIRE(code({.mask = kv1::attention_mask::explicit_for_last(3, visible)}) == errc::ok);
    REQUIRE(code({.mask = kv1::attention_mask::explicit_for_last(4, visible)}) == errc::shape_mismatch);
    REQUIRE(code({.masks = two_masks}) == errc::shape_mismatch);
    REQUIRE(code({.alibi_slopes = slope}) == errc::invalid_argument);
    REQUIRE(code({.soft_cap = not_a_number}) == errc::invalid_argument);
    REQUIRE(code({}) == errc::ok);
    REQUIRE(failing([&] { cache.commit(s); }).code == errc::layers_disagree);
    REQUIRE(failing([&] { cache.rollback(s); }).code == errc::nothing_committed);
    REQUIRE(failing([&] {
                cache.attend(s, 0, {q.data(), 1, 1, dim - 1}, {out.data(), 1, 1, dim});
            }).code == errc::shape_mismatch);
    REQUIRE(failing([&] { append(cache, s, 2, tokens(1)); }).code == errc::out_of_range);
    REQUIRE(same_on_all(attend(cache, s, 0)));
}

TEST_CASE("masks that differ are an error on all ranks", "[failure]") {
    if (last_rank() == 0)
        return;
    distributed_cache cache(MPI_COMM_WORLD, two_layers());
    const auto s = cache.create_sequence();
    append(cache, s, 0, tokens(20));
    const std::vector<float> q = tokens(1);
    std::vector<float> out(dim);
    std::vector<std::uint8_t> visible(12, 1);
    if (is_last())
        visible[9] = 0;
    const failure f = failing([&] {
        cache.attend(s, 0, {q.data(), 1, 1, dim}, {out.data(), 1, 1, dim},
                     {.mask = kv1::attention_mask::explicit_for_last(12, visible)});
    });
    REQUIRE(f.code == errc::invalid_argument);
    REQUIRE(f.rank == -1);
}

TEST_CASE("appending and attending in one call: what fails on one rank leaves none with its tokens",
          "[failure]") {
    using context_parallel::inputs;
    using context_parallel::joining;
    for (const inputs from : {inputs::of_every_rank, inputs::of_root})
        for (const joining join : {joining::in_rank_order, joining::reduced}) {
            const kv1::cache_description d = two_layers();
            distributed_cache cache(MPI_COMM_WORLD, d, {.from = from, .join = join}),
                never_failed(MPI_COMM_WORLD, d, {.from = from, .join = join});
            const auto s = cache.create_sequence(), t = never_failed.create_sequence();
            const auto step = [](distributed_cache& c, context_parallel::sequence which, std::size_t layer,
                                 const std::vector<float>& x) {
                std::vector<float> out(x.size());
                const std::size_t n = x.size() / dim;
                c.append_and_attend(which, layer, {x.data(), n, 1, dim}, {x.data(), n, 1, dim},
                                    {x.data(), n, 1, dim}, {out.data(), n, 1, dim});
                return out;
            };
            for (std::size_t layer = 0; layer < 2; ++layer) {
                step(cache, s, layer, tokens(20));
                step(never_failed, t, layer, tokens(20));
            }
            cache.commit(s);
            never_failed.commit(t);
            // the first layer of a step: undone at once
            const failure first = failing([&] { step(cache, s, 0, tokens(60, 45)); });
            REQUIRE(first.code == errc::non_finite);
            REQUIRE(first.rank == static_cast<int>(cache.positions().owner(65)));
            REQUIRE(cache.length(s, 0) == 20);
            // a later layer: undone by a rollback
            step(cache, s, 0, tokens(60));
            REQUIRE(failing([&] { step(cache, s, 1, tokens(60, 45)); }).code == errc::non_finite);
            if (last_rank() > 0)
                REQUIRE(failing([&] { step(cache, s, 1, tokens(60)); }).code == errc::broken_invariant);
            cache.rollback(s);
            cache.local().validate();
            for (std::size_t layer = 0; layer < 2; ++layer)
                REQUIRE(kv1_test::same_bits(step(cache, s, layer, tokens(60)),
                                            step(never_failed, t, layer, tokens(60))));
            REQUIRE(cache.commit(s) == 80);
        }
}

TEST_CASE("a rank that stops in the middle of a call is an error on those that wait", "[failure]") {
    using context_parallel::joining;
    if (last_rank() == 0)
        return;
    for (const joining join : {joining::in_rank_order, joining::reduced}) {
        context_parallel::cache_options options{.join = join, .patience = std::chrono::duration<double>(1.0)};
        bool asleep = false;
        options.run = [&asleep](std::size_t count, kv1::task_view task) {
            if (std::exchange(asleep, false))
                std::this_thread::sleep_for(std::chrono::milliseconds(2500));
            kv1::inline_executor{}(count, task);
        };
        distributed_cache cache(MPI_COMM_WORLD, two_layers(), options);
        const auto s = cache.create_sequence();
        append(cache, s, 0, tokens(page * static_cast<std::size_t>(kv1_test::ranks_of_world())));
        asleep = is_last();
        try {
            attend(cache, s, 0);
            REQUIRE(is_last()); // the others had sent it their rows
        } catch (const rank_error& e) {
            REQUIRE(!is_last());
            REQUIRE(e.code() == errc::io_error);
            REQUIRE(e.rank() == -1);
            REQUIRE_THROWS_AS(cache.commit(s), rank_error); // at once: nothing can be agreed on any more
        }
        MPI_Barrier(MPI_COMM_WORLD);
    }
}

TEST_CASE("a rank that does not come is an error on those that wait", "[failure]") {
    if (last_rank() == 0)
        return;
    distributed_cache cache(MPI_COMM_WORLD, two_layers(), {.patience = std::chrono::duration<double>(1.0)});
    if (!is_last())
        for (int call = 0; call < 2; ++call) {
            try {
                static_cast<void>(cache.create_sequence());
                FAIL("the last rank did not answer");
            } catch (const rank_error& e) {
                REQUIRE(e.code() == errc::io_error);
                REQUIRE(e.rank() == -1);
            }
        }
    MPI_Barrier(MPI_COMM_WORLD);
    if (is_last()) // too late for the others, but their reduction ends, which MPI wants before the next test
        static_cast<void>(cache.create_sequence());
    MPI_Barrier(MPI_COMM_WORLD);
}
