// SPDX-License-Identifier: Apache-2.0
#include <kv1/detail/schedule.hpp>

#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <numeric>
#include <vector>

namespace detail = kv1::detail;

namespace {

constexpr std::size_t page_tokens = 64;
constexpr kv1::page_layout layout(kv1::kv_format::affine2, 128, kv1::kv_format::affine2, 128, page_tokens);

// Tokens of every task, in the order in which tasks are numbered.
std::vector<std::size_t> task_tokens(std::size_t rows, std::size_t kv_heads, std::size_t first,
                                     std::size_t last) {
    const detail::attention_split s = detail::split_attention(layout, rows, kv_heads, first, last);
    std::vector<std::size_t> tasks;
    for (std::size_t i = 0; i < kv_heads * s.row_splits; ++i)
        for (std::size_t r = 0; r < s.ranges; ++r) {
            const std::size_t begin = s.first_token + r * s.range_tokens;
            tasks.push_back(std::min(last, begin + s.range_tokens) - begin);
        }
    return tasks;
}

} // namespace

TEST_CASE("the tasks of a decoded token divide evenly among 2, 4, 8 and 16 workers", "[schedule]") {
    for (const std::size_t tokens :
         std::array<std::size_t, 8>{4096, 5000, 6200, 9999, 32768, 50000, 100001, 131072})
        for (const std::size_t workers : std::array<std::size_t, 4>{2, 4, 8, 16}) {
            INFO(tokens << " tokens, " << workers << " workers");
            std::vector<std::size_t> load(workers);
            for (const std::size_t task : task_tokens(4, 8, 0, tokens)) // whoever is free takes the next one
                *std::ranges::min_element(load) += task;
            const std::size_t all = std::accumulate(load.begin(), load.end(), std::size_t{0});
            REQUIRE(all == 8 * tokens);
            // a task's length is rounded up to pages: each of a worker's tasks may be a page longer than its
            // share
            const std::size_t tasks = task_tokens(4, 8, 0, tokens).size() / workers;
            REQUIRE(std::ranges::max(load) <= all / workers + (tasks + 1) * page_tokens);
        }
}

TEST_CASE("ranges cover every token once and are not shorter than they repay", "[schedule]") {
    for (const std::size_t first : std::array<std::size_t, 3>{0, 63, 5000})
        for (const std::size_t tokens : std::array<std::size_t, 7>{1, 64, 2047, 2048, 4095, 4097, 40000}) {
            INFO("from " << first << ", " << tokens << " tokens");
            const std::vector<std::size_t> tasks = task_tokens(1, 1, first, first + tokens);
            const std::size_t unit = tasks.size() == 1 ? kv1::tile_tokens : page_tokens;
            REQUIRE(std::accumulate(tasks.begin(), tasks.end(), std::size_t{0}) == tokens + first % unit);
            REQUIRE(std::ranges::min(tasks) > 0);
            if (tasks.size() > 1)
                REQUIRE(tasks.front() >= detail::smallest_range);
        }
}

TEST_CASE("a single range begins with the granule of the first token, counted from the begin of its page",
          "[schedule]") {
    struct window {
        kv1::kv_format value;
        std::size_t page_tokens, first, begin;
    };
    for (const window& w :
         {window{kv1::kv_format::fp16, 64, 96, 96}, // two of four tiles of a page are left out
          window{kv1::kv_format::fp16, 64, 111, 96}, window{kv1::kv_format::fp16, 16, 111, 96},
          window{kv1::kv_format::affine2, 64, 112, 112},
          window{kv1::kv_format::binary, 64, 112, 96}, // 32 tokens share a line of values
          window{kv1::kv_format::binary, 48, 90, 80},  // 80 is 32 in its page
          window{kv1::kv_format::binary, 48, 75, 48}}) {
        INFO("from " << w.first << " in pages of " << w.page_tokens);
        const kv1::page_layout pages(kv1::kv_format::fp16, 128, w.value, 128, w.page_tokens);
        const detail::attention_split s = detail::split_attention(pages, 4, 8, w.first, w.first + 32);
        REQUIRE(s.ranges == 1);
        REQUIRE(s.first_token == w.begin);
        REQUIRE(s.first_token + s.range_tokens >= w.first + 32);
    }
}
