// SPDX-License-Identifier: Apache-2.0
//
// The shape of a cache, and what it costs. Plain data; checked when a cache is made from it.
#pragma once

#include <kv1/encoding.hpp>
#include <kv1/format.hpp>
#include <kv1/layout.hpp>

#include <cstddef>
#include <vector>

namespace kv1::inline KV1_ABI {

/// One layer: how many KV heads, how wide, how stored. K and V are independent of each other. Numbers are
/// std::size_t, as in a shape that is written once; an int variable between braces is narrowed, and wants a
/// cast.
struct layer_description {
    std::size_t kv_heads = 0;                    ///< of K and of V
    std::size_t key_dim = 0;                     ///< head_dim of keys and queries
    std::size_t value_dim = 0;                   ///< head_dim of values and outputs
    kv_format key_format = kv_format::affine2;   ///< how K is stored
    kv_format value_format = kv_format::affine2; ///< how V is stored
    /// A query sees this many tokens, itself included; 0: all. Pages that no later query can see are freed
    /// when the sequence is committed.
    std::size_t sliding_window = 0;
    /// Tokens behind the sliding window that a commit keeps all the same: truncate() goes back that far, to
    /// where a query would see them again, and attend() serves queries at those positions. They cost whole
    /// pages (cache_statistics::bytes_retained); 0: a commit frees all that no later query can see.
    std::size_t window_retention = 0;
    /// What happens to vectors before they are stored, and how their levels are chosen; encoding.hpp.
    /// @{
    vector_encoding key_encoding = {};
    vector_encoding value_encoding = {};
    /// @}
    /// Channels that share a scale and minimum; 0: all of a vector. In affine and compact formats, without
    /// error weights; a multiple of group_unit that divides the head dim. Every group is stored as a vector
    /// of its own would be, after means and rotation, for 4 bytes of metadata (compact: 2) each.
    /// @{
    std::size_t key_group = 0;
    std::size_t value_group = 0;
    /// @}
    /// per_channel: a channel's keys share a scale and minimum over all tokens of a page, which suits keys
    /// some of whose channels are large in every token. A page's keys are kept in fp16 until it is full
    /// (kv_cache.hpp says what follows from that). In formats of up to 4 bits whose levels can be
    /// chosen, without key_group, on pages of at most 4096 tokens, in caches that carry fp16.
    quantization_axis key_axis = quantization_axis::per_token;
    /// The values are the first value_dim channels of the keys, and are stored as part of them: the shared
    /// latent of multi-head latent attention (MLA; DeepSeek-V2, 2024). Outputs are sums of keys as they are
    /// decoded. value_format and value_group are then the keys' own, value_encoding is empty, and a group of
    /// channels or a Hadamard block lies on one side of value_dim. Not with keys per channel, whose scales
    /// belong to pages. latent_layer() makes such a layer.
    bool values_in_keys = false;
    /// Whether all fields are the same.
    friend bool operator==(const layer_description&, const layer_description&) = default;
};

/// A layer of multi-head latent attention as it is decoded: one KV head, which all query heads share; a key
/// is the latent (value_dim channels) followed by the rotary part, and the latent is the value. Queries and
/// outputs are those of the latent space: the up-projections are applied to queries before and to outputs
/// after. The softmax scale is the model's (attention_options::scale), for key_dim is not the head dim that
/// it trained with.
[[nodiscard]] inline layer_description latent_layer(std::size_t key_dim, std::size_t value_dim,
                                                    kv_format format = kv_format::affine2) {
    layer_description l{1, key_dim, value_dim, format, format};
    l.values_in_keys = true;
    return l;
}

/// A whole cache: its layers, and room for how many tokens.
struct cache_description {
    std::vector<layer_description> layers; ///< in the model's order
    std::size_t capacity_tokens = 0;       ///< in whole pages, over all sequences
    std::size_t page_tokens = 64;          ///< a multiple of tile_tokens

    /// The first fp16_sinks tokens of a sequence and a query's last fp16_window tokens, itself included, are
    /// attended to in fp16 and the tokens between them in the layer's formats: kv_cache.hpp says how. Layers
    /// with a sliding window, and those that store K and V plain, are left as they are.
    /// @{
    std::size_t fp16_sinks = 0;
    std::size_t fp16_window = 0;
    /// @}

    /// Capacity of the layers with a sliding window, and of the fp16 copies and open pages (two of which do
    /// for a sequence); 0: capacity_tokens. Memory that is never used is reserved only, so smaller numbers
    /// matter where address space or overcommitment does.
    /// @{
    std::size_t window_capacity_tokens = 0;
    std::size_t fp16_capacity_tokens = 0;
    /// @}

    /// Asks the system to back the arenas with large pages (Linux; elsewhere nothing).
    bool huge_pages = false;
    /// Events of the prefix index that are kept until they are taken; 0: none are recorded.
    std::size_t prefix_events = 0;
};

/// How a page of one layer and KV head lies.
[[nodiscard]] constexpr page_layout layout_of(const layer_description& l, std::size_t page_tokens) noexcept {
    if (l.values_in_keys)
        return page_layout::with_values_in_keys(l.key_format, l.key_dim, l.value_dim, page_tokens,
                                                l.key_group);
    return {l.key_format, l.key_dim,   l.value_format, l.value_dim,
            page_tokens,  l.key_group, l.value_group,  l.key_axis};
}

/// Bytes of one page of every layer, all KV heads, fp16 copies and fp16 keys of open pages left out.
[[nodiscard]] inline std::size_t bytes_per_page(const cache_description& d) noexcept {
    std::size_t bytes = 0;
    for (const layer_description& l : d.layers)
        bytes += l.kv_heads * layout_of(l, d.page_tokens).bytes();
    return bytes;
}

/// capacity_tokens for a pool of so many bytes: whole pages that fit.
[[nodiscard]] inline std::size_t capacity_for_bytes(const cache_description& d, std::size_t bytes) noexcept {
    const std::size_t page = bytes_per_page(d);
    return page == 0 ? 0 : bytes / page * d.page_tokens;
}

/// The usual case: every layer alike.
[[nodiscard]] inline cache_description uniform_cache(std::size_t layers, const layer_description& layer,
                                                     std::size_t capacity_tokens,
                                                     std::size_t page_tokens = 64) {
    cache_description d;
    d.layers.assign(layers, layer);
    d.capacity_tokens = capacity_tokens;
    d.page_tokens = page_tokens;
    return d;
}

} // namespace kv1::inline KV1_ABI
