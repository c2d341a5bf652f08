// SPDX-License-Identifier: Apache-2.0
//
// Reads tests/data/*.safetensors: just enough of the format for files that this project wrote itself. An
// 8-byte little-endian header length, a flat JSON header {"name":{"dtype":"F32","shape":[..],
// "data_offsets":[from,to]},..}, the data. Anything unexpected throws.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace kv1_test {

class safetensors_file {
public:
    struct tensor {
        std::string dtype;
        std::vector<std::size_t> shape;
        std::span<const char> bytes;
    };

    explicit safetensors_file(const std::string& path) {
        std::ifstream in(path, std::ios::binary);
        if (!in)
            throw std::runtime_error("can not open " + path);
        data_.assign(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
        std::uint64_t header_size = 0;
        require(data_.size() >= sizeof header_size);
        std::memcpy(&header_size, data_.data(), sizeof header_size);
        require(header_size <= data_.size() - sizeof header_size);
        const std::span<const char> body =
            std::span<const char>(data_).subspan(sizeof header_size + header_size);
        rest_ = std::string_view(data_.data() + sizeof header_size, header_size);
        expect('{');
        do {
            std::string name = string();
            expect(':');
            tensors_.emplace(std::move(name), object(body));
        } while (accept(','));
        expect('}');
    }

    [[nodiscard]] bool contains(const std::string& name) const { return tensors_.contains(name); }
    [[nodiscard]] const tensor& at(const std::string& name) const {
        const auto found = tensors_.find(name);
        if (found == tensors_.end())
            throw std::runtime_error("no tensor " + name);
        return found->second;
    }
    [[nodiscard]] const std::map<std::string, tensor>& tensors() const noexcept { return tensors_; }

    /// The elements of a tensor, whose size T has to have.
    template <class T>
    [[nodiscard]] std::vector<T> values(const std::string& name) const {
        const tensor& t = at(name);
        require(size_of(t.dtype) == sizeof(T));
        std::vector<T> out(t.bytes.size() / sizeof(T));
        std::memcpy(out.data(), t.bytes.data(), t.bytes.size());
        return out;
    }

private:
    static void require(bool holds) {
        if (!holds)
            throw std::runtime_error("not a safetensors file that this reader knows");
    }
    static std::size_t size_of(std::string_view dtype) {
        return dtype == "F32"                                        ? 4u
               : dtype == "F16" || dtype == "BF16" || dtype == "U16" ? 2u
               : dtype == "U8"                                       ? 1u
                                                                     : 0u;
    }

    void skip_space() {
        while (!rest_.empty() && (rest_.front() == ' ' || rest_.front() == '\n'))
            rest_.remove_prefix(1);
    }
    bool accept(char c) {
        skip_space();
        if (rest_.empty() || rest_.front() != c)
            return false;
        rest_.remove_prefix(1);
        return true;
    }
    void expect(char c) { require(accept(c)); }
    std::string string() {
        expect('"');
        const std::size_t end = rest_.find('"');
        require(end != std::string_view::npos && rest_.substr(0, end).find('\\') == std::string_view::npos);
        std::string text(rest_.substr(0, end));
        rest_.remove_prefix(end + 1);
        return text;
    }
    std::vector<std::size_t> numbers() {
        std::vector<std::size_t> list;
        expect('[');
        if (accept(']'))
            return list;
        do {
            skip_space();
            std::size_t n = 0, digits = 0;
            for (; digits < rest_.size() && rest_[digits] >= '0' && rest_[digits] <= '9'; ++digits)
                n = n * 10 + static_cast<std::size_t>(rest_[digits] - '0');
            require(digits > 0 && digits < 19);
            rest_.remove_prefix(digits);
            list.push_back(n);
        } while (accept(','));
        expect(']');
        return list;
    }
    tensor object(std::span<const char> body) {
        tensor t;
        std::vector<std::size_t> offsets;
        expect('{');
        do {
            const std::string key = string();
            expect(':');
            if (key == "dtype")
                t.dtype = string();
            else if (key == "shape")
                t.shape = numbers();
            else if (key == "data_offsets")
                offsets = numbers();
            else
                string(); // an entry of __metadata__
        } while (accept(','));
        expect('}');
        if (t.dtype.empty())
            return t;
        require(offsets.size() == 2 && offsets[0] <= offsets[1] && offsets[1] <= body.size());
        std::size_t size = size_of(t.dtype);
        for (const std::size_t extent : t.shape)
            size *= extent;
        require(size == offsets[1] - offsets[0]);
        t.bytes = body.subspan(offsets[0], size);
        return t;
    }

    std::vector<char> data_;
    std::string_view rest_;
    std::map<std::string, tensor> tensors_;
};

} // namespace kv1_test
