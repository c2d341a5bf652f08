// SPDX-License-Identifier: Apache-2.0
//
// What holds for bytes that say they are a slot's raw bytes, whatever they are. Throws std::logic_error where it does
// not.
#pragma once

#include <kv1/slot_store.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

namespace kv1_test {

class slots_body {
public:
    /// How often bytes were refused, and taken.
    struct tallies {
        std::size_t refused = 0, taken = 0;
    };

    /// The first byte chooses a layer, and whether bytes are cut. The others are raw bytes of two slots, repeated to the
    /// length that these have.
    static void run(std::span<const std::uint8_t> input, tallies& t) {
        if (input.size() < 2)
            return;
        kv1::slot_store store(describe(input[0]));
        const std::uint32_t slots[] = {17, 2}, others[] = {0, 31};
        std::vector<std::byte> raw(2 * store.raw_bytes(0)), before(raw.size()), after(raw.size());
        for (std::size_t i = 0; i < raw.size(); ++i)
            raw[i] = static_cast<std::byte>(input[1 + i % (input.size() - 1)]);
        if ((input[0] & 0x80) != 0) {
            raw.pop_back();
            require(store.try_import_raw(0, slots, raw).code() == kv1::errc::shape_mismatch,
                    "lengths are checked");
            return;
        }
        store.export_raw(0, slots, before);
        const kv1::status s = store.try_import_raw(0, slots, raw);
        store.export_raw(0, slots, after);
        if (!s) {
            require(s.code() == kv1::errc::non_finite, "bytes are refused for their numbers alone");
            require(after == before, "what is refused changes nothing");
            ++t.refused;
            return;
        }
        ++t.taken;
        // channels that do not fill their last byte leave bits that mean nothing: a second import is exact
        store.import_raw(0, others, after);
        store.export_raw(0, others, before);
        require(before == after, "what goes in comes out");
        const kv1::layer_description& l = store.description().layers[0];
        std::vector<float> q(l.kv_heads * l.key_dim, 0x1p-12f), out(l.kv_heads * l.value_dim);
        for (const kv1::kv_side side : {kv1::kv_side::key, kv1::kv_side::value})
            for (std::size_t head = 0; head < l.kv_heads; ++head) {
                std::vector<float> row(side == kv1::kv_side::key ? l.key_dim : l.value_dim);
                store.read(0, side, head, std::span(slots).first(1), row);
                require(std::all_of(row.begin(), row.end(), [](float x) { return std::isfinite(x); }),
                        "slots hold finite numbers");
            }
        const kv1::slot_stream stream{1, kv1::slot_view::range(0, 32), kv1::slot_mask::none()};
        store.attend(0, {&stream, 1}, {q.data(), 1, l.kv_heads, l.key_dim},
                     {out.data(), 1, l.kv_heads, l.value_dim});
    }

private:
    static void require(bool holds, const char* what) {
        if (!holds)
            throw std::logic_error(what);
    }
    static kv1::slot_store_description describe(std::uint8_t choice) {
        using enum kv1::kv_format;
        const kv1::layer_description layers[] = {{1, 8, 6, affine2, fp32},
                                                 {2, 5, 7, fp16, scaled_binary},
                                                 {2, 33, 12, affine3, compact4},
                                                 {1, 64, 32, affine8, codebook2}};
        kv1::slot_store_description d;
        d.layers = {layers[choice % 4]};
        if (choice % 4 == 3)
            d.layers[0].key_group = 32;
        d.slots = 32;
        d.page_tokens = 16;
        return d;
    }
};

} // namespace kv1_test
