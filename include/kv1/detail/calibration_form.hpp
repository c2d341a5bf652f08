// SPDX-License-Identifier: Apache-2.0
//
// The saved form of a calibration, which calibration_file.hpp describes: how it is written, read and checked.
#pragma once

#include <kv1/calibration.hpp>
#include <kv1/detail/byte_numbers.hpp>
#include <kv1/version.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

namespace kv1::inline KV1_ABI::detail {

inline constexpr std::array<char, 8> calibration_magic{'K', 'V', '1', 'C', 'A', 'L', 'I', 'B'};
inline constexpr std::uint32_t calibration_version = 1;
inline constexpr std::size_t calibration_fixed_bytes = 80;
inline constexpr std::size_t calibration_start_bytes = 12; // that all forms have in common: magic and version
// More than any model has. They bound what a table can ask for.
inline constexpr std::uint32_t most_calibrated_layers = 65536, most_calibrated_heads = 65536;
inline constexpr std::uint32_t most_policy_bytes = 1u << 24;

// The fixed part.
struct calibration_sizes {
    std::uint32_t layers = 0, policy_bytes = 0;
    std::uint64_t table_bytes = 0, value_bytes = 0; // checksums not counted
    model_fingerprint model;
};

// Which parts a side has.
enum calibrated_part : std::uint32_t { part_means = 1, part_error_weights = 2, part_basis = 4 };
inline constexpr std::uint32_t all_parts = 7;

inline std::uint32_t parts_of(const calibrated_side& s) noexcept {
    return (s.means.empty() ? 0u : part_means) | (s.error_weights.empty() ? 0u : part_error_weights) |
           (s.basis.empty() ? 0u : part_basis);
}

// The bytes of a side's values. They fit: heads and channels are bounded.
inline std::uint64_t bytes_of(std::uint32_t parts, std::uint64_t heads, std::uint64_t dim) noexcept {
    return heads *
           ((parts & part_means ? 2 * dim : 0) + (parts & part_error_weights ? 4 + dim * (dim + 1) : 0) +
            (parts & part_basis ? 4 * dim * dim : 0));
}

// ---- writing

// Errors: out_of_memory.
inline status write_policy(const cache_policy& policy, std::string& text) noexcept {
    constexpr std::size_t most_a_layer = 256; // of text; a string may take twice that as it grows
    if (const status s = seek_memory(2 * most_a_layer * (policy.layers.size() + 1)); !s)
        return s;
    return guarded([&] { text = to_string(policy); });
}

template <class T, class Writer>
bool write_array(Writer& w, std::span<const T> values) noexcept {
    if constexpr (std::endian::native == std::endian::little)
        return w.bytes(std::as_bytes(values));
    using word = std::conditional_t<sizeof(T) == 2, std::uint16_t, std::uint32_t>;
    for (const T v : values)
        if (!w.number(std::bit_cast<word>(v)))
            return false;
    return true;
}

template <class Writer>
bool write_calibrated_layer(Writer& w, const calibrated_layer& l) noexcept {
    const auto number = [&](std::size_t n) { return w.number(static_cast<std::uint32_t>(n)); };
    return number(l.kv_heads) && number(l.key_dim) && number(l.value_dim) && w.number(parts_of(l.sides[0])) &&
           w.number(parts_of(l.sides[1])) && number(l.rotary.frequencies.size()) &&
           number(l.rotary.pairs == rotary_pairs::interleaved ? 1 : 0) && number(l.rotary.first_channel) &&
           write_array(w, std::span<const float>(l.rotary.frequencies));
}
inline constexpr std::size_t calibrated_layer_bytes = 32; // without frequencies

template <class Writer>
bool write_calibrated_values(Writer& w, const calibrated_side& s) noexcept {
    return write_array(w, s.means.view()) && write_array(w, s.error_weights.scales.view()) &&
           write_array(w, s.error_weights.factors.view()) && write_array(w, s.basis.view());
}

// policy is the text of c's policy. Errors: io_error if the sink refuses bytes; out_of_range.
template <class Sink>
status write_calibration(const calibration& c, std::string_view policy, Sink& sink) noexcept {
    const std::span<const calibrated_layer> layers = calibration_access::layers(c);
    if (policy.size() > most_policy_bytes || layers.size() > most_calibrated_layers)
        return {errc::out_of_range, "a calibration has at most 65,536 layers, and a policy 16 MiB"};
    calibration_sizes sizes{static_cast<std::uint32_t>(layers.size()),
                            static_cast<std::uint32_t>(policy.size()), policy.size(), 0, c.model()};
    for (const calibrated_layer& l : layers) {
        sizes.table_bytes += calibrated_layer_bytes + 4 * l.rotary.frequencies.size();
        for (const std::size_t side : {0u, 1u})
            sizes.value_bytes += bytes_of(parts_of(l.sides[side]), l.kv_heads, l.dim(side));
    }
    byte_writer<Sink> w(sink);
    const auto all = [&](auto&& write) {
        for (const calibrated_layer& l : layers)
            if (!write(l))
                return false;
        return true;
    };
    const bool written =
        w.bytes(std::as_bytes(std::span(calibration_magic))) && w.number(calibration_version) &&
        w.number(static_cast<std::uint32_t>(KV1_VERSION)) && w.number(sizes.layers) &&
        w.number(sizes.policy_bytes) && w.number(sizes.table_bytes) && w.number(sizes.value_bytes) &&
        w.bytes(std::as_bytes(std::span(sizes.model.bytes))) && w.number(std::uint32_t{0}) && w.checksum() &&
        w.bytes(std::as_bytes(std::span(policy))) &&
        all([&](const calibrated_layer& l) { return write_calibrated_layer(w, l); }) && w.checksum() &&
        all([&](const calibrated_layer& l) {
            return write_calibrated_values(w, l.sides[0]) && write_calibrated_values(w, l.sides[1]);
        }) &&
        w.checksum();
    return written ? status{} : status{errc::io_error, "the sink refused bytes"};
}

// ---- reading

inline constexpr status calibration_truncated(errc::truncated, "the calibration ends too early");

// Reads numbers from a source, and checksums them. Memory grows as bytes arrive, so that a file that promises more
// than it holds costs no more than twice what it holds.
template <class Source>
class calibration_input {
public:
    explicit calibration_input(Source& source) noexcept : source_(source) {}

    status bytes(std::span<std::byte> out) noexcept {
        if (!source_(out))
            return calibration_truncated;
        crc_ = crc32c(crc_, out);
        return {};
    }
    template <class T>
    status array(std::size_t n, buffer<T>& out) noexcept {
        constexpr std::size_t piece = (std::size_t{1} << 20) / sizeof(T);
        out.clear();
        while (out.size() < n) {
            const std::size_t some = (std::min)(n - out.size(), piece), first = out.size();
            if (!out.reserve(first + some))
                return no_calibration_memory();
            out.set_size(first + some);
            const std::span<T> read(out.data() + first, some);
            if (const status s = bytes(std::as_writable_bytes(read)); !s)
                return s;
            if constexpr (std::endian::native != std::endian::little && sizeof(T) > 1)
                for (T& v : read) {
                    auto own = std::bit_cast<std::array<std::byte, sizeof(T)>>(v);
                    std::reverse(own.begin(), own.end());
                    v = std::bit_cast<T>(own);
                }
        }
        return {};
    }
    // Compares with the checksum that comes next.
    status checksum(const char* rule) noexcept {
        const std::uint32_t expected = crc_;
        std::array<std::byte, 4> b;
        if (const status s = bytes(b); !s)
            return s;
        crc_ = 0;
        return byte_reader(b).number<std::uint32_t>() == expected ? status{}
                                                                  : status{errc::checksum_mismatch, rule};
    }

private:
    Source& source_;
    std::uint32_t crc_ = 0;
};

template <class Source>
status read_calibration_start(calibration_input<Source>& in, calibration_sizes& sizes) noexcept {
    std::array<std::byte, calibration_fixed_bytes - 4> b;
    const std::span<std::byte> start = std::span(b).first(calibration_start_bytes);
    if (const status s = in.bytes(start); !s)
        return s;
    if (std::memcmp(b.data(), calibration_magic.data(), calibration_magic.size()) != 0)
        return {errc::bad_format, "the bytes do not begin like a calibration"};
    if (byte_reader(start.subspan(calibration_magic.size())).number<std::uint32_t>() != calibration_version)
        return {errc::unsupported_version, "the calibration is of another version of the form"};
    if (const status s = in.bytes(std::span(b).subspan(calibration_start_bytes)); !s)
        return s;
    byte_reader r{std::span<const std::byte>(b).subspan(calibration_start_bytes)};
    static_cast<void>(r.number<std::uint32_t>()); // the library's version
    sizes.layers = r.number<std::uint32_t>();
    sizes.policy_bytes = r.number<std::uint32_t>();
    sizes.table_bytes = r.number<std::uint64_t>();
    sizes.value_bytes = r.number<std::uint64_t>();
    for (std::uint8_t& byte : sizes.model.bytes)
        byte = r.number<std::uint8_t>();
    const auto unused = r.number<std::uint32_t>();
    if (const status s = in.checksum("the fixed part was changed"); !s)
        return s;
    if (unused != 0)
        return {errc::unsupported_version, "the calibration is of another version of the form"};
    if (sizes.layers > most_calibrated_layers || sizes.policy_bytes > most_policy_bytes ||
        sizes.table_bytes < sizes.policy_bytes ||
        sizes.table_bytes - sizes.policy_bytes < sizes.layers * std::uint64_t{calibrated_layer_bytes} ||
        sizes.table_bytes - sizes.policy_bytes >
            sizes.layers * std::uint64_t{calibrated_layer_bytes + 4 * max_vector_length})
        return {errc::bad_format, "the sizes of a calibration contradict each other"};
    return {};
}

// What a table says of a layer, beside its numbers in calibrated_layer.
struct calibrated_layer_parts {
    std::uint32_t sides[2] = {};
};

// Reads the rows of the table. Errors: bad_format, out_of_memory.
inline status read_calibration_table(std::span<const std::byte> table, const calibration_sizes& sizes,
                                     std::span<calibrated_layer> layers,
                                     std::span<calibrated_layer_parts> parts) noexcept {
    byte_reader r(table);
    std::uint64_t values = 0;
    for (std::size_t i = 0; i < layers.size(); ++i) {
        calibrated_layer& l = layers[i];
        const auto number = [&] { return std::size_t{r.number<std::uint32_t>()}; };
        l.kv_heads = number();
        l.key_dim = number();
        l.value_dim = number();
        for (std::uint32_t& side : parts[i].sides)
            side = r.number<std::uint32_t>();
        const std::size_t frequencies = number(), pairs = number();
        l.rotary.first_channel = number();
        const status wrong(errc::bad_format, "a layer of a calibration has a shape that no layer has",
                           {.layer = static_cast<std::int64_t>(i)});
        if (l.kv_heads == 0 || l.kv_heads > most_calibrated_heads || l.key_dim == 0 || l.value_dim == 0 ||
            l.key_dim > max_vector_length || l.value_dim > max_vector_length || pairs > 1 ||
            ((parts[i].sides[0] | parts[i].sides[1]) & ~all_parts) != 0)
            return wrong;
        if (2 * frequencies > l.key_dim || l.rotary.first_channel > l.key_dim - 2 * frequencies ||
            r.left() < 4 * frequencies)
            return wrong;
        l.rotary.pairs = pairs == 1 ? rotary_pairs::interleaved : rotary_pairs::half_split;
        if (const status s = seek_memory(frequencies * sizeof(float)); !s)
            return s;
        if (const status s = guarded([&] { l.rotary.frequencies.resize(frequencies); }); !s)
            return s;
        for (float& f : l.rotary.frequencies) {
            f = std::bit_cast<float>(r.number<std::uint32_t>());
            if (!is_finite(f))
                return wrong;
        }
        for (const std::size_t side : {0u, 1u})
            values += bytes_of(parts[i].sides[side], l.kv_heads, l.dim(side));
    }
    if (r.failed() || r.left() != 0 || values != sizes.value_bytes)
        return {errc::bad_format, "the sizes of a calibration contradict each other"};
    return {};
}

template <class Source>
status read_calibrated_values(calibration_input<Source>& in, std::uint32_t parts, std::size_t heads,
                              std::size_t dim, calibrated_side& out) noexcept {
    if (parts & part_means)
        if (const status s = in.array(heads * dim, out.means); !s)
            return s;
    if (parts & part_error_weights) {
        if (const status s = in.array(heads, out.error_weights.scales); !s)
            return s;
        if (const status s = in.array(heads * triangle(dim), out.error_weights.factors); !s)
            return s;
    }
    if (parts & part_basis)
        if (const status s = in.array(heads * dim * dim, out.basis); !s)
            return s;
    const auto halves = [](const buffer<std::uint16_t>& b) {
        return std::all_of(b.begin(), b.end(), [](std::uint16_t h) { return is_finite(half_to_float(h)); });
    };
    const auto floats = [](const buffer<float>& b) {
        return std::all_of(b.begin(), b.end(), [](float x) { return is_finite(x); });
    };
    if (halves(out.means) && halves(out.error_weights.factors) && floats(out.error_weights.scales) &&
        floats(out.basis))
        return {};
    return {errc::non_finite, "a calibration holds finite numbers"};
}

// Errors: bad_format, unsupported_version, checksum_mismatch, truncated, different_model, non_finite,
// out_of_memory.
template <class Source>
result<calibration> read_calibration(Source& source, const model_fingerprint& model) noexcept {
    calibration_input<Source> in(source);
    calibration_sizes sizes;
    if (const status s = read_calibration_start(in, sizes); !s)
        return s;
    if (sizes.model != model)
        return status(errc::different_model,
                      model.empty() ? "the calibration says of which model it is: give its fingerprint"
                      : sizes.model.empty() ? "the calibration does not say of which model it is"
                                            : "the calibration is of another model");
    buffer<std::byte> table;
    if (const status s = in.array(static_cast<std::size_t>(sizes.table_bytes), table); !s)
        return s;
    if (const status s = in.checksum("the tables were changed"); !s)
        return s;
    const std::string_view text(reinterpret_cast<const char*>(table.data()), sizes.policy_bytes);
    result<cache_policy> policy = try_parse_policy(text);
    if (!policy)
        return policy.code() == errc::out_of_memory
                   ? policy.reason()
                   : status(errc::bad_format, "the policy of a calibration is none", policy.reason().where());
    calibration found;
    buffer<calibrated_layer_parts> parts;
    if (!parts.resize(sizes.layers))
        return no_calibration_memory();
    if (const status s = calibration_access::create(found, sizes.layers, sizes.model); !s)
        return s;
    found.set_policy(std::move(*policy));
    const std::span<calibrated_layer> layers = calibration_access::layers(found);
    if (const status s = read_calibration_table(table.view().subspan(sizes.policy_bytes), sizes, layers,
                                                {parts.data(), parts.size()});
        !s)
        return s;
    for (std::size_t i = 0; i < layers.size(); ++i)
        for (const std::size_t side : {0u, 1u})
            if (const status s = read_calibrated_values(in, parts[i].sides[side], layers[i].kv_heads,
                                                        layers[i].dim(side), layers[i].sides[side]);
                !s)
                return status(s.code(), s.rule(), {.layer = static_cast<std::int64_t>(i)});
    if (const status s = in.checksum("the values were changed"); !s)
        return s;
    return result<calibration>(std::move(found));
}

} // namespace kv1::inline KV1_ABI::detail
