// SPDX-License-Identifier: Apache-2.0
//
// How errors are reported.
#include <catch2/catch_test_macros.hpp>

#include <kv1/status.hpp>

#include <string>
#include <utility>

using kv1::errc;

TEST_CASE("a status says in one line what is wrong and where", "[status]") {
    REQUIRE(kv1::status{}.message() == "ok");
    REQUIRE(kv1::status(errc::out_of_range, "no such layer", {.layer = 3}).message() ==
            "out of range: no such layer (layer 3)");
    const kv1::status s(errc::non_finite, "K and V must be finite",
                        {.layer = 1, .kv_head = 0, .token = 12, .channel = 5});
    REQUIRE(s.message() ==
            "non-finite value: K and V must be finite (layer 1, KV head 0, token 12, channel 5)");
    REQUIRE(kv1::status(errc::invalid_argument, "no such word", {.position = 0}).message() ==
            "invalid argument: no such word (position 0)");
    REQUIRE(to_string(s) == s.message());
    const kv1::error e(s);
    REQUIRE(std::string(e.what()) == "kv1: " + s.message());
    REQUIRE(e.code() == errc::non_finite);
    REQUIRE(e.reason().where().token == 12);
    for (unsigned code = 0; code <= static_cast<unsigned>(errc::broken_invariant); ++code)
        REQUIRE(to_string(static_cast<errc>(code)) != "unknown error");
}

TEST_CASE("a result holds a value or the reason there is none", "[status]") {
    kv1::result<int> good(7);
    REQUIRE(good);
    REQUIRE(*good == 7);
    REQUIRE(good.value() == 7);
    REQUIRE(good.code() == errc::ok);
    kv1::result<int> bad(kv1::status(errc::out_of_range, "rule"));
    REQUIRE_FALSE(bad);
    REQUIRE(bad.code() == errc::out_of_range);
    REQUIRE_THROWS_AS(bad.value(), kv1::error);
    REQUIRE_THROWS_AS(std::move(bad).value(), kv1::error);
}
