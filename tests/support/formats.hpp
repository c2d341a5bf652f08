// SPDX-License-Identifier: Apache-2.0
//
// Lists of formats by their properties: a format that is added is in every test that is about all of its kind.
#pragma once

#include <kv1/format.hpp>

#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace kv1_test {

/// Those of which want(format_info) holds, in the enumeration's order.
template <class F>
std::vector<kv1::kv_format> formats_that(F&& want) {
    std::vector<kv1::kv_format> found;
    for (const kv1::kv_format f : kv1::all_kv_formats)
        if (want(kv1::info_of(f)))
            found.push_back(f);
    return found;
}

/// With codes of at most so many bits, whose levels can be chosen.
inline std::vector<kv1::kv_format> fitted_formats(int most_bits = 8) {
    return formats_that([&](const kv1::format_info& f) { return f.fits_levels && f.code_bits <= most_bits; });
}

/// With codes, whatever they stand for.
inline std::vector<kv1::kv_format> coded_formats() {
    return formats_that([](const kv1::format_info& f) { return f.code_bits != 0; });
}

/// A tuple of what Map makes of the types of fitted_formats(MostBits).
template <template <class> class Map, int MostBits, class... Fs>
auto fitted_types_of(kv1::formats<Fs...>) -> decltype(std::tuple_cat(
    std::conditional_t<kv1::info_of(kv1::kv_format_of<Fs>).fits_levels &&
                           kv1::info_of(kv1::kv_format_of<Fs>).code_bits <= MostBits,
                       std::tuple<Map<Fs>>, std::tuple<>>{}...));
template <template <class> class Map, int MostBits = 8>
using fitted_types = decltype(fitted_types_of<Map, MostBits>(kv1::all_formats{}));

/// body.template operator()<F>() for the type of a format; the result, of the type that all of them give.
template <class F, class... Fs>
auto with_type_of(kv1::kv_format f, F&& body, kv1::formats<Fs...>) {
    using result = std::common_type_t<decltype(body.template operator()<Fs>())...>;
    result found{};
    bool any = false;
    static_cast<void>(
        ((kv1::kv_format_of<Fs> == f && (found = body.template operator()<Fs>(), any = true)) || ...));
    if (!any)
        throw std::runtime_error("unknown format");
    return found;
}
template <class F>
auto with_type_of(kv1::kv_format f, F&& body) {
    return with_type_of(f, std::forward<F>(body), kv1::all_formats{});
}

} // namespace kv1_test
