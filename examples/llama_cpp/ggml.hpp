// SPDX-License-Identifier: Apache-2.0
//
// What the backend takes from ggml: its internal headers, of the tree that KV1_GGML_SOURCE names, and a few words about
// its tensors. All that differs between ggml's versions is here and in backend.cpp.
//
// No function of ggml is linked. A few are used where the process has them (weak symbols), so one file serves programs
// with a shared ggml and programs that ggml is a part of.
#pragma once

#include <ggml-backend-impl.h>
#include <ggml-impl.h>

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string_view>

#pragma weak ggml_version
#pragma weak ggml_log_internal
#pragma weak ggml_get_type_traits

namespace kv1_ggml {

// One line in llama.cpp's log, or on stderr where that is out of reach.
[[gnu::format(printf, 2, 3)]] inline void say(ggml_log_level level, const char* format, ...) {
    char line[512];
    std::va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (ggml_log_internal != nullptr)
        ggml_log_internal(level, "kv1: %s\n", line);
    else
        std::fprintf(stderr, "kv1: %s\n", line);
}

// The tensor that a view lies in.
inline const ggml_tensor* root_of(const ggml_tensor* t) noexcept {
    while (t != nullptr && t->view_src != nullptr)
        t = t->view_src;
    return t;
}

inline bool is_view(ggml_op op) noexcept {
    return op == GGML_OP_NONE || op == GGML_OP_VIEW || op == GGML_OP_RESHAPE || op == GGML_OP_PERMUTE ||
           op == GGML_OP_TRANSPOSE;
}

inline bool is_float(const ggml_tensor* t) noexcept {
    return t->type == GGML_TYPE_F32 || t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_BF16;
}

// A tensor of llama.cpp's cache: keys or values of a layer of the model.
struct cache_name {
    bool keys;
    std::size_t layer;
};

// Other tensors that memories put beside them (recurrent states, indexers' keys) have other names.
inline std::optional<cache_name> cache_name_of(const ggml_tensor* root) noexcept {
    const std::string_view name(root->name);
    const bool keys = name.starts_with("cache_k_l");
    if (!keys && !name.starts_with("cache_v_l"))
        return std::nullopt;
    std::size_t layer = 0;
    if (name.size() == 9)
        return std::nullopt;
    for (const char c : name.substr(9)) {
        if (c < '0' || c > '9' || layer > 65535)
            return std::nullopt;
        layer = layer * 10 + static_cast<std::size_t>(c - '0');
    }
    return cache_name{keys, layer};
}

// Where versions differ by a member that one does not have, it is set where it is there.
template <class Capabilities>
void allow_mmap(Capabilities& of_device) {
    if constexpr (requires { of_device.mmap_support; })
        of_device.mmap_support = true;
}

inline float float_param(const ggml_tensor* op, std::size_t i) noexcept {
    float x = 0;
    std::memcpy(&x, op->op_params + i, sizeof x);
    return x;
}

inline std::size_t size_of(std::int64_t extent) noexcept { return static_cast<std::size_t>(extent); }

// A stride in numbers of T.
template <class T>
std::ptrdiff_t stride_of(std::size_t bytes) noexcept {
    return static_cast<std::ptrdiff_t>(bytes / sizeof(T));
}

} // namespace kv1_ggml
