// SPDX-License-Identifier: Apache-2.0
//
// How kv1 reports errors, with and without exceptions.
//
// Every operation that can fail has a `try_` form that is noexcept and returns `status` or `result<T>`. With
// exceptions it also has a plain form that throws `kv1::error` with that status. An operation that fails
// leaves its object as it was. A status allocates nothing. It names the error, the rule that was broken, and
// the place (layer, KV head, token, channel, position in a text).
//
// Programs without exceptions. A try_ form does not end the program if there is no memory: kv1 asks operator
// new (std::nothrow). This does not hold for what callers bring: a std::vector, std::string or
// std::filesystem::path that they make or copy, their allocator, their executor. A cache_description is made
// of such vectors. create() allocates nothing for a description that is moved to it; before it copies one, it
// tests whether the memory is there. Functions that say that they allocate and are no try_ forms
// (status::message(), to_string(), the estimators of encoding.hpp, packed_vector) allocate as the standard's
// containers do.
#pragma once

#include <kv1/detail/config.hpp>

#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#if KV1_EXCEPTIONS
#include <new>
#include <stdexcept>
#endif

namespace kv1::inline KV1_ABI {

/// Why an operation failed.
enum class errc : std::uint8_t {
    ok,
    invalid_argument,    ///< a value that no call accepts
    shape_mismatch,      ///< extents that do not fit the object or each other
    out_of_range,        ///< an index past the end
    non_finite,          ///< NaN or infinity where a number is needed
    not_representable,   ///< a finite number that the storage format cannot hold
    out_of_memory,       ///< the allocator gave nothing
    capacity_exceeded,   ///< the page pool has no free page left
    invalid_sequence,    ///< a handle that names no living sequence
    unsupported_format,  ///< a storage format this cache type was not compiled for
    unsupported_target,  ///< an instruction set that is not compiled in or that this processor lacks
    layers_disagree,     ///< a commit point is needed, and the layers hold different numbers of tokens
    dropped_tokens,      ///< tokens that were dropped, or that a sliding window gave up
    nothing_committed,   ///< a rollback of a sequence that has no commit to return to
    bad_format,          ///< bytes that are no saved cache, or whose parts contradict each other
    unsupported_version, ///< a saved cache of a newer or unknown version
    checksum_mismatch,   ///< a saved cache with changed bytes
    truncated,           ///< a saved cache that ends too early
    different_cache,     ///< a saved cache whose shape or formats are not this one's
    different_model,     ///< a saved cache of another model, or one that does not say which
    io_error,            ///< the system refused to read or write
    broken_invariant,    ///< validate() found a contradiction: a defect, or memory overwritten
};

/// The error in a word or two, such as "shape mismatch".
[[nodiscard]] constexpr std::string_view to_string(errc code) noexcept {
    switch (code) {
    case errc::ok:
        return "ok";
    case errc::invalid_argument:
        return "invalid argument";
    case errc::shape_mismatch:
        return "shape mismatch";
    case errc::out_of_range:
        return "out of range";
    case errc::non_finite:
        return "non-finite value";
    case errc::not_representable:
        return "value not representable";
    case errc::out_of_memory:
        return "out of memory";
    case errc::capacity_exceeded:
        return "cache capacity exceeded";
    case errc::invalid_sequence:
        return "invalid sequence";
    case errc::unsupported_format:
        return "unsupported format";
    case errc::unsupported_target:
        return "unsupported target";
    case errc::layers_disagree:
        return "layers disagree";
    case errc::dropped_tokens:
        return "dropped tokens";
    case errc::nothing_committed:
        return "nothing committed";
    case errc::bad_format:
        return "not a saved cache";
    case errc::unsupported_version:
        return "unsupported version";
    case errc::checksum_mismatch:
        return "checksum mismatch";
    case errc::truncated:
        return "truncated";
    case errc::different_cache:
        return "different cache";
    case errc::different_model:
        return "different model";
    case errc::io_error:
        return "input or output failed";
    case errc::broken_invariant:
        return "broken invariant";
    }
    return "unknown error";
}

/// Where an error was met. All count from 0; -1: does not apply.
struct error_location {
    std::int64_t layer = -1;    ///< of the cache
    std::int64_t kv_head = -1;  ///< of the layer
    std::int64_t token = -1;    ///< of the call's tensor
    std::int64_t channel = -1;  ///< of the vector
    std::int64_t position = -1; ///< of a text, in bytes
};

/// Outcome of an operation. Contextually convertible to bool: true means success.
class [[nodiscard]] status {
public:
    /// Success.
    constexpr status() noexcept = default;
    /// `rule` must have static storage duration: the status keeps the pointer.
    constexpr status(errc code, const char* rule, error_location where = {}) noexcept
        : code_(code), rule_(rule), where_(where) {}

    /// Success or not; the error, the rule that was broken ("" for success), and where.
    /// @{
    [[nodiscard]] constexpr explicit operator bool() const noexcept { return code_ == errc::ok; }
    [[nodiscard]] constexpr errc code() const noexcept { return code_; }
    [[nodiscard]] constexpr const char* rule() const noexcept { return rule_; }
    [[nodiscard]] constexpr const error_location& where() const noexcept { return where_; }
    /// @}

    /// One line: the error, the rule and the place. Allocates.
    [[nodiscard]] std::string message() const {
        std::string text(to_string(code_));
        if (*rule_ != '\0')
            text.append(": ").append(rule_);
        const std::pair<const char*, std::int64_t> places[] = {{"layer", where_.layer},
                                                               {"KV head", where_.kv_head},
                                                               {"token", where_.token},
                                                               {"channel", where_.channel},
                                                               {"position", where_.position}};
        const char* separator = " (";
        for (const auto& [name, index] : places) {
            if (index < 0)
                continue;
            text.append(separator).append(name).append(" ").append(std::to_string(index));
            separator = ", ";
        }
        if (*separator == ',')
            text.push_back(')');
        return text;
    }

private:
    errc code_ = errc::ok;
    const char* rule_ = "";
    error_location where_{};
};

/// status::message(). Allocates.
[[nodiscard]] inline std::string to_string(const status& s) { return s.message(); }

#if KV1_EXCEPTIONS
/// What the throwing forms throw.
class error : public std::runtime_error {
public:
    /// Copies the status and its message.
    explicit error(const status& s) : std::runtime_error("kv1: " + s.message()), status_(s) {}
    /// What went wrong.
    /// @{
    [[nodiscard]] const status& reason() const noexcept { return status_; }
    [[nodiscard]] errc code() const noexcept { return status_.code(); }
    /// @}

private:
    status status_;
};
#endif

namespace detail {

inline void throw_if_error([[maybe_unused]] const status& s) {
#if KV1_EXCEPTIONS
    if (!s)
        throw error(s);
#else
    if (!s)
        std::abort(); // value() of a failed result: a caller without exceptions tests first
#endif
}

} // namespace detail

/// A value or the status that says why there is none.
template <class T>
class [[nodiscard]] result {
public:
    /// Success, with this value.
    result(T value) noexcept : value_(std::move(value)) {}
    /// Failure, for this reason.
    result(const status& failure) noexcept : status_(failure) {}

    /// Whether there is a value, and why not.
    /// @{
    [[nodiscard]] explicit operator bool() const noexcept { return value_.has_value(); }
    [[nodiscard]] const status& reason() const noexcept { return status_; }
    [[nodiscard]] errc code() const noexcept { return status_.code(); }
    /// @}

    /// The value. Precondition: the result holds one.
    /// @{
    [[nodiscard]] T& operator*() noexcept { return *value_; }
    [[nodiscard]] const T& operator*() const noexcept { return *value_; }
    [[nodiscard]] T* operator->() noexcept { return &*value_; }
    [[nodiscard]] const T* operator->() const noexcept { return &*value_; }
    /// @}

    /// The value; throws `error` where there is none (without exceptions: aborts).
    /// @{
    [[nodiscard]] T& value() & { return detail::throw_if_error(status_), *value_; }
    [[nodiscard]] T value() && { return detail::throw_if_error(status_), std::move(*value_); }
    /// @}

private:
    std::optional<T> value_;
    status status_;
};

} // namespace kv1::inline KV1_ABI
