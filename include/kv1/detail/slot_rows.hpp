// SPDX-License-Identifier: Apache-2.0
//
// Single slots of a layer: decoded, and as bytes. A slot's raw bytes are, KV head by KV head, the key's packed codes, its
// scales and minima (fp16, one for each group of channels, where the format has them), then the same of the value, if it
// does not lie in the key. Behind them comes the key's position, an int32, where the layer has positions. Example: with 2
// KV heads of affine2 and 128 channels, 2 * (32 + 2 + 2 + 32 + 2 + 2) = 144 bytes.
#pragma once

#include <kv1/cache_views.hpp>
#include <kv1/detail/buffer.hpp>
#include <kv1/detail/cache_rows.hpp>
#include <kv1/detail/layer_store.hpp>
#include <kv1/detail/page_fields.hpp>
#include <kv1/detail/slot_layer.hpp>
#include <kv1/float16.hpp>
#include <kv1/status.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace kv1::inline KV1_ABI::detail {

class slot_rows {
public:
    slot_rows(const slot_layer& layer, const layer_store& store) noexcept : layer_(layer), store_(store) {}

    // The fp16 copy where there is one, else what the codes stand for.
    void read(kv_side side, std::uint32_t slot, std::size_t kv_head, std::span<float> out) const noexcept {
        const std::uint32_t copy = layer_.copied.of(slot);
        if (copy == slot_copies::none) {
            const std::int32_t position = layer_.position_of(slot);
            store_.read(side, layer_.place_of(slot), kv_head,
                        position < 0 ? 0 : static_cast<std::size_t>(position), out);
            return;
        }
        const slot_place at = layer_.copy_place(copy);
        decode_row(layer_.copy_section(side), layer_.copies.page(at.block, kv_head), at.token, out);
    }

    [[nodiscard]] std::size_t raw_bytes() const noexcept {
        std::size_t bytes = 0;
        for_each_section([&](const section_layout& s) { bytes += bytes_of(s); });
        return layer_.body.kv_heads * bytes + (layer_.has_positions ? sizeof(std::int32_t) : 0);
    }
    void store_raw(std::uint32_t slot, std::span<std::byte> out) const noexcept {
        const slot_place at = layer_.place_of(slot);
        for (std::size_t head = 0; head < layer_.body.kv_heads; ++head)
            for_each_section([&](const section_layout& s) {
                float16 scales[max_groups], minima[max_groups];
                const std::size_t packed = packed_bytes(s.format, s.channels);
                export_row(
                    s, layer_.body.page(at.block, head), at.token,
                    {out.first(packed), std::span(scales, scales_of(s)), std::span(minima, minima_of(s))}, 0);
                std::memcpy(out.data() + packed, scales, 2 * scales_of(s));
                std::memcpy(out.data() + packed + 2 * scales_of(s), minima, 2 * minima_of(s));
                out = out.subspan(bytes_of(s));
            });
        const std::int32_t position = layer_.position_of(slot);
        if (layer_.has_positions)
            std::memcpy(out.data(), &position, sizeof position);
    }
    // Errors: non_finite, naming the KV head; invalid_argument for a position.
    [[nodiscard]] status check_raw(std::span<const std::byte> in) const noexcept {
        status found;
        for (std::size_t head = 0; head < layer_.body.kv_heads; ++head)
            for_each_section([&](const section_layout& s) {
                const raw_row row(s, in);
                if (const status own = check_rows_finite(s, 1, row.buffers()); !own && found)
                    found = {own.code(), own.rule(), {.kv_head = static_cast<std::int64_t>(head)}};
                in = in.subspan(bytes_of(s));
            });
        if (found && layer_.has_positions && position_in(in) < -1)
            return {errc::invalid_argument, "the position of a key is not negative, or -1 for none"};
        return found;
    }
    // Preconditions: check_raw(), the slot's page was begun. `layer` is this layer.
    void load_raw(slot_layer& layer, std::uint32_t slot, std::span<const std::byte> in) const noexcept {
        const slot_place at = layer_.place_of(slot);
        for (std::size_t head = 0; head < layer_.body.kv_heads; ++head)
            for_each_section([&](const section_layout& s) {
                const raw_row row(s, in);
                store_row(s, page_of(layer_.body, at.block, head), at.token, row.buffers(), 0);
                in = in.subspan(bytes_of(s));
            });
        if (layer.has_positions)
            layer.set_position(slot, position_in(in));
    }

    // Of a slot's fp16 copy: [KV head][key, then value].
    [[nodiscard]] std::size_t fp16_numbers() const noexcept {
        const layer_description& l = layer_.shape();
        return l.kv_heads * (l.key_dim + (l.values_in_keys ? 0 : l.value_dim));
    }
    // Precondition: the slot has a copy.
    void store_fp16(std::uint32_t slot, std::span<float16> out) const noexcept {
        for_each_number(slot, [&](const section_layout& s, std::byte* page, std::size_t token, std::size_t c,
                                  std::size_t i) {
            out[i] = float16::from_bits(static_cast<std::uint16_t>(load_code(s, page, token, c)));
        });
    }
    void load_fp16(std::uint32_t slot, std::span<const float16> in) const noexcept {
        for_each_number(slot, [&](const section_layout& s, std::byte* page, std::size_t token, std::size_t c,
                                  std::size_t i) { store_code(s, page, token, c, in[i].bits()); });
    }

    // Precondition: the slot's page was begun. `layer` is this layer.
    void clear(slot_layer& layer, std::uint32_t slot) const noexcept {
        layer.set_position(slot, -1);
        const slot_place at = layer_.place_of(slot);
        for (std::size_t head = 0; head < layer_.body.kv_heads; ++head)
            for_each_section([&](const section_layout& s) {
                std::byte* const page = page_of(layer_.body, at.block, head);
                for (std::size_t c = 0; c < s.channels; ++c)
                    store_code(s, page, at.token, c, 0);
                for (std::size_t g = 0; g < s.groups(); ++g)
                    store_metadata(s, page, at.token, {}, g);
            });
    }

    // Copies slots with their fp16 copies, as if all were read before any is written; or moves them: sources then keep
    // their codes and lose their fp16 copies. `layer` is this layer. Errors: capacity_exceeded, out_of_memory.
    [[nodiscard]] status copy(slot_layer& layer, std::span<const std::uint32_t> from,
                              std::span<const std::uint32_t> to, bool moves) const noexcept {
        const std::size_t raw = raw_bytes(), numbers = fp16_numbers();
        std::size_t sources = 0, destinations = 0; // that have a copy
        for (std::size_t i = 0; i < from.size(); ++i)
            sources += layer.copied.of(from[i]) != slot_copies::none ? 1 : 0;
        for (const std::uint32_t slot : to)
            destinations += layer.copied.of(slot) != slot_copies::none ? 1 : 0;
        if (!moves && sources > layer.copied.free() + destinations)
            return {errc::capacity_exceeded, "no room for fp16 copies: settle() or flush() makes some"};
        const std::size_t page = layer.body.layout.page_tokens();
        buffer<std::byte> bytes;
        buffer<float16> halves;
        buffer<std::uint8_t> has_copy;
        const bool by_pages = whole_pages(from, to, page);
        if ((!by_pages && !bytes.resize(from.size() * raw)) || !halves.resize(sources * numbers) ||
            !has_copy.resize(from.size()))
            return {errc::out_of_memory, "an allocation failed"};
        for (std::size_t i = 0, at = 0; i < from.size(); ++i) {
            if (!by_pages)
                store_raw(from[i], {bytes.data() + i * raw, raw});
            has_copy[i] = layer.copied.of(from[i]) != slot_copies::none ? 1 : 0;
            if (has_copy[i] != 0)
                store_fp16(from[i], {halves.data() + at++ * numbers, numbers});
        }
        for (std::size_t i = 0; moves && i < from.size(); ++i)
            layer.copied.remove(from[i]);
        for (const std::uint32_t slot : to)
            layer.copied.remove(slot);
        for (std::size_t i = 0, at = 0; i < to.size(); ++i) {
            if (by_pages) {
                if (i % page == 0) {
                    layer.begin(to[i]);
                    const std::size_t source = layer.place_of(from[i]).block;
                    layer.body.copy(static_cast<std::uint32_t>(source),
                                    static_cast<std::uint32_t>(to[i] / page));
                    if (layer.has_positions)
                        std::copy_n(layer.positions() + source * page, page, layer.positions() + to[i]);
                }
            } else {
                layer.begin(to[i]);
                load_raw(layer, to[i], {bytes.data() + i * raw, raw});
            }
            if (has_copy[i] == 0)
                continue;
            layer.begin_copy(layer.copied.add(to[i]));
            load_fp16(to[i], {halves.data() + at++ * numbers, numbers});
        }
        return {};
    }

private:
    // A row's metadata at an address that fp16 may have.
    class raw_row {
    public:
        raw_row(const section_layout& s, std::span<const std::byte> in) noexcept
            : packed_(in.first(packed_bytes(s.format, s.channels))), scales_(scales_of(s)),
              minima_(minima_of(s)) {
            std::memcpy(static_cast<void*>(numbers_), in.data() + packed_.size(), 2 * scales_);
            std::memcpy(static_cast<void*>(numbers_ + max_groups), in.data() + packed_.size() + 2 * scales_,
                        2 * minima_);
        }
        [[nodiscard]] const_row_buffers buffers() const noexcept {
            return {packed_, std::span(numbers_, scales_), std::span(numbers_ + max_groups, minima_)};
        }

    private:
        std::span<const std::byte> packed_;
        std::size_t scales_, minima_;
        float16 numbers_[2 * max_groups];
    };

    static std::int32_t position_in(std::span<const std::byte> in) noexcept {
        std::int32_t position = 0;
        std::memcpy(&position, in.data(), sizeof position);
        return position;
    }
    static std::size_t scales_of(const section_layout& s) noexcept {
        return s.traits().metadata != metadata_kind::none ? s.groups() : 0;
    }
    static std::size_t minima_of(const section_layout& s) noexcept {
        return s.traits().metadata == metadata_kind::scale_and_minimum ? s.groups() : 0;
    }
    static std::size_t bytes_of(const section_layout& s) noexcept {
        return packed_bytes(s.format, s.channels) + 2 * (scales_of(s) + minima_of(s));
    }
    static std::byte* page_of(const plane& p, std::uint32_t block, std::size_t head) noexcept {
        return const_cast<std::byte*>(p.page(block, head));
    }
    template <class F>
    void for_each_section(F&& f) const noexcept {
        f(layer_.body.layout.keys());
        if (!layer_.shape().values_in_keys)
            f(layer_.body.layout.values());
    }
    // f(section, page, token, channel, number) for each number of a slot's copy.
    template <class F>
    void for_each_number(std::uint32_t slot, F&& f) const noexcept {
        const slot_place at = layer_.copy_place(layer_.copied.of(slot));
        std::size_t i = 0;
        for (std::size_t head = 0; head < layer_.body.kv_heads; ++head)
            for (const kv_side side : {kv_side::key, kv_side::value}) {
                if (side == kv_side::value && layer_.shape().values_in_keys)
                    continue;
                const section_layout& s = layer_.copy_section(side);
                for (std::size_t c = 0; c < s.channels; ++c)
                    f(s, page_of(layer_.copies, at.block, head), at.token, c, i++);
            }
    }
    // Whether slots are those of whole pages, in order, and no page is both read and written.
    static bool whole_pages(std::span<const std::uint32_t> from, std::span<const std::uint32_t> to,
                            std::size_t page) noexcept {
        if (from.size() % page != 0)
            return false;
        for (std::size_t i = 0; i < from.size(); ++i)
            for (const std::span<const std::uint32_t> each : {from, to})
                if (each[i] != each[i / page * page] + i % page || each[i] % page != i % page)
                    return false;
        for (std::size_t i = 0; i < to.size(); i += page)
            for (std::size_t k = 0; k < from.size(); k += page)
                if (to[i] == from[k])
                    return false;
        return true;
    }

    const slot_layer& layer_;
    const layer_store& store_;
};

} // namespace kv1::inline KV1_ABI::detail
