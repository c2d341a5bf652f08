// SPDX-License-Identifier: Apache-2.0
//
// Extents as engines have them: of any integer type, in braces, without a warning.
#include <catch2/catch_test_macros.hpp>

#include <kv1/kv_cache.hpp>
#include <kv1/tensor.hpp>

#include <array>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#if defined(__GNUC__)
#pragma GCC diagnostic error "-Wnarrowing"
#pragma GCC diagnostic error "-Wconversion"
#pragma GCC diagnostic error "-Wsign-conversion"
#endif

using kv1::errc;

namespace {

constexpr std::size_t dim = 32;

kv1::kv_cache one_layer() { return kv1::kv_cache(kv1::uniform_cache(1, {1, dim, dim}, 64)); }

template <class Integer>
void attends(Integer tokens, Integer heads, Integer channels) {
    kv1::kv_cache cache = one_layer();
    const kv1::sequence_id id = cache.create_sequence();
    std::vector<float> x(2 * dim, 1.0f), out(2 * dim);
    cache.append(id, 0, {x.data(), tokens, heads, channels}, {x.data(), tokens, heads, channels});
    cache.attend(id, 0, {x.data(), tokens, heads, channels}, {out.data(), tokens, heads, channels});
    REQUIRE(cache.length(id) == 2);
    REQUIRE(out == x);
}

} // namespace

TEST_CASE("extents may be of any integer type", "[tensor]") {
    attends<int>(2, 1, 32);
    attends<long long>(2, 1, 32);
    attends<std::int16_t>(2, 1, 32);
    attends<std::uint8_t>(2, 1, 32);
    attends<unsigned>(2, 1, 32);
    attends<std::size_t>(2, 1, 32);
    enum { two = 2, one = 1, channels = 32 };
    const std::array<float, 64> x{};
    const int stride = 32;
    const kv1::tensor_view view{x.data(), two, one, channels, stride, stride};
    REQUIRE(view.tokens() == 2);
    REQUIRE(view.channels() == 32);
    REQUIRE_FALSE(view.has_negative_extent());
}

TEST_CASE("calls refuse negative extents and change nothing", "[tensor]") {
    kv1::kv_cache cache = one_layer();
    const kv1::sequence_id id = cache.create_sequence();
    std::vector<float> x(2 * dim, 1.0f), out(2 * dim, 7.0f);
    const int n = 1, d = 32, bad = -1, least = std::numeric_limits<int>::min();
    cache.append(id, 0, {x.data(), n, n, d}, {x.data(), n, n, d});
    const auto refused = [&](const kv1::status& s) {
        REQUIRE(s.code() == errc::invalid_argument);
        REQUIRE(std::string_view(s.rule()) == "tokens, heads and channels are not negative");
        REQUIRE(cache.length(id) == 1);
        REQUIRE(out == std::vector<float>(2 * dim, 7.0f));
    };
    refused(cache.try_append(id, 0, {x.data(), bad, n, d}, {x.data(), bad, n, d}));
    refused(cache.try_append(id, 0, {x.data(), n, bad, d}, {x.data(), n, bad, d}));
    refused(cache.try_append(id, 0, {x.data(), n, n, d}, {x.data(), n, n, least}));
    refused(cache.try_attend(id, 0, {x.data(), bad, n, d}, {out.data(), bad, n, d}));
    refused(cache.try_attend(id, 0, {x.data(), n, least, d}, {out.data(), n, least, d}));
    refused(cache.try_attend(id, 0, {x.data(), n, n, d}, {out.data(), n, n, bad}));
    const std::array<std::size_t, 2> indptr{0, 1};
    refused(cache.try_append({&id, 1}, 0, indptr, {x.data(), bad, n, d}, {x.data(), bad, n, d}));
    refused(cache.try_attend({&id, 1}, 0, indptr, {x.data(), bad, n, d}, {out.data(), bad, n, d}));
    REQUIRE(kv1::mutable_tensor_view(out.data(), n, n, bad).has_negative_extent());
}
