// SPDX-License-Identifier: Apache-2.0
//
// Where saved bytes go, and where they come from: sinks and sources, which callers bring, and those that are
// the caller's memory.
#pragma once

#include <kv1/detail/config.hpp>

#include <concepts>
#include <cstddef>
#include <cstring>
#include <span>

namespace kv1::inline KV1_ABI {

/// A sink: sink(bytes) takes all of the bytes and returns true, or returns false. It does not throw.
template <class S>
concept byte_sink = requires(S& sink, std::span<const std::byte> bytes) {
    { sink(bytes) } -> std::convertible_to<bool>;
};
/// A source: source(bytes) fills all of the bytes and returns true, or returns false. It does not throw. Two
/// members are optional. rewind() goes back to where reading began and returns true, or returns false.
/// at_end() says whether no byte is left; with it, a load refuses bytes after the end.
template <class S>
concept byte_source = requires(S& source, std::span<std::byte> bytes) {
    { source(bytes) } -> std::convertible_to<bool>;
};

/// A source that reads the caller's memory.
class memory_source {
public:
    /// The bytes are read while the source is used.
    explicit memory_source(std::span<const std::byte> bytes) noexcept : all_(bytes), left_(bytes) {}
    /// Copies the next bytes to `out`. False, and copies nothing, if fewer are left.
    bool operator()(std::span<std::byte> out) noexcept {
        if (out.size() > left_.size())
            return false;
        if (!out.empty())
            std::memcpy(out.data(), left_.data(), out.size());
        left_ = left_.subspan(out.size());
        return true;
    }
    /// Goes back to the first byte.
    bool rewind() noexcept {
        left_ = all_;
        return true;
    }

private:
    std::span<const std::byte> all_, left_;
};

/// A sink that writes to the caller's memory.
class memory_sink {
public:
    /// The bytes are written while the sink is used.
    explicit memory_sink(std::span<std::byte> bytes) noexcept : left_(bytes) {}
    /// Copies the bytes behind those before. False, and copies nothing, if there is no room.
    bool operator()(std::span<const std::byte> in) noexcept {
        if (in.size() > left_.size())
            return false;
        if (!in.empty())
            std::memcpy(left_.data(), in.data(), in.size());
        left_ = left_.subspan(in.size());
        return true;
    }

private:
    std::span<std::byte> left_;
};

} // namespace kv1::inline KV1_ABI
