// SPDX-License-Identifier: Apache-2.0
#include "policy_body.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    kv1_test::policy_body({data, size});
    return 0;
}
