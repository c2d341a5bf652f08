// SPDX-License-Identifier: Apache-2.0
//
// libFuzzer changes a saved calibration, checksums made right again or not, and loads it. Seeds lie in
// seeds/calibration; the unit test calibration_file_test replays them.
#include "calibration_body.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    kv1_test::calibration_body::tallies tallies;
    kv1_test::calibration_body::run({data, size}, tallies);
    return 0;
}
