// SPDX-License-Identifier: Apache-2.0
//
// What holds for bytes that say they are a calibration, whatever they are. Throws std::logic_error where it does
// not.
#pragma once

#include "saved_bytes.hpp"
#include "small_calibration.hpp"

#include <kv1/calibration_file.hpp>
#include <kv1/kv_cache.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <utility>

namespace kv1_test {

inline saved_bytes saved_calibration(const kv1::calibration& c) {
    saved_bytes b;
    const auto to_memory = [&](std::span<const std::byte> some) {
        b.insert(b.end(), some.begin(), some.end());
        return true;
    };
    if (!kv1::try_save_calibration(c, to_memory))
        throw std::logic_error("a calibration is saved");
    return b;
}

/// Offsets in the form that calibration_file.hpp describes.
struct calibration_places {
    static constexpr std::size_t fixed_part = 80, fixed_checksum = 76, table_size = 24;
};

/// Corrects all checksums, so that a load looks at the change itself.
inline void reseal_calibration(std::span<std::byte> b) {
    using places = calibration_places;
    write_number(b, places::fixed_checksum, kv1::detail::crc32c(0, b.first(places::fixed_checksum)), 4);
    const std::uint64_t tables = number_at(b, places::table_size, 8);
    const std::size_t room = b.size() - places::fixed_part;
    if (room < 8 || tables > room - 8)
        return;
    const std::size_t values = places::fixed_part + static_cast<std::size_t>(tables) + 4;
    write_number(b, values - 4,
                 kv1::detail::crc32c(0, b.subspan(places::fixed_part, static_cast<std::size_t>(tables))), 4);
    write_number(b, b.size() - 4, kv1::detail::crc32c(0, b.subspan(values, b.size() - 4 - values)), 4);
}

/// A calibration that is saved, changed and loaded again.
class calibration_body {
public:
    /// How often bytes were refused, loaded though they were changed, and made a cache.
    struct tallies {
        std::size_t refused = 0, loaded = 0, caches = 0;
    };

    /// The first byte is a choice; then come changes of three bytes each: place, in two, and value. Without changes
    /// the bytes are loaded as they are.
    static void run(std::span<const std::uint8_t> input, tallies& t) {
        if (input.empty())
            return;
        const std::uint8_t choice = input[0];
        const saved_bytes& saved = originals()[choice & 3];
        saved_bytes b = saved;
        for (std::size_t i = 1; i + 3 <= input.size(); i += 3)
            b[(std::size_t{input[i]} | std::size_t{input[i + 1]} << 8u) % b.size()] =
                static_cast<std::byte>(input[i + 2]);
        const bool changed = b != saved;
        if ((choice & 4) != 0)
            reseal_calibration(b);
        if ((choice & 8) != 0 && !changed)
            b.resize(b.size() / 2);
        auto loaded = (choice & 16) != 0 ? kv1::try_load_calibration(one_way{b}, model())
                                         : kv1::try_load_calibration(kv1::memory_source(b), model());
        if (!loaded) {
            require(*loaded.reason().rule() != '\0', "an error names its rule");
            require(changed || (choice & 8) != 0, "what was saved is loaded");
            ++t.refused;
            return;
        }
        require(!changed || (choice & 4) != 0, "changed bytes are refused");
        t.loaded += changed ? 1 : 0;
        // the version of the library that wrote it is not kept
        const saved_bytes again = saved_calibration(*loaded);
        require(changed || again == saved, "what was loaded is saved as it was");
        const auto d = kv1::try_describe_cache(*loaded, small_calibrated_shape());
        if (!d)
            return;
        const auto cache = kv1::kv_cache::create(*d);
        t.caches += cache ? 1 : 0;
        require(cache || changed, "a calibration makes a cache");
    }

private:
    static void require(bool holds, const char* what) {
        if (!holds)
            throw std::logic_error(what);
    }
    static kv1::model_fingerprint model() { return kv1::fingerprint_of("model"); }
    static const std::array<saved_bytes, 4>& originals() {
        static const std::array<saved_bytes, 4> all{
            saved_calibration(small_calibration("c3+ls+basis+had+mean+ew,c2+ls+basis+had+ew@4:8", model())),
            saved_calibration(small_calibration("c2+ls+mean,2+ls+had+mean+ew/1:c4+ls,c3+ls+ew", model())),
            saved_calibration(small_calibration("2", model())),
            saved_calibration(small_calibration("c4+ls+ew/0:16,32@0:4#32", model()))};
        return all;
    }
};

} // namespace kv1_test
