// SPDX-License-Identifier: Apache-2.0
//
// One KV cache over the ranks of an MPI communicator: each keeps the tokens of its positions, of every layer
// (rank_cache.hpp); attention is computed where the tokens are, and joined.
//
//   context_parallel::distributed_cache cache(MPI_COMM_WORLD, description, {});
//   const auto sequence = cache.create_sequence();
//   for each step:
//       for each layer:
//           cache.append_and_attend(sequence, layer, keys, values, queries, outputs);
//       cache.commit(sequence);
//
// Every call but const ones is collective: all ranks make it, in one order, with arguments of the same shape
// and with the same options. Calls mean what those of kv_cache mean, positions are the whole sequence's, and
// results are those of one cache that holds everything, but for the rounding of the joins. That goes for
// sliding windows, fp16 sinks and windows, explicit masks, values in keys, and keys per channel, too: pages are
// never parted.
//
// Means that turn with their keys' positions (layer_description::rotary) want one range a rank:
// distribution::ranges() for capacity_tokens. A rank's cache counts positions on from the first of its own.
//
// Arrays. With inputs::of_every_rank all ranks hold the arrays of a call (every one runs the model, and has
// computed the same), and all get the outputs. With inputs::of_root rank 0 alone holds them: it deals keys and
// values to their owners, broadcasts queries, and gets the outputs; others pass views of the same shape, whose
// data may be null.
//
// Messages. append() is two agreements, attend() one and the join of rows; append_and_attend() is one
// agreement and the join, half as many: networks count those, not their bytes. With inputs::of_root the arrays
// and a last agreement come on top.
//
// Errors. What fails on one rank throws the same rank_error on all (agreement.hpp), as do calls that differ,
// caches that were described differently and tokens that a rank has lost. A call that throws has changed
// nothing, but for three: an append that some ranks had finished when another failed leaves the step to be
// undone, by rollback() or truncate(), unless the sequence was at a commit point, to which it then returns by
// itself; and a commit, rollback or truncation of such a step that only some ranks could finish leaves a
// sequence that can only be destroyed. Until then other calls refuse the sequence.
//
// Left out. ALiBi's slopes are refused: distances between a rank's places are not those of positions, and
// models with contexts worth many machines do without. Dropped pages, prefixes and saving are not there.
#pragma once

#include "agreement.hpp"
#include "distribution.hpp"
#include "rank_cache.hpp"
#include "row_reduction.hpp"

#include <kv1/kv_cache.hpp>

#include <mpi.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <vector>

namespace context_parallel {

enum class inputs { of_every_rank, of_root };

struct cache_options {
    /// Absent: a page a block, round robin. Blocks are whole pages.
    std::optional<distribution> positions = std::nullopt;
    inputs from = inputs::of_every_rank;
    joining join = joining::in_rank_order;
    /// How long a rank waits for others before that is an error; zero: for ever.
    std::chrono::duration<double> patience{};
    /// This rank's threads.
    thread_source run = kv1::inline_executor{};
};

/// Names a sequence, alike on all ranks.
struct sequence {
    std::uint64_t number = 0;
    friend bool operator==(sequence, sequence) = default;
};

/// What stands for the values of a layer that has them in its keys.
[[nodiscard]] inline kv1::tensor_view no_values() noexcept {
    return {static_cast<const float*>(nullptr), 0, 0, 0};
}

struct dealt_rows;

class distributed_cache {
public:
    /// `whole` describes the cache that all ranks make up: its capacity is dealt like positions, so that one
    /// sequence of capacity_tokens fits; a rank that has no page left for its share fails for all.
    distributed_cache(MPI_Comm ranks, const kv1::cache_description& whole, cache_options options = {});

    [[nodiscard]] sequence create_sequence();
    void destroy_sequence(sequence s);
    [[nodiscard]] sequence fork(sequence s);
    void truncate(sequence s, std::size_t tokens);
    std::size_t commit(sequence s);
    void rollback(sequence s);

    /// In a batch sequence i takes tokens indptr[i] ... indptr[i + 1] - 1, as in kv_cache.
    /// @{
    void append(sequence s, std::size_t layer, kv1::tensor_view keys, kv1::tensor_view values);
    void append(std::span<const sequence> batch, std::size_t layer, std::span<const std::size_t> indptr,
                kv1::tensor_view keys, kv1::tensor_view values);
    /// With inputs::of_root log_sum_exp is rank 0's, too.
    void attend(sequence s, std::size_t layer, kv1::tensor_view queries, kv1::mutable_tensor_view outputs,
                const kv1::attention_options& options = {});
    void attend(std::span<const sequence> batch, std::size_t layer, std::span<const std::size_t> indptr,
                kv1::tensor_view queries, kv1::mutable_tensor_view outputs,
                const kv1::attention_options& options = {});
    /// What append() and attend() do, in half the messages; `indptr` divides tokens and queries alike.
    void append_and_attend(sequence s, std::size_t layer, kv1::tensor_view keys, kv1::tensor_view values,
                           kv1::tensor_view queries, kv1::mutable_tensor_view outputs,
                           const kv1::attention_options& options = {});
    void append_and_attend(std::span<const sequence> batch, std::size_t layer,
                           std::span<const std::size_t> indptr, kv1::tensor_view keys,
                           kv1::tensor_view values, kv1::tensor_view queries,
                           kv1::mutable_tensor_view outputs, const kv1::attention_options& options = {});
    /// @}

    /// Of the whole sequence; not collective. Throws std::out_of_range for one that there is not.
    [[nodiscard]] std::size_t length(sequence s, std::size_t layer) const;
    /// Tokens that every layer holds.
    [[nodiscard]] std::size_t length(sequence s) const;

    [[nodiscard]] const kv1::cache_description& description() const noexcept { return whole_; }
    [[nodiscard]] const distribution& positions() const noexcept { return positions_; }
    [[nodiscard]] int rank() const noexcept { return ranks_.rank(); }
    [[nodiscard]] int ranks() const noexcept { return ranks_.size(); }
    /// This rank's bytes in use.
    [[nodiscard]] std::size_t bytes_in_use() const noexcept { return own_.bytes_in_use(); }
    /// What this rank has spent on communication.
    [[nodiscard]] const traffic& spent() const noexcept { return ranks_.spent(); }
    void forget_spent() noexcept { ranks_.forget_spent(); }
    /// This rank's own cache, of all layers; to look at, and for tests to harm.
    [[nodiscard]] kv1::kv_cache& local() noexcept { return own_.body(); }
    [[nodiscard]] kv1::sequence_id local(sequence s) const { return sequences_.at(s.number).here.body; }

private:
    enum class condition { whole, step_failed, broken };
    struct record {
        rank_sequence here;
        std::vector<std::size_t> lengths, given_up; // of the whole, by layer; the latter by sliding windows
        std::optional<std::size_t> committed;
        std::size_t fp16_from = 0;
        condition is = condition::whole;
        [[nodiscard]] bool at_commit_point() const noexcept;
        [[nodiscard]] std::size_t shortest() const noexcept;
    };

    [[nodiscard]] bool receives() const noexcept { return from_root_ && ranks_.rank() != 0; }
    [[nodiscard]] record* find(sequence s) noexcept;
    [[nodiscard]] kv1::status usable(const record* r, bool also_failed_steps = false) const noexcept;
    [[nodiscard]] kv1::status holds_all(const record& r, std::size_t layer) const noexcept;
    [[nodiscard]] kv1::status check_batch(std::span<const sequence> batch, std::size_t layer,
                                          std::span<const std::size_t> indptr, std::size_t rows) noexcept;
    [[nodiscard]] digest told_of_description() const;
    void cut(sequence s, std::size_t tokens, digest told, kv1::status here);

    struct append_call;
    // Checks, and finds room for all that follows; throws what the standard library does.
    [[nodiscard]] kv1::status prepare(append_call& call);
    [[nodiscard]] static digest told(const append_call& call);
    void deal(append_call& call, dealt_rows& rows) const;
    void receive(append_call& call);
    void receive(const append_call& call, dealt_rows& rows);
    // This rank's part. `changed` becomes true once any token is there.
    [[nodiscard]] kv1::status carry_out(append_call& call, bool& changed);
    void finish(const append_call& call);
    void undo(const append_call& call);

    struct query_call;
    // `appended`: the tokens of the call are there when its queries attend.
    [[nodiscard]] kv1::status prepare(query_call& call, bool appended);
    [[nodiscard]] kv1::status check(const query_call& call) noexcept;
    [[nodiscard]] query_sight sight_of(const query_call& call, std::size_t i) noexcept;
    [[nodiscard]] static digest told(const query_call& call);
    void receive(query_call& call);
    [[nodiscard]] kv1::status carry_out(query_call& call);
    void join(query_call& call, const kv1::status& here, bool& changed);
    void finish(const query_call& call);

    agreement ranks_;
    kv1::cache_description whole_;
    distribution positions_;
    bool from_root_;
    joining join_;
    thread_source run_;
    rank_cache own_;
    std::map<std::uint64_t, record> sequences_;
    std::uint64_t next_ = 1;
    row_reduction reduce_;
};

} // namespace context_parallel
