// SPDX-License-Identifier: Apache-2.0
//
// The bytes of one layer, and all that is asked of them: allocate, clear and copy blocks, write vectors to
// slots, attend over a block table, read vectors. Nothing here knows sequences, lengths or reference counts.
// The caller names the slots, and sees to it that nobody else writes to them meanwhile. A cache keeps its
// sequences on top of this. A program with other bookkeeping needs this header alone.
//
//   plane   one layer's blocks in one layout. Block b lies at byte b * block_bytes and holds the pages of all
//           KV heads, side by side
//   table   block numbers, in the order of their tokens
//   slot    an index into a table's tokens: with 64 tokens a page, slot 130 is token 2 of block table[2]
//
// A layer has a body, the plane of its own formats. It may have two more planes: fp16 copies of its vectors,
// and fp16 keys of pages that are not full yet, if keys are quantized per channel.
#pragma once

#include <kv1/attention.hpp>
#include <kv1/cache_description.hpp>
#include <kv1/cache_views.hpp>
#include <kv1/detail/append.hpp>
#include <kv1/detail/arena.hpp>
#include <kv1/detail/cache_rows.hpp>
#include <kv1/detail/kernels/interface.hpp>
#include <kv1/detail/kernels/registry.hpp>
#include <kv1/detail/memory_source.hpp>
#include <kv1/detail/schedule.hpp>
#include <kv1/detail/scratch_pool.hpp>
#include <kv1/detail/prepared_encoding.hpp>
#include <kv1/executor.hpp>
#include <kv1/layout.hpp>
#include <kv1/status.hpp>
#include <kv1/target.hpp>
#include <kv1/tensor.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>

namespace kv1::inline KV1_ABI::detail {

// One layer's blocks in one layout, and the arena that they lie in.
struct plane {
    page_layout layout;
    std::size_t layer = 0;
    std::size_t kv_heads = 0;
    std::size_t group = 0;       // index of the block group (cache_storage.hpp)
    std::size_t block_bytes = 0; // the pages of all KV heads
    detail::arena arena;

    [[nodiscard]] std::byte* block(std::uint32_t index) noexcept {
        return arena.data() + static_cast<std::size_t>(index) * block_bytes;
    }
    [[nodiscard]] const std::byte* block(std::uint32_t index) const noexcept {
        return arena.data() + static_cast<std::size_t>(index) * block_bytes;
    }
    [[nodiscard]] std::byte* page(std::uint32_t index, std::size_t kv_head) noexcept {
        return block(index) + kv_head * layout.bytes();
    }
    [[nodiscard]] const std::byte* page(std::uint32_t index, std::size_t kv_head) const noexcept {
        return block(index) + kv_head * layout.bytes();
    }

    // Whether so many blocks are a number of bytes that pointers can count.
    [[nodiscard]] static bool addressable(const page_layout& layout, std::size_t kv_heads,
                                          std::size_t blocks) noexcept {
        constexpr std::size_t most_bytes = (std::numeric_limits<std::ptrdiff_t>::max)();
        return kv_heads <= most_bytes / layout.bytes() && blocks <= most_bytes / (kv_heads * layout.bytes());
    }
    // Allocates so many blocks in an empty arena, without touching them. False: no memory.
    [[nodiscard]] bool allocate(detail::arena& to, std::size_t blocks, bool huge_pages) const noexcept {
        if (!addressable(layout, kv_heads, blocks) || !to.allocate(blocks * block_bytes))
            return false;
        if (huge_pages)
            advise_huge_pages(to.data(), blocks * block_bytes);
        return true;
    }

    // Clears a block, before it is first written to. Attention multiplies slots past the stored tokens by
    // weights of zero, so what they hold must be finite.
    void clear(std::uint32_t index) noexcept { std::memset(block(index), 0, block_bytes); }
    void copy(std::uint32_t from, std::uint32_t to) noexcept {
        std::memcpy(block(to), block(from), block_bytes);
    }
};

// A layer's shape and its encodings.
struct layer_encodings {
    const layer_description& shape;
    prepared_encoding keys = {}, values = {};

    // Checks the shape, windows left out, and prepares the encodings. Errors: invalid_argument,
    // shape_mismatch, unsupported_format, non_finite, out_of_memory.
    status make(std::size_t page_tokens, const kernel_set& kernels) noexcept {
        const layer_description& l = shape;
        if (l.kv_heads == 0 || l.key_dim == 0 || l.value_dim == 0)
            return {errc::invalid_argument, "KV heads and head dims are positive"};
        if (l.key_dim > max_vector_length || l.value_dim > max_vector_length)
            return {errc::invalid_argument, "head dims are at most 4096"};
        if (!kernels.contains(l.key_format) || !kernels.contains(l.value_format))
            return {errc::unsupported_format, "the cache type was not compiled for this format"};
        if (!groups_fit(l.key_format, l.key_dim, l.key_group) ||
            !groups_fit(l.value_format, l.value_dim, l.value_group))
            return {errc::invalid_argument,
                    "a group is a multiple of 32 channels that divides the head dim of an affine or compact "
                    "format"};
        if (l.key_axis == quantization_axis::per_channel)
            if (const char* rule = broken_axis_rule(l, page_tokens))
                return {errc::invalid_argument, rule};
        if (l.values_in_keys)
            if (const char* rule = broken_latent_rule(l))
                return {errc::invalid_argument, rule};
        if (const char* rule = broken_rotary_rule(l))
            return {errc::invalid_argument, rule};
        if (first_non_finite(l.rotary.frequencies) != l.rotary.frequencies.size())
            return {errc::non_finite, "rotary frequencies are finite"};
        if (status s =
                prepare_encoding(l.key_format, l.key_encoding, l.kv_heads, l.key_dim, l.key_group, keys);
            !s)
            return s;
        if (status s = prepare_turning(l.rotary, l.kv_heads, keys); !s)
            return s;
        if (l.values_in_keys)
            return make_first_channels(keys, l.kv_heads, l.value_dim, values);
        return prepare_encoding(l.value_format, l.value_encoding, l.kv_heads, l.value_dim, l.value_group,
                                values);
    }

private:
    static bool groups_fit(kv_format f, std::size_t head_dim, std::size_t group) noexcept {
        return group == 0 || (group % group_unit == 0 && head_dim % group == 0 && traits_of(f).fits_levels());
    }

    // The rule for keys per channel that the layer breaks; null: none.
    [[nodiscard]] static const char* broken_axis_rule(const layer_description& l,
                                                      std::size_t page_tokens) noexcept {
        const format_traits& t = traits_of(l.key_format);
        if (!t.fits_levels() || t.code_bits > 4)
            return "keys per channel need an affine or compact format of at most 4 bits";
        if (l.key_group != 0)
            return "keys per channel have no groups of channels";
        if (page_tokens > max_vector_length)
            return "keys per channel need pages of at most 4096 tokens";
        return nullptr;
    }

    // The rule for rotary embeddings that the layer breaks; null: none.
    [[nodiscard]] static const char* broken_rotary_rule(const layer_description& l) noexcept {
        const rotary_embedding& r = l.rotary;
        if (r.empty())
            return nullptr;
        if (r.frequencies.size() > l.key_dim / 2 || r.first_channel > l.key_dim - r.channels())
            return "the channels that turn are channels of a key";
        if (l.values_in_keys && r.first_channel < l.value_dim)
            return "values in keys do not turn: the channels that turn come after them";
        return nullptr;
    }

    // The rule for values in keys that the layer breaks; null: none.
    [[nodiscard]] static const char* broken_latent_rule(const layer_description& l) noexcept {
        if (l.value_dim > l.key_dim)
            return "values in keys have at most as many channels as the keys";
        if (l.value_format != l.key_format || l.value_group != l.key_group)
            return "values in keys have the keys' format and groups of channels";
        if (l.value_encoding != vector_encoding{})
            return "values in keys have the keys' encoding, and none of their own";
        if (!l.key_encoding.basis.empty())
            return "values in keys have no basis of their own, nor have the keys";
        if (l.key_axis != quantization_axis::per_token)
            return "keys per channel hold no values: their scales change from page to page";
        if (l.key_encoding.hadamard != 0 && l.value_dim % l.key_encoding.hadamard != 0)
            return "values in keys end where a Hadamard block of the keys does";
        if (longest_chunk(layout_of(l, tile_tokens)) == 0)
            return "values in keys take at most 4096 bytes a token, in formats of 1 and 3 bits 1024";
        return nullptr;
    }
};

// The slots that vectors go to. Vector i goes to slot slots[i], or to slot first + i if slots is null.
struct slot_run {
    const std::uint32_t* table = nullptr;
    std::size_t first = 0;
    const std::uint32_t* slots = nullptr;
};

// Where a slot lies.
struct slot_place {
    std::uint32_t block;
    std::size_t token; // in the page
};

// A view of a layer: encodings, kernels, planes and scratch pool outlive it. Its calls write to pages
// although planes are const. The caller decides which pages may be written to, and keeps two calls from
// writing to the same slots at once.
class layer_store {
public:
    layer_store(const layer_encodings& encodings, const kernel_set& kernels, const plane& body,
                const plane* copies, const plane* open_keys, scratch_pool& scratches) noexcept
        : encodings_(encodings), kernels_(kernels), body_(body), copies_(copies), open_keys_(open_keys),
          scratches_(scratches) {}

    [[nodiscard]] const plane& body() const noexcept { return body_; }
    [[nodiscard]] const plane* copies() const noexcept { return copies_; }
    [[nodiscard]] const plane* open_keys() const noexcept { return open_keys_; }

    [[nodiscard]] const target_kernels& kernels() const noexcept { return kernels_.common(current_target()); }

    // ---- write

    // Where new vectors go. Blocks are cleared, or hold tokens that were written before. With keys per
    // channel body.slots is null.
    struct destination {
        slot_run body;
        slot_run copies{}; // of the fp16 copies, if the layer has any
        // The position of a slot of the body less its number: where the sequence begins, and the tokens that
        // were dropped before the slots. It matters to keys whose means turn with their position.
        std::size_t position_shift = 0;
        // The same for slots whose order says nothing: a position for each vector, not negative. Null: none.
        const std::int32_t* positions = nullptr;
        // Blocks of open keys, if the layer has any: open_begun for the page that the first slot lies in, if
        // that page holds tokens already; open_later for the pages after it.
        std::uint32_t open_begun = 0, open_later = 0;
    };

    // Encodes vectors [tokens][kv_heads][channels] into their slots. Errors: non_finite and
    // not_representable, naming KV head, token and channel; out_of_memory. The slots' contents are then
    // unspecified.
    status write(const destination& to, const tensor_view& keys, const tensor_view& values,
                 executor_view run) const noexcept {
        return to_planes(to, keys, values,
                         [&](const append_job& job) { return append_heads(job, body_.kv_heads, run); });
    }
    // write() for one KV head.
    [[nodiscard]] status write_head(const destination& to, const tensor_view& keys, const tensor_view& values,
                                    std::size_t kv_head) const noexcept {
        return to_planes(to, keys, values, [&](const append_job& job) { return append_head(job, kv_head); });
    }
    // Encodes the keys, or the values, of KV heads first_head ... last_head - 1: x is [tokens][kv_heads]
    // [channels]. Not for keys per channel.
    [[nodiscard]] status write_side(kv_side side, const destination& to, const tensor_view& x,
                                    std::size_t first_head, std::size_t last_head) const noexcept {
        return to_planes(to, x, x, [&](const append_job& job) {
            return append_side(job, side == kv_side::key ? job.layout->keys() : job.layout->values(),
                               first_head, last_head);
        });
    }
    // Stores a row bit for bit. Preconditions: fits(); the row's numbers are finite.
    void write_row(kv_side side, const slot_place& to, std::size_t kv_head, const const_row_buffers& from,
                   std::size_t row) const noexcept {
        store_row(section(side), const_cast<std::byte*>(body_.page(to.block, kv_head)), to.token, from, row);
    }

    // ---- attend

    // A job over a plane. The caller fills in what each query sees: ranges of slots, masks, windows; and, for
    // means that turn, the positions of tokens, if a token's is not its place in the table.
    [[nodiscard]] attention_job job(const plane& p, const std::uint32_t* table, std::size_t query_heads,
                                    const attention_options& options) const noexcept {
        const bool per_channel = p.layout.keys().axis == quantization_axis::per_channel;
        const target t = per_channel ? without_pairs(current_target()) : current_target();
        attention_job job{};
        job.target = &kernels_.common(t);
        job.key_kernels = kernels_.find(t, p.layout.keys().format);
        job.value_kernels = kernels_.find(t, p.layout.values().format);
        job.mode = options.mode;
        job.scratches = &scratches_;
        job.layout = &p.layout;
        job.pages = p.arena.data();
        job.block_stride = p.block_bytes;
        job.block_table = table;
        job.head_group = query_heads / body_.kv_heads;
        job.scale = scale(options);
        job.soft_cap = options.soft_cap;
        if (&p == &body_) { // fp16 copies have neither rotation nor means taken off
            job.key_hadamard = encodings_.keys.params.hadamard;
            job.value_hadamard = encodings_.values.params.hadamard;
            job.key_means = encodings_.keys.mean(0);
            job.key_turning = encodings_.keys.turning.data();
            job.value_means = encodings_.values.mean(0);
            job.key_basis = encodings_.keys.basis.of(0);
            job.value_basis = encodings_.values.basis.of(0);
        }
        return job;
    }
    // Makes a job read the keys of slots from `from` on, which lie in the open page, from a block of open
    // keys.
    void read_open_keys(attention_job& job, std::uint32_t block, std::size_t from) const noexcept {
        job.open_keys = open_keys_->block(block);
        job.open_layout = &open_keys_->layout;
        job.open_kernels = kernels_.find(without_pairs(current_target()), kv_format::fp16);
        job.open_from = from;
    }
    status attend(const attention_job& job, const tensor_view& queries, const mutable_tensor_view& outputs,
                  const attention_options& options, executor_view run) const noexcept {
        const auto optional = [](std::span<const float> x) { return x.empty() ? nullptr : x.data(); };
        return attend_heads(job, body_.kv_heads, queries, outputs,
                            {optional(options.alibi_slopes), optional(options.sink_logits)},
                            options.log_sum_exp, run);
    }
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push // at -O3 g++ 12 sees the payload of an empty optional and not the test before it
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
    [[nodiscard]] float scale(const attention_options& options) const noexcept {
        return options.scale ? *options.scale
                             : 1.0f / std::sqrt(static_cast<float>(encodings_.shape.key_dim));
    }
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

    // ---- read

    [[nodiscard]] const section_layout& section(kv_side side) const noexcept {
        return side == kv_side::key ? body_.layout.keys() : body_.layout.values();
    }
    // Decodes a vector; rotation and mean, that of its position, are undone. Precondition: the body holds its
    // codes.
    void read(kv_side side, const slot_place& at, std::size_t kv_head, std::size_t position,
              std::span<float> out) const noexcept {
        decode_row(section(side), body_.page(at.block, kv_head), at.token, out);
        encoding(side).restore(out, kv_head, position);
    }
    // Decodes a key of an open page; rotation and mean, that of its position, are undone.
    void read_open_key(const slot_place& at, std::size_t kv_head, std::size_t position,
                       std::span<float> out) const noexcept {
        decode_row(open_keys_->layout.keys(), open_keys_->page(at.block, kv_head), at.token, out);
        encodings_.keys.restore(out, kv_head, position);
    }
    // Copies a row out bit for bit.
    void read_row(kv_side side, const slot_place& at, std::size_t kv_head, const row_buffers& out,
                  std::size_t row) const noexcept {
        export_row(section(side), body_.page(at.block, kv_head), at.token, out, row);
    }

private:
    [[nodiscard]] const prepared_encoding& encoding(kv_side side) const noexcept {
        return side == kv_side::key ? encodings_.keys : encodings_.values;
    }

    // Appends to the fp16 copies first: a vector that fp16 cannot hold is refused before codes are written.
    template <class Append>
    status to_planes(const destination& to, const tensor_view& keys, const tensor_view& values,
                     Append&& append) const noexcept {
        if (copies_ != nullptr)
            if (const status s = append(append_to(*copies_, to.copies, keys, values)); !s)
                return s;
        append_job job = append_to(body_, to.body, keys, values);
        job.through_fp16 = copies_ != nullptr;
        job.position_shift = to.position_shift;
        job.positions = to.positions;
        job.key_encoding = &encodings_.keys;
        job.value_encoding = &encodings_.values;
        if (open_keys_ != nullptr) {
            job.open_layout = &open_keys_->layout;
            job.open_before = open_keys_->block(to.open_begun);
            job.open_after = open_keys_->block(to.open_later);
        }
        return append(job);
    }
    [[nodiscard]] append_job append_to(const plane& p, const slot_run& to, const tensor_view& keys,
                                       const tensor_view& values) const noexcept {
        append_job job{&kernels_.common(current_target()),
                       &p.layout,
                       p.arena.data(),
                       p.block_bytes,
                       to.table,
                       to.first,
                       keys,
                       values,
                       &scratches_};
        job.slots = to.slots;
        return job;
    }

    const layer_encodings& encodings_;
    const kernel_set& kernels_;
    const plane& body_;
    const plane* copies_;
    const plane* open_keys_;
    scratch_pool& scratches_;
};

} // namespace kv1::inline KV1_ABI::detail
