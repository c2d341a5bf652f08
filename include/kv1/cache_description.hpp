// SPDX-License-Identifier: Apache-2.0
//
// The shape of a cache, and its cost. Plain data, which is checked when a cache is made from it.
//
// Cost. Example: 36 layers, 8 KV heads of 128 channels, keys in compact3, values in compact2 (the policies
// `safe` and `balanced`, cache_policy.hpp).
//
//   a key, a value        row_bytes(compact3, 128) = 50, row_bytes(compact2, 128) = 34 bytes
//   a token               36 * 8 * (50 + 34) = 24,192 bytes
//   131,072 tokens        131,072 * 24,192 = 3,170,893,824 bytes = 2.95 GiB; fp16 takes 18 GiB
//   in whole pages of 64  bytes_per_page() = 64 * 24,192; capacity_for_bytes() goes the other way
//   fp16 sinks, window    4 and 32 tokens: at most 3 pages of fp16 a sequence, 3 * 64 * 147,456 bytes = 27 MiB,
//                         22 on average, and the new tokens of a step until its commit; with pages of 16 at most 4,
//                         9 MiB, for pages are kept whole
//   error weights         8 * 128 * 128 floats for the keys, and for the values, of a layer: 36 MiB in all,
//                         once for the cache, and as much again in its description
//
// cache_statistics says what a cache takes while it runs.
#pragma once

#include <kv1/encoding.hpp>
#include <kv1/format.hpp>
#include <kv1/layout.hpp>
#include <kv1/rotary_embedding.hpp>

#include <cstddef>
#include <vector>

namespace kv1::inline KV1_ABI {

/// One layer: its number of KV heads, their widths, and how K and V are stored, independently of each other.
/// Numbers are std::size_t. An int variable between braces would be narrowed, so it needs a cast.
struct layer_description {
    std::size_t kv_heads = 0;                    ///< number of heads of K and V
    std::size_t key_dim = 0;                     ///< head_dim of keys and queries
    std::size_t value_dim = 0;                   ///< head_dim of values and outputs
    kv_format key_format = kv_format::affine2;   ///< how K is stored
    kv_format value_format = kv_format::affine2; ///< how V is stored
    /// A query sees this many tokens, its own included; 0: all. A commit frees pages that no later query can
    /// see.
    std::size_t sliding_window = 0;
    /// Tokens behind the sliding window that a commit keeps nevertheless; 0: none. truncate() can go back by
    /// that many tokens behind a commit, and attend() serves queries at those positions. They cost whole
    /// pages (cache_statistics::bytes_retained).
    std::size_t window_retention = 0;
    /// What is done to vectors before they are stored, and how their levels are chosen (encoding.hpp).
    /// @{
    vector_encoding key_encoding = {};
    vector_encoding value_encoding = {};
    /// @}
    /// Channels that share a scale and minimum; 0: all of a vector. A multiple of group_unit that divides the
    /// head dim: 128 channels in groups of 32 have four scales and minima. For affine and compact formats,
    /// without error weights. Means and rotation come first. Each group takes 4 bytes of metadata (compact:
    /// 2).
    /// @{
    std::size_t key_group = 0;
    std::size_t value_group = 0;
    /// @}
    /// per_channel: the keys of a channel share a scale and minimum over all tokens of a page. This suits
    /// keys in which some channels are large in every token. The keys of a page stay in fp16 until it is full
    /// (kv_cache.hpp says what follows from that). For formats of up to 4 bits whose levels can be chosen,
    /// without key_group, with pages of at most 4096 tokens, in caches that carry fp16.
    quantization_axis key_axis = quantization_axis::per_token;
    /// The values are the first value_dim channels of the keys, and are stored as part of them: the shared
    /// latent of multi-head latent attention (MLA; DeepSeek-V2, 2024). Outputs are sums of keys as they are
    /// decoded. value_format and value_group are then the keys' own, value_encoding is empty, and a group of
    /// channels, or a run of channels that is rotated together, lies on one side of value_dim. Not with keys
    /// per channel, whose scales belong to pages. latent_layer() makes such a layer.
    bool values_in_keys = false;
    /// How keys turn with their position (rotary_embedding.hpp). With it, key_encoding.means are the means of
    /// keys before rotary embedding, such as a key projection's bias as it stands. At position p a key is
    /// stored without its head's mean as RoPE turns it there, and attention gives the mean's share of each
    /// score back. Pairs of channels whose means are zero cost nothing, so keep the largest: about 16 have
    /// nearly all of it. Empty: the means are those of keys as they are stored, the same at every position.
    /// Of values in keys, the channels that turn come after the values.
    rotary_embedding rotary = {};
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

/// A whole cache: its layers and its capacity.
struct cache_description {
    std::vector<layer_description> layers; ///< in the model's order
    std::size_t capacity_tokens = 0;       ///< of all sequences together, rounded up to pages
    std::size_t page_tokens = 64;          ///< a multiple of tile_tokens

    /// A query sees the first fp16_sinks tokens of its sequence and its last fp16_window tokens, its own
    /// included, in fp16, and the tokens between them in the layer's formats (kv_cache.hpp). This does not
    /// concern layers with a sliding window, and layers that store K and V plain.
    /// @{
    std::size_t fp16_sinks = 0;
    std::size_t fp16_window = 0;
    /// @}

    /// Capacity of layers with a sliding window; capacity of fp16 copies and of fp16 keys of open pages (two
    /// pages are enough for the open pages of a sequence). 0: capacity_tokens. Memory that is never used is
    /// reserved only, so smaller numbers matter if address space is short or the system does not overcommit.
    /// Example: a sequence that decodes token by token under a window of 1,024, in pages of 64, holds at most
    /// 17 pages of such a layer, 1,088 tokens. A prompt is there in full until its commit.
    /// @{
    std::size_t window_capacity_tokens = 0;
    std::size_t fp16_capacity_tokens = 0;
    /// @}

    /// Asks the system to back the arenas with large pages (Linux only).
    bool huge_pages = false;
    /// The number of events of the prefix index that are kept until they are taken; 0: none are recorded.
    std::size_t prefix_events = 0;
    /// The position that rotary embedding gives to the first token of a sequence
    /// (layer_description::rotary); a token of a sequence has this plus its place in it. Less than 2^48.
    std::size_t first_position = 0;
};

/// The layout of a page of one layer and KV head.
[[nodiscard]] constexpr page_layout layout_of(const layer_description& l, std::size_t page_tokens) noexcept {
    if (l.values_in_keys)
        return page_layout::with_values_in_keys(l.key_format, l.key_dim, l.value_dim, page_tokens,
                                                l.key_group);
    return {l.key_format, l.key_dim,   l.value_format, l.value_dim,
            page_tokens,  l.key_group, l.value_group,  l.key_axis};
}

/// The bytes of one page in all layers and KV heads, without fp16 copies and fp16 keys of open pages.
[[nodiscard]] inline std::size_t bytes_per_page(const cache_description& d) noexcept {
    std::size_t bytes = 0;
    for (const layer_description& l : d.layers)
        bytes += l.kv_heads * layout_of(l, d.page_tokens).bytes();
    return bytes;
}

/// The capacity_tokens whose pages fit into so many bytes.
[[nodiscard]] inline std::size_t capacity_for_bytes(const cache_description& d, std::size_t bytes) noexcept {
    const std::size_t page = bytes_per_page(d);
    return page == 0 ? 0 : bytes / page * d.page_tokens;
}

/// The description of a cache whose layers are alike.
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
