// SPDX-License-Identifier: Apache-2.0
//
// libFuzzer changes a saved cache, checksums made right again or not, and loads it. Seeds lie in seeds/saved;
// the unit test saved_prefixes_test replays them.
#include "saved_body.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    kv1_test::saved_body::tallies tallies;
    kv1_test::saved_body::run({data, size}, tallies);
    return 0;
}
