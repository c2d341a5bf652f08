// SPDX-License-Identifier: Apache-2.0
//
// Saved states. llama.cpp saves a cache row by row of its tensors (llama_state_*, prompt caches, slots of llama-server),
// each row in the bytes of the nominal type. A slot's row is one of
//
//   zeros                        nothing was ever written
//   ff ff, kind, 0, codes        what the slot holds, the rest zeros
//   numbers of the nominal type  the fp16 copy of a slot that has one; what llama.cpp's own cache would hold
//
// No finite fp16 number has the bytes ff ff. So what is restored is what was saved, bit for bit, with an f16 nominal
// type. A quantized one has no room for fp16 copies: slots are then restored as their codes. So are slots of layers whose
// keys have positions, for which a row of numbers has no room.
#include "slot_cache.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <span>
#include <utility>

namespace kv1_ggml {

namespace {

constexpr std::size_t marker_bytes = 4;

bool is_zero(std::span<const std::byte> row) noexcept {
    return row.empty() ||
           (row[0] == std::byte{0} && std::memcmp(row.data(), row.data() + 1, row.size() - 1) == 0);
}

// f(i, slots) for rows i, i + 1, ..., which are those of slots first + i, ..., a few hundred at a time.
template <class F>
void for_pieces(std::size_t first, std::size_t rows, F&& f) {
    constexpr std::size_t at_once = 256;
    std::vector<std::uint32_t> slots;
    for (std::size_t i = 0; i < rows; i += slots.size()) {
        slots.resize(std::min(at_once, rows - i));
        std::iota(slots.begin(), slots.end(), static_cast<std::uint32_t>(first + i));
        f(i, slots);
    }
}

} // namespace

std::size_t slot_cache::side_bytes(std::size_t layer, kv1::kv_side side) const {
    const kv1::layer_description& l = store_->description().layers[layer];
    const bool key = side == kv1::kv_side::key;
    return kv1::row_bytes(key ? l.key_format : l.value_format, key ? l.key_dim : l.value_dim,
                          key ? l.key_group : l.value_group);
}

std::size_t slot_cache::row_bytes(place p) const {
    return layers_[p.layer].kv_heads * side_bytes(p.layer, p.side) +
           (p.side == kv1::kv_side::key && keeps_positions(p.layer) ? sizeof(std::int32_t) : 0);
}

// f(bytes into a slot's raw bytes, bytes into its row of one side, how many) for what they share. Raw bytes are
// [KV head][key, then value], then a key's position.
template <class F>
void slot_cache::for_parts(place p, F&& f) const {
    const std::size_t heads = layers_[p.layer].kv_heads, bytes = side_bytes(p.layer, p.side);
    const std::size_t skipped = p.side == kv1::kv_side::value ? side_bytes(p.layer, kv1::kv_side::key) : 0;
    const std::size_t position = keeps_positions(p.layer) ? sizeof(std::int32_t) : 0,
                      of_head = (store_->raw_bytes(p.layer) - position) / heads;
    for (std::size_t h = 0; h < heads; ++h)
        f(h * of_head + skipped, h * bytes, bytes);
    if (p.side == kv1::kv_side::key)
        f(heads * of_head, heads * bytes, position);
}

// Rows [slots] to out, in the bytes of the nominal type. Codes of many slots are taken out at once.
void slot_cache::save_rows(place p, std::span<const std::uint32_t> slots, std::size_t nominal, ggml_type type,
                           std::byte* out) {
    std::memset(out, 0, slots.size() * nominal);
    if (!store_)
        return;
    const cache_layer& l = layers_[p.layer];
    const kv1::layer_description& shape = store_->description().layers[p.layer];
    const std::size_t dim = p.side == kv1::kv_side::key ? l.key_dim : l.value_dim;
    const std::size_t codes = row_bytes(p);
    const kv1::kv_format format = p.side == kv1::kv_side::key ? shape.key_format : shape.value_format;
    const bool plain = format == kv1::kv_format::fp16 || format == kv1::kv_format::fp32;
    std::vector<std::uint32_t> coded;
    std::vector<std::byte*> rows; // theirs
    std::vector<float> head(dim);
    for (std::size_t i = 0; i < slots.size(); ++i) {
        const std::uint32_t slot = slots[i];
        std::byte* const row = out + i * nominal;
        if (!book_->written(slot))
            continue;
        if (type == GGML_TYPE_F16 && !keeps_positions(p.layer) &&
            (plain || store_->has_fp16(p.layer, slot))) {
            if (format == kv1::kv_format::fp32 && !std::exchange(warned_, true))
                say(GGML_LOG_LEVEL_WARN, "fp32 keys and values are rounded to fp16 in a saved state");
            for (std::size_t h = 0; h < l.kv_heads; ++h) {
                if (const kv1::status s = store_->try_read(p.layer, p.side, h, std::span(&slot, 1), head); !s)
                    failed("saving a state", s);
                for (std::size_t c = 0; c < dim; ++c) {
                    const std::uint16_t bits = kv1::float16(head[c]).bits();
                    std::memcpy(row + (h * dim + c) * 2, &bits, 2);
                }
            }
            if (!is_zero({row, nominal}))
                continue;
        }
        coded.push_back(slot);
        rows.push_back(row);
    }
    if (coded.empty())
        return;
    if (codes + marker_bytes > nominal) {
        if (!std::exchange(warned_, true))
            say(GGML_LOG_LEVEL_ERROR,
                "layer %zu: %zu bytes of codes do not fit a row of %zu bytes, so the state is not saved; "
                "-ctk "
                "f16 -ctv f16 has room",
                l.of_model, codes, nominal);
        return;
    }
    const std::size_t of_slot = store_->raw_bytes(p.layer);
    std::vector<std::byte> raw(coded.size() * of_slot);
    if (const kv1::status s = store_->try_export_raw(p.layer, coded, raw); !s)
        failed("saving a state", s);
    for (std::size_t i = 0; i < coded.size(); ++i) {
        rows[i][0] = rows[i][1] = std::byte{0xff};
        rows[i][2] = static_cast<std::byte>(row_kind::codes);
        for_parts(p, [&](std::size_t inside, std::size_t apart, std::size_t n) {
            std::memcpy(rows[i] + marker_bytes + apart, raw.data() + i * of_slot + inside, n);
        });
    }
}

// And from a saved state. What slots have of the other side stays.
void slot_cache::load_rows(place p, std::span<const std::uint32_t> slots, std::size_t nominal, ggml_type type,
                           const std::byte* in) {
    const cache_layer& l = layers_[p.layer];
    const bool key = p.side == kv1::kv_side::key;
    const std::size_t dim = key ? l.key_dim : l.value_dim, codes = row_bytes(p);
    std::vector<std::uint32_t> empty, coded, plain;
    std::vector<const std::byte*> rows; // of those that are coded
    std::vector<kv1::float16> numbers;  // of those that are plain
    for (std::size_t i = 0; i < slots.size(); ++i) {
        const std::byte* const row = in + i * nominal;
        if (key)
            book_->place(slots[i], step_book::unknown);
        if (is_zero({row, nominal})) {
            if (key)
                empty.push_back(slots[i]);
        } else if (row[0] == std::byte{0xff} && row[1] == std::byte{0xff}) {
            if (row[2] == static_cast<std::byte>(row_kind::codes) && codes + marker_bytes <= nominal &&
                is_zero({row + marker_bytes + codes, nominal - marker_bytes - codes})) {
                coded.push_back(slots[i]);
                rows.push_back(row + marker_bytes);
            } else if (!std::exchange(warned_, true)) {
                say(GGML_LOG_LEVEL_ERROR, "layer %zu: the state was saved under another policy", l.of_model);
            }
        } else if (type == GGML_TYPE_F16) {
            plain.push_back(slots[i]);
            numbers.resize(plain.size() * l.kv_heads * dim);
            std::memcpy(static_cast<void*>(numbers.data() + numbers.size() - l.kv_heads * dim), row,
                        std::min(nominal, l.kv_heads * dim * 2));
        } else if (!std::exchange(warned_, true)) {
            say(GGML_LOG_LEVEL_ERROR,
                "a state that llama.cpp's own quantized cache saved can not be restored");
        }
    }
    if (const kv1::status s = store_->try_clear(p.layer, empty); !s)
        failed("restoring a state", s);
    const std::size_t of_slot = store_->raw_bytes(p.layer);
    std::vector<std::byte> raw(coded.size() * of_slot);
    kv1::status s = store_->try_export_raw(p.layer, coded, raw);
    for (std::size_t i = 0; i < coded.size(); ++i)
        for_parts(p, [&](std::size_t inside, std::size_t apart, std::size_t n) {
            std::memcpy(raw.data() + i * of_slot + inside, rows[i] + apart, n);
        });
    if (s)
        s = store_->try_import_raw(p.layer, coded, raw);
    if (!s)
        failed("restoring a state", s);
    else if (key && keeps_positions(p.layer))
        for (const std::uint32_t slot : coded)
            book_->place(slot, store_->key_position(p.layer, slot));
    if (plain.empty())
        return;
    if (key)
        make_room(p.layer, plain);
    write_vectors(p.layer, p.side, plain, {}, kv1::tensor_view(numbers.data(), plain.size(), l.kv_heads, dim),
                  nullptr);
}

void slot_cache::save(const ggml_tensor* tensor, std::byte* out, std::size_t offset, std::size_t bytes) {
    const std::optional<place> p = find(tensor);
    const ggml_tensor* const root = root_of(tensor);
    const std::size_t row = root->nb[1],
                      at = offset + static_cast<std::size_t>(static_cast<const std::byte*>(tensor->data) -
                                                             static_cast<const std::byte*>(root->data));
    if (!p || at % row != 0 || bytes % row != 0) {
        std::memset(out, 0, bytes);
        say(GGML_LOG_LEVEL_ERROR, "%s is read in parts of rows", root->name);
        return;
    }
    end_step();
    for_pieces(at / row, bytes / row, [&](std::size_t first, std::span<const std::uint32_t> slots) {
        save_rows(*p, slots, row, root->type, out + first * row);
    });
}

void slot_cache::load(const ggml_tensor* tensor, const std::byte* in, std::size_t offset, std::size_t bytes) {
    const std::optional<place> p = find(tensor);
    const ggml_tensor* const root = root_of(tensor);
    const std::size_t row = root->nb[1],
                      at = offset + static_cast<std::size_t>(static_cast<const std::byte*>(tensor->data) -
                                                             static_cast<const std::byte*>(root->data));
    if (!p || at % row != 0 || bytes % row != 0 || !ready()) {
        say(GGML_LOG_LEVEL_ERROR, "%s can not be restored", root->name);
        return;
    }
    end_step();
    // Of the first layer: fp16 copies of states that were restored before may go where room is short.
    if (p->layer == 0 && p->side == kv1::kv_side::key)
        book_->begin_restoring();
    for_pieces(at / row, bytes / row, [&](std::size_t first, std::span<const std::uint32_t> slots) {
        load_rows(*p, slots, row, root->type, in + first * row);
    });
}

// llama.cpp copies the keys of a layer, then its values. A slot is copied with both.
void slot_cache::copy(const ggml_tensor* to, const ggml_tensor* root, std::size_t first_row,
                      std::size_t rows) {
    const std::optional<place> p = find(root);
    if (!p || root_of(to) != root || !store_ || p->side == kv1::kv_side::value)
        return;
    end_step();
    const auto first =
        static_cast<std::uint32_t>(static_cast<std::size_t>(static_cast<const std::byte*>(to->data) -
                                                            static_cast<const std::byte*>(root->data)) /
                                   root->nb[1]);
    std::vector<std::uint32_t> sources, destinations, cleared;
    for (std::uint32_t i = 0; i < rows; ++i) {
        const auto source = static_cast<std::uint32_t>(first_row) + i;
        // The book is the same for all layers, and changes with the last.
        if (book_->written(source)) {
            sources.push_back(source);
            destinations.push_back(first + i);
        } else if (book_->written(first + i)) {
            cleared.push_back(first + i);
        }
    }
    make_room(p->layer, destinations);
    kv1::status s = store_->try_copy(p->layer, sources, destinations);
    if (s)
        s = store_->try_clear(p->layer, cleared);
    if (!s)
        failed("copying a stream", s);
    if (p->layer + 1 < layers_.size())
        return;
    for (std::size_t i = 0; i < sources.size(); ++i)
        book_->copy(sources[i], destinations[i]);
    for (const std::uint32_t slot : cleared)
        book_->clear(slot);
}

void slot_cache::clear() {
    if (!store_)
        return;
    store_->clear();
    book_->clear();
    for (cache_layer& l : layers_)
        l.written = false;
}

} // namespace kv1_ggml
