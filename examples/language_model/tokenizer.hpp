// SPDX-License-Identifier: Apache-2.0
//
// Reads a Hugging Face tokenizer.json that holds a byte-level BPE, as the GPT-2 family has it, and gives the
// ids that Hugging Face's tokenizers gives.
//
// Supported: model BPE with merges as strings or as pairs; pre-tokenizer ByteLevel, or a Sequence of Digits
// and Split (behaviour Isolated) that ends with it; added tokens, which are found before anything else;
// decoder ByteLevel; post-processors that add no token. Whatever else would change the ids (normalizers,
// other models, dropout, stripping added tokens, ...) is refused by name. `truncation` and `padding` are not
// read: they are the caller's choice, as in Transformers.
//
// Letters, numbers and spaces are those of PCRE2's Unicode version: characters of later versions count as
// neither. Split's expressions are read in PCRE2's dialect, not Oniguruma's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kv1_lm {

/// Immutable and cheap to copy; every member may be called from several threads at once.
class tokenizer {
public:
    /// Both throw input_error, naming the file and the key.
    [[nodiscard]] static tokenizer read(const std::filesystem::path& file);
    [[nodiscard]] static tokenizer parse(std::string_view text, std::string origin);

    /// The ids of a text, special tokens spelled out in it included. O(n log n) for n bytes, whatever the
    /// text. Throws input_error with the byte offset where the text is not UTF-8. Bytes for which the
    /// vocabulary has no token are dropped, as in Hugging Face's tokenizers; vocabularies have all 256.
    [[nodiscard]] std::vector<std::int32_t> encode(std::string_view utf8) const;

    /// The text of some ids, special tokens included; what is not UTF-8 becomes U+FFFD as in Python and Rust.
    /// Throws input_error for an id that has no token.
    [[nodiscard]] std::string decode(std::span<const std::int32_t> ids) const;

    /// The bytes of one token, which need not be UTF-8 by themselves. Throws input_error as decode does.
    [[nodiscard]] const std::string& bytes_of(std::int32_t id) const;

    /// One more than the largest id.
    [[nodiscard]] std::size_t size() const noexcept;

    /// The id of a token as tokenizer.json spells it ("<|endoftext|>", "\u0120the").
    [[nodiscard]] std::optional<std::int32_t> id_of(std::string_view token) const;

private:
    struct parts;
    class encoder;
    explicit tokenizer(std::shared_ptr<const parts> p) noexcept : parts_(std::move(p)) {}

    std::shared_ptr<const parts> parts_;
};

/// Decodes ids one by one: what push and finish return makes up decode() of all of them. Text is held back
/// only while its last character lacks bytes, three at most.
class stream_decoder {
public:
    explicit stream_decoder(tokenizer t) noexcept : tokenizer_(std::move(t)) {}

    /// The text that this id completes; may be empty.
    [[nodiscard]] std::string push(std::int32_t id);
    /// What is left, and the decoder starts afresh.
    [[nodiscard]] std::string finish();

private:
    tokenizer tokenizer_;
    std::string pending_;
};

} // namespace kv1_lm
