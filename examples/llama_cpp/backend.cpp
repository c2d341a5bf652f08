// SPDX-License-Identifier: Apache-2.0
//
// The functions that ggml calls: registry, device, buffer type, buffer, backend. Members are set by name and others left
// null, so one source serves the versions of the interface that are known (README.md).
//
// How llama.cpp's scheduler comes to use it. The device takes all layers' caches, since it is the one with an index below
// the CPU's. It runs nothing but what reads or writes a tensor of a KV cache, so weights and everything else stay with
// the CPU backend. Its memory is host memory, so nothing is copied between the two. Its host buffer type is its buffer
// type: the scheduler then hands it attention nodes that it had given to the CPU (pass 3), those of layers that share
// another layer's cache.
#include "ggml.hpp"
#include "kv_buffer.hpp"
#include "model_parts.hpp"
#include "settings.hpp"
#include "slot_cache.hpp"
#include "thread_team.hpp"

#include <cstring>
#include <exception>
#include <memory>
#include <string_view>
#include <vector>

#include <sys/sysinfo.h>

namespace kv1_ggml {
namespace {

struct module {
    ggml_backend_reg registry{};
    ggml_backend_device device{};
    ggml_backend_buffer_type type{};
};

module& own() {
    static module m;
    return m;
}

struct backend_context {
    thread_team team;
};

bool is_ours(const ggml_backend_buffer* b) noexcept { return b != nullptr && b->buft == &own().type; }

kv_buffer& context_of(ggml_backend_buffer_t b) noexcept { return *static_cast<kv_buffer*>(b->context); }

// The cache that a tensor lies in. Tensors of a cache that was only planned (llama.cpp does so to estimate memory) have
// a name and an empty buffer.
const ggml_tensor* cached(const ggml_tensor* t) noexcept {
    const ggml_tensor* const root = root_of(t);
    return root != nullptr && is_ours(root->buffer) && cache_name_of(root) ? root : nullptr;
}

const ggml_tensor* touched_by(const ggml_tensor* op) noexcept {
    if (const ggml_tensor* t = cached(op))
        return t;
    if (is_view(op->op))
        return nullptr;
    for (const ggml_tensor* source : op->src)
        if (const ggml_tensor* t = source != nullptr ? cached(source) : nullptr)
            return t;
    return nullptr;
}

// ---- buffer

void buffer_free(ggml_backend_buffer_t b) { delete &context_of(b); }
void* buffer_base(ggml_backend_buffer_t b) { return context_of(b).base(); }

ggml_status buffer_init_tensor(ggml_backend_buffer_t b, ggml_tensor* t) {
    try {
        return context_of(b).add(t) ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
    } catch (const std::exception&) {
        return GGML_STATUS_ALLOC_FAILED;
    }
}

// Whether a tensor's bytes are a slot_cache's.
bool is_coded(const ggml_tensor* t) noexcept { return cached(t) != nullptr; }

void refuse(const std::exception& e) { say(GGML_LOG_LEVEL_ERROR, "%s", e.what()); }

void buffer_memset(ggml_backend_buffer_t b, ggml_tensor* t, std::uint8_t value, std::size_t offset,
                   std::size_t bytes) try {
    if (!is_coded(t)) {
        std::memset(static_cast<std::byte*>(t->data) + offset, value, bytes);
        return;
    }
    const std::vector<std::byte> zeros(bytes, std::byte{value});
    context_of(b).cache().load(t, zeros.data(), offset, bytes);
} catch (const std::exception& e) {
    refuse(e);
}

void buffer_get(ggml_backend_buffer_t b, const ggml_tensor* t, void* out, std::size_t offset,
                std::size_t bytes) try {
    if (is_coded(t))
        context_of(b).cache().save(t, static_cast<std::byte*>(out), offset, bytes);
    else
        std::memcpy(out, static_cast<const std::byte*>(t->data) + offset, bytes);
} catch (const std::exception& e) {
    refuse(e);
}

void buffer_set(ggml_backend_buffer_t b, ggml_tensor* t, const void* in, std::size_t offset,
                std::size_t bytes) try {
    // ggml_backend_tensor_copy() gives the address of another tensor.
    if (kv_buffer* const from = kv_buffer::of(in)) {
        const ggml_tensor* const source = from->cache().at(in);
        const auto at = static_cast<std::size_t>(static_cast<const std::byte*>(in) -
                                                 static_cast<const std::byte*>(source->data));
        if (is_coded(t) && root_of(t) == source && offset == 0) {
            from->cache().copy(t, source, at / source->nb[1], bytes / source->nb[1]);
            return;
        }
        std::vector<std::byte> rows(bytes);
        from->cache().save(source, rows.data(), at, bytes);
        buffer_set(b, t, rows.data(), offset, bytes);
        return;
    }
    if (is_coded(t))
        context_of(b).cache().load(t, static_cast<const std::byte*>(in), offset, bytes);
    else
        std::memcpy(static_cast<std::byte*>(t->data) + offset, in, bytes);
} catch (const std::exception& e) {
    refuse(e);
}

void buffer_clear(ggml_backend_buffer_t b, std::uint8_t value) { context_of(b).clear(value); }

// ---- buffer type

const char* type_name(ggml_backend_buffer_type_t) { return "KV1"; }
std::size_t type_alignment(ggml_backend_buffer_type_t) { return 64; }
bool type_is_host(ggml_backend_buffer_type_t) { return true; }

ggml_backend_buffer_t type_alloc(ggml_backend_buffer_type_t type, std::size_t bytes) try {
    auto context = std::make_unique<kv_buffer>(bytes);
    ggml_backend_buffer_i i{};
    i.free_buffer = buffer_free;
    i.get_base = buffer_base;
    i.init_tensor = buffer_init_tensor;
    i.memset_tensor = buffer_memset;
    i.set_tensor = buffer_set;
    i.get_tensor = buffer_get;
    i.clear = buffer_clear;
    // ggml deletes it.
    auto* const b = new ggml_backend_buffer{};
    b->iface = i;
    b->buft = type;
    b->context = context.release();
    b->size = bytes;
    b->usage = GGML_BACKEND_BUFFER_USAGE_ANY;
    return b;
} catch (const std::exception& e) {
    refuse(e);
    return nullptr;
}

// ---- backend

const char* backend_name(ggml_backend_t) { return "KV1"; }
void backend_free(ggml_backend_t b) {
    delete static_cast<backend_context*>(b->context);
    delete b;
}

outcome compute(ggml_tensor* op, thread_team& team) {
    const ggml_tensor* const root = touched_by(op);
    if (root == nullptr || root->data == nullptr)
        return unknown(op);
    slot_cache& cache = context_of(root->buffer).cache();
    switch (op->op) {
    case GGML_OP_SET_ROWS:
        return cache.write(op, team);
    case GGML_OP_FLASH_ATTN_EXT:
        return cache.attend(op, team);
    case GGML_OP_ROPE:
        return cache.turn(op);
    case GGML_OP_CPY:
        return cached(op) != nullptr ? cache.encode(op) : cache.decode(op);
    default:
        return unknown(op);
    }
}

ggml_status backend_compute(ggml_backend_t b, ggml_cgraph* graph) try {
    thread_team& team = static_cast<backend_context*>(b->context)->team;
    // A batch's attention node may come in a later graph than its keys: what it says of heads is wanted first.
    for (int i = 0; i < graph->n_nodes; ++i)
        if (const ggml_tensor* op = graph->nodes[i]; op->op == GGML_OP_FLASH_ATTN_EXT)
            if (const ggml_tensor* root = touched_by(op))
                context_of(root->buffer).cache().learn(op);
    for (int i = 0; i < graph->n_nodes; ++i) {
        ggml_tensor* const op = graph->nodes[i];
        if (is_view(op->op) || op->ne[0] * op->ne[1] * op->ne[2] * op->ne[3] == 0)
            continue;
        if (compute(op, team) == outcome::failed)
            return GGML_STATUS_FAILED;
    }
    return GGML_STATUS_SUCCESS;
} catch (const std::exception& e) {
    refuse(e);
    return GGML_STATUS_FAILED;
}

void set_threads(ggml_backend_t b, int threads) {
    static_cast<backend_context*>(b->context)
        ->team.resize(threads > 0 ? static_cast<std::size_t>(threads) : 1);
}

// ---- device

const char* device_name(ggml_backend_dev_t) { return "KV1"; }
const char* device_description(ggml_backend_dev_t) { return "KV cache in a few bits a value (kv1)"; }

// What is nominal need not fit: the memory that is really there, times what codes save at most.
void device_memory(ggml_backend_dev_t, std::size_t* free, std::size_t* total) {
    struct sysinfo info {};
    ::sysinfo(&info);
    *free = *total = 16 * static_cast<std::size_t>(info.totalram) * info.mem_unit;
}
enum ggml_backend_dev_type device_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_IGPU; }

void device_props(ggml_backend_dev_t d, ggml_backend_dev_props* p) {
    *p = {};
    p->name = device_name(d);
    p->description = device_description(d);
    p->type = device_type(d);
    device_memory(d, &p->memory_free, &p->memory_total);
    p->caps.host_buffer = true;
    allow_mmap(p->caps);
}

ggml_backend_t device_init(ggml_backend_dev_t d, const char*) try {
    static ggml_guid guid = {0x6b, 0x76, 0x31, 0x9d, 0x52, 0x0c, 0x4e, 0x31,
                             0xa7, 0x18, 0x5f, 0x02, 0xc3, 0x64, 0x8b, 0xe9};
    ggml_backend_i i{};
    i.get_name = backend_name;
    i.free = backend_free;
    i.graph_compute = backend_compute;
    auto* const b = new ggml_backend{};
    b->guid = &guid;
    b->iface = i;
    b->device = d;
    b->context = new backend_context;
    return b;
} catch (const std::exception& e) {
    refuse(e);
    return nullptr;
}

ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t) { return &own().type; }

bool device_supports_op(ggml_backend_dev_t, const ggml_tensor* op) {
    const ggml_tensor* const root = touched_by(op);
    if (root == nullptr) {
        // What follows attention stays with the CPU, but says which weights these are.
        const ggml_tensor* const attention = attention_projected_by(op);
        if (const ggml_tensor* r = attention != nullptr ? touched_by(attention) : nullptr)
            context_of(r->buffer).cache().learn_projection(attention, op->src[0]);
        return false;
    }
    if (root->data != nullptr && op->op == GGML_OP_FLASH_ATTN_EXT)
        context_of(root->buffer).cache().learn(op);
    if (root->data != nullptr && op->op == GGML_OP_SET_ROWS)
        context_of(root->buffer).cache().learn_keys(op);
    return true; // what can not be done is refused by name when it is computed
}

bool device_supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t type) {
    return type == &own().type || (type->iface.is_host != nullptr && type->iface.is_host(type));
}

// ---- registry

const char* registry_name(ggml_backend_reg_t) { return "KV1"; }
std::size_t registry_devices(ggml_backend_reg_t) { return 1; }
ggml_backend_dev_t registry_device(ggml_backend_reg_t, std::size_t) { return &own().device; }
void* registry_function(ggml_backend_reg_t, const char* name) {
    return std::string_view(name) == "ggml_backend_set_n_threads" ? reinterpret_cast<void*>(set_threads)
                                                                  : nullptr;
}

// Structures of ggml change from one version to the next, so only the one that this was built for is served.
bool version_fits() {
    if (ggml_version == nullptr)
        return true; // a static ggml that does not export it; the loader compares the interface's version
    const std::string_view there = ggml_version(), here = KV1_GGML_VERSION;
    const auto minor = [](std::string_view v) { return v.substr(0, v.find('.', v.find('.') + 1)); };
    if (minor(there) == minor(here))
        return true;
    say(GGML_LOG_LEVEL_ERROR, "built for ggml %s (interface %d), this is ggml %s: build it with its sources",
        KV1_GGML_VERSION, GGML_BACKEND_API_VERSION, ggml_version());
    return false;
}

} // namespace
} // namespace kv1_ggml

// Null: what the log says is in the way.
extern "C" [[gnu::visibility("default")]] ggml_backend_reg_t ggml_backend_init() {
    using namespace kv1_ggml;
    module& m = own();
    if (m.registry.api_version != 0)
        return &m.registry;
    if (!version_fits())
        return nullptr;
    try {
        // Read again by each cache that is made; here, so that a mistake is seen at once.
        if (!settings::from_environment(nullptr))
            return nullptr;
    } catch (const std::exception& e) {
        refuse(e);
        return nullptr;
    }
    m.type.iface.get_name = type_name;
    m.type.iface.alloc_buffer = type_alloc;
    m.type.iface.get_alignment = type_alignment;
    m.type.iface.is_host = type_is_host;
    m.type.device = &m.device;
    m.device.iface.get_name = device_name;
    m.device.iface.get_description = device_description;
    m.device.iface.get_memory = device_memory;
    m.device.iface.get_type = device_type;
    m.device.iface.get_props = device_props;
    m.device.iface.init_backend = device_init;
    m.device.iface.get_buffer_type = device_buffer_type;
    m.device.iface.get_host_buffer_type = device_buffer_type;
    m.device.iface.supports_op = device_supports_op;
    m.device.iface.supports_buft = device_supports_buft;
    m.device.reg = &m.registry;
    m.registry.iface.get_name = registry_name;
    m.registry.iface.get_device_count = registry_devices;
    m.registry.iface.get_device = registry_device;
    m.registry.iface.get_proc_address = registry_function;
    m.registry.api_version = GGML_BACKEND_API_VERSION;
    return &m.registry;
}
