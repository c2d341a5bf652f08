// SPDX-License-Identifier: Apache-2.0
//
// Quantizes new tokens and writes them into their slots: the loops over KV heads and tokens around the
// target's kernels.
#pragma once

#include <kv1/detail/channel_keys.hpp>
#include <kv1/detail/encode_reference.hpp>
#include <kv1/detail/kernels/interface.hpp>
#include <kv1/detail/scratch_pool.hpp>
#include <kv1/detail/prepared_encoding.hpp>
#include <kv1/executor.hpp>
#include <kv1/quantizer.hpp>
#include <kv1/tensor.hpp>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

namespace kv1::inline KV1_ABI::detail {

// What an append to one layer of one sequence is told.
struct append_job {
    const target_kernels* kernels;
    const page_layout* layout;
    const std::byte* arena; // pages are written to through a cast: the caller owns them
    std::size_t block_bytes;
    const std::uint32_t* block_table;
    std::size_t first_token;           // slot of the first new token: with 64 a page, 130 is in table entry 2
    tensor_view keys, values;          // values are ignored if the layout's values lie in its keys
    scratch_pool* scratches = nullptr; // of the cache; affine2_batch needs none
    bool through_fp16 = false;         // vectors are rounded to fp16 before they are quantized
    std::size_t position_shift = 0;    // a token's position less its slot
    // the encodings of the body; null for fp16 copies
    const prepared_encoding* key_encoding = nullptr;
    const prepared_encoding* value_encoding = nullptr;
    // With keys per channel: the block for fp16 keys of the page that the first token continues, and the
    // block for the pages after it, which use it one after the other. Both point to KV head 0's page.
    const page_layout* open_layout = nullptr;
    const std::byte* open_before = nullptr;
    const std::byte* open_after = nullptr;

    // Slots of the new tokens, [tokens]; null: first_token, first_token + 1, ... Null with keys per channel.
    const std::uint32_t* slots = nullptr;
    // Positions of the new tokens, [tokens], not negative; null: position_shift says them.
    const std::int32_t* positions = nullptr;

    [[nodiscard]] std::size_t slot(std::size_t i) const noexcept {
        return slots != nullptr ? slots[i] : first_token + i;
    }
    [[nodiscard]] std::uint64_t position(std::size_t i) const noexcept {
        return positions != nullptr ? static_cast<std::uint64_t>(positions[i]) : slot(i) + position_shift;
    }
    [[nodiscard]] const prepared_encoding* encoding(const section_layout& s) const noexcept {
        return s.keys ? key_encoding : value_encoding;
    }
    // Whether append_affine2() can do it: 2-bit codes, one scale a vector, min/max levels, no rotation or
    // means
    [[nodiscard]] bool takes_tiles(const section_layout& s) const noexcept {
        const prepared_encoding* c = encoding(s);
        return s.format == kv_format::affine2 && s.groups() == 1 && s.axis == quantization_axis::per_token &&
               (c == nullptr || !(c->chooses_levels || c->prepares()));
    }
};

// Writes one vector of a plain format, T its storage type. Places are stepped through and not computed for each
// channel. Lanes of 4 bytes are copied whole: a key's channels lie side by side in them.
template <class T>
void store_plain(const section_layout& s, std::byte* page, std::size_t token, const T* x) noexcept {
    constexpr std::size_t per_lane = 4 / sizeof(T);
    T* const first = plain_element<T>(s, page, token, 0);
    std::size_t c = 0;
    if (s.keys) { // one lane of each line, for a lane's worth of channels
        std::byte* const lane = reinterpret_cast<std::byte*>(first);
        for (; c + per_lane <= s.channels; c += per_lane)
            std::memcpy(lane + c / per_lane * line_bytes, x + c, 4);
        if (c < s.channels)
            std::memcpy(lane + c / per_lane * line_bytes, x + c, (s.channels - c) * sizeof(T));
        return;
    }
    const std::size_t step = s.unit_lines() * line_lanes * per_lane; // from 16 channels to the next 16
    for (; c + line_lanes <= s.channels; c += line_lanes)
        for (std::size_t k = 0; k < line_lanes; ++k)
            first[c / line_lanes * step + k * per_lane] = x[c + k];
    for (std::size_t k = 0; c + k < s.channels; ++k)
        first[c / line_lanes * step + k * per_lane] = x[c + k];
}

// Writes one vector of a plain format into its lanes. `buffer` has room for its fp16 numbers. Errors:
// non_finite, not_representable, with the channel.
inline encode_result insert_plain(const target_kernels& kernels, const section_layout& s, std::byte* page,
                                  std::size_t token, const float* x, std::uint16_t* buffer) noexcept {
    std::uint32_t largest = 0; // by magnitude bits, NaN above infinity
    for (std::size_t c = 0; c < s.channels; ++c) {
        const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(x[c]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    if (largest >= 0x7f800000u)
        return {errc::non_finite, rule_finite, first_non_finite({x, s.channels}), {}};
    if (s.format == kv_format::fp32) {
        store_plain(s, page, token, x);
        return {};
    }
    if (!is_finite(float16(std::bit_cast<float>(largest)))) {
        std::size_t c = 0;
        while (is_finite(float16(x[c])))
            ++c;
        return {errc::not_representable, rule_fp16_value, c, {}};
    }
    kernels.store_floats(scalar_type::fp16, x, s.channels, buffer);
    store_plain(s, page, token, buffer);
    return {};
}

inline encode_result insert_vector(const target_kernels& kernels, const section_layout& s, std::byte* page,
                                   std::size_t token, const float* x, append_scratch& scratch) noexcept {
    const format_traits t = s.traits();
    if (t.code_bits == 0)
        return insert_plain(kernels, s, page, token, x, scratch.halves);
    std::uint8_t* const codes = scratch.codes; // zero past the channels
    encode_result encoded;
    switch (t.metadata) {
    case metadata_kind::scale_and_minimum:
        for (std::size_t g = 0; g < s.groups(); ++g) {
            const std::size_t first = g * s.group_channels;
            encoded = kernels.encode_affine(x + first, s.group_channels, t.code_bits, codes + first);
            if (encoded.code != errc::ok) {
                encoded.channel += encoded.channel == no_channel ? 0 : first;
                return encoded;
            }
            store_metadata(s, page, token, encoded.metadata, g);
        }
        kernels.insert_codes(s, page, token, codes);
        return encoded;
    case metadata_kind::scale:
        encoded = kernels.encode_scaled_binary(x, s.channels, codes);
        break;
    case metadata_kind::compact:
        return {errc::unsupported_format, "compact formats need a choice of levels", no_channel, {}};
    case metadata_kind::none:
        encoded = kernels.encode_binary(x, s.channels, codes);
        break;
    }
    if (encoded.code != errc::ok)
        return encoded;
    kernels.insert_codes(s, page, token, codes);
    store_metadata(s, page, token, encoded.metadata);
    return encoded;
}

inline status append_error(const encode_result& r, std::size_t head, std::size_t token) noexcept {
    error_location where{.kv_head = static_cast<std::int64_t>(head),
                         .token = static_cast<std::int64_t>(token)};
    if (r.channel != no_channel)
        where.channel = static_cast<std::int64_t>(r.channel);
    return {r.code, r.rule, where};
}

// One KV head's page in entry `index` of the block table.
inline std::byte* page_of(const append_job& job, std::size_t head, std::size_t index) noexcept {
    return const_cast<std::byte*>(job.arena) +
           static_cast<std::size_t>(job.block_table[index]) * job.block_bytes + head * job.layout->bytes();
}

// A new vector as floats. The result points into the tensor, or to `converted` if it had to be converted.
inline const float* row_of(const append_job& job, const tensor_view& source, std::size_t i, std::size_t head,
                           float* converted) noexcept {
    const void* x = source.at(i, head);
    if (source.type() == scalar_type::fp32 && !job.through_fp16)
        return static_cast<const float*>(x);
    job.kernels->load_floats(source.type(), x, source.channels(), converted);
    if (job.through_fp16 && source.type() != scalar_type::fp16) {
        // gives no infinity: the fp16 copy was stored before, which refuses what does not fit
        std::uint16_t halves[max_vector_length];
        job.kernels->store_floats(scalar_type::fp16, converted, source.channels(), halves);
        job.kernels->load_floats(scalar_type::fp16, halves, source.channels(), converted);
    }
    return converted;
}

// New vector i with its mean and error weights. Where there is a basis, the mean is taken off, for enter_basis().
// room: [channels], for a mean that turns, or for the vector less its mean.
inline vector_to_encode input_of(const append_job& job, const prepared_encoding& encoding, const float* x,
                                 std::size_t i, std::size_t head, float* room) noexcept {
    const float* mean = encoding.mean_at(head, job.position(i), room, job.kernels->turn_mean);
    if (encoding.basis.empty())
        return {x, mean, encoding.feedback_of(head)};
    for (std::size_t c = 0; c < encoding.params.channels; ++c)
        room[c] = mean == nullptr ? x[c] : x[c] - mean[c];
    return {room, nullptr, encoding.feedback_of(head)};
}
// What an encoder asks of a vector. In a basis channels are no longer the caller's, so it is asked before.
inline encode_result check_vector(std::span<const float> x) noexcept {
    if (const std::size_t bad = first_non_finite(x); bad != x.size())
        return {errc::non_finite, rule_finite, bad, {}};
    for (std::size_t c = 0; c < x.size(); ++c)
        if (!(std::fabs(x[c]) <= largest_half))
            return {errc::not_representable, rule_fp16_value, c, {}};
    return {};
}

// Gathers 2-bit vectors into batches for append_affine2.
class affine2_batch {
public:
    explicit affine2_batch(const append_job& job) noexcept : job_(job) {}

    status add(const section_layout& s, std::size_t head, std::size_t i) noexcept {
        const tensor_view& source = s.keys ? job_.keys : job_.values;
        const bool converts = source.type() != scalar_type::fp32 || job_.through_fp16;
        if (count_ == tile_tokens || (converts && used_ + s.channels > max_vector_length))
            if (const status flushed = flush(); !flushed)
                return flushed;
        const float* x = row_of(job_, source, i, head, converted_ + used_);
        used_ += converts ? s.channels : 0;
        const std::size_t token = job_.slot(i);
        const std::size_t page_tokens = job_.layout->page_tokens(), index = token / page_tokens;
        rows_[count_] = {&s, page_of(job_, head, index), token - index * page_tokens, x};
        heads_[count_] = head;
        tokens_[count_++] = i;
        return {};
    }

    status flush() noexcept {
        std::size_t failed = 0;
        const std::size_t count = count_;
        count_ = used_ = 0;
        if (count == 0)
            return {};
        const encode_result r = job_.kernels->append_affine2(rows_, count, failed);
        return r.code == errc::ok ? status{} : append_error(r, heads_[failed], tokens_[failed]);
    }

private:
    const append_job& job_;
    vector_to_append rows_[tile_tokens];
    std::size_t heads_[tile_tokens], tokens_[tile_tokens];
    std::size_t count_ = 0, used_ = 0;
    alignas(64) float converted_[max_vector_length];
};

// Gathers vectors into batches for encode_vectors.
class encoded_batch {
public:
    encoded_batch(const append_job& job, const section_layout& s, append_scratch& scratch) noexcept
        : job_(job), section_(s), encoding_(*job.encoding(s)), scratch_(scratch),
          stride_(round_up(s.channels, 32)), most_((std::min)(tile_tokens, max_vector_length / stride_)) {
        if (stride_ != s.channels)
            std::memset(scratch.codes, 0, most_ * stride_); // the encoder does not write past the channels
    }

    status add(std::size_t head, std::size_t i) noexcept {
        if (count_ == most_)
            if (const status flushed = flush(); !flushed)
                return flushed;
        const tensor_view& source = section_.keys ? job_.keys : job_.values;
        const std::size_t at = count_ * stride_;
        const float* x = row_of(job_, source, i, head, scratch_.converted + at);
        if (!encoding_.basis.empty())
            if (const encode_result r = check_vector({x, section_.channels}); r.code != errc::ok) {
                const status before = flush(); // the first vector that is refused is named
                return before ? append_error(r, head, i) : before;
            }
        rows_[count_] = input_of(job_, encoding_, x, i, head, scratch_.means + at);
        heads_[count_] = head;
        tokens_[count_++] = i;
        return {};
    }

    status flush() noexcept {
        const std::size_t count = count_;
        count_ = 0;
        if (count == 0)
            return {};
        if (!encoding_.basis.empty())
            enter_basis(count);
        std::size_t failed = 0;
        encode_result r =
            job_.kernels->encode_vectors(encoding_.params, rows_, count, scratch_.codes, stride_,
                                         scratch_.metadata, failed, scratch_.encoder());
        if (!encoding_.basis.empty())
            r.channel = no_channel;
        if (r.code != errc::ok)
            return append_error(r, heads_[failed], tokens_[failed]);
        const std::size_t page_tokens = job_.layout->page_tokens(), groups = section_.groups();
        for (std::size_t k = 0; k < count; ++k) {
            const std::size_t token = job_.slot(tokens_[k]);
            std::byte* page = page_of(job_, heads_[k], token / page_tokens);
            job_.kernels->insert_codes(section_, page, token % page_tokens, scratch_.codes + k * stride_);
            for (std::size_t g = 0; g < groups; ++g)
                store_metadata(section_, page, token % page_tokens, scratch_.metadata[k * groups + g], g);
        }
        return {};
    }

private:
    // Vectors of one head side by side are taken together.
    void enter_basis(std::size_t count) noexcept {
        for (std::size_t first = 0, last = 0; first < count; first = last) {
            for (last = first + 1;
                 last < count && stride_ == section_.channels && heads_[last] == heads_[first];)
                ++last;
            job_.kernels->enter_basis(encoding_.basis.of(heads_[first]), rows_[first].x, last - first,
                                      scratch_.converted + first * stride_);
        }
        for (std::size_t k = 0; k < count; ++k)
            rows_[k].x = scratch_.converted + k * stride_;
    }

    const append_job& job_;
    const section_layout& section_;
    const prepared_encoding& encoding_;
    append_scratch& scratch_;
    std::size_t stride_, most_; // bytes from one vector's codes to the next; vectors of a batch
    vector_to_encode rows_[tile_tokens];
    std::size_t heads_[tile_tokens], tokens_[tile_tokens];
    std::size_t count_ = 0;
};

// New vector i as it is stored, but for its codes: less its mean, in the basis, rotated. x may lie in
// scratch.converted, the result lies in scratch.prepared.
inline const float* prepared_row(const append_job& job, const prepared_encoding& encoding, const float* x,
                                 std::size_t i, std::size_t head, append_scratch& scratch) noexcept {
    vector_to_encode row = input_of(job, encoding, x, i, head, scratch.means);
    if (const basis_view basis = encoding.basis.of(head)) {
        job.kernels->enter_basis(basis, row.x, 1, scratch.converted);
        row.x = scratch.converted;
    }
    prepare_vector(encoding.params, row, scratch.prepared);
    return scratch.prepared;
}

// Appends keys quantized per channel of one KV head. They go to the page of fp16 keys; a page that they fill
// is turned into codes.
inline status append_channel_keys(const append_job& job, std::size_t head, append_scratch& scratch) noexcept {
    const section_layout& s = job.layout->keys();
    const section_layout& open = job.open_layout->keys();
    const prepared_encoding& encoding = *job.key_encoding;
    for (std::size_t i = 0; i < job.keys.tokens(); ++i) {
        const float* x = row_of(job, job.keys, i, head, scratch.converted);
        if (encoding.prepares()) {
            if (const std::size_t bad = first_non_finite({x, s.channels}); bad != s.channels)
                return append_error({errc::non_finite, rule_finite, bad, {}}, head, i);
            x = prepared_row(job, encoding, x, i, head, scratch);
        }
        const std::size_t token = job.first_token + i, index = token / s.tokens, slot = token % s.tokens;
        const bool begun = i < slot; // before these tokens
        std::byte* page = const_cast<std::byte*>(begun ? job.open_before : job.open_after) +
                          head * job.open_layout->bytes();
        encode_result r = insert_plain(*job.kernels, open, page, slot, x, scratch.halves);
        if (encoding.params.hadamard != 0 || !encoding.basis.empty())
            r.channel = no_channel; // each rotated channel is a mix of many
        if (r.code == errc::ok && slot + 1 == s.tokens)
            r = seal_keys(*job.kernels, encoding, head, s, page_of(job, head, index), open, page, scratch);
        if (r.code != errc::ok)
            return append_error(r, head, i);
    }
    return {};
}

// Appends keys or values of one KV head. Precondition: takes_tiles(s).
inline status append_tiles(const append_job& job, const section_layout& s, std::size_t head) noexcept {
    affine2_batch batch(job);
    for (std::size_t i = 0; i < job.keys.tokens(); ++i) {
        // a batch ends where a tile does, so that each line of V is written once
        if (job.slot(i) % tile_tokens == 0)
            if (const status flushed = batch.flush(); !flushed)
                return flushed;
        if (const status added = batch.add(s, head, i); !added)
            return added;
    }
    return batch.flush();
}

// Appends keys or values of one KV head.
inline status append_section(const append_job& job, const section_layout& s, std::size_t head,
                             append_scratch& scratch) noexcept {
    const tensor_view& source = s.keys ? job.keys : job.values;
    const prepared_encoding* encoding = job.encoding(s);
    if (s.axis == quantization_axis::per_channel)
        return append_channel_keys(job, head, scratch);
    if (encoding != nullptr && encoding->chooses_levels) {
        encoded_batch batch(job, s, scratch);
        for (std::size_t i = 0; i < source.tokens(); ++i)
            if (const status added = batch.add(head, i); !added)
                return added;
        return batch.flush();
    }
    if (job.takes_tiles(s))
        return append_tiles(job, s, head);
    std::memset(scratch.codes, 0, round_up(s.channels, 32));
    for (std::size_t i = 0; i < source.tokens(); ++i) {
        const float* x = row_of(job, source, i, head, scratch.converted);
        const std::size_t token = job.slot(i);
        if (encoding != nullptr && encoding->prepares()) {
            if (const std::size_t bad = first_non_finite({x, s.channels}); bad != s.channels)
                return append_error({errc::non_finite, rule_finite, bad, {}}, head, i);
            x = prepared_row(job, *encoding, x, i, head, scratch);
        }
        const encode_result r = insert_vector(*job.kernels, s, page_of(job, head, token / s.tokens),
                                              token % s.tokens, x, scratch);
        if (r.code != errc::ok)
            return append_error(r, head, i);
    }
    return {};
}

// Appends the keys, or the values, of KV heads first_head ... last_head - 1. Vectors of several heads share
// batches, which a token or a few of each head would not fill. Not for keys per channel.
inline status append_side(const append_job& job, const section_layout& s, std::size_t first_head,
                          std::size_t last_head) noexcept {
    const tensor_view& source = s.keys ? job.keys : job.values;
    const prepared_encoding* encoding = job.encoding(s);
    if (job.takes_tiles(s)) {
        affine2_batch batch(job);
        for (std::size_t head = first_head; head < last_head; ++head)
            for (std::size_t i = 0; i < source.tokens(); ++i) {
                // as append_tiles() has it
                if (source.tokens() != 1 && job.slot(i) % tile_tokens == 0)
                    if (const status flushed = batch.flush(); !flushed)
                        return flushed;
                if (const status added = batch.add(s, head, i); !added)
                    return added;
            }
        return batch.flush();
    }
    const scratch_lease lease(*job.scratches);
    if (!lease)
        return no_scratch();
    append_scratch& scratch = lease.as<append_scratch>();
    if (encoding != nullptr && encoding->chooses_levels) {
        encoded_batch batch(job, s, scratch);
        for (std::size_t head = first_head; head < last_head; ++head)
            for (std::size_t i = 0; i < source.tokens(); ++i)
                if (const status added = batch.add(head, i); !added)
                    return added;
        return batch.flush();
    }
    for (std::size_t head = first_head; head < last_head; ++head)
        if (const status added = append_section(job, s, head, scratch); !added)
            return added;
    return {};
}

// Appends keys and values of one KV head.
inline status append_head(const append_job& job, std::size_t head, append_scratch& scratch) noexcept {
    const status s = append_section(job, job.layout->keys(), head, scratch);
    return s && !job.layout->values_in_keys() ? append_section(job, job.layout->values(), head, scratch) : s;
}
inline status append_head(const append_job& job, std::size_t head) noexcept {
    const section_layout &keys = job.layout->keys(), &values = job.layout->values();
    if (job.takes_tiles(keys) && job.takes_tiles(values)) {
        const status s = append_tiles(job, keys, head);
        return s && !job.layout->values_in_keys() ? append_tiles(job, values, head) : s;
    }
    const scratch_lease lease(*job.scratches);
    return lease ? append_head(job, head, lease.as<append_scratch>()) : no_scratch();
}

// Appends one token of all KV heads.
inline status append_token(const append_job& job, std::size_t kv_heads) noexcept {
    const section_layout &keys = job.layout->keys(), &values = job.layout->values();
    const bool keys_alone = job.layout->values_in_keys();
    if (job.takes_tiles(keys) && job.takes_tiles(values)) {
        affine2_batch batch(job);
        for (std::size_t head = 0; head < kv_heads; ++head) {
            if (const status s = batch.add(keys, head, 0); !s)
                return s;
            if (keys_alone)
                continue;
            if (const status s = batch.add(values, head, 0); !s)
                return s;
        }
        return batch.flush();
    }
    const scratch_lease lease(*job.scratches);
    if (!lease)
        return no_scratch();
    append_scratch& scratch = lease.as<append_scratch>();
    const auto chooses_levels = [&](const section_layout& s) {
        return job.encoding(s) != nullptr && job.encoding(s)->chooses_levels;
    };
    const bool per_channel = keys.axis == quantization_axis::per_channel;
    if (!per_channel && chooses_levels(keys) && chooses_levels(values)) {
        for (const section_layout* each : {&keys, &values}) {
            if (keys_alone && each == &values)
                continue;
            encoded_batch batch(job, *each, scratch);
            for (std::size_t head = 0; head < kv_heads; ++head)
                if (const status s = batch.add(head, 0); !s)
                    return s;
            if (const status s = batch.flush(); !s)
                return s;
        }
        return {};
    }
    for (std::size_t head = 0; head < kv_heads; ++head)
        if (const status s = append_head(job, head, scratch); !s)
            return s;
    return {};
}

inline status append_heads(const append_job& job, std::size_t kv_heads, executor_view run) noexcept {
    // One token of decoding is less work than waking a thread, and all heads share a scratch: a single task.
    if (job.keys.tokens() == 1) {
        status s;
        auto all = [&](std::size_t) { s = append_token(job, kv_heads); };
        run(1, task_view(all));
        return s;
    }
    std::atomic<std::size_t> first_failed{kv_heads};
    auto task = [&](std::size_t head) {
        if (append_head(job, head))
            return;
        std::size_t seen = first_failed.load(std::memory_order_relaxed);
        while (head < seen && !first_failed.compare_exchange_weak(seen, head, std::memory_order_relaxed)) {
        }
    };
    run(kv_heads, task_view(task));
    // Tasks do not keep statuses. The first head that failed runs again, for its status. If it succeeds now
    // (memory was short), those after it run again too.
    status s;
    for (std::size_t head = first_failed.load(std::memory_order_relaxed); s && head < kv_heads; ++head)
        s = append_head(job, head);
    return s;
}

} // namespace kv1::inline KV1_ABI::detail
