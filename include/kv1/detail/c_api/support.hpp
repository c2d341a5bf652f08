// SPDX-License-Identifier: Apache-2.0
//
// What all functions of kv1.h share: statuses become codes, structures that grow with versions are taken and
// given, arrays of C's structures become spans of C++'s.
#pragma once

#include <kv1/c/error.h>
#include <kv1/c/tensor.h>

#include <kv1/detail/buffer.hpp>
#include <kv1/executor.hpp>
#include <kv1/status.hpp>
#include <kv1/tensor.hpp>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace kv1::inline KV1_ABI::detail {

inline kv1_code c_report(const status& s, kv1_error* error) noexcept {
    const auto code = static_cast<kv1_code>(s.code());
    if (!s && error != nullptr) {
        const error_location& at = s.where();
        *error = {code, s.rule(), at.layer, at.kv_head, at.token, at.channel};
    }
    return code;
}

inline status c_no_memory() noexcept { return {errc::out_of_memory, "an allocation failed"}; }

inline kv1_code c_refuse_null(kv1_error* error) noexcept {
    return c_report({errc::invalid_argument, "a pointer is null"}, error);
}

template <class... Pointers>
bool c_any_null(Pointers... pointers) noexcept {
    return ((pointers == nullptr) || ...);
}

// A number that is no enumerator never becomes one of C++'s.
constexpr bool c_within(std::int32_t value, std::int32_t last) noexcept {
    return value >= 0 && value <= last;
}

// What the structure's first version had. A structure that gets a field pins this to its size before that.
template <class S>
inline constexpr std::size_t c_first_size = sizeof(S);

// A caller's structure as this version has it: fields that the caller does not have are zero, and those that
// this version does not have must be.
template <class S>
status c_take(const S& given, S& taken) noexcept {
    const std::size_t size = given.struct_size;
    if (size < c_first_size<S>)
        return {errc::invalid_argument, "struct_size is the size of the structure"};
    const auto* bytes = reinterpret_cast<const unsigned char*>(&given);
    for (std::size_t i = sizeof(S); i < size; ++i)
        if (bytes[i] != 0)
            return {errc::invalid_argument, "a structure has a field that this version does not know"};
    taken = {};
    std::memcpy(&taken, &given, size < sizeof(S) ? size : sizeof(S));
    return {};
}

// Null: the default.
template <class S>
status c_take(const S* given, S& taken) noexcept {
    taken = {};
    return given != nullptr ? c_take(*given, taken) : status{};
}

// Fills as much of the caller's structure as there is; what this version does not know becomes zero.
template <class S>
status c_give(S made, S& out) noexcept {
    made.struct_size = out.struct_size;
    if (made.struct_size < c_first_size<S>)
        return {errc::invalid_argument, "struct_size is the size of the structure"};
    auto* bytes = reinterpret_cast<unsigned char*>(&out);
    if (made.struct_size > sizeof(S))
        std::memset(bytes + sizeof(S), 0, made.struct_size - sizeof(S));
    std::memcpy(bytes, &made, made.struct_size < sizeof(S) ? made.struct_size : sizeof(S));
    return {};
}

// An array of C's structures as C++'s; few of them need no allocation.
template <class T>
class c_array {
public:
    // Errors: out_of_memory.
    template <class From, class Convert>
    status assign(const From* from, std::size_t count, Convert&& convert) noexcept {
        T* to = few_;
        if (count > most_few) {
            if (!many_.resize(count))
                return c_no_memory();
            to = many_.data();
        }
        for (std::size_t i = 0; i < count; ++i)
            to[i] = convert(from[i]);
        items_ = {to, count};
        return {};
    }
    [[nodiscard]] std::span<T> view() const noexcept { return items_; }

private:
    static constexpr std::size_t most_few = 16;

    T few_[most_few]{};
    buffer<T> many_;
    std::span<T> items_;
};

// ---- tensors and threads

static_assert(static_cast<int>(scalar_type::fp32) == KV1_FP32 &&
              static_cast<int>(scalar_type::fp16) == KV1_FP16 &&
              static_cast<int>(scalar_type::bf16) == KV1_BF16);

// Calls f(pointer to elements of the tensor's type, the other arguments of a view).
template <class Tensor, class F>
auto c_view_of(const Tensor& t, F&& f) noexcept {
    switch (t.type) {
    case KV1_FP16:
        return f(static_cast<float16*>(nullptr));
    case KV1_BF16:
        return f(static_cast<bfloat16*>(nullptr));
    default:
        return f(static_cast<float*>(nullptr));
    }
}
inline tensor_view c_view(const kv1_tensor& t) noexcept {
    return c_view_of(t, [&]<class T>(T*) {
        return tensor_view(static_cast<const T*>(t.data), t.tokens, t.heads, t.channels, t.token_stride,
                           t.head_stride);
    });
}
inline mutable_tensor_view c_view(const kv1_output& t) noexcept {
    return c_view_of(t, [&]<class T>(T*) {
        return mutable_tensor_view(static_cast<T*>(t.data), t.tokens, t.heads, t.channels, t.token_stride,
                                   t.head_stride);
    });
}
template <class... Tensors>
status c_check_types(const Tensors&... tensors) noexcept {
    if ((c_within(tensors.type, KV1_BF16) && ...))
        return {};
    return {errc::invalid_argument, "a scalar type is an enumerator"};
}

struct c_executor {
    const kv1_executor* lent; // null: the calling thread

    void operator()(std::size_t count, task_view task) const {
        if (lent != nullptr && lent->run != nullptr)
            lent->run(
                lent->context, count,
                [](void* state, std::size_t i) { (*static_cast<const task_view*>(state))(i); }, &task);
        else
            inline_executor{}(count, task);
    }
};

} // namespace kv1::inline KV1_ABI::detail
