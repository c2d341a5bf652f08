// SPDX-License-Identifier: Apache-2.0
//
// One layer's bytes, and all that is asked of them: memory for blocks, blocks cleared and copied, vectors
// written to slots, attention over a block table, vectors read. Nothing here knows sequences, lengths or
// reference counts: the caller says which slots it means, and sees to it that nobody else writes to them. A
// cache keeps its sequences on top of this; who keeps other books needs nothing of the cache but this header.
//
//   plane   a layer's pages in one layout. Block b lies at b * block_bytes: the pages of its KV heads, side
//   by
//           side
//   table   numbers of blocks, in the order of their tokens
//   slot    a place of a table: slot s is token s % page_tokens of block table[s / page_tokens]
//
// A layer has a body, the plane of its own formats. Beside it there may be two more: fp16 copies of its
// vectors, and, where keys are quantized per channel, fp16 keys of pages that are not full yet.
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
#include <kv1/detail/vector_codec.hpp>
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

struct plane {
    page_layout layout;
    std::size_t layer = 0;
    std::size_t kv_heads = 0;
    std::size_t group = 0;       // of planes whose blocks have the same numbers (cache_storage.hpp)
    std::size_t block_bytes = 0; // of all KV heads
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

    // Whether memory can have that many blocks of a layout's pages.
    [[nodiscard]] static bool addressable(const page_layout& layout, std::size_t kv_heads,
                                          std::size_t blocks) noexcept {
        constexpr std::size_t most_bytes = (std::numeric_limits<std::ptrdiff_t>::max)();
        return kv_heads <= most_bytes / layout.bytes() && blocks <= most_bytes / (kv_heads * layout.bytes());
    }
    // Memory for blocks, in an arena that has none: not touched yet. False: no memory.
    [[nodiscard]] bool allocate(detail::arena& to, std::size_t blocks, bool huge_pages) const noexcept {
        if (!addressable(layout, kv_heads, blocks) || !to.allocate(blocks * block_bytes))
            return false;
        if (huge_pages)
            advise_huge_pages(to.data(), blocks * block_bytes);
        return true;
    }

    // A block is cleared before it is first written to: slots past the stored tokens meet weights of zero, so
    // what they hold must be finite.
    void clear(std::uint32_t index) noexcept { std::memset(block(index), 0, block_bytes); }
    void copy(std::uint32_t from, std::uint32_t to) noexcept {
        std::memcpy(block(to), block(from), block_bytes);
    }
};

// A layer's shape, and how its vectors become what its body holds.
struct layer_codecs {
    const layer_description& shape;
    vector_codec keys = {}, values = {};

    // Checks the shape, but for what concerns windows, and makes the codecs. Errors: invalid_argument,
    // shape_mismatch, unsupported_format, non_finite, out_of_memory.
    status make(std::size_t page_tokens, const kernel_set& kernels) noexcept {
        const layer_description& l = shape;
        if (l.kv_heads == 0 || l.key_dim == 0 || l.value_dim == 0)
            return {errc::invalid_argument, "KV heads and head dims are positive"};
        if (l.key_dim > max_head_dim || l.value_dim > max_head_dim)
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
        if (status s = make_codec(l.key_format, l.key_encoding, l.kv_heads, l.key_dim, l.key_group, keys); !s)
            return s;
        if (l.values_in_keys)
            return make_first_channels(keys, l.kv_heads, l.value_dim, values);
        return make_codec(l.value_format, l.value_encoding, l.kv_heads, l.value_dim, l.value_group, values);
    }

private:
    static bool groups_fit(kv_format f, std::size_t head_dim, std::size_t group) noexcept {
        const metadata_kind kind = traits_of(f).metadata;
        return group == 0 || (group % group_unit == 0 && head_dim % group == 0 &&
                              (kind == metadata_kind::scale_and_minimum || kind == metadata_kind::compact));
    }

    // The rule that keys per channel break, or null.
    [[nodiscard]] static const char* broken_axis_rule(const layer_description& l,
                                                      std::size_t page_tokens) noexcept {
        const format_traits t = traits_of(l.key_format);
        if ((t.metadata != metadata_kind::scale_and_minimum && t.metadata != metadata_kind::compact) ||
            t.code_bits > 4)
            return "keys per channel need an affine or compact format of at most 4 bits";
        if (l.key_group != 0)
            return "keys per channel have no groups of channels";
        if (page_tokens > max_vector_length)
            return "keys per channel need pages of at most 4096 tokens";
        return nullptr;
    }

    // The rule that values in keys break, or null.
    [[nodiscard]] static const char* broken_latent_rule(const layer_description& l) noexcept {
        if (l.value_dim > l.key_dim)
            return "values in keys have at most as many channels as the keys";
        if (l.value_format != l.key_format || l.value_group != l.key_group)
            return "values in keys have the keys' format and groups of channels";
        if (l.value_encoding != vector_encoding{})
            return "values in keys have the keys' encoding, and none of their own";
        if (l.key_axis != quantization_axis::per_token)
            return "keys per channel hold no values: their scales change from page to page";
        if (l.key_encoding.hadamard != 0 && l.value_dim % l.key_encoding.hadamard != 0)
            return "values in keys end where a Hadamard block of the keys does";
        if (longest_block(layout_of(l, tile_tokens)) == 0)
            return "values in keys take at most 4096 bytes a token, in formats of 1 and 3 bits 1024";
        return nullptr;
    }
};

// The slots that vectors go to: the i-th to slot first + i or, where slots are listed, to slots[i].
struct slot_run {
    const std::uint32_t* table = nullptr;
    std::size_t first = 0;
    const std::uint32_t* slots = nullptr;
};

// Where a slot lies.
struct slot_place {
    std::uint32_t block;
    std::size_t token; // of the block's pages
};

// A view: codecs, kernels, planes and the pool that tasks take their scratch from outlive it. Its calls write
// to pages, though planes come as const: which pages may be written to is the caller's affair, as are two
// calls at once.
class layer_store {
public:
    layer_store(const layer_codecs& codecs, const kernel_set& kernels, const plane& body, const plane* copies,
                const plane* open_keys, scratch_pool& scratches) noexcept
        : codecs_(codecs), kernels_(kernels), body_(body), copies_(copies), open_keys_(open_keys),
          scratches_(scratches) {}

    [[nodiscard]] const plane& body() const noexcept { return body_; }
    [[nodiscard]] const plane* copies() const noexcept { return copies_; }
    [[nodiscard]] const plane* open_keys() const noexcept { return open_keys_; }

    // ---- write

    // Blocks are cleared, or hold what was written before. Keys per channel take slots in order, not listed.
    struct destination {
        slot_run body;
        slot_run copies{}; // where the layer has copies
        // where it has open keys: the block for the page that the first slot lies in, if that page has begun,
        // and the block for those after it
        std::uint32_t open_begun = 0, open_later = 0;
    };

    // Vectors [tokens][kv_heads][channels] of the layer's shape, encoded. Errors: those of encoding, naming
    // KV head, token and channel; slots then hold what nobody should read.
    status write(const destination& to, const tensor_view& keys, const tensor_view& values,
                 executor_view run) const noexcept {
        return to_planes(to, keys, values,
                         [&](const append_job& job) { return append_heads(job, body_.kv_heads, run); });
    }
    // The same of one KV head.
    [[nodiscard]] status write_head(const destination& to, const tensor_view& keys, const tensor_view& values,
                                    std::size_t kv_head) const noexcept {
        return to_planes(to, keys, values, [&](const append_job& job) { return append_head(job, kv_head); });
    }
    // A row as it is stored, which fits() and is finite.
    void write_row(kv_side side, const slot_place& to, std::size_t kv_head, const const_row_buffers& from,
                   std::size_t row) const noexcept {
        store_row(section(side), const_cast<std::byte*>(body_.page(to.block, kv_head)), to.token, from, row);
    }

    // ---- attend

    // What attention needs to know of a plane. Of whom each query sees (attention_job's ranges of slots,
    // masks and windows) nothing is said yet.
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
        job.group = query_heads / body_.kv_heads;
        job.scale = scale(options);
        job.soft_cap = options.soft_cap;
        if (&p == &body_) { // fp16 copies are as they were given
            job.key_hadamard = codecs_.keys.recipe.hadamard;
            job.value_hadamard = codecs_.values.recipe.hadamard;
            job.key_means = codecs_.keys.mean(0);
            job.value_means = codecs_.values.mean(0);
        }
        return job;
    }
    // Keys of slots from `from` on, in a page that is not full, are read from a block of open keys.
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
                            {optional(options.alibi_slopes), optional(options.sinks)}, options.log_sum_exp,
                            run);
    }
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push // at -O3 g++ 12 sees the payload of an empty optional and not the test before it
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
    [[nodiscard]] float scale(const attention_options& options) const noexcept {
        return options.scale ? *options.scale : 1.0f / std::sqrt(static_cast<float>(codecs_.shape.key_dim));
    }
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

    // ---- read

    [[nodiscard]] const section_layout& section(kv_side side) const noexcept {
        return side == kv_side::key ? body_.layout.keys() : body_.layout.values();
    }
    // A vector as it was given, but for what encoding took from it. Precondition: it is in the body.
    void read(kv_side side, const slot_place& at, std::size_t kv_head, std::span<float> out) const noexcept {
        decode_row(section(side), body_.page(at.block, kv_head), at.token, out);
        codec(side).restore(out, kv_head);
    }
    // The same of an open key.
    void read_open_key(const slot_place& at, std::size_t kv_head, std::span<float> out) const noexcept {
        decode_row(open_keys_->layout.keys(), open_keys_->page(at.block, kv_head), at.token, out);
        codecs_.keys.restore(out, kv_head);
    }
    // A vector as it is stored.
    void read_row(kv_side side, const slot_place& at, std::size_t kv_head, const row_buffers& out,
                  std::size_t row) const noexcept {
        export_row(section(side), body_.page(at.block, kv_head), at.token, out, row);
    }

private:
    [[nodiscard]] const vector_codec& codec(kv_side side) const noexcept {
        return side == kv_side::key ? codecs_.keys : codecs_.values;
    }

    // The fp16 copies first, since what they refuse is refused.
    template <class Append>
    status to_planes(const destination& to, const tensor_view& keys, const tensor_view& values,
                     Append&& append) const noexcept {
        if (copies_ != nullptr)
            if (const status s = append(append_to(*copies_, to.copies, keys, values)); !s)
                return s;
        append_job job = append_to(body_, to.body, keys, values);
        job.through_fp16 = copies_ != nullptr;
        job.key_codec = &codecs_.keys;
        job.value_codec = &codecs_.values;
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

    const layer_codecs& codecs_;
    const kernel_set& kernels_;
    const plane& body_;
    const plane* copies_;
    const plane* open_keys_;
    scratch_pool& scratches_;
};

} // namespace kv1::inline KV1_ABI::detail
