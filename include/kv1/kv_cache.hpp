// SPDX-License-Identifier: Apache-2.0
//
// A paged KV cache that computes attention straight from its packed bits.
//
//   kv1::kv2_cache cache(kv1::uniform_cache(layers, {kv_heads, head_dim, head_dim}, capacity_tokens));
//   auto sequence = cache.create_sequence();
//   for each step, for each layer:
//       cache.append(sequence, layer, {k, tokens, kv_heads, head_dim}, {v, tokens, kv_heads, head_dim});
//       cache.attend(sequence, layer, {q, tokens, query_heads, head_dim}, {out, tokens, query_heads,
//       head_dim});
//
// Keys are cached as they are given, that is after RoPE where a model uses it; every vector is quantized
// before anything attends to it, the newest included. A cached key cannot be moved to another position:
// shifting already rotated keys (context shift) is out of scope, since a rotation of 2-bit codes cannot be
// undone without loss.
//
// Errors: each call has a noexcept `try_` form that returns status or result, and a form that throws
// kv1::error. A failed call leaves the cache as it was. K and V must be finite: NaN, infinity and values that
// the format's fp16 metadata (or fp16 itself) cannot hold are refused, naming layer, KV head, token and
// channel. Queries are not checked: a NaN or infinity in one makes that row's output NaN or meaningless, and
// no other row's.
//
// Threads: const calls may run concurrently; a call that changes the cache needs it for itself.
#pragma once

#include <kv1/attention.hpp>
#include <kv1/cache_description.hpp>
#include <kv1/detail/kernels/registry.hpp>
#include <kv1/executor.hpp>
#include <kv1/layout.hpp>
#include <kv1/page_pool.hpp>
#include <kv1/quantizers/affine.hpp>
#include <kv1/quantizers/binary.hpp>
#include <kv1/quantizers/scaled_binary.hpp>
#include <kv1/status.hpp>
#include <kv1/tensor.hpp>

#include <kv1/detail/append.hpp>
#include <kv1/detail/arena.hpp>
#include <kv1/detail/schedule.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace kv1::inline KV1_ABI {

/// Names a living sequence of one cache. A handle of a destroyed sequence is recognized as stale.
struct sequence_id {
    std::uint32_t slot = std::numeric_limits<std::uint32_t>::max(); ///< of the cache's table
    std::uint32_t generation = 0;                                   ///< tells sequences of one slot apart
    /// Whether they name the same sequence.
    friend bool operator==(sequence_id, sequence_id) = default;
};

/// Which of the two tensors of a layer.
enum class kv_side : std::uint8_t { key, value };

/// Destination of exported rows: packed values, and metadata where the format has it (else the spans stay
/// empty). Row i takes bytes [i * packed_bytes, (i + 1) * packed_bytes); plain formats export their values,
/// little-endian.
struct row_buffers {
    std::span<std::byte> packed;    ///< rows * packed_bytes(format, head_dim)
    std::span<float16> scales = {}; ///< one a row, where the format has scales
    std::span<float16> minima = {}; ///< one a row, where the format has minima
};

/// The cache. Formats lists the storage formats it carries kernels for; Allocator provides the arenas.
/// Memory: one arena per layer, reserved at construction and touched page by page as sequences grow.
template <class Formats = all_formats, class Allocator = std::allocator<std::byte>>
class basic_kv_cache {
public:
    /// The template's arguments.
    /// @{
    using formats_type = Formats;
    using allocator_type = Allocator;
    /// @}

    /// Reserves the arenas: O(layers) plus 4 bytes a page. Errors: invalid_argument and shape_mismatch for a
    /// description that no cache can have, unsupported_format, unsupported_target (KV1_TARGET),
    /// out_of_memory.
    [[nodiscard]] static result<basic_kv_cache> create(const cache_description& description,
                                                       const Allocator& allocator = {}) noexcept {
        basic_kv_cache cache;
        if (const status s = cache.initialize(description, allocator); !s)
            return s;
        return cache;
    }

#if KV1_EXCEPTIONS
    /// As create; throws kv1::error.
    explicit basic_kv_cache(const cache_description& description, const Allocator& allocator = {}) {
        detail::throw_if_error(initialize(description, allocator));
    }
#endif

    /// Caches are moved, not copied: handles stay valid, the source holds nothing and may only be destroyed
    /// or assigned to.
    /// @{
    basic_kv_cache(basic_kv_cache&&) noexcept = default;
    basic_kv_cache& operator=(basic_kv_cache&&) noexcept = default;
    /// @}

    /// What the cache was made from.
    [[nodiscard]] const cache_description& description() const noexcept { return description_; }
    /// How many there are.
    [[nodiscard]] std::size_t layers() const noexcept { return layers_.size(); }
    /// Geometry of one KV head's page of a layer. Precondition: layer < layers().
    [[nodiscard]] const page_layout& layout(std::size_t layer) const noexcept {
        return layers_[layer].layout;
    }

    // ---- sequences

    /// An empty sequence. Amortized O(layers). Errors: out_of_memory.
    [[nodiscard]] result<sequence_id> try_create_sequence() noexcept {
        std::uint32_t slot = 0;
        const status s = detail::guarded([&] {
            if (free_slots_.empty()) {
                free_slots_.reserve(sequences_.size() + 1); // so that destroying never allocates
                sequences_.push_back({});
                sequences_.back().lengths.assign(layers_.size(), 0);
                slot = static_cast<std::uint32_t>(sequences_.size() - 1);
            } else {
                slot = free_slots_.back();
                sequences_[slot].lengths.assign(layers_.size(), 0);
                free_slots_.pop_back();
            }
        });
        if (!s)
            return s;
        sequences_[slot].alive = true;
        return sequence_id{slot, sequences_[slot].generation};
    }

    /// Gives the sequence's pages back. O(pages). Errors: invalid_sequence.
    status try_destroy_sequence(sequence_id id) noexcept {
        sequence* q = find(id);
        if (q == nullptr)
            return stale();
        for (const std::uint32_t block : q->blocks)
            pool_.release(block);
        q->blocks.clear();
        q->alive = false;
        ++q->generation;
        free_slots_.push_back(id.slot);
        return {};
    }

    /// Whether the handle names a living sequence. O(1).
    [[nodiscard]] bool contains(sequence_id id) const noexcept { return find(id) != nullptr; }

    /// Cached tokens of one layer. Errors: invalid_sequence, out_of_range.
    [[nodiscard]] result<std::size_t> try_length(sequence_id id, std::size_t layer) const noexcept {
        const sequence* q = find(id);
        if (q == nullptr)
            return stale();
        if (layer >= layers_.size())
            return no_such_layer(layer);
        return q->lengths[layer];
    }
    /// Tokens that every layer holds.
    [[nodiscard]] result<std::size_t> try_length(sequence_id id) const noexcept {
        const sequence* q = find(id);
        if (q == nullptr)
            return stale();
        return *std::min_element(q->lengths.begin(), q->lengths.end());
    }

    // ---- append

    /// Quantizes and stores the next tokens of one layer: keys [tokens][kv_heads][key_dim], values
    /// [tokens][kv_heads][value_dim]. Many tokens at once give the same bytes as one by one. Layers may be
    /// appended to in any order. The executor gets one task per KV head. O(values). Errors: invalid_sequence,
    /// out_of_range, shape_mismatch, capacity_exceeded, out_of_memory, non_finite, not_representable.
    template <executor E = inline_executor>
    status try_append(sequence_id id, std::size_t layer, tensor_view keys, tensor_view values,
                      E&& run = {}) noexcept {
        sequence* q = find(id);
        if (q == nullptr)
            return stale();
        if (layer >= layers_.size())
            return no_such_layer(layer);
        const layer_state& l = layers_[layer];
        if (const status s = check_append(l, layer, keys, values); !s)
            return s;
        const std::size_t length = q->lengths[layer], tokens = keys.tokens();
        if (tokens == 0)
            return {};
        const std::size_t had = q->blocks.size();
        if (const status s = grow(*q, length, tokens); !s)
            return s;

        const detail::append_job job{&detail::common_kernels(), &l.layout, l.arena.data(), l.block_bytes,
                                     q->blocks.data(),          length,    keys,           values};
        if (const status s = detail::append_heads(job, l.shape.kv_heads, run); !s) {
            shrink(*q, had); // what was written lies past the sequence's length: it is not data
            error_location where = s.where();
            where.layer = static_cast<std::int64_t>(layer);
            return {s.code(), s.rule(), where};
        }
        q->lengths[layer] = length + tokens;
        return {};
    }

    // ---- attend

    /// Attention of query rows over the cached tokens of one layer, from the packed codes:
    ///   out[i][h] = sum_t softmax_t(scale * q[i][h] . k[t][h / group]) v[t][h / group]
    /// queries [tokens][query_heads][key_dim], outputs [tokens][query_heads][value_dim] in any scalar type;
    /// query_heads is a multiple of kv_heads (group = query_heads / kv_heads). A query that sees no token
    /// gets zeros, and -infinity as its log_sum_exp. O(tokens * query_heads * length * head_dim); no
    /// allocation unless few heads meet a long sequence, whose partial results then take 4 * (value_dim + 2)
    /// bytes per range and row. The result does not depend on the executor. Errors: invalid_sequence,
    /// out_of_range, shape_mismatch, invalid_argument, out_of_memory.
    template <executor E = inline_executor>
    status try_attend(sequence_id id, std::size_t layer, tensor_view queries, mutable_tensor_view outputs,
                      const attention_options& options = {}, E&& run = {}) const noexcept {
        const sequence* q = find(id);
        if (q == nullptr)
            return stale();
        if (layer >= layers_.size())
            return no_such_layer(layer);
        const layer_state& l = layers_[layer];
        const std::size_t length = q->lengths[layer];
        if (const status s = check_attend(l, layer, length, queries, outputs, options); !s)
            return s;
        if (queries.tokens() == 0)
            return {};

        const target t = current_target();
        detail::attention_job job{};
        job.target = &detail::common_registry<>::at(t);
        job.key_kernels = detail::format_registry<Formats>::find(t, l.shape.key_format);
        job.value_kernels = detail::format_registry<Formats>::find(t, l.shape.value_format);
        job.mode = options.mode;
        job.layout = &l.layout;
        job.pages = l.arena.data();
        job.block_stride = l.block_bytes;
        job.block_table = q->blocks.data();
        job.last_token = std::min(length, options.range.last);
        job.first_visible = std::min(options.range.first, job.last_token);
        job.group = queries.heads() / l.shape.kv_heads;
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push // at -O3 g++ 12 sees the payload of an empty optional and not the test before it
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
        job.scale = options.scale ? *options.scale : 1.0f / std::sqrt(static_cast<float>(l.shape.key_dim));
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
        const attention_mask& mask = options.mask;
        job.visible_base =
            mask.is_causal() ? mask.first_position().value_or(length - queries.tokens()) + 1 : length;
        job.visible_step = mask.is_causal() ? 1 : 0;
        job.first_position = mask.first_position() ? static_cast<std::ptrdiff_t>(*mask.first_position())
                                                   : static_cast<std::ptrdiff_t>(length) -
                                                         static_cast<std::ptrdiff_t>(queries.tokens());
        // a window that reaches past the first token of the first query's is no window
        job.window = options.window < std::numeric_limits<std::size_t>::max() / 4 ? options.window : 0;
        job.soft_cap = options.soft_cap;
        if (!mask.visible().empty()) {
            job.mask = mask.visible().data();
            job.mask_first = length - mask.explicit_keys();
            job.mask_stride = mask.explicit_keys();
        }
        const auto optional = [](std::span<const float> x) { return x.empty() ? nullptr : x.data(); };
        return detail::attend_heads(job, l.shape.kv_heads, queries, outputs,
                                    {optional(options.alibi_slopes), optional(options.sinks)},
                                    options.log_sum_exp, run);
    }

    // ---- rows

    /// Copies cached vectors out in row format, bit for bit what the quantizer made of them.
    /// Errors: invalid_sequence, out_of_range, shape_mismatch (a buffer's size).
    status try_export_rows(sequence_id id, std::size_t layer, kv_side side, std::size_t kv_head,
                           std::size_t first, std::size_t count, row_buffers out) const noexcept {
        if (const status s = check_rows(id, layer, kv_head, first, count); !s)
            return s;
        const section_layout& section = section_of(layer, side);
        const detail::format_traits t = section.traits();
        const std::size_t row = packed_bytes(section.format, section.channels);
        if (out.packed.size() != count * row ||
            out.scales.size() != (t.metadata != detail::metadata_kind::none ? count : 0) ||
            out.minima.size() != (t.metadata == detail::metadata_kind::scale_and_minimum ? count : 0))
            return {errc::shape_mismatch, "the buffers do not fit the rows"};
        const auto bits = static_cast<std::size_t>(t.code_bits != 0 ? t.code_bits : t.plain_bits);
        std::fill(out.packed.begin(), out.packed.end(), std::byte{0});
        for (std::size_t i = 0; i < count; ++i) {
            const std::byte* page = page_of(*find(id), layer, kv_head, first + i);
            const std::size_t token = (first + i) % description_.page_tokens;
            std::byte* bytes = out.packed.data() + i * row;
            for (std::size_t c = 0; c < section.channels; ++c) {
                const std::uint64_t code = detail::load_code(section, page, token, c);
                const std::uint64_t shifted = code << (c * bits % 8);
                for (std::size_t k = 0; k < (c * bits % 8 + bits + 7) / 8; ++k)
                    bytes[c * bits / 8 + k] |= static_cast<std::byte>(shifted >> (8 * k) & 0xffu);
            }
            const detail::row_metadata m = detail::load_metadata(section, page, token);
            if (!out.scales.empty())
                out.scales[i] = float16::from_bits(m.scale);
            if (!out.minima.empty())
                out.minima[i] = float16::from_bits(m.minimum);
        }
        return {};
    }

    /// Decodes cached vectors: out is [count][channels]. Errors as try_export_rows.
    status try_read(sequence_id id, std::size_t layer, kv_side side, std::size_t kv_head, std::size_t first,
                    std::size_t count, std::span<float> out) const noexcept {
        if (const status s = check_rows(id, layer, kv_head, first, count); !s)
            return s;
        const section_layout& section = section_of(layer, side);
        if (out.size() != count * section.channels)
            return {errc::shape_mismatch, "the buffer does not fit the rows"};
        for (std::size_t i = 0; i < count; ++i) {
            const std::byte* page = page_of(*find(id), layer, kv_head, first + i);
            const std::size_t token = (first + i) % description_.page_tokens;
            const detail::row_metadata m = detail::load_metadata(section, page, token);
            for (std::size_t c = 0; c < section.channels; ++c)
                out[i * section.channels + c] =
                    detail::decode_value(section.format, detail::load_code(section, page, token, c), m);
        }
        return {};
    }

    // ---- statistics

    /// Over all sequences. O(sequences * layers).
    [[nodiscard]] cache_statistics statistics() const noexcept {
        cache_statistics s = empty_statistics();
        for (const sequence& q : sequences_)
            if (q.alive)
                add(s, q);
        return s;
    }
    /// Of one sequence. Errors: invalid_sequence.
    [[nodiscard]] result<cache_statistics> try_statistics(sequence_id id) const noexcept {
        const sequence* q = find(id);
        if (q == nullptr)
            return stale();
        cache_statistics s = empty_statistics();
        add(s, *q);
        return s;
    }
    /// Pages that no sequence holds. O(1).
    [[nodiscard]] std::size_t available_pages() const noexcept { return pool_.available(); }

#if KV1_EXCEPTIONS
    /// As the try_ forms; throw kv1::error.
    /// @{
    [[nodiscard]] sequence_id create_sequence() { return try_create_sequence().value(); }
    void destroy_sequence(sequence_id id) { detail::throw_if_error(try_destroy_sequence(id)); }
    [[nodiscard]] std::size_t length(sequence_id id, std::size_t layer) const {
        return try_length(id, layer).value();
    }
    [[nodiscard]] std::size_t length(sequence_id id) const { return try_length(id).value(); }
    template <executor E = inline_executor>
    void append(sequence_id id, std::size_t layer, tensor_view keys, tensor_view values, E&& run = {}) {
        detail::throw_if_error(try_append(id, layer, keys, values, run));
    }
    template <executor E = inline_executor>
    void attend(sequence_id id, std::size_t layer, tensor_view queries, mutable_tensor_view outputs,
                const attention_options& options = {}, E&& run = {}) const {
        detail::throw_if_error(try_attend(id, layer, queries, outputs, options, run));
    }
    void export_rows(sequence_id id, std::size_t layer, kv_side side, std::size_t kv_head, std::size_t first,
                     std::size_t count, row_buffers out) const {
        detail::throw_if_error(try_export_rows(id, layer, side, kv_head, first, count, out));
    }
    void read(sequence_id id, std::size_t layer, kv_side side, std::size_t kv_head, std::size_t first,
              std::size_t count, std::span<float> out) const {
        detail::throw_if_error(try_read(id, layer, side, kv_head, first, count, out));
    }
    [[nodiscard]] cache_statistics statistics(sequence_id id) const { return try_statistics(id).value(); }
    /// @}
#endif

private:
    struct sequence {
        std::vector<std::uint32_t> blocks;
        std::vector<std::size_t> lengths; // tokens, by layer
        std::uint32_t generation = 0;
        bool alive = false;
    };

    struct layer_state {
        layer_description shape;
        page_layout layout;
        std::size_t block_bytes = 0; // of all KV heads
        detail::arena<Allocator> arena;
    };

    basic_kv_cache() = default;

    static status stale() noexcept { return {errc::invalid_sequence, "the handle names no living sequence"}; }
    static status no_such_layer(std::size_t layer) noexcept {
        return {errc::out_of_range, "no such layer", {.layer = static_cast<std::int64_t>(layer)}};
    }

    [[nodiscard]] const sequence* find(sequence_id id) const noexcept {
        if (id.slot >= sequences_.size())
            return nullptr;
        const sequence& q = sequences_[id.slot];
        return q.alive && q.generation == id.generation ? &q : nullptr;
    }
    [[nodiscard]] sequence* find(sequence_id id) noexcept {
        return const_cast<sequence*>(std::as_const(*this).find(id));
    }

    status initialize(const cache_description& d, const Allocator& allocator) noexcept {
        if (detail::environment_target().refused)
            return {errc::unsupported_target, "KV1_TARGET names no target that this processor supports"};
        if (d.layers.empty() || d.page_tokens == 0 || d.page_tokens % tile_tokens != 0 ||
            d.capacity_tokens == 0)
            return {errc::invalid_argument, "layers, capacity and page size are positive, pages whole tiles"};
        const std::size_t blocks =
            d.capacity_tokens / d.page_tokens + (d.capacity_tokens % d.page_tokens != 0 ? 1 : 0);
        if (blocks > std::numeric_limits<std::uint32_t>::max() - 1)
            return {errc::invalid_argument, "more than 2^32 - 2 pages"};
        basic_kv_cache fresh;
        const status s = detail::guarded([&] {
            fresh.description_ = d;
            fresh.pool_ = page_pool(static_cast<std::uint32_t>(blocks));
            fresh.layers_.reserve(d.layers.size());
        });
        if (!s)
            return s;
        for (std::size_t i = 0; i < d.layers.size(); ++i) {
            const layer_description& l = d.layers[i];
            const error_location where{.layer = static_cast<std::int64_t>(i)};
            if (l.kv_heads == 0 || l.key_dim == 0 || l.value_dim == 0)
                return {errc::invalid_argument, "KV heads and head dims are positive", where};
            if (l.key_dim > detail::max_head_dim || l.value_dim > detail::max_head_dim)
                return {errc::invalid_argument, "head dims are at most 4096", where};
            if (!Formats::contains(l.key_format) || !Formats::contains(l.value_format))
                return {errc::unsupported_format, "the cache type was not compiled for this format", where};
            layer_state state{
                l, page_layout(l.key_format, l.key_dim, l.value_format, l.value_dim, d.page_tokens), 0,
                detail::arena<Allocator>(allocator)};
            constexpr std::size_t limit = std::numeric_limits<std::ptrdiff_t>::max();
            if (l.kv_heads > limit / state.layout.bytes() ||
                blocks > limit / (l.kv_heads * state.layout.bytes()))
                return {errc::out_of_memory, "the arena's size overflows", where};
            state.block_bytes = l.kv_heads * state.layout.bytes();
            if (!state.arena.allocate(blocks * state.block_bytes))
                return {errc::out_of_memory, "no memory for the arena", where};
            fresh.layers_.push_back(std::move(state)); // within the reserved capacity
        }
        *this = std::move(fresh);
        return {};
    }

    static status check_append(const layer_state& l, std::size_t layer, const tensor_view& keys,
                               const tensor_view& values) noexcept {
        const error_location where{.layer = static_cast<std::int64_t>(layer)};
        if (keys.tokens() != values.tokens())
            return {errc::shape_mismatch, "keys and values have the same number of tokens", where};
        if (keys.heads() != l.shape.kv_heads || values.heads() != l.shape.kv_heads)
            return {errc::shape_mismatch, "keys and values have the layer's number of KV heads", where};
        if (keys.channels() != l.shape.key_dim || values.channels() != l.shape.value_dim)
            return {errc::shape_mismatch, "keys and values have the layer's head dims", where};
        if (keys.tokens() != 0 && (keys.data() == nullptr || values.data() == nullptr))
            return {errc::invalid_argument, "keys and values are not null", where};
        return {};
    }

    static status check_attend(const layer_state& l, std::size_t layer, std::size_t length,
                               const tensor_view& queries, const mutable_tensor_view& outputs,
                               const attention_options& options) noexcept {
        const error_location where{.layer = static_cast<std::int64_t>(layer)};
        if (queries.heads() == 0 || queries.heads() % l.shape.kv_heads != 0)
            return {errc::shape_mismatch, "query heads are a multiple of the KV heads", where};
        if (queries.channels() != l.shape.key_dim || outputs.channels() != l.shape.value_dim)
            return {errc::shape_mismatch, "queries and outputs have the layer's head dims", where};
        if (outputs.tokens() != queries.tokens() || outputs.heads() != queries.heads())
            return {errc::shape_mismatch, "one output row per query row", where};
        if (queries.tokens() != 0 && (queries.data() == nullptr || outputs.data() == nullptr))
            return {errc::invalid_argument, "queries and outputs are not null", where};
        if (options.scale && !detail::is_finite(*options.scale))
            return {errc::invalid_argument, "the softmax scale is finite", where};
        if (!options.log_sum_exp.empty() && options.log_sum_exp.size() != queries.tokens() * queries.heads())
            return {errc::shape_mismatch, "one log-sum-exp per query row", where};
        if (!(options.soft_cap >= 0.0f) || !detail::is_finite(options.soft_cap))
            return {errc::invalid_argument, "the soft cap is finite and not negative", where};
        for (const std::span<const float> per_head : {options.alibi_slopes, options.sinks}) {
            if (!per_head.empty() && per_head.size() != queries.heads())
                return {errc::shape_mismatch, "one slope, and one sink logit, per query head", where};
            if (!std::all_of(per_head.begin(), per_head.end(), [](float x) { return detail::is_finite(x); }))
                return {errc::invalid_argument, "slopes and sink logits are finite", where};
        }
        const attention_mask& mask = options.mask;
        if (mask.is_causal() && !mask.first_position() && queries.tokens() > length)
            return {errc::shape_mismatch, "causal queries are among the cached tokens", where};
        if (mask.is_causal() &&
            mask.first_position().value_or(0) > std::numeric_limits<std::size_t>::max() / 2)
            return {errc::out_of_range, "the first position overflows", where};
        if (!mask.is_causal() && (mask.explicit_keys() > length ||
                                  mask.visible().size() != mask.explicit_keys() * queries.tokens()))
            return {errc::shape_mismatch, "the mask covers queries times its keys, all of them cached",
                    where};
        return {};
    }

    [[nodiscard]] status check_rows(sequence_id id, std::size_t layer, std::size_t kv_head, std::size_t first,
                                    std::size_t count) const noexcept {
        const sequence* q = find(id);
        if (q == nullptr)
            return stale();
        if (layer >= layers_.size())
            return no_such_layer(layer);
        if (kv_head >= layers_[layer].shape.kv_heads)
            return {errc::out_of_range, "no such KV head", {.kv_head = static_cast<std::int64_t>(kv_head)}};
        if (first > q->lengths[layer] || count > q->lengths[layer] - first)
            return {errc::out_of_range, "the tokens are not all cached"};
        return {};
    }

    [[nodiscard]] const section_layout& section_of(std::size_t layer, kv_side side) const noexcept {
        const page_layout& p = layers_[layer].layout;
        return side == kv_side::key ? p.keys() : p.values();
    }

    [[nodiscard]] const std::byte* page_of(const sequence& q, std::size_t layer, std::size_t kv_head,
                                           std::size_t token) const noexcept {
        const layer_state& l = layers_[layer];
        const auto block = static_cast<std::size_t>(q.blocks[token / description_.page_tokens]);
        return l.arena.data() + block * l.block_bytes + kv_head * l.layout.bytes();
    }

    // Pages for tokens length ... length + tokens - 1; all or none.
    status grow(sequence& q, std::size_t length, std::size_t tokens) noexcept {
        const std::size_t page = description_.page_tokens;
        if (tokens > pool_.capacity() * page)
            return {errc::capacity_exceeded, "no free page is left"};
        const std::size_t needed = (length + tokens + page - 1) / page;
        if (needed <= q.blocks.size())
            return {};
        if (needed - q.blocks.size() > pool_.available())
            return {errc::capacity_exceeded, "no free page is left"};
        if (const status s = detail::guarded([&] {
                if (needed > q.blocks.capacity())
                    q.blocks.reserve(std::max(needed, 2 * q.blocks.capacity()));
            });
            !s)
            return s;
        while (q.blocks.size() < needed) {
            const std::uint32_t block = *pool_.allocate();
            // lanes past the stored tokens are multiplied by zero weights: they must be finite
            for (layer_state& l : layers_)
                std::memset(l.arena.data() + static_cast<std::size_t>(block) * l.block_bytes, 0,
                            l.block_bytes);
            q.blocks.push_back(block);
        }
        return {};
    }

    void shrink(sequence& q, std::size_t blocks) noexcept {
        while (q.blocks.size() > blocks) {
            pool_.release(q.blocks.back());
            q.blocks.pop_back();
        }
    }

    [[nodiscard]] cache_statistics empty_statistics() const noexcept {
        cache_statistics s;
        s.layers = layers_.size();
        s.pages_total = pool_.capacity();
        for (const layer_state& l : layers_)
            s.bytes_reserved += pool_.capacity() * l.block_bytes;
        return s;
    }

    void add(cache_statistics& s, const sequence& q) const noexcept {
        ++s.sequences;
        s.tokens += *std::max_element(q.lengths.begin(), q.lengths.end());
        s.pages_in_use += q.blocks.size();
        for (std::size_t i = 0; i < layers_.size(); ++i) {
            const layer_description& d = layers_[i].shape;
            s.bytes_in_use += q.blocks.size() * layers_[i].block_bytes;
            s.bytes_stored += q.lengths[i] * d.kv_heads *
                              (row_bytes(d.key_format, d.key_dim) + row_bytes(d.value_format, d.value_dim));
            s.bytes_as_fp16 += q.lengths[i] * d.kv_heads * 2 * (d.key_dim + d.value_dim);
        }
    }

    cache_description description_;
    std::vector<layer_state> layers_;
    page_pool pool_;
    std::vector<sequence> sequences_;
    std::vector<std::uint32_t> free_slots_;
};

/// A cache for any mix of formats.
using kv_cache = basic_kv_cache<>;
/// The 2-bit cache: K and V in affine<2>, 12 bytes per vector at head_dim 32, 36 at 128.
using kv2_cache = basic_kv_cache<formats<affine<2>>>;

} // namespace kv1::inline KV1_ABI
