// SPDX-License-Identifier: Apache-2.0
//
// Writes the new tokens of one layer of a sequence into slots that begin_append() has made ready for them.
#pragma once

#include <kv1/detail/cache_state.hpp>
#include <kv1/detail/layer_store.hpp>
#include <kv1/executor.hpp>
#include <kv1/status.hpp>
#include <kv1/tensor.hpp>

#include <cstddef>

namespace kv1::inline KV1_ABI::detail {

// An append to one layer of one sequence.
class sequence_append {
public:
    // Preconditions: the layer exists; begin_append() was called for as many tokens.
    sequence_append(const cache_state& cache, const sequence_state& q, std::size_t layer,
                    const tensor_view& keys, const tensor_view& values) noexcept
        : store_(cache.store_of(layer)), keys_(keys), values_(values) {
        const auto next = [&](const plane& p) -> slot_run {
            const block_table& table = q.pages[p.group].table;
            return {table.blocks().data(), table.kept_before(q.length(layer), cache.page_tokens())};
        };
        to_.body = next(store_.body());
        to_.position_shift = cache.storage.description().first_position + q.length(layer) - to_.body.first;
        if (store_.copies() != nullptr)
            to_.copies = next(*store_.copies());
        if (store_.open_keys() != nullptr) {
            const auto [begun, later] = cache.open_key_blocks(q, layer, keys.tokens());
            to_.open_begun = begun;
            to_.open_later = later;
        }
    }

    // Writes all KV heads.
    status operator()(executor_view run) const noexcept { return store_.write(to_, keys_, values_, run); }
    // Writes one KV head.
    [[nodiscard]] status head(std::size_t kv_head) const noexcept {
        return store_.write_head(to_, keys_, values_, kv_head);
    }

private:
    layer_store store_;
    layer_store::destination to_;
    tensor_view keys_, values_;
};

} // namespace kv1::inline KV1_ABI::detail
