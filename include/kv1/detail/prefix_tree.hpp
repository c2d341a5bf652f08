// SPDX-License-Identifier: Apache-2.0
//
// The tree behind prefix_index (prefix_index.hpp). Nodes are looked up by a chain of hashes, but a hash never
// decides.
//
//   insert  whole pages; a last page that is not full if the caller asks for it
//   match   whole pages by hash, then the child with the longest common beginning. Part of a page can be shared,
//           since a sequence that appends to a shared page copies it first
//   saving  snapshot() gives all nodes as a list, and merge() takes such a list in (cache_io.hpp)
//
// insert and match take O(tokens), and O(children * block_tokens) at the last node of a match.
#pragma once

#include <kv1/detail/buffer.hpp>
#include <kv1/detail/page_pool.hpp>
#include <kv1/prefix_index.hpp>
#include <kv1/status.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <span>
#include <utility>

namespace kv1::inline KV1_ABI::detail {

// The nodes of an index as lists, the most recently used first: parents come before their children.
struct prefix_snapshot {
    // No parent.
    static constexpr std::uint32_t none = (std::numeric_limits<std::uint32_t>::max)();
    // One page of a prompt.
    struct node {
        std::uint32_t parent = none; // index of an earlier node; none: this is a prompt's first page
        std::uint32_t tokens = 0;    // number of tokens
        prefix_salt salt;            // of the prompt; used if there is no parent
    };
    buffer<node> nodes;           // the most recently used first
    buffer<token_id> tokens;      // of all nodes, one after the other
    buffer<std::uint32_t> blocks; // [node][block group]; prefix_tree::no_block: no page
};

// A function like hash_tokens().
using token_hash = std::uint64_t (*)(std::uint64_t previous, std::span<const token_id> tokens) noexcept;

// The index of a cache. Thread-safe, but for initialize() and destruction: there is one lock, taken before those
// of the pools.
class prefix_tree final : public prefix_index {
public:
    // In the place of a block: the node has no page in this block group.
    static constexpr std::uint32_t no_block = (std::numeric_limits<std::uint32_t>::max)();

    prefix_tree() = default;
    // With another hash function, for tests.
    explicit prefix_tree(token_hash hash) noexcept : hash_(hash) {}
    ~prefix_tree() { clear(); }

    // Prepares the index; call it before anything else. block_tokens: tokens of a page. pools: of the block
    // groups; they outlive the index. events: how many are kept until taken. Errors: out_of_memory.
    status initialize(std::size_t block_tokens, std::span<page_pool* const> pools,
                      std::size_t events = 0) noexcept {
        block_tokens_ = block_tokens;
        if (!pools_.assign(pools) || !events_.reserve(events))
            return no_memory();
        event_capacity_ = events;
        return {};
    }

    // Stores the pages of a prompt. block_of(page, group) gives the block that holds page `page` in a block
    // group, or no_block. A last page that is not full is stored only if `partial`. Known nodes stay as they
    // are. Gives the number of tokens that the index knows now. Errors: out_of_memory.
    template <class BlockOf>
    result<std::size_t> insert(prefix_salt salt, std::span<const token_id> tokens, bool partial,
                               BlockOf&& block_of) noexcept {
        const std::size_t known = partial ? tokens.size() : tokens.size() / block_tokens_ * block_tokens_;
        if (known == 0)
            return std::size_t{0};
        const std::lock_guard lock(mutex_);
        std::uint32_t root = find_root(salt);
        // reserves for all nodes that may be missing, so that the insertion cannot fail half-way
        if (!reserve((known + block_tokens_ - 1) / block_tokens_ + (root == none ? 1 : 0)))
            return no_memory();
        if (root == none)
            root = add_root(salt);
        std::uint32_t at = root;
        for (std::size_t first = 0; first < known; first += block_tokens_) {
            const auto block = tokens.subspan(first, (std::min)(block_tokens_, known - first));
            const std::uint64_t hash = hash_(nodes_[at].hash, block);
            std::uint32_t child = find_child(at, hash, block);
            if (child == none)
                child = add_child(at, hash, block,
                                  [&](std::size_t g) { return block_of(first / block_tokens_, g); });
            at = child;
        }
        touch(at);
        return known;
    }

    // Finds the longest known beginning of the tokens, and gives its number of tokens. Calls take(page,
    // blocks) for each of its pages in order; blocks[group] comes with a reference that the caller then
    // owns.
    template <class Take>
    std::size_t match(prefix_salt salt, std::span<const token_id> tokens, Take&& take) noexcept {
        const std::lock_guard lock(mutex_);
        std::uint32_t at = find_root(salt);
        if (at == none)
            return 0;
        std::size_t matched = 0;
        while (tokens.size() - matched >= block_tokens_) {
            const auto block = tokens.subspan(matched, block_tokens_);
            const std::uint32_t child = find_child(at, hash_(nodes_[at].hash, block), block);
            if (child == none)
                break;
            give(child, matched / block_tokens_, take);
            at = child;
            matched += block_tokens_;
        }
        const auto rest = tokens.subspan(matched);
        std::uint32_t best = none;
        std::size_t longest = 0;
        for (std::uint32_t child = nodes_[at].first_child; child != none; child = nodes_[child].next) {
            const auto known = tokens_of(child);
            const auto differs = std::mismatch(known.begin(), known.end(), rest.begin(), rest.end());
            const auto common = static_cast<std::size_t>(differs.first - known.begin());
            if (common > longest) {
                longest = common;
                best = child;
            }
        }
        if (best != none) {
            give(best, matched / block_tokens_, take);
            at = best;
            matched += longest;
        }
        touch(at);
        return matched;
    }

    std::size_t evict(std::size_t pages) noexcept override {
        const std::lock_guard lock(mutex_);
        std::size_t gone = 0;
        for (std::uint32_t n = oldest_; n != none && gone < pages;) {
            const std::uint32_t newer = nodes_[n].newer; // parents are newer than their children
            if (evictable(n)) {
                remove(n);
                ++gone;
            }
            n = newer;
        }
        return gone;
    }

    void clear() noexcept override {
        const std::lock_guard lock(mutex_);
        for (std::uint32_t n = oldest_; n != none;) {
            const std::uint32_t newer = nodes_[n].newer;
            if (nodes_[n].pins == 0 && nodes_[n].first_child == none)
                remove(n);
            n = newer;
        }
    }

    result<prefix_pin> pin(prefix_salt salt, std::span<const token_id> tokens) noexcept override {
        const std::lock_guard lock(mutex_);
        std::uint32_t at = find_root(salt);
        std::size_t matched = 0;
        while (at != none && matched < tokens.size()) {
            const auto block = tokens.subspan(matched, (std::min)(block_tokens_, tokens.size() - matched));
            const std::uint32_t child = find_child(at, hash_(nodes_[at].hash, block), block);
            if (child == none)
                break;
            at = child;
            matched += block.size();
        }
        if (matched == 0)
            return status{errc::out_of_range, "no block of these tokens is known"};
        ++nodes_[at].pins;
        return prefix_pin{at, nodes_[at].stamp, matched};
    }
    status unpin(prefix_pin pin) noexcept override {
        const std::lock_guard lock(mutex_);
        if (pin.node >= nodes_.size() || nodes_[pin.node].stamp != pin.stamp || nodes_[pin.node].pins == 0)
            return {errc::out_of_range, "the pin is not one of this index's"};
        --nodes_[pin.node].pins;
        return {};
    }

    // Lists all nodes. Each block comes with a reference that the caller then owns and gives back with
    // release(). O(nodes * block_tokens). Errors: out_of_memory.
    status snapshot(prefix_snapshot& out) const noexcept {
        const std::lock_guard lock(mutex_);
        const std::size_t groups = pools_.size();
        buffer<std::uint32_t> places; // [node of the index]: its place in the list
        std::size_t total = 0;
        for (std::uint32_t n = newest_; n != none; n = nodes_[n].older)
            total += nodes_[n].tokens;
        if (!places.resize(nodes_.size(), prefix_snapshot::none) || !out.nodes.reserve(count_) ||
            !out.tokens.reserve(total) || !out.blocks.reserve(count_ * groups))
            return no_memory();
        out.nodes.clear();
        out.tokens.clear();
        out.blocks.clear();
        for (std::uint32_t n = newest_; n != none; n = nodes_[n].older) {
            const std::uint32_t parent = nodes_[n].parent;
            places[n] = static_cast<std::uint32_t>(out.nodes.size());
            out.nodes.push_back({places[parent], nodes_[n].tokens, nodes_[parent].salt});
            for (const token_id t : tokens_of(n))
                out.tokens.push_back(t);
            for (std::size_t g = 0; g < groups; ++g) {
                const std::uint32_t b = blocks_[n * groups + g];
                out.blocks.push_back(b);
                if (b != no_block)
                    pools_[g]->retain(b);
            }
        }
        return {};
    }
    // Gives back the references of a snapshot.
    void release(const prefix_snapshot& s) const noexcept {
        for (std::size_t i = 0; i < s.blocks.size(); ++i)
            if (s.blocks[i] != no_block)
                pools_[i % pools_.size()]->release(s.blocks[i]);
    }
    // Adds the nodes of a list, as more recently used than all others and in the list's order. Known nodes
    // keep their pages. Preconditions: parents come before their children and are full pages; the caller
    // holds a reference to each block (the index takes one of its own). O(nodes * block_tokens). Errors:
    // out_of_memory, which leaves the index as it was.
    status merge(const prefix_snapshot& s) noexcept {
        const std::lock_guard lock(mutex_);
        const std::size_t groups = pools_.size();
        buffer<std::uint32_t> numbers; // [node of the list]: its number in the index
        std::size_t roots = 0;
        for (const prefix_snapshot::node& each : s.nodes)
            roots += each.parent == prefix_snapshot::none ? 1 : 0;
        if (!numbers.resize(s.nodes.size()) || !reserve(s.nodes.size() + roots))
            return no_memory();
        std::size_t first = 0;
        for (std::size_t i = 0; i < s.nodes.size(); ++i) {
            const prefix_snapshot::node& from = s.nodes[i];
            const auto block = s.tokens.view().subspan(first, from.tokens);
            first += from.tokens;
            std::uint32_t parent = none;
            if (from.parent != prefix_snapshot::none)
                parent = numbers[from.parent];
            else if (parent = find_root(from.salt); parent == none)
                parent = add_root(from.salt);
            const std::uint64_t hash = hash_(nodes_[parent].hash, block);
            std::uint32_t n = find_child(parent, hash, block);
            if (n == none)
                n = add_child(parent, hash, block, [&](std::size_t g) { return s.blocks[i * groups + g]; });
            numbers[i] = n;
        }
        for (std::size_t i = numbers.size(); i-- > 0;) { // children go before their parents
            unlink(numbers[i]);
            link_newest(numbers[i]);
        }
        return {};
    }

    std::size_t take_events(std::span<prefix_event> out) noexcept override {
        const std::lock_guard lock(mutex_);
        const std::size_t n = (std::min)(out.size(), events_.size());
        std::copy_n(events_.begin(), n, out.begin());
        events_.erase(0, n);
        return n;
    }
    [[nodiscard]] std::size_t lost_events() const noexcept override {
        const std::lock_guard lock(mutex_);
        return lost_events_;
    }
    [[nodiscard]] std::size_t pages() const noexcept override {
        const std::lock_guard lock(mutex_);
        return count_;
    }

    // f(group, block) for every reference that the index holds.
    template <class F>
    void for_each_block(F&& f) const noexcept {
        const std::lock_guard lock(mutex_);
        for (std::uint32_t n = oldest_; n != none; n = nodes_[n].newer)
            for (std::size_t g = 0; g < pools_.size(); ++g)
                if (const std::uint32_t b = blocks_[n * pools_.size() + g]; b != no_block)
                    f(g, b);
    }

    // Whether tree, list and hash table agree. O(nodes).
    [[nodiscard]] bool valid() const noexcept {
        const std::lock_guard lock(mutex_);
        std::size_t listed = 0, children = 0, kept = 0;
        std::uint32_t older = none;
        for (std::uint32_t n = oldest_; n != none; n = nodes_[n].newer) {
            if (nodes_[n].older != older || nodes_[n].is_root || ++listed > count_)
                return false;
            const std::uint32_t parent = nodes_[n].parent;
            if (find_child(parent, nodes_[n].hash, tokens_of(n)) != n)
                return false;
            older = n;
        }
        for (const std::uint32_t head : buckets_)
            for (std::uint32_t n = head; n != none; n = nodes_[n].chained) {
                ++kept;
                std::uint32_t before = none;
                for (std::uint32_t c = nodes_[n].first_child; c != none; c = nodes_[c].next) {
                    if (nodes_[c].parent != n || nodes_[c].previous != before)
                        return false;
                    before = c;
                    ++children;
                }
                if (nodes_[n].is_root && nodes_[n].first_child == none)
                    return false;
            }
        return newest_ == older && listed == count_ && children == count_ && kept >= count_;
    }

private:
    static constexpr std::uint32_t none = (std::numeric_limits<std::uint32_t>::max)();

    struct node {
        std::uint64_t hash = 0;
        prefix_salt salt;                                                              // of a root
        std::uint32_t parent = none, first_child = none, next = none, previous = none; // siblings
        std::uint32_t newer = none, older = none;                                      // by use
        std::uint32_t chained = none;                                                  // in its bucket
        std::uint32_t tokens = 0, pins = 0, stamp = 0;
        bool is_root = false;
    };

    static status no_memory() noexcept { return {errc::out_of_memory, "no memory for the prefix index"}; }

    [[nodiscard]] std::span<const token_id> tokens_of(std::uint32_t n) const noexcept {
        return {tokens_.data() + n * block_tokens_, nodes_[n].tokens};
    }
    [[nodiscard]] std::uint32_t bucket(std::uint64_t hash) const noexcept {
        return static_cast<std::uint32_t>((hash ^ hash >> 29) & (buckets_.size() - 1));
    }

    [[nodiscard]] std::uint32_t find_root(prefix_salt salt) const noexcept {
        if (buckets_.empty())
            return none;
        for (std::uint32_t n = buckets_[bucket(root_hash(salt))]; n != none; n = nodes_[n].chained)
            if (nodes_[n].is_root && nodes_[n].salt == salt)
                return n;
        return none;
    }
    [[nodiscard]] std::uint32_t find_child(std::uint32_t parent, std::uint64_t hash,
                                           std::span<const token_id> tokens) const noexcept {
        for (std::uint32_t n = buckets_[bucket(hash)]; n != none; n = nodes_[n].chained) {
            const node& x = nodes_[n];
            if (x.hash == hash && x.parent == parent && !x.is_root && x.tokens == tokens.size() &&
                std::equal(tokens.begin(), tokens.end(), tokens_of(n).begin()))
                return n;
        }
        return none;
    }
    static std::uint64_t root_hash(prefix_salt salt) noexcept {
        std::uint64_t h = (salt.high ^ 0x2545f4914f6cdd1du) * 0xc4ceb9fe1a85ec53u;
        h = (h ^ h >> 32 ^ salt.low) * 0x9fb21c651e98df25u;
        return h ^ h >> 29;
    }

    // Makes room for `more` nodes. False: no memory.
    [[nodiscard]] bool reserve(std::size_t more) noexcept {
        const std::size_t total = nodes_.size() + (more > free_.size() ? more - free_.size() : 0);
        if (total >= none || !nodes_.reserve(total) || !free_.reserve(nodes_.capacity()) ||
            !tokens_.reserve(nodes_.capacity() * block_tokens_) ||
            !blocks_.reserve(nodes_.capacity() * pools_.size()))
            return false;
        if (buckets_.size() >= total && !buckets_.empty())
            return true;
        std::size_t wanted = 64;
        while (wanted < 2 * total)
            wanted *= 2;
        buffer<std::uint32_t> grown;
        if (!grown.resize(wanted, none))
            return false;
        std::swap(buckets_, grown);
        for (const std::uint32_t head : grown)
            for (std::uint32_t n = head; n != none;) {
                const std::uint32_t following = nodes_[n].chained;
                chain(n);
                n = following;
            }
        return true;
    }

    void chain(std::uint32_t n) noexcept {
        std::uint32_t& head = buckets_[bucket(nodes_[n].hash)];
        nodes_[n].chained = head;
        head = n;
    }
    void unchain(std::uint32_t n) noexcept {
        std::uint32_t* at = &buckets_[bucket(nodes_[n].hash)];
        while (*at != n)
            at = &nodes_[*at].chained;
        *at = nodes_[n].chained;
    }

    // new_node(), add_root(), add_node() and add_child() need room that reserve() made.
    [[nodiscard]] std::uint32_t new_node() noexcept {
        std::uint32_t n = 0, stamp = 0;
        if (!free_.empty()) {
            n = free_.back();
            free_.pop_back();
            stamp = nodes_[n].stamp + 1;
        } else {
            n = static_cast<std::uint32_t>(nodes_.size());
            nodes_.push_back({});
            tokens_.set_size(nodes_.size() * block_tokens_);
            blocks_.set_size(nodes_.size() * pools_.size());
        }
        nodes_[n] = {};
        nodes_[n].stamp = stamp;
        return n;
    }
    [[nodiscard]] std::uint32_t add_root(prefix_salt salt) noexcept {
        const std::uint32_t n = new_node();
        nodes_[n].is_root = true;
        nodes_[n].salt = salt;
        nodes_[n].hash = root_hash(salt);
        chain(n);
        return n;
    }
    [[nodiscard]] std::uint32_t add_node(std::uint32_t parent, std::uint64_t hash,
                                         std::span<const token_id> tokens) noexcept {
        const std::uint32_t n = new_node();
        node& x = nodes_[n];
        x.hash = hash;
        x.parent = parent;
        x.tokens = static_cast<std::uint32_t>(tokens.size());
        std::copy(tokens.begin(), tokens.end(), tokens_.begin() + n * block_tokens_);
        x.next = nodes_[parent].first_child;
        if (x.next != none)
            nodes_[x.next].previous = n;
        nodes_[parent].first_child = n;
        chain(n);
        link_newest(n);
        ++count_;
        return n;
    }
    // Adds a node with its pages; block_of(group) gives their blocks.
    template <class BlockOf>
    [[nodiscard]] std::uint32_t add_child(std::uint32_t parent, std::uint64_t hash,
                                          std::span<const token_id> tokens, BlockOf&& block_of) noexcept {
        const std::uint32_t n = add_node(parent, hash, tokens);
        for (std::size_t g = 0; g < pools_.size(); ++g) {
            const std::uint32_t b = block_of(g);
            blocks_[n * pools_.size() + g] = b;
            if (b != no_block)
                pools_[g]->retain(b);
        }
        record(prefix_event_kind::stored, n);
        return n;
    }
    void free_node(std::uint32_t n) noexcept {
        unchain(n);
        free_.push_back(n);
    }

    void link_newest(std::uint32_t n) noexcept {
        nodes_[n].older = newest_;
        nodes_[n].newer = none;
        (newest_ != none ? nodes_[newest_].newer : oldest_) = n;
        newest_ = n;
    }
    void unlink(std::uint32_t n) noexcept {
        const std::uint32_t newer = nodes_[n].newer, older = nodes_[n].older;
        (older != none ? nodes_[older].newer : oldest_) = newer;
        (newer != none ? nodes_[newer].older : newest_) = older;
    }
    // Marks a node and its ancestors as used. The root's child comes out newest, so that children are evicted
    // before their parents.
    void touch(std::uint32_t n) noexcept {
        for (; !nodes_[n].is_root; n = nodes_[n].parent) {
            unlink(n);
            link_newest(n);
        }
    }

    template <class Take>
    void give(std::uint32_t n, std::size_t page, Take&& take) noexcept {
        const std::uint32_t* blocks = blocks_.data() + n * pools_.size();
        for (std::size_t g = 0; g < pools_.size(); ++g)
            if (blocks[g] != no_block)
                pools_[g]->retain(blocks[g]);
        take(page, std::span<const std::uint32_t>(blocks, pools_.size()));
    }

    // Whether a node may be evicted and that would free a block: no pins, no children, a block that nobody
    // else refers to.
    [[nodiscard]] bool evictable(std::uint32_t n) const noexcept {
        if (nodes_[n].pins != 0 || nodes_[n].first_child != none)
            return false;
        for (std::size_t g = 0; g < pools_.size(); ++g)
            if (const std::uint32_t b = blocks_[n * pools_.size() + g];
                b != no_block && pools_[g]->references(b) == 1)
                return true;
        return false;
    }

    void remove(std::uint32_t n) noexcept {
        record(prefix_event_kind::evicted, n);
        for (std::size_t g = 0; g < pools_.size(); ++g)
            if (const std::uint32_t b = blocks_[n * pools_.size() + g]; b != no_block)
                pools_[g]->release(b);
        const node x = nodes_[n];
        (x.previous != none ? nodes_[x.previous].next : nodes_[x.parent].first_child) = x.next;
        if (x.next != none)
            nodes_[x.next].previous = x.previous;
        unlink(n);
        free_node(n);
        --count_;
        if (nodes_[x.parent].is_root && nodes_[x.parent].first_child == none)
            free_node(x.parent);
    }

    void record(prefix_event_kind kind, std::uint32_t n) noexcept {
        if (event_capacity_ == 0)
            return;
        if (events_.size() == event_capacity_)
            ++lost_events_;
        else
            events_.push_back({kind, nodes_[n].tokens, nodes_[n].hash, nodes_[nodes_[n].parent].hash});
    }

    mutable std::mutex mutex_;
    std::size_t block_tokens_ = 1;
    token_hash hash_ = hash_tokens;
    buffer<page_pool*> pools_;
    buffer<node> nodes_;
    buffer<token_id> tokens_;       // [node][block_tokens]
    buffer<std::uint32_t> blocks_;  // [node][group]
    buffer<std::uint32_t> free_;    // nodes
    buffer<std::uint32_t> buckets_; // a power of two
    std::uint32_t newest_ = none, oldest_ = none;
    std::size_t count_ = 0; // nodes but roots
    buffer<prefix_event> events_;
    std::size_t event_capacity_ = 0, lost_events_ = 0;
};

} // namespace kv1::inline KV1_ABI::detail
