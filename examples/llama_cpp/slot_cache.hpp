// SPDX-License-Identifier: Apache-2.0
//
// The K and V tensors of one of llama.cpp's caches as layers of a kv1::slot_store. Cell c of stream s is slot
// s * cells + c. llama.cpp allocates tensors of a type that it knows (-ctk, -ctv: the nominal type). Their memory is
// reserved and never touched: what it would hold is in the store.
//
// A layer's heads are not known when its tensors are made. They are learnt from the attention nodes of the first graph,
// which the scheduler shows before anything is computed. The store is made when the first batch is written. So are
// parameters by which a layer is known, and its output projection (model_parts.hpp), where a calibration wants them.
#pragma once

#include "calibration_run.hpp"
#include "ggml.hpp"
#include "mask_texts.hpp"
#include "settings.hpp"
#include "step_book.hpp"
#include "thread_team.hpp"

#include <kv1/slot_store.hpp>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

namespace kv1_ggml {

// Why an operation can not be done; the log has a line about it. ggml reports a failed graph to llama_decode().
enum class outcome : bool { failed, done };

// Says that an operation on a cache is none that is known.
outcome unknown(const ggml_tensor* op);

class slot_cache {
public:
    slot_cache() = default;
    slot_cache(const slot_cache&) = delete;
    slot_cache& operator=(const slot_cache&) = delete;
    ~slot_cache();

    // Takes a tensor in, if it is one of a layer's keys or values.
    bool add(const ggml_tensor* tensor, cache_name name);
    // Learns a layer's heads from an attention node, how keys turn and by which parameters a layer is known from the
    // node that writes its keys, and its output projection.
    void learn(const ggml_tensor* attention);
    void learn_keys(const ggml_tensor* set_rows);
    void learn_projection(const ggml_tensor* attention, const ggml_tensor* weights);

    // The operations of llama.cpp's graphs.
    outcome write(const ggml_tensor* set_rows, thread_team& team);
    outcome attend(const ggml_tensor* attention, thread_team& team);
    outcome turn(const ggml_tensor* rope);   // context shift, in place
    outcome decode(const ggml_tensor* copy); // keys out as fp32, where the nominal type is quantized
    outcome encode(const ggml_tensor* copy); // and in again

    // The rows of a saved state (slot_state.cpp): each slot's bytes, padded to a nominal row.
    void save(const ggml_tensor* tensor, std::byte* out, std::size_t offset, std::size_t bytes);
    void load(const ggml_tensor* tensor, const std::byte* in, std::size_t offset, std::size_t bytes);
    // Copies a stream of one of this cache's tensors to another.
    void copy(const ggml_tensor* to, const ggml_tensor* root, std::size_t first_row, std::size_t rows);
    void clear();

    // The tensor of this cache that has an address, or null.
    [[nodiscard]] const ggml_tensor* at(const void* address) const noexcept;

private:
    struct cache_layer {
        std::size_t of_model = 0;
        const ggml_tensor *keys = nullptr, *values = nullptr;
        std::size_t kv_heads = 0, key_dim = 0, value_dim = 0;
        bool values_in_keys = false, written = false; // in this step
        const ggml_tensor *parameters = nullptr, *output_projection = nullptr;
        kv1::rotary_embedding rotary;
    };
    // A layer and a side of it.
    struct place {
        std::size_t layer;
        kv1::kv_side side;
    };
    // Channels of keys that a view of the cache has.
    struct channels {
        std::size_t first, count;
    };

    [[nodiscard]] std::optional<place> find(const ggml_tensor* tensor) const noexcept;
    [[nodiscard]] channels channels_of(const ggml_tensor* view, const cache_layer& l) const noexcept;
    bool ready();
    bool make();
    // The caches of this one's model, itself among them.
    [[nodiscard]] std::vector<const slot_cache*> of_model() const;
    [[nodiscard]] kv1::model_fingerprint model() const;
    bool join_calibration();
    outcome calibrate(const ggml_tensor* attention, std::size_t layer, thread_team& team);
    [[nodiscard]] kv1::result<kv1::layer_description> describe(const cache_layer& l) const;
    void end_step();
    void make_room(std::size_t layer, std::span<const std::uint32_t> slots);
    // Whether the means of a layer's keys turn, so that a key has a position.
    [[nodiscard]] bool keeps_positions(std::size_t layer) const noexcept;
    outcome write_vectors(std::size_t layer, kv1::kv_side side, std::span<const std::uint32_t> slots,
                          std::span<const std::int32_t> positions, const kv1::tensor_view& vectors,
                          thread_team* team);
    // by: how far a slot's key was turned, by slot; null: not at all.
    outcome replace_keys(std::size_t layer, channels part, std::span<const std::uint32_t> slots,
                         const std::int32_t* by, const std::vector<float>& keys);
    outcome failed(const char* what, const kv1::status& why) const;

    // Of a slot's row in a saved state.
    enum class row_kind : std::uint8_t { codes = 1 };
    [[nodiscard]] std::size_t side_bytes(std::size_t layer, kv1::kv_side side) const; // of a KV head
    [[nodiscard]] std::size_t row_bytes(place p) const; // of all, and a key's position
    void save_rows(place p, std::span<const std::uint32_t> slots, std::size_t nominal, ggml_type type,
                   std::byte* out);
    void load_rows(place p, std::span<const std::uint32_t> slots, std::size_t nominal, ggml_type type,
                   const std::byte* in);
    template <class F>
    void for_parts(place p, F&& f) const;

    settings how_;
    std::vector<cache_layer> layers_;
    std::size_t slots_ = 0;
    std::optional<kv1::slot_store> store_;
    std::optional<step_book> book_;
    std::shared_ptr<calibration_run> calibration_;
    std::vector<text_part> texts_; // of the step, for calibration_
    std::uint64_t texts_of_step_ = 0;
    bool refused_ = false, warned_ = false;
    std::vector<std::uint32_t> batch_;
    std::vector<std::int32_t> positions_; // of the step's tokens, empty where they are not known
};

} // namespace kv1_ggml
