// SPDX-License-Identifier: Apache-2.0
//
// The tokens of a text: a folder of token ids, cut into shards. An id has two bytes, or four where the vocabulary has
// more than 65,536 words.
//
//   corpus.json          {"vocab_size": .., "shards": [{"file": "tokens-00000.bin", "tokens": ..}, ..]}
//   tokens-00000.bin     uint16 or uint32, little-endian, nothing else
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <vector>

namespace kv1_train {

/// Writes a folder. It appears when finish() is called.
class token_writer {
public:
    /// Makes the folder. Throws input_error if it exists or cannot be made.
    token_writer(std::filesystem::path folder, std::size_t vocab_size, std::size_t shard_tokens);
    token_writer(const token_writer&) = delete;
    token_writer& operator=(const token_writer&) = delete;
    ~token_writer();

    /// Throws input_error for an id that is not in the vocabulary.
    void append(std::span<const std::int32_t> ids);
    void finish();
    [[nodiscard]] std::size_t tokens() const noexcept;

private:
    struct state;
    std::unique_ptr<state> state_;
};

/// Reads a folder by mapping its files: opening is cheap, and ranks on one machine share the memory.
class token_file {
public:
    /// Throws input_error for a file that is missing, too short, or not as corpus.json says.
    [[nodiscard]] static token_file open(const std::filesystem::path& folder);

    [[nodiscard]] std::size_t size() const noexcept { return size_; }
    [[nodiscard]] std::size_t vocab_size() const noexcept { return vocab_size_; }
    /// Copies the ids from `first` on, as if the shards were one. Precondition: they are there.
    void read(std::size_t first, std::span<std::int64_t> out) const;

private:
    struct shard {
        std::shared_ptr<const void> mapping;
        const void* ids = nullptr;
        std::size_t tokens = 0;
    };
    std::vector<shard> shards_;
    std::size_t size_ = 0, vocab_size_ = 0;
};

} // namespace kv1_train
