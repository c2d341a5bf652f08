// SPDX-License-Identifier: Apache-2.0
//
// The new tokens of one layer of a sequence, in terms of jobs over pages that are open: one job a plane that
// takes them.
#pragma once

#include <kv1/detail/append.hpp>
#include <kv1/detail/cache_state.hpp>
#include <kv1/detail/kernels/registry.hpp>
#include <kv1/tensor.hpp>

#include <cstddef>

namespace kv1::inline KV1_ABI::detail {

class sequence_append {
public:
    // The layer exists; open_layer() was called for as many tokens.
    sequence_append(const cache_state& cache, const sequence_state& q, std::size_t layer,
                    const tensor_view& keys, const tensor_view& values) noexcept
        : cache_(cache), q_(q), layer_(layer), keys_(keys), values_(values) {}

    // All KV heads.
    status operator()(executor_view run) const noexcept {
        return to_planes(
            [&](const append_job& job) { return append_heads(job, cache_.body_of(layer_).kv_heads, run); });
    }
    // One of them.
    [[nodiscard]] status head(std::size_t kv_head) const noexcept {
        return to_planes([&](const append_job& job) { return append_head(job, kv_head); });
    }

private:
    // The fp16 copies first, since what they refuse is refused.
    template <class Append>
    status to_planes(Append&& append) const noexcept {
        const layer_planes& planes = cache_.planes_of(layer_);
        const bool copied = planes.copy != no_plane;
        if (copied)
            if (const status s = append(job_for(cache_.copy_of(layer_))); !s)
                return s;
        append_job job = job_for(cache_.body_of(layer_));
        job.through_fp16 = copied;
        job.key_codec = &planes.keys;
        job.value_codec = &planes.values;
        if (planes.open != no_plane) {
            const plane& open = cache_.open_keys_of(layer_);
            const auto [begun, later] = cache_.open_key_blocks(q_, layer_, keys_.tokens());
            job.open_layout = &open.layout;
            job.open_before = open.block(begun);
            job.open_after = open.block(later);
        }
        return append(job);
    }

    [[nodiscard]] append_job job_for(const plane& p) const noexcept {
        const block_table& table = q_.pages[p.group].table;
        return {&cache_.kernels.common(current_target()),
                &p.layout,
                p.arena.data(),
                p.block_bytes,
                table.blocks().data(),
                table.kept_before(q_.length(layer_), cache_.page_tokens()),
                keys_,
                values_};
    }

    const cache_state& cache_;
    const sequence_state& q_;
    std::size_t layer_;
    tensor_view keys_, values_;
};

} // namespace kv1::inline KV1_ABI::detail
