// SPDX-License-Identifier: Apache-2.0
//
// Views of the caller's K, V, query and output tensors: [tokens][heads][channels] of fp32, fp16 or bf16.
// There is a stride, in elements and of any sign, from token to token and from head to head; channels are
// contiguous. The element type is erased, so calls that take views are not templates.
//
//   kv1::tensor_view keys(k.data(), tokens, kv_heads, head_dim);   // memory is [token][head][channel]
//   kv1::tensor_view same(k.data(), tokens, kv_heads, head_dim,    // memory is [head][token][channel]
//                         head_dim, tokens * head_dim);
//
// Extents are integers of any type, int as well as std::size_t. Calls refuse a view with a negative extent
// (invalid_argument).
#pragma once

#include <kv1/float16.hpp>

#include <concepts>
#include <cstddef>
#include <limits>

namespace kv1::inline KV1_ABI {

namespace detail {

// An extent as it was given. A negative one becomes `negative`, a number that no tensor has.
class extent {
public:
    static constexpr std::size_t negative = (std::numeric_limits<std::size_t>::max)();

    constexpr extent(std::size_t n) noexcept : value_(n) {}
    template <std::signed_integral I>
    constexpr extent(I n) noexcept : value_(n < 0 ? negative : static_cast<std::size_t>(n)) {}

    [[nodiscard]] constexpr std::size_t value() const noexcept { return value_; }

private:
    std::size_t value_;
};

inline constexpr const char* rule_extents = "tokens, heads and channels are not negative";

} // namespace detail

/// Read-only view.
class tensor_view {
public:
    /// Contiguous [tokens][heads][channels].
    template <scalar T>
    constexpr tensor_view(const T* data, detail::extent tokens, detail::extent heads,
                          detail::extent channels) noexcept
        : tensor_view(data, tokens, heads, channels,
                      static_cast<std::ptrdiff_t>(heads.value() * channels.value()),
                      static_cast<std::ptrdiff_t>(channels.value())) {}
    /// With strides, in elements, between tokens and between heads; channels are contiguous.
    template <scalar T>
    constexpr tensor_view(const T* data, detail::extent tokens, detail::extent heads, detail::extent channels,
                          std::ptrdiff_t token_stride, std::ptrdiff_t head_stride) noexcept
        : data_(data), type_(scalar_type_of<T>), tokens_(tokens.value()), heads_(heads.value()),
          channels_(channels.value()), token_stride_(token_stride), head_stride_(head_stride) {}

    /// Extents, and strides in elements.
    /// @{
    [[nodiscard]] constexpr const void* data() const noexcept { return data_; }
    [[nodiscard]] constexpr scalar_type type() const noexcept { return type_; }
    [[nodiscard]] constexpr std::size_t tokens() const noexcept { return tokens_; }
    [[nodiscard]] constexpr std::size_t heads() const noexcept { return heads_; }
    [[nodiscard]] constexpr std::size_t channels() const noexcept { return channels_; }
    [[nodiscard]] constexpr std::ptrdiff_t token_stride() const noexcept { return token_stride_; }
    [[nodiscard]] constexpr std::ptrdiff_t head_stride() const noexcept { return head_stride_; }
    /// @}
    /// Whether an extent was given as a negative number.
    [[nodiscard]] constexpr bool has_negative_extent() const noexcept {
        return tokens_ == detail::extent::negative || heads_ == detail::extent::negative ||
               channels_ == detail::extent::negative;
    }

    /// The view of tokens first ... first + count - 1. Precondition: first + count <= tokens().
    [[nodiscard]] tensor_view slice(std::size_t first, std::size_t count) const noexcept {
        tensor_view part = *this;
        if (data_ != nullptr)
            part.data_ = at(first, 0);
        part.tokens_ = count;
        return part;
    }

    /// The address of the first channel of (token, head).
    [[nodiscard]] const void* at(std::size_t token, std::size_t head) const noexcept {
        const std::ptrdiff_t size = type_ == scalar_type::fp32 ? 4 : 2;
        return static_cast<const std::byte*>(data_) + (static_cast<std::ptrdiff_t>(token) * token_stride_ +
                                                       static_cast<std::ptrdiff_t>(head) * head_stride_) *
                                                          size;
    }

private:
    const void* data_;
    scalar_type type_;
    std::size_t tokens_, heads_, channels_;
    std::ptrdiff_t token_stride_, head_stride_;
};

/// Writable view.
class mutable_tensor_view {
public:
    /// Contiguous [tokens][heads][channels].
    template <scalar T>
    constexpr mutable_tensor_view(T* data, detail::extent tokens, detail::extent heads,
                                  detail::extent channels) noexcept
        : view_(data, tokens, heads, channels), data_(data) {}
    /// With strides, in elements, between tokens and between heads; channels are contiguous.
    template <scalar T>
    constexpr mutable_tensor_view(T* data, detail::extent tokens, detail::extent heads,
                                  detail::extent channels, std::ptrdiff_t token_stride,
                                  std::ptrdiff_t head_stride) noexcept
        : view_(data, tokens, heads, channels, token_stride, head_stride), data_(data) {}

    /// The same elements, read-only.
    [[nodiscard]] constexpr operator tensor_view() const noexcept { return view_; }
    /// Extents, and strides in elements.
    /// @{
    [[nodiscard]] constexpr void* data() const noexcept { return data_; }
    [[nodiscard]] constexpr scalar_type type() const noexcept { return view_.type(); }
    [[nodiscard]] constexpr std::size_t tokens() const noexcept { return view_.tokens(); }
    [[nodiscard]] constexpr std::size_t heads() const noexcept { return view_.heads(); }
    [[nodiscard]] constexpr std::size_t channels() const noexcept { return view_.channels(); }
    [[nodiscard]] constexpr std::ptrdiff_t token_stride() const noexcept { return view_.token_stride(); }
    [[nodiscard]] constexpr std::ptrdiff_t head_stride() const noexcept { return view_.head_stride(); }
    /// @}
    /// Whether an extent was given as a negative number.
    [[nodiscard]] constexpr bool has_negative_extent() const noexcept { return view_.has_negative_extent(); }
    /// The view of tokens first ... first + count - 1. Precondition: first + count <= tokens().
    [[nodiscard]] mutable_tensor_view slice(std::size_t first, std::size_t count) const noexcept {
        mutable_tensor_view part = *this;
        part.view_ = view_.slice(first, count);
        part.data_ = const_cast<void*>(part.view_.data());
        return part;
    }
    /// The address of the first channel of (token, head).
    [[nodiscard]] void* at(std::size_t token, std::size_t head) const noexcept {
        return const_cast<void*>(view_.at(token, head));
    }

private:
    tensor_view view_;
    void* data_;
};

} // namespace kv1::inline KV1_ABI
