// SPDX-License-Identifier: Apache-2.0
#include "token_file.hpp"

#include "durable.hpp"
#include "error.hpp"
#include "json_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstdio>
#include <optional>
#include <string>
#include <system_error>

namespace kv1_train {

static_assert(std::endian::native == std::endian::little, "token files are mapped as they are");

using kv1_lm::input_error;

namespace {

constexpr std::size_t largest_vocabulary = std::size_t{1} << 31;
std::size_t bytes_of_an_id(std::size_t vocab_size) noexcept { return vocab_size > 65536 ? 4 : 2; }

} // namespace

struct token_writer::state {
    state(std::filesystem::path target, std::size_t words, std::size_t tokens_of_a_shard)
        : folder(std::move(target)), vocab_size(words), shard_tokens(tokens_of_a_shard) {}

    durable_folder folder;
    std::size_t vocab_size, shard_tokens, total = 0;
    kv1_lm::json shards = kv1_lm::json::array();
    std::vector<std::byte> pending;
    std::size_t pending_tokens = 0;

    void write_shard() {
        std::array<char, 32> name{};
        std::snprintf(name.data(), name.size(), "tokens-%05zu.bin", shards.size());
        folder.write(name.data(), pending);
        shards.push_back({{"file", name.data()}, {"tokens", pending_tokens}});
        pending.clear();
        pending_tokens = 0;
    }
};

token_writer::token_writer(std::filesystem::path folder, std::size_t vocab_size, std::size_t shard_tokens)
    : state_(std::make_unique<state>(std::move(folder), vocab_size, shard_tokens)) {
    if (vocab_size > largest_vocabulary)
        throw input_error("a vocabulary of " + std::to_string(vocab_size) + " words is too large");
}

token_writer::~token_writer() = default;

void token_writer::append(std::span<const std::int32_t> ids) {
    state& s = *state_;
    for (const std::int32_t id : ids) {
        if (id < 0 || static_cast<std::size_t>(id) >= s.vocab_size)
            throw input_error("token " + std::to_string(id) + " is not in the vocabulary");
        const auto bytes = std::as_bytes(std::span(&id, 1)).first(bytes_of_an_id(s.vocab_size));
        s.pending.insert(s.pending.end(), bytes.begin(), bytes.end());
        ++s.total;
        if (++s.pending_tokens == s.shard_tokens)
            s.write_shard();
    }
}

void token_writer::finish() {
    state& s = *state_;
    if (s.pending_tokens != 0)
        s.write_shard();
    const std::string index = kv1_lm::json{{"vocab_size", s.vocab_size}, {"shards", s.shards}}.dump(2) + "\n";
    s.folder.write("corpus.json", std::as_bytes(std::span(index)));
    s.folder.commit();
}

std::size_t token_writer::tokens() const noexcept { return state_->total; }

token_file token_file::open(const std::filesystem::path& folder) {
    const kv1_lm::json_document document = kv1_lm::read_json_file(folder / "corpus.json");
    const kv1_lm::json_view root = document.root(), list = root.member("shards");
    token_file out;
    out.vocab_size_ = root.member("vocab_size").count(1, largest_vocabulary);
    for (std::size_t i = 0; i < list.array().size(); ++i) {
        const kv1_lm::json_view entry = list.element(i);
        const std::filesystem::path file = folder / entry.member("file").string();
        const std::size_t tokens = entry.member("tokens").count(1, std::size_t{1} << 40);
        const auto fail = [&] {
            return input_error(file.string(), "cannot be read: " + std::generic_category().message(errno));
        };
        const int descriptor = ::open(file.c_str(), O_RDONLY | O_CLOEXEC);
        if (descriptor < 0)
            throw fail();
        struct ::stat about {};
        const bool known = ::fstat(descriptor, &about) == 0;
        const std::size_t bytes = tokens * bytes_of_an_id(out.vocab_size_);
        void* at = known && static_cast<std::size_t>(about.st_size) == bytes
                       ? ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, descriptor, 0)
                       : nullptr;
        ::close(descriptor);
        if (at == nullptr)
            throw input_error(file.string(), "does not hold " + std::to_string(tokens) + " tokens");
        if (at == MAP_FAILED)
            throw fail();
        const auto unmap = [bytes](const void* p) { ::munmap(const_cast<void*>(p), bytes); };
        out.shards_.push_back({{at, unmap}, at, tokens});
        out.size_ += tokens;
    }
    return out;
}

void token_file::read(std::size_t first, std::span<std::int64_t> out) const {
    for (const shard& s : shards_) {
        if (first >= s.tokens) {
            first -= s.tokens;
            continue;
        }
        const std::size_t n = std::min(out.size(), s.tokens - first);
        if (bytes_of_an_id(vocab_size_) == 2)
            std::copy_n(static_cast<const std::uint16_t*>(s.ids) + first, n, out.begin());
        else
            std::copy_n(static_cast<const std::uint32_t*>(s.ids) + first, n, out.begin());
        out = out.subspan(n);
        if (out.empty())
            return;
        first = 0;
    }
}

} // namespace kv1_train
