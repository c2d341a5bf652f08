// SPDX-License-Identifier: Apache-2.0
//
// prefix_index: the pages of prompts that a cache keeps for later sequences. kv_cache::store_prefix() puts pages
// into it, and create_from_prefix() looks for the longest known beginning of a prompt. Here is what else an engine
// does with it: evict, pin, and follow what comes and goes.
//
// The index is a tree. A node stands for the tokens of one page after those of its ancestors, and holds a
// reference to that page's block in every block group. With 64 tokens a page, a prompt of 150 tokens is a path of
// nodes with 64, 64 and 22 tokens. Tokens, parents and salts are compared, not hashes alone, so two prompts
// cannot be taken for each other.
//
//   salt    128 bits that the caller gives: what else the pages depend on (adapter, tenant, images)
//   evict   removes the least recently used nodes that have no children, no pins and a page of their own
//   events  records of stored and evicted nodes, for routers; as many are kept as were asked for
#pragma once

#include <kv1/detail/config.hpp>
#include <kv1/status.hpp>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

namespace kv1::inline KV1_ABI {

/// Token ids as the index compares them.
using token_id = std::int32_t;

/// Tells apart prompts whose tokens are equal and whose keys and values are not.
struct prefix_salt {
    std::uint64_t high = 0; ///< any bits, such as an adapter or a tenant
    std::uint64_t low = 0;  ///< any bits, such as the hash of an image
    /// Whether both halves are the same.
    friend bool operator==(prefix_salt, prefix_salt) = default;
};

/// What happened to a node.
enum class prefix_event_kind : std::uint8_t { stored, evicted };

/// A node came into the index or left it, for routers that mirror the index.
struct prefix_event {
    prefix_event_kind kind{};   ///< what happened
    std::uint32_t tokens = 0;   ///< number of the node's tokens
    std::uint64_t hash = 0;     ///< of salt and tokens up to the last of this node
    std::uint64_t previous = 0; ///< of salt and tokens before this node
};

/// Keeps a prefix from being evicted until it is given back.
struct prefix_pin {
    std::uint32_t node = (std::numeric_limits<std::uint32_t>::max)(); ///< the index's own
    std::uint32_t stamp = 0;                                          ///< the index's own
    std::size_t tokens = 0;                                           ///< that are pinned
};

/// The hash of a prompt: `previous` is the hash of what comes before, tokens are one page's.
[[nodiscard]] inline std::uint64_t hash_tokens(std::uint64_t previous,
                                               std::span<const token_id> tokens) noexcept {
    std::uint64_t h = previous + 0x9e3779b97f4a7c15u * (tokens.size() + 1);
    for (const token_id t : tokens) {
        h = (h ^ static_cast<std::uint32_t>(t)) * 0xff51afd7ed558ccdu;
        h ^= h >> 32;
    }
    return h;
}

/// The prompts that a cache remembers (kv_cache::prefixes()). All members may be called from any threads at once,
/// and beside all calls of the cache.
class prefix_index {
public:
    /// Evicts up to `pages` nodes, the least recently used first. Gives the number of evicted nodes. Walks past
    /// nodes that it must keep.
    virtual std::size_t evict(std::size_t pages) noexcept = 0;
    /// Evicts all nodes but pinned ones and their ancestors, even if sequences share their pages.
    virtual void clear() noexcept = 0;
    /// Pins the longest beginning of the tokens whose nodes are known in full: it is not evicted until
    /// unpin(). O(tokens). Errors: out_of_range if no node is known.
    virtual result<prefix_pin> pin(prefix_salt salt, std::span<const token_id> tokens) noexcept = 0;
    /// Gives a pin back. Errors: out_of_range for a pin that is not this index's or was given back before.
    virtual status unpin(prefix_pin pin) noexcept = 0;
    /// Moves the oldest events to the span. Gives their number.
    virtual std::size_t take_events(std::span<prefix_event> out) noexcept = 0;
    /// The number of events that found no room, since the index was made.
    [[nodiscard]] virtual std::size_t lost_events() const noexcept = 0;
    /// The number of nodes.
    [[nodiscard]] virtual std::size_t pages() const noexcept = 0;

    prefix_index(const prefix_index&) = delete;
    prefix_index& operator=(const prefix_index&) = delete;

protected:
    prefix_index() = default;
    ~prefix_index() = default;
};

} // namespace kv1::inline KV1_ABI
