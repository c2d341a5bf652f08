// SPDX-License-Identifier: Apache-2.0
//
// Bulk packing on every target against a model that sets one bit at a time.
#include "compare.hpp"
#include "packed_model.hpp"
#include "random.hpp"
#include "targets.hpp"

#include <catch2/catch_template_test_macros.hpp>

#include <kv1/packed_span.hpp>

#include <algorithm>
#include <span>
#include <vector>

TEMPLATE_TEST_CASE_SIG("every target packs the model's bytes and unpacks the codes", "[packed]",
                       ((int Bits), Bits), 1, 2, 3, 4, 8) {
    kv1_test::for_each_target([&](kv1::target) {
        kv1_test::generator g(1);
        kv1_test::tally t;
        for (std::size_t n = 0; n <= 400; ++n) {
            const std::size_t length = n <= 200 ? n : g.between(200, 5000);
            const std::vector<std::uint8_t> codes = kv1_test::random_codes(g, length, Bits);
            const std::size_t size = kv1::packed_size<Bits>(length), offset = g.between(1, 5);
            std::vector<std::byte> buffer(size + 6, std::byte{0xcc});
            const kv1::packed_span<Bits> packed{std::span(buffer).subspan(offset, size), length};
            REQUIRE(packed.try_pack(codes));
            std::vector<std::byte> expected(offset, std::byte{0xcc});
            const std::vector<std::byte> model = kv1_test::packed_model(codes, Bits);
            expected.insert(expected.end(), model.begin(), model.end());
            expected.resize(size + 6, std::byte{0xcc});
            t.expect(buffer == expected, "packing", length);

            std::vector<std::uint8_t> unpacked(length + 6, 0xcc);
            REQUIRE(packed.try_unpack(std::span(unpacked).subspan(offset, length)));
            std::vector<std::uint8_t> restored(offset, 0xcc);
            restored.insert(restored.end(), codes.begin(), codes.end());
            restored.resize(length + 6, 0xcc);
            t.expect(unpacked == restored, "unpacking", length);
        }
        KV1_REQUIRE_CLEAN(t);
    });
}
