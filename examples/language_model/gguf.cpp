// SPDX-License-Identifier: Apache-2.0
#include "gguf.hpp"

#include "error.hpp"
#include "file.hpp"

#include <kv1/float16.hpp>

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

namespace kv1_lm {

namespace {

static_assert(std::endian::native == std::endian::little, "GGUF files are read as they are");

// Kinds of values, by their numbers in the file.
enum kind : std::uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };

class reader {
public:
    reader(std::span<const std::byte> bytes, const std::string& origin) : bytes_(bytes), origin_(origin) {}

    [[noreturn]] void fail(std::string_view problem) const {
        throw input_error(origin_, "byte " + std::to_string(at_) + ": " + std::string(problem));
    }
    [[nodiscard]] std::size_t at() const noexcept { return at_; }
    [[nodiscard]] std::size_t left() const noexcept { return bytes_.size() - at_; }

    std::span<const std::byte> take(std::uint64_t n) {
        if (n > left())
            fail("the file ends within what begins here");
        const auto part = bytes_.subspan(at_, static_cast<std::size_t>(n));
        at_ += part.size();
        return part;
    }
    template <class T>
    T scalar() {
        T value;
        std::memcpy(&value, take(sizeof(T)).data(), sizeof(T));
        return value;
    }
    std::string text() {
        const auto bytes = take(scalar<std::uint64_t>());
        return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
    }
    // Of things that take at least so many bytes each, as many as the file can hold.
    std::size_t count(std::size_t least_bytes) {
        const auto n = scalar<std::uint64_t>();
        if (n > left() / least_bytes)
            fail("more is announced than the file can hold");
        return static_cast<std::size_t>(n);
    }
    double number(std::uint32_t kind_of_it) {
        switch (kind_of_it) {
        case u8:
            return scalar<std::uint8_t>();
        case i8:
            return scalar<std::int8_t>();
        case u16:
            return scalar<std::uint16_t>();
        case i16:
            return scalar<std::int16_t>();
        case u32:
            return scalar<std::uint32_t>();
        case i32:
            return scalar<std::int32_t>();
        case f32:
            return static_cast<double>(scalar<float>());
        case boolean:
            return scalar<std::uint8_t>() != 0 ? 1.0 : 0.0;
        case u64:
            return static_cast<double>(scalar<std::uint64_t>());
        case i64:
            return static_cast<double>(scalar<std::int64_t>());
        case f64:
            return scalar<double>();
        default:
            fail("a value of kind " + std::to_string(kind_of_it) + ", which GGUF does not have");
        }
    }
    gguf::value any() {
        const auto what = scalar<std::uint32_t>();
        if (what == string)
            return text();
        if (what != array)
            return number(what);
        const auto of = scalar<std::uint32_t>();
        if (of == array)
            fail("arrays of arrays are not supported");
        const std::size_t n = count(of == string ? 8 : 1);
        if (of == string) {
            gguf::strings all(n);
            for (std::string& s : all)
                s = text();
            return all;
        }
        gguf::numbers all(n);
        for (double& x : all)
            x = number(of);
        return all;
    }

private:
    std::span<const std::byte> bytes_;
    const std::string& origin_;
    std::size_t at_ = 0;
};

struct block_size {
    std::size_t values = 0, bytes = 0;
};
// 0: not supported
block_size block_of(gguf_type type) {
    switch (type) {
    case gguf_type::f32:
        return {1, 4};
    case gguf_type::f16:
    case gguf_type::bf16:
        return {1, 2};
    case gguf_type::q4_0:
        return {32, 18};
    case gguf_type::q4_1:
        return {32, 20};
    case gguf_type::q8_0:
        return {32, 34};
    }
    return {};
}

float half_at(const std::byte* at) {
    std::uint16_t bits = 0;
    std::memcpy(&bits, at, sizeof bits);
    return static_cast<float>(kv1::float16::from_bits(bits));
}

void decode(gguf_type type, const std::byte* in, float* out) {
    const auto byte = [&](std::size_t i) { return std::to_integer<unsigned>(in[i]); };
    switch (type) {
    case gguf_type::f32:
        std::memcpy(out, in, sizeof(float));
        break;
    case gguf_type::f16:
        *out = half_at(in);
        break;
    case gguf_type::bf16:
        *out = std::bit_cast<float>((byte(0) | byte(1) << 8) << 16);
        break;
    case gguf_type::q8_0:
        for (std::size_t i = 0; i < 32; ++i)
            out[i] = static_cast<float>(static_cast<std::int8_t>(byte(2 + i))) * half_at(in);
        break;
    case gguf_type::q4_0:
    case gguf_type::q4_1: {
        const bool has_minimum = type == gguf_type::q4_1;
        const float scale = half_at(in), least = has_minimum ? half_at(in + 2) : -8.0f * scale;
        const std::size_t codes = has_minimum ? 4 : 2;
        for (std::size_t i = 0; i < 16; ++i) {
            out[i] = static_cast<float>(byte(codes + i) & 15u) * scale + least;
            out[i + 16] = static_cast<float>(byte(codes + i) >> 4) * scale + least;
        }
        break;
    }
    }
}

} // namespace

gguf gguf::read(const std::filesystem::path& file) { return parse(read_binary_file(file), file.string()); }

gguf gguf::parse(std::vector<std::byte> contents, std::string origin) {
    gguf file;
    file.contents_ = std::move(contents);
    file.origin_ = std::move(origin);
    reader in(file.contents_, file.origin_);
    if (in.left() < 4 || std::memcmp(in.take(4).data(), "GGUF", 4) != 0)
        throw input_error(file.origin_, "is no GGUF file");
    if (const auto version = in.scalar<std::uint32_t>(); version != 2 && version != 3)
        in.fail("GGUF version " + std::to_string(version) + " is not supported");
    const std::size_t tensors = in.count(24), pairs = in.count(13);
    for (std::size_t i = 0; i < pairs; ++i) {
        std::string key = in.text();
        value v = in.any();
        if (!file.values_.emplace(key, std::move(v)).second)
            in.fail("the key " + quote(key) + " is there twice");
    }
    struct place {
        std::string name;
        std::uint64_t offset;
    };
    std::vector<place> places;
    for (std::size_t i = 0; i < tensors; ++i) {
        std::string name = in.text();
        gguf_tensor t{};
        const auto extents = in.scalar<std::uint32_t>();
        if (extents > 4)
            in.fail("tensor " + quote(name) + " has more than four dimensions");
        std::size_t elements = 1;
        for (std::uint32_t d = 0; d < extents; ++d) {
            const auto extent = in.scalar<std::uint64_t>();
            if (extent == 0 || extent > (std::uint64_t{1} << 40) / elements)
                in.fail("tensor " + quote(name) + " has an extent of " + std::to_string(extent));
            elements *= static_cast<std::size_t>(extent);
            t.shape.insert(t.shape.begin(), static_cast<std::size_t>(extent));
        }
        t.type = static_cast<gguf_type>(in.scalar<std::uint32_t>());
        const std::size_t values = block_of(t.type).values;
        if (values != 0 && (t.shape.empty() || t.shape.back() % values != 0))
            in.fail("tensor " + quote(name) + " has rows that are not whole blocks");
        places.push_back({name, in.scalar<std::uint64_t>()});
        if (!file.tensors_.emplace(std::move(name), std::move(t)).second)
            in.fail("the tensor " + quote(places.back().name) + " is there twice");
    }
    std::size_t alignment = 32;
    if (file.find<double>("general.alignment") != nullptr)
        alignment = file.count("general.alignment");
    if (alignment == 0 || alignment > 65536)
        throw input_error(file.origin_, "general.alignment is " + std::to_string(alignment));
    (void)in.take(std::min((alignment - in.at() % alignment) % alignment, in.left()));
    const auto data = in.take(in.left());
    for (const place& p : places) {
        gguf_tensor& t = file.tensors_.find(p.name)->second;
        const auto [values, bytes] = block_of(t.type);
        if (values == 0)
            continue; // floats() refuses it
        std::size_t size = bytes;
        for (const std::size_t extent : t.shape)
            size *= extent;
        size /= values;
        if (p.offset > data.size() || size > data.size() - p.offset)
            throw input_error(file.origin_, "tensor " + quote(p.name) + " lies beyond the end of the file");
        t.bytes = data.subspan(static_cast<std::size_t>(p.offset), size);
    }
    return file;
}

void gguf::lacks(std::string_view key, std::string_view what) const {
    throw input_error(origin_, "holds no " + std::string(what) + " " + quote(key));
}

double gguf::number(std::string_view key) const {
    const auto* found = find<double>(key);
    if (found == nullptr)
        lacks(key, "number");
    return *found;
}

std::size_t gguf::count(std::string_view key) const {
    const double x = number(key);
    if (!(x >= 0.0 && x <= 0x1p32) || x != static_cast<double>(static_cast<std::uint64_t>(x)))
        lacks(key, "whole number");
    return static_cast<std::size_t>(x);
}

const std::string& gguf::string(std::string_view key) const {
    const auto* found = find<std::string>(key);
    if (found == nullptr)
        lacks(key, "text");
    return *found;
}

const gguf::strings& gguf::list(std::string_view key) const {
    const auto* found = find<strings>(key);
    if (found == nullptr)
        lacks(key, "list of texts");
    return *found;
}

std::vector<float> gguf::floats(std::string_view name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end())
        lacks(name, "tensor");
    const gguf_tensor& t = found->second;
    const auto [values, bytes] = block_of(t.type);
    if (values == 0)
        throw input_error(origin_, "tensor " + quote(name) + " has elements of type " +
                                       std::to_string(static_cast<std::uint32_t>(t.type)) +
                                       "; F32, F16, BF16, Q8_0, Q4_0 and Q4_1 are supported");
    std::vector<float> out(t.bytes.size() / bytes * values);
    for (std::size_t i = 0; i * bytes < t.bytes.size(); ++i)
        decode(t.type, t.bytes.data() + i * bytes, out.data() + i * values);
    return out;
}

} // namespace kv1_lm
