// SPDX-License-Identifier: Apache-2.0
#include "slot_cache.hpp"

#include "model_parts.hpp"
#include "rotary.hpp"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <limits>
#include <mutex>
#include <string>
#include <utility>

namespace kv1_ggml {

namespace {

// Caches that llama.cpp has now.
std::mutex live_mutex;
std::vector<const slot_cache*> live;

// A batch larger than this sees itself partly as codes.
constexpr std::size_t largest_batch = 8192;

kv1::scalar_type scalar_of(ggml_type type) noexcept {
    return type == GGML_TYPE_F32    ? kv1::scalar_type::fp32
           : type == GGML_TYPE_BF16 ? kv1::scalar_type::bf16
                                    : kv1::scalar_type::fp16;
}

// Rows of heads of channels, with strides in bytes.
kv1::tensor_view view_of(ggml_type type, const void* data, std::size_t rows, std::size_t heads,
                         std::size_t dim, std::size_t row_bytes, std::size_t head_bytes) noexcept {
    switch (scalar_of(type)) {
    case kv1::scalar_type::fp32:
        return {static_cast<const float*>(data), rows, heads, dim, stride_of<float>(row_bytes),
                stride_of<float>(head_bytes)};
    case kv1::scalar_type::bf16:
        return {
            static_cast<const kv1::bfloat16*>(data), rows, heads, dim, stride_of<kv1::bfloat16>(row_bytes),
            stride_of<kv1::bfloat16>(head_bytes)};
    default:
        return {static_cast<const kv1::float16*>(data), rows, heads, dim, stride_of<kv1::float16>(row_bytes),
                stride_of<kv1::float16>(head_bytes)};
    }
}

// Slopes of ALiBi (Press et al. 2022) for any number of heads, as ggml takes them from its largest bias.
std::vector<float> slopes_of(float largest_bias, std::size_t heads) {
    std::vector<float> slopes;
    if (largest_bias <= 0)
        return slopes;
    const double whole = std::exp2(std::floor(std::log2(static_cast<double>(heads))));
    for (std::size_t h = 0; h < heads; ++h) {
        const auto i = static_cast<double>(h);
        slopes.push_back(
            static_cast<float>(i < whole ? std::exp2(-largest_bias / whole * (i + 1))
                                         : std::exp2(-largest_bias / 2 / whole * (2 * (i - whole) + 1))));
    }
    return slopes;
}

} // namespace

outcome unknown(const ggml_tensor* op) {
    say(GGML_LOG_LEVEL_ERROR,
        "ggml's operation %d with a result of type %d on the cache ('%s') is none that is known: -fa on is "
        "needed, and "
        "a model that has flash attention",
        static_cast<int>(op->op), static_cast<int>(op->type), op->name);
    return outcome::failed;
}

// ---------------------------------------------------------------------------------------------- layers

bool slot_cache::add(const ggml_tensor* tensor, cache_name name) {
    if (tensor->type == GGML_TYPE_F32) {
        say(GGML_LOG_LEVEL_ERROR,
            "llama.cpp converts f32 keys and values before it attends: leave -ctk and -ctv alone; "
            "KV1_POLICY=32 keeps them in fp32");
        return false;
    }
    auto own = std::find_if(layers_.begin(), layers_.end(),
                            [&](const cache_layer& l) { return l.of_model == name.layer; });
    if (own == layers_.end()) {
        cache_layer l;
        l.of_model = name.layer;
        own = layers_.insert(std::find_if(layers_.begin(), layers_.end(),
                                          [&](const cache_layer& x) { return x.of_model > name.layer; }),
                             l);
    }
    const std::size_t slots = size_of(tensor->ne[1]) * size_of(tensor->ne[2]);
    if ((slots_ != 0 && slots_ != slots) || slots > std::size_t{1} << 30)
        return false;
    slots_ = slots;
    (name.keys ? own->keys : own->values) = tensor;
    const std::lock_guard lock(live_mutex);
    if (std::find(live.begin(), live.end(), this) == live.end())
        live.push_back(this);
    return true;
}

slot_cache::~slot_cache() {
    const std::lock_guard lock(live_mutex);
    std::erase(live, this);
}

// Sliding windows make a second cache of other layers. A model beside this one (a draft's) has layers of the same numbers,
// or its weights elsewhere.
std::vector<const slot_cache*> slot_cache::of_model() const {
    const auto buffer_of = [](const slot_cache& c) {
        return c.layers_.front().parameters != nullptr ? c.layers_.front().parameters->buffer : nullptr;
    };
    const std::lock_guard lock(live_mutex);
    std::vector<const slot_cache*> own;
    for (const slot_cache* c : live) {
        bool joins = c == this || (buffer_of(*c) == buffer_of(*this) && c->slots_ != 0);
        for (const cache_layer& l : layers_)
            for (const cache_layer& other : c->layers_)
                joins = joins && (c == this || other.of_model != l.of_model);
        if (joins)
            own.push_back(c);
    }
    return own;
}

kv1::model_fingerprint slot_cache::model() const {
    std::vector<const cache_layer*> all;
    for (const slot_cache* c : of_model())
        for (const cache_layer& l : c->layers_)
            all.push_back(&l);
    std::sort(all.begin(), all.end(),
              [](const cache_layer* a, const cache_layer* b) { return a->of_model < b->of_model; });
    kv1::model_fingerprint fingerprint;
    for (const cache_layer* l : all)
        fingerprint = joined(fingerprint, l->of_model, l->parameters);
    return fingerprint;
}

std::optional<slot_cache::place> slot_cache::find(const ggml_tensor* tensor) const noexcept {
    const ggml_tensor* const root = root_of(tensor);
    for (std::size_t i = 0; i < layers_.size(); ++i) {
        if (layers_[i].keys == root)
            return place{i, kv1::kv_side::key};
        if (layers_[i].values == root)
            return place{i, kv1::kv_side::value};
    }
    return std::nullopt;
}

const ggml_tensor* slot_cache::at(const void* address) const noexcept {
    const auto inside = [&](const ggml_tensor* t) {
        const auto* const first = t != nullptr ? static_cast<const std::byte*>(t->data) : nullptr;
        return first != nullptr && address >= first && address < first + t->nb[2] * size_of(t->ne[2]);
    };
    for (const cache_layer& l : layers_)
        for (const ggml_tensor* t : {l.keys, l.values})
            if (inside(t))
                return t;
    return nullptr;
}

void slot_cache::learn(const ggml_tensor* attention) {
    const ggml_tensor *const k = attention->src[1], *const v = attention->src[2];
    const std::optional<place> keys = find(k);
    if (!keys || keys->side != kv1::kv_side::key || layers_[keys->layer].kv_heads != 0)
        return;
    cache_layer& l = layers_[keys->layer];
    l.kv_heads = size_of(k->ne[2]);
    l.key_dim = size_of(k->ne[0]);
    l.value_dim = size_of(v->ne[0]);
    l.values_in_keys = root_of(v) == l.keys;
}

void slot_cache::learn_keys(const ggml_tensor* set_rows) {
    const std::optional<place> p = find(set_rows);
    if (!p || p->side != kv1::kv_side::key || layers_[p->layer].parameters != nullptr)
        return;
    cache_layer& l = layers_[p->layer];
    l.parameters = nearest_parameters(set_rows->src[0]);
    if (const ggml_tensor* rope = find_rope(set_rows->src[0]))
        l.rotary = turn_of(rope).rotary;
}

void slot_cache::learn_projection(const ggml_tensor* attention, const ggml_tensor* weights) {
    const std::optional<place> p = find(attention->src[1]);
    if (p && layers_[p->layer].output_projection == nullptr)
        layers_[p->layer].output_projection = weights; // the first: an adapter's come later
}

kv1::result<kv1::layer_description> slot_cache::describe(const cache_layer& l) const {
    kv1::layer_description shape{l.kv_heads, l.key_dim, l.value_dim};
    shape.values_in_keys = l.values_in_keys;
    kv1::cache_policy policy;
    policy.common = how_.policy.of(l.of_model);
    kv1::layer_calibration parts;
    std::vector<float> own[6];
    if (how_.calibration != nullptr) {
        const kv1::calibration& c = *how_.calibration;
        if (l.of_model >= c.layers())
            return kv1::status(kv1::errc::shape_mismatch, "the calibration has fewer layers than the model");
        for (const kv1::kv_side side : {kv1::kv_side::key, kv1::kv_side::value}) {
            const bool key = side == kv1::kv_side::key;
            own[key ? 0 : 1] = c.means(l.of_model, side);
            own[key ? 2 : 3] = c.error_weights(l.of_model, side);
            own[key ? 4 : 5] = c.basis(l.of_model, side);
        }
        parts = {own[0], own[1], own[2], own[3], own[4], own[5]};
        if (policy.common.key.means)
            shape.rotary = c.rotary(l.of_model);
    }
    kv1::result<kv1::cache_description> described =
        kv1::try_describe_cache(policy, kv1::uniform_cache(1, shape, slots_), std::span(&parts, 1));
    if (!described)
        return described.reason();
    return std::move(described->layers[0]);
}

bool slot_cache::ready() {
    if (!store_ && !refused_)
        refused_ = !make();
    return store_.has_value();
}

bool slot_cache::make() {
    const kv1::model_fingerprint own = model();
    std::optional<settings> how = settings::from_environment(&own);
    if (!how)
        return false;
    how_ = std::move(*how);
    if (how_.calibrate && !join_calibration())
        return false;
    kv1::slot_store_description d;
    std::size_t bytes = 0, nominal = 0;
    for (const cache_layer& l : layers_) {
        if (l.keys == nullptr || l.kv_heads == 0 || (l.values == nullptr) != l.values_in_keys) {
            say(GGML_LOG_LEVEL_ERROR,
                "layer %zu: no flash attention on its keys and values; -fa on is needed, and a model whose "
                "attention llama.cpp computes that way",
                l.of_model);
            return false;
        }
        kv1::result<kv1::layer_description> described = describe(l);
        if (!described) {
            say(GGML_LOG_LEVEL_ERROR, "layer %zu: %s", l.of_model,
                kv1::to_string(described.reason()).c_str());
            return false;
        }
        d.layers.push_back(std::move(*described));
        nominal += l.keys->nb[1] + (l.values != nullptr ? l.values->nb[1] : 0);
    }
    d.slots = slots_;
    d.page_tokens = how_.policy.page_tokens != 0 ? how_.policy.page_tokens : d.page_tokens;
    d.fp16_sinks = how_.policy.fp16_sinks;
    d.fp16_window = how_.policy.fp16_window;
    // Without fp16 tokens, too: a batch sees itself as it came, and is coded for those that follow.
    d.fp16_slots = std::min(slots_, largest_batch + 64 * (d.fp16_sinks + d.fp16_window));
    kv1::result<kv1::slot_store> made = kv1::slot_store::create(std::move(d));
    if (!made) {
        say(GGML_LOG_LEVEL_ERROR, "%s", kv1::to_string(made.reason()).c_str());
        return false;
    }
    store_.emplace(std::move(*made));
    book_.emplace(slots_);
    for (std::size_t i = 0; i < layers_.size(); ++i)
        bytes += store_->raw_bytes(i);
    say(GGML_LOG_LEVEL_INFO,
        "%s: %zu layers, %zu cells, %zu bytes a token (%zu nominal): %.1f MiB when full, taken as cells are "
        "written",
        kv1::to_string(how_.policy).c_str(), layers_.size(), slots_, bytes, nominal,
        static_cast<double>(bytes * slots_) / (1 << 20));
    return true;
}

bool slot_cache::keeps_positions(std::size_t layer) const noexcept {
    return kv1::keeps_positions(store_->description().layers[layer]);
}

outcome slot_cache::failed(const char* what, const kv1::status& why) const {
    say(GGML_LOG_LEVEL_ERROR, "%s: %s", what, kv1::to_string(why).c_str());
    return outcome::failed;
}

// ---------------------------------------------------------------------------------------------- steps

void slot_cache::end_step() {
    if (!store_ || book_->batch().empty())
        return;
    if (book_->observed()) {
        if (const kv1::status s = store_->try_settle(book_->sequences()); !s)
            failed("settling a batch", s);
        if (const kv1::status s = store_->try_release_fp16(book_->unseen()); !s)
            failed("settling a batch", s);
    }
    book_->end();
    for (cache_layer& l : layers_)
        l.written = false;
}

// fp16 copies of cells that llama.cpp has dropped stay until their cells are used again. If room is short, those that
// no batch has seen for longest go: a few more than have to, so that rows of a state that come one by one do not ask for
// the next one each.
void slot_cache::make_room(std::size_t layer, std::span<const std::uint32_t> slots) {
    const std::size_t room = store_->description().fp16_slots;
    if (store_->fp16_slots_in_use(layer) + slots.size() <= room)
        return;
    std::vector<std::uint32_t> copies;
    for (std::uint32_t slot = 0; slot < slots_; ++slot)
        if (store_->has_fp16(layer, slot) && book_->last_use(slot) != book_->step())
            copies.push_back(slot);
    std::sort(copies.begin(), copies.end(),
              [&](std::uint32_t a, std::uint32_t b) { return book_->last_use(a) < book_->last_use(b); });
    const std::size_t missing = store_->fp16_slots_in_use(layer) + slots.size() - room;
    copies.resize(std::min(copies.size(), std::max(missing, room / 16)));
    if (const kv1::status s = store_->try_release_fp16(copies); !s)
        failed("making room for fp16 tokens", s);
}

// ---------------------------------------------------------------------------------------------- write

outcome slot_cache::write_vectors(std::size_t layer, kv1::kv_side side, std::span<const std::uint32_t> slots,
                                  std::span<const std::int32_t> positions, const kv1::tensor_view& vectors,
                                  thread_team* team) {
    const kv1::tensor_view none = kv1::slot_store::nothing();
    const bool key = side == kv1::kv_side::key;
    kv1::result<kv1::work_plan> plan =
        store_->try_plan_write(layer, slots, positions, key ? vectors : none, key ? none : vectors);
    thread_team alone;
    const kv1::status s = plan ? (team != nullptr ? *team : alone).run(*plan) : plan.reason();
    return s ? outcome::done : failed(key ? "writing keys" : "writing values", s);
}

outcome slot_cache::write(const ggml_tensor* op, thread_team& team) {
    const ggml_tensor *const rows = op->src[0], *const indices = op->src[1];
    const std::optional<place> p = find(op);
    if (!p)
        return unknown(op);
    if (op->ne[0] != root_of(op)->ne[0]) {
        say(GGML_LOG_LEVEL_ERROR, "values are written transposed: -fa on is needed");
        return outcome::failed;
    }
    if (!ready())
        return outcome::failed; // the log says why, once
    cache_layer& l = layers_[p->layer];
    const bool keys = p->side == kv1::kv_side::key;
    if (!is_float(rows) || (indices->type != GGML_TYPE_I64 && indices->type != GGML_TYPE_I32)) {
        say(GGML_LOG_LEVEL_ERROR, "rows of type %d can not be written", static_cast<int>(rows->type));
        return outcome::failed;
    }
    const std::size_t n = size_of(rows->ne[1]);
    batch_.resize(n);
    for (std::size_t i = 0; i < n; ++i) {
        const auto* const at = static_cast<const std::byte*>(indices->data) + i * indices->nb[0];
        std::int64_t slot = 0;
        if (indices->type == GGML_TYPE_I64) {
            std::memcpy(&slot, at, 8);
        } else {
            std::int32_t narrow = 0;
            std::memcpy(&narrow, at, 4);
            slot = narrow;
        }
        if (slot < 0 || size_of(slot) >= slots_) {
            say(GGML_LOG_LEVEL_ERROR, "cell %" PRId64 " is outside the cache", slot);
            return outcome::failed;
        }
        batch_[i] = static_cast<std::uint32_t>(slot);
    }
    if (keys && (book_->batch().empty() || l.written)) { // a layer's keys come once a step
        end_step();
        book_->begin(batch_);
        positions_.clear();
        // Of the step's first layer: ggml reuses the memory of positions once the model's last layer has turned its keys.
        if (const std::int32_t* at = positions_of(find_rope(rows), n)) {
            positions_.assign(at, at + n);
            book_->set_positions(at);
        }
    }
    if (keys) {
        l.written = true;
        if (keeps_positions(p->layer) && positions_.size() != n) {
            say(GGML_LOG_LEVEL_ERROR, "layer %zu: no positions are found for keys whose means turn",
                l.of_model);
            return outcome::failed;
        }
        make_room(p->layer, batch_);
    }
    const bool placed = keys && keeps_positions(p->layer);
    const std::size_t dim = keys ? l.key_dim : l.value_dim;
    const std::size_t head_bytes = dim * (rows->type == GGML_TYPE_F32 ? 4 : 2);
    return write_vectors(p->layer, p->side, batch_,
                         placed ? std::span<const std::int32_t>(positions_) : std::span<const std::int32_t>{},
                         view_of(rows->type, rows->data, n, l.kv_heads, dim, rows->nb[1], head_bytes), &team);
}

// ---------------------------------------------------------------------------------------------- attend

outcome slot_cache::attend(const ggml_tensor* op, thread_team& team) {
    const ggml_tensor *const q = op->src[0], *const k = op->src[1], *const mask = op->src[3],
                             *const sinks = op->src[4];
    const std::optional<place> p = find(k);
    learn(op);
    if (!p || p->side != kv1::kv_side::key)
        return unknown(op);
    if (!ready())
        return outcome::failed; // the log says why, once
    const cache_layer& l = layers_[p->layer];
    const std::size_t dim = size_of(q->ne[0]), tokens = size_of(q->ne[1]), heads = size_of(q->ne[2]),
                      streams = size_of(q->ne[3]), cells = size_of(k->ne[1]);
    if (dim != l.key_dim || size_of(k->ne[2]) != l.kv_heads || size_of(k->ne[3]) != streams ||
        op->type != GGML_TYPE_F32 || !is_float(q) || (mask != nullptr && mask->type != GGML_TYPE_F16)) {
        say(GGML_LOG_LEVEL_ERROR, "layer %zu: an attention of this form is not known", l.of_model);
        return outcome::failed;
    }
    const std::size_t row = l.keys->nb[1], first = k->view_offs / row;
    const std::size_t stride = streams > 1 ? k->nb[3] / row : 0; // slots of a stream
    const auto mask_of = [&](std::size_t s) {
        return reinterpret_cast<const kv1::float16*>(static_cast<const std::byte*>(mask->data) +
                                                     (s % size_of(mask->ne[3])) * mask->nb[3]);
    };
    if (mask != nullptr && !book_->observed())
        for (std::size_t s = 0; s < streams; ++s) {
            const auto begin = static_cast<std::uint32_t>(first + s * stride);
            const std::size_t width = mask->nb[1] / 2;
            const kv1::float16* const rows = mask_of(s);
            book_->observe(s * tokens, tokens, begin, static_cast<std::uint32_t>(begin + cells),
                           [&](std::size_t i, std::uint32_t slot) {
                               return slot >= begin && slot < begin + cells &&
                                      rows[i * width + (slot - begin)].bits() != 0xfc00u;
                           });
        }
    const std::vector<float> slopes = slopes_of(float_param(op, 1), heads);
    kv1::slot_attention_options options;
    options.scale = float_param(op, 0);
    options.soft_cap = float_param(op, 2);
    options.mode = how_.mode;
    options.alibi_slopes = slopes;
    if (sinks != nullptr)
        options.sink_logits = {static_cast<const float*>(sinks->data), heads};
    std::vector<kv1::slot_stream> seen(streams);
    for (std::size_t s = 0; s < streams; ++s) {
        seen[s].queries = tokens;
        seen[s].slots = kv1::slot_view::range(first + s * stride, cells);
        if (mask != nullptr)
            seen[s].mask =
                kv1::slot_mask::additive(mask_of(s), stride_of<kv1::float16>(mask->nb[1]),
                                         mask->ne[2] > 1 ? stride_of<kv1::float16>(mask->nb[2]) : 0);
    }
    // Queries of all streams have one stride, or each stream is a call.
    const bool even = streams == 1 || q->nb[3] == q->nb[1] * tokens;
    const std::size_t calls = even ? 1 : streams, of_call = streams / calls;
    for (std::size_t c = 0; c < calls; ++c) {
        const std::size_t rows = tokens * of_call;
        const kv1::tensor_view queries =
            view_of(q->type, static_cast<const std::byte*>(q->data) + c * q->nb[3], rows, heads, dim,
                    q->nb[1], q->nb[2]);
        auto* const out = reinterpret_cast<float*>(static_cast<std::byte*>(op->data) + c * op->nb[3]);
        kv1::result<kv1::work_plan> plan =
            store_->try_plan_attention(p->layer, std::span(seen).subspan(c * of_call, of_call), queries,
                                       kv1::mutable_tensor_view(out, rows, heads, l.value_dim), options);
        if (const kv1::status s = plan ? team.run(*plan) : plan.reason(); !s)
            return failed("attention", s);
    }
    return calibration_ != nullptr ? calibrate(op, p->layer, team) : outcome::done;
}

// ---------------------------------------------------------------------------------------------- context shift

slot_cache::channels slot_cache::channels_of(const ggml_tensor* view, const cache_layer& l) const noexcept {
    // A head's channels take nb[1] bytes, in whole blocks of a quantized type.
    const std::size_t in_head = view->view_offs % l.keys->nb[1] % view->nb[1];
    return {in_head * l.key_dim / view->nb[1], size_of(view->ne[0])};
}

// Keys are [slots][kv_heads][channels of the part].
outcome slot_cache::replace_keys(std::size_t layer, channels part, std::span<const std::uint32_t> slots,
                                 const std::int32_t* by, const std::vector<float>& keys) {
    const cache_layer& l = layers_[layer];
    std::vector<float> whole(slots.size() * l.kv_heads * l.key_dim), head(slots.size() * l.key_dim);
    std::vector<std::uint32_t> coded; // those that are seen as codes stay so
    for (const std::uint32_t slot : slots)
        if (!store_->has_fp16(layer, slot))
            coded.push_back(slot);
    for (std::size_t h = 0; h < l.kv_heads; ++h) {
        if (const kv1::status s = store_->try_read(layer, kv1::kv_side::key, h, slots, head); !s)
            return failed("reading keys", s);
        for (std::size_t i = 0; i < slots.size(); ++i) {
            float* const to = whole.data() + (i * l.kv_heads + h) * l.key_dim;
            std::copy_n(head.data() + i * l.key_dim, l.key_dim, to);
            std::copy_n(keys.data() + (i * l.kv_heads + h) * part.count, part.count, to + part.first);
        }
    }
    std::vector<std::int32_t> positions; // that they are turned to
    if (keeps_positions(layer))
        for (const std::uint32_t slot : slots)
            positions.push_back(
                std::max(0, store_->key_position(layer, slot) + (by != nullptr ? by[slot] : 0)));
    make_room(layer, slots);
    const outcome written =
        write_vectors(layer, kv1::kv_side::key, slots, positions,
                      kv1::tensor_view(whole.data(), slots.size(), l.kv_heads, l.key_dim), nullptr);
    if (const kv1::status s = store_->try_release_fp16(coded); !s)
        return failed("context shift", s);
    return written;
}

outcome slot_cache::turn(const ggml_tensor* op) {
    const std::optional<place> p = find(op);
    if (!p || p->side != kv1::kv_side::key)
        return unknown(op);
    if (!store_)
        return outcome::done; // nothing was ever written
    end_step();
    cache_layer& l = layers_[p->layer];
    const ggml_tensor* const shift = op->src[1];
    const struct turn how = turn_of(op);
    const channels part = channels_of(op, l);
    const std::size_t all = std::min(slots_, size_of(op->ne[2]));
    const auto* const by = static_cast<const std::int32_t*>(shift->data);
    constexpr std::size_t at_once = 256;
    std::vector<std::uint32_t> slots;
    std::vector<float> head, keys;
    for (std::uint32_t slot = 0; slot < all;) {
        slots.clear();
        for (; slot < all && slots.size() < at_once; ++slot)
            if (by[slot] != 0 && book_->written(slot))
                slots.push_back(slot);
        if (slots.empty())
            continue;
        head.resize(slots.size() * l.key_dim);
        keys.resize(slots.size() * l.kv_heads * part.count);
        for (std::size_t h = 0; h < l.kv_heads; ++h) {
            if (const kv1::status s = store_->try_read(p->layer, kv1::kv_side::key, h, slots, head); !s)
                return failed("reading keys", s);
            for (std::size_t i = 0; i < slots.size(); ++i) {
                const std::span<float> key(keys.data() + (i * l.kv_heads + h) * part.count, part.count);
                std::copy_n(head.data() + i * l.key_dim + part.first, part.count, key.data());
                kv1::apply_rotary(how.rotary, key, by[slots[i]]);
                for (std::size_t c = 0; c < std::min(key.size(), how.rotary.channels()); ++c)
                    key[c] *= how.magnitude;
            }
        }
        if (replace_keys(p->layer, part, slots, by, keys) == outcome::failed)
            return outcome::failed;
        if (&l == &layers_.front())
            for (const std::uint32_t s : slots)
                book_->shift(s, by[s]);
    }
    return outcome::done;
}

outcome slot_cache::decode(const ggml_tensor* op) {
    const ggml_tensor* const from = op->src[0];
    const std::optional<place> p = find(from);
    if (!p || p->side != kv1::kv_side::key || op->type != GGML_TYPE_F32)
        return unknown(op);
    const cache_layer& l = layers_[p->layer];
    auto* const out = static_cast<std::byte*>(op->data);
    if (!store_) {
        std::memset(out, 0, size_of(op->ne[2]) * op->nb[2]);
        return outcome::done;
    }
    end_step();
    const channels part = channels_of(from, l);
    std::vector<float> key(l.key_dim);
    for (std::uint32_t slot = 0; slot < size_of(from->ne[2]); ++slot)
        for (std::size_t h = 0; h < l.kv_heads; ++h) {
            std::byte* const to = out + slot * op->nb[2] + h * op->nb[1];
            std::memset(to, 0, part.count * sizeof(float));
            if (!book_->written(slot))
                continue;
            if (const kv1::status s =
                    store_->try_read(p->layer, kv1::kv_side::key, h, std::span(&slot, 1), key);
                !s)
                return failed("reading keys", s);
            std::memcpy(to, key.data() + part.first, part.count * sizeof(float));
        }
    return outcome::done;
}

outcome slot_cache::encode(const ggml_tensor* op) {
    const ggml_tensor* const from = op->src[0];
    const std::optional<place> p = find(op);
    if (!p || p->side != kv1::kv_side::key || from->type != GGML_TYPE_F32)
        return unknown(op);
    if (!store_)
        return outcome::done;
    cache_layer& l = layers_[p->layer];
    const channels part = channels_of(op, l);
    const std::size_t all = std::min(slots_, size_of(from->ne[2]));
    // Only keys that turn are written again.
    const ggml_tensor* const rope = find_rope(from);
    const std::int32_t* const by = rope != nullptr ? positions_of(rope, all) : nullptr;
    std::vector<std::uint32_t> slots;
    std::vector<float> keys;
    for (std::uint32_t slot = 0; slot < all;) {
        slots.clear();
        keys.clear();
        for (; slot < all && slots.size() < 256; ++slot) {
            if (!book_->written(slot) || (by != nullptr && by[slot] == 0))
                continue;
            slots.push_back(slot);
            for (std::size_t h = 0; h < l.kv_heads; ++h) {
                const auto* const key = reinterpret_cast<const float*>(
                    static_cast<const std::byte*>(from->data) + slot * from->nb[2] + h * from->nb[1]);
                keys.insert(keys.end(), key, key + part.count);
            }
        }
        if (!slots.empty() && replace_keys(p->layer, part, slots, by, keys) == outcome::failed)
            return outcome::failed;
        if (by != nullptr && &l == &layers_.front())
            for (const std::uint32_t s : slots)
                book_->shift(s, by[s]);
    }
    return outcome::done;
}

} // namespace kv1_ggml
