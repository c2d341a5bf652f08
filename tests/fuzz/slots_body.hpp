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
#include <cstring>
#include <memory>
#include <span>
#include <stdexcept>
#include <vector>

namespace kv1_test {

class slots_body {
public:
    /// How often bytes were refused, taken, and taken with positions that keys stand at.
    struct tallies {
        std::size_t refused = 0, taken = 0, positions = 0;
    };

    /// The first byte chooses a layer, whether its means turn, and whether bytes are cut. The others are raw bytes of two
    /// slots, repeated to the length that these have.
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
        const std::vector<std::int32_t> positions = positions_in(raw, store);
        const bool impossible =
            std::any_of(positions.begin(), positions.end(), [](std::int32_t p) { return p < -1; });
        require(!(s && impossible), "no key stands before -1");
        if (!s) {
            require(s.code() == kv1::errc::non_finite ||
                        (impossible && s.code() == kv1::errc::invalid_argument),
                    "bytes are refused for their numbers alone");
            require(after == before, "what is refused changes nothing");
            ++t.refused;
            return;
        }
        ++t.taken;
        // channels that do not fill their last byte leave bits that mean nothing: a second import is exact
        store.import_raw(0, others, after);
        store.export_raw(0, others, before);
        require(before == after, "what goes in comes out");
        for (std::size_t i = 0; i < positions.size(); ++i) {
            require(store.key_position(0, slots[i]) == positions[i] &&
                        store.key_position(0, others[i]) == positions[i],
                    "keys stand where it is said");
            t.positions += positions[i] >= 0 ? 1 : 0;
        }
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
        if (!positions.empty()) { // a list has other columns, and each tile one slot that stands somewhere
            const kv1::slot_stream list{1, kv1::slot_view::list(slots), kv1::slot_mask::none()};
            store.attend(0, {&list, 1}, {q.data(), 1, l.kv_heads, l.key_dim},
                         {out.data(), 1, l.kv_heads, l.value_dim});
        }
        // the same bytes again, in memory of the caller's: another store over it has all that the first had
        const std::size_t bytes = kv1::slot_memory_bytes(store.description(), 0);
        std::vector<std::byte> room(bytes + kv1::line_bytes);
        void* aligned = room.data();
        std::size_t space = room.size();
        kv1::slot_memory lent{
            {static_cast<std::byte*>(std::align(kv1::line_bytes, bytes, aligned, space)), bytes}};
        {
            kv1::slot_store first(store.description(), {&lent, 1});
            first.import_raw(0, slots, after);
        }
        lent.holds_slots = true;
        kv1::slot_store(store.description(), {&lent, 1}).export_raw(0, slots, before);
        require(before == after, "lent memory keeps slots");
    }

private:
    static void require(bool holds, const char* what) {
        if (!holds)
            throw std::logic_error(what);
    }
    // Of the keys in raw bytes, in layers that have any: they come last.
    static std::vector<std::int32_t> positions_in(std::span<const std::byte> raw,
                                                  const kv1::slot_store& store) {
        std::vector<std::int32_t> positions;
        if (kv1::keeps_positions(store.description().layers[0])) {
            positions.resize(raw.size() / store.raw_bytes(0));
            for (std::size_t i = 0; i < positions.size(); ++i)
                std::memcpy(&positions[i], raw.data() + (i + 1) * store.raw_bytes(0) - sizeof(std::int32_t),
                            sizeof(std::int32_t));
        }
        return positions;
    }
    static kv1::slot_store_description describe(std::uint8_t choice) {
        using enum kv1::kv_format;
        const kv1::layer_description layers[] = {{1, 8, 6, affine2, fp32},
                                                 {2, 5, 7, fp16, scaled_binary},
                                                 {2, 33, 12, affine3, codebook4},
                                                 {1, 64, 32, affine8, codebook2}};
        kv1::slot_store_description d;
        d.layers = {layers[choice % 4]};
        if (choice % 4 == 3)
            d.layers[0].key_group = 32;
        if ((choice & 0x40) != 0 && choice % 4 != 1) { // plain keys have no means
            kv1::layer_description& l = d.layers[0];
            l.rotary = {kv1::rotary_frequencies(10000.0, l.key_dim / 2 * 2)};
            l.key_encoding.means.assign(l.kv_heads * l.key_dim, 1.5f);
        }
        d.slots = 32;
        d.page_tokens = 16;
        return d;
    }
};

} // namespace kv1_test
