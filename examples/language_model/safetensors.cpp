// SPDX-License-Identifier: Apache-2.0
#include "safetensors.hpp"

#include "error.hpp"
#include "file.hpp"
#include "json_file.hpp"

#include <kv1/convert.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <optional>
#include <utility>

namespace kv1_lm {

static_assert(std::endian::native == std::endian::little, "tensors are used in place");

namespace {

constexpr std::size_t length_bytes = 8;
constexpr std::size_t longest_header = 100'000'000; // the reference implementation's limit

struct type_row {
    std::string_view name;
    std::size_t bits;
};
// In the order of tensor_type.
constexpr std::array<type_row, 22> type_table{{
    {"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"U8", 8},          {"I8", 8},
    {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
    {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32},        {"F32", 32},
    {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64},
}};
static_assert(static_cast<std::size_t>(tensor_type::u64) + 1 == type_table.size());

const type_row& row_of(tensor_type type) noexcept { return type_table[static_cast<std::size_t>(type)]; }

tensor_type read_type(const json_view& dtype) {
    const auto row = std::find_if(type_table.begin(), type_table.end(),
                                  [&](const type_row& r) { return r.name == dtype.string(); });
    if (row == type_table.end())
        dtype.fail("unknown element type " + quote(dtype.string()));
    return static_cast<tensor_type>(row - type_table.begin());
}

std::vector<std::size_t> read_counts(const json_view& list) {
    std::vector<std::size_t> counts(list.array().size());
    for (std::size_t i = 0; i < counts.size(); ++i)
        counts[i] = list.element(i).count();
    return counts;
}

// a * b; nothing if it overflows.
std::optional<std::size_t> product(std::size_t a, std::size_t b) noexcept {
    if (b != 0 && a > std::numeric_limits<std::size_t>::max() / b)
        return std::nullopt;
    return a * b;
}

// The bytes of a tensor. Throws input_error, which names `shape`, if their number overflows.
std::size_t byte_count(tensor_type type, const std::vector<std::size_t>& extents, const json_view& shape) {
    std::optional<std::size_t> bits = row_of(type).bits;
    for (const std::size_t extent : extents)
        if (bits = product(*bits, extent); !bits)
            shape.fail("overflows");
    if (*bits % 8 != 0)
        shape.fail("does not fill whole bytes of " + std::string(to_string(type)));
    return *bits / 8;
}

// Where a tensor lies in the data. `place` names the tensor in messages.
struct extent {
    std::size_t begin, end;
    const std::string* place;
};

extent read_extent(const json_view& offsets, std::size_t data_size) {
    if (offsets.array().size() != 2)
        offsets.fail("is not a pair");
    const std::size_t begin = offsets.element(0).count(), end = offsets.element(1).count();
    if (begin > end)
        offsets.fail("ends before it begins");
    if (end > data_size)
        offsets.fail("ends at " + std::to_string(end) + ", past the " + std::to_string(data_size) +
                     " bytes of data");
    return {begin, end, nullptr};
}

std::map<std::string, std::string, std::less<>> read_metadata(const json_view& metadata) {
    std::map<std::string, std::string, std::less<>> strings;
    for (const auto& entry : metadata.object())
        strings.emplace(entry.first, metadata.member(entry.first).string());
    return strings;
}

template <kv1::scalar T>
std::vector<float> convert(std::span<const std::byte> bytes) {
    std::vector<float> out(bytes.size() / sizeof(T));
    std::array<T, 4096> part; // aligned, unlike the file's bytes
    for (std::size_t at = 0; at < out.size(); at += part.size()) {
        const std::size_t n = std::min(part.size(), out.size() - at);
        std::memcpy(part.data(), bytes.data() + at * sizeof(T), n * sizeof(T));
        kv1::convert(std::span<const T>(part).first(n), std::span(out).subspan(at, n));
    }
    return out;
}

} // namespace

std::string_view to_string(tensor_type type) noexcept { return row_of(type).name; }

std::vector<float> to_floats(const tensor& t) {
    switch (t.type) {
    case tensor_type::f32:
        return convert<float>(t.bytes);
    case tensor_type::f16:
        return convert<kv1::float16>(t.bytes);
    case tensor_type::bf16:
        return convert<kv1::bfloat16>(t.bytes);
    default:
        throw input_error(t.place,
                          "holds " + std::string(to_string(t.type)) + ", where F32, F16 or BF16 is needed");
    }
}

safetensors safetensors::read(const std::filesystem::path& file) {
    return parse(read_binary_file(file), file.string());
}

safetensors safetensors::parse(std::vector<std::byte> contents, std::string origin) {
    safetensors file;
    file.contents_ = std::move(contents);
    file.origin_ = std::move(origin);
    const std::span<const std::byte> all(file.contents_);

    if (all.size() < length_bytes)
        throw input_error(file.origin_, "truncated: " + std::to_string(all.size()) +
                                            " bytes, less than the 8 of the header's length");
    std::uint64_t header_size = 0;
    std::memcpy(&header_size, all.data(), length_bytes);
    if (header_size > longest_header)
        throw input_error(file.origin_, "a header of " + std::to_string(header_size) +
                                            " bytes, more than the 100000000 that are allowed");
    const auto rest = all.subspan(length_bytes);
    if (header_size > rest.size())
        throw input_error(file.origin_, "truncated: a header of " + std::to_string(header_size) +
                                            " bytes, of which the file has " + std::to_string(rest.size()));
    const std::string_view header(reinterpret_cast<const char*>(rest.data()), header_size);
    const auto data = rest.subspan(header_size);

    const std::string header_place = file.origin_ + ": header";
    if (!header.starts_with('{'))
        throw input_error(header_place, "does not begin with {");
    const json document = parse_json(header, header_place);

    std::vector<extent> extents;
    const json_view root(document, header_place);
    for (const auto& [name, value] : root.object()) {
        if (name == "__metadata__") {
            if (!value.is_null())
                file.metadata_ = read_metadata(json_view(value, header_place + ": __metadata__"));
            continue;
        }
        tensor t;
        t.place = file.origin_ + ": tensor " + quote(name);
        const json_view entry(value, t.place);
        t.type = read_type(entry.member("dtype"));
        t.shape = read_counts(entry.member("shape"));
        const std::size_t bytes = byte_count(t.type, t.shape, entry.member("shape"));
        const extent where = read_extent(entry.member("data_offsets"), data.size());
        if (where.end - where.begin != bytes)
            entry.fail(std::to_string(bytes) + " bytes by shape and dtype, but " +
                       std::to_string(where.end - where.begin) + " by data_offsets");
        t.bytes = data.subspan(where.begin, bytes);
        extents.push_back(where);
        extents.back().place = &file.tensors_.emplace(name, std::move(t)).first->second.place;
    }

    std::sort(extents.begin(), extents.end(), [](const extent& a, const extent& b) {
        return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
    });
    std::size_t covered = 0;
    for (const extent& e : extents) {
        if (e.begin != covered)
            throw input_error(*e.place, "data begins at " + std::to_string(e.begin) +
                                            (e.begin < covered ? ", inside another tensor's, which ends at "
                                                               : ", after a hole that begins at ") +
                                            std::to_string(covered));
        covered = e.end;
    }
    if (const std::size_t end = all.size() - data.size() + covered; end != all.size())
        throw input_error(file.origin_, "the tensors' data ends at byte " + std::to_string(end) + " of " +
                                            std::to_string(all.size()));
    return file;
}

const tensor* safetensors::find(std::string_view name) const {
    const auto found = tensors_.find(name);
    return found == tensors_.end() ? nullptr : &found->second;
}

} // namespace kv1_lm
