// SPDX-License-Identifier: Apache-2.0
//
// libFuzzer drives random operations against a naive model of the cache. Seeds lie in seeds/cache; the unit
// test cache_model_test replays them.
#include "cache_operations.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    kv1_test::cache_operations::tallies tallies;
    kv1_test::cache_operations::run({data, size}, tallies);
    return 0;
}
