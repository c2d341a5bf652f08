// SPDX-License-Identifier: Apache-2.0
//
// libFuzzer makes up raw bytes of slots, and a store imports them. Seeds lie in seeds/slots; the unit test
// slot_store_test replays them.
#include "slots_body.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    kv1_test::slots_body::tallies tallies;
    kv1_test::slots_body::run({data, size}, tallies);
    return 0;
}
