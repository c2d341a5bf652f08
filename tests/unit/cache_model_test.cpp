// SPDX-License-Identifier: Apache-2.0
//
// The cache against a naive model under random operations; and the fuzzer's corpus, replayed.
#include "cache_operations.hpp"

#include <catch2/catch_test_macros.hpp>

#include <filesystem>
#include <fstream>
#include <iterator>

using kv1_test::cache_operations;

TEST_CASE("random operations leave the cache equal to its model", "[cache][model]") {
    cache_operations::tallies t;
    for (std::uint64_t seed = 1; seed <= 256; ++seed) {
        kv1_test::generator g(seed);
        std::vector<std::uint8_t> bytes(600);
        for (std::uint8_t& b : bytes)
            b = static_cast<std::uint8_t>(g.bits());
        bytes[0] = static_cast<std::uint8_t>(seed); // every shape
        INFO("seed " << seed);
        REQUIRE_NOTHROW(cache_operations::run(bytes, t));
    }
    // each operation was there, and did its work
    for (const std::size_t count :
         {t.appended,  t.refused,      t.exhausted, t.forked,          t.truncated,   t.dropped,
          t.committed, t.destroyed,    t.attended,  t.stored,          t.matched,     t.partly_matched,
          t.imported,  t.batches,      t.loaded,    t.prefixes_loaded, t.rolled_back, t.never_committed,
          t.masked,    t.windows_gone, t.twice,     t.retained})
        REQUIRE(count >= 20);
}

TEST_CASE("the fuzzer's corpus leaves the cache equal to its model", "[cache][model]") {
    const std::filesystem::path folder = std::filesystem::path(KV1_FUZZ_SEED_DIR) / "cache";
    std::size_t files = 0;
    cache_operations::tallies t;
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
        std::ifstream in(entry.path(), std::ios::binary);
        const std::string bytes(std::istreambuf_iterator<char>(in), {});
        INFO(entry.path().filename().string());
        REQUIRE_NOTHROW(
            cache_operations::run({reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()}, t));
        ++files;
    }
    REQUIRE(files >= 10);
}
