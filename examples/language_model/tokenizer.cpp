// SPDX-License-Identifier: Apache-2.0
#include "tokenizer.hpp"

#include "byte_alphabet.hpp"
#include "byte_pairs.hpp"
#include "error.hpp"
#include "file.hpp"
#include "json_file.hpp"
#include "literal_finder.hpp"
#include "unicode_regex.hpp"
#include "utf8.hpp"

#include <algorithm>
#include <array>
#include <cctype>
#include <deque>
#include <functional>
#include <limits>
#include <unordered_map>
#include <utility>

namespace kv1_lm {

namespace {

// The expression that finds GPT-2's words. \s is spelled out, since PCRE2's has U+180E, no space since
// Unicode 6.3.
std::string gpt2_words() {
    const std::string space = R"(\p{Z}\t-\r\x{85})";
    return R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{L}\p{N})" + space + "]+|[" + space +
           "]+(?![^" + space + "])|[" + space + "]+";
}

// An expression that matches this text and no other.
std::string literally(std::string_view text) {
    std::string pattern;
    for (const char c : text) {
        if (std::ispunct(static_cast<unsigned char>(c)) != 0)
            pattern += '\\';
        pattern += c;
    }
    return pattern;
}

const std::string& type_of(const json_view& part) { return part.member("type").string(); }

[[noreturn]] void refuse(const json_view& part) { part.fail(quote(type_of(part)) + " is not supported"); }

bool is_set(const json_view& part, const char* flag) {
    const auto value = part.find(flag);
    return value && value->boolean();
}

// Throws input_error if a flag of a part of the tokenizer is set.
void refuse_flag(const json_view& part, const char* flag) {
    if (is_set(part, flag))
        part.member(flag).fail("true is not supported");
}

struct text_hash {
    using is_transparent = void;
    std::size_t operator()(std::string_view text) const noexcept {
        return std::hash<std::string_view>()(text);
    }
};

constexpr std::int32_t no_token = -1;

} // namespace

// The contents of a tokenizer.json, in the order in which a text passes through them.
struct tokenizer::parts {
    std::string origin;

    // Added tokens, which cut the text. [0] are found first; [1] are those that Hugging Face looks for in the
    // normalized text.
    std::array<literal_finder, 2> added;
    // Pre-tokenizers. Each cuts the pieces that the one before has left.
    std::vector<unicode_regex> splits;
    bool add_prefix_space = false;
    std::optional<unicode_regex> words;
    // The model.
    std::array<std::int32_t, 256> byte_tokens{};
    merge_table merges;
    bool ignore_merges = false;
    // For decoding.
    std::unordered_map<std::string, std::int32_t, text_hash, std::equal_to<>> ids; // by spelling
    std::unordered_map<std::int32_t, std::string> bytes;
    std::size_t size = 0;

    parts(const json_view& root, std::string name) : origin(std::move(name)) {
        if (const auto normalizer = root.find("normalizer"))
            refuse(*normalizer);
        const json_view model = root.member("model");
        read_model(model);
        read_vocabulary(model.member("vocab"));
        read_merges(model.member("merges"));
        if (const auto tokens = root.find("added_tokens"))
            read_added_tokens(*tokens);
        read_pre_tokenizers(root.member("pre_tokenizer"));
        if (const auto processor = root.find("post_processor"))
            check_post_processor(*processor);
        const json_view decoder = root.member("decoder");
        if (type_of(decoder) != "ByteLevel")
            refuse(decoder);
    }

    [[nodiscard]] std::int32_t find(std::string_view spelling) const {
        const auto found = ids.find(spelling);
        return found == ids.end() ? no_token : found->second;
    }

private:
    // Whether a pre-tokenizer, of which nothing can come after ByteLevel, has been read.
    bool is_byte_level = false;

    void read_model(const json_view& model) {
        // Files older than the member "type" hold a BPE.
        if (const auto type = model.find("type"); type && type->string() != "BPE")
            refuse(model);
        if (const auto dropout = model.find("dropout"); dropout && dropout->number() != 0.0)
            dropout->fail("dropout is not supported");
        for (const char* text : {"unk_token", "continuing_subword_prefix", "end_of_word_suffix"})
            if (const auto value = model.find(text); value && !value->string().empty())
                value->fail(quote(value->string()) + " is not supported");
        refuse_flag(model, "byte_fallback");
        ignore_merges = is_set(model, "ignore_merges");
    }

    void add_token(const json_view& where, const std::string& spelling, std::int32_t id) {
        // A spelling outside the alphabet stands for itself, as Hugging Face's decoder has it.
        const auto added_bytes = bytes.emplace(id, unspell(spelling).value_or(spelling));
        if (!added_bytes.second)
            where.fail("id " + std::to_string(id) + " is another token's, too");
        ids.emplace(spelling, id);
        size = std::max(size, static_cast<std::size_t>(id) + 1);
    }

    static std::int32_t read_id(const json_view& id) {
        return static_cast<std::int32_t>(id.count(0, std::numeric_limits<std::int32_t>::max()));
    }

    void read_vocabulary(const json_view& vocabulary) {
        for (const auto& entry : vocabulary.object()) {
            const json_view id = vocabulary.member(entry.first);
            add_token(id, entry.first, read_id(id));
        }
        for (std::size_t b = 0; b < byte_tokens.size(); ++b)
            byte_tokens[b] = find(spell(std::string(1, static_cast<char>(b))));
    }

    [[nodiscard]] std::int32_t known(const json_view& merge, std::string_view spelling) const {
        const std::int32_t id = find(spelling);
        if (id == no_token)
            merge.fail("needs " + quote(spelling) + ", which the vocabulary lacks");
        return id;
    }

    void read_merges(const json_view& list) {
        merges = merge_table(list.array().size());
        std::int32_t rank = 0;
        for (std::size_t i = 0; i < list.array().size(); ++i) {
            const json_view entry = list.element(i);
            std::string_view left, right;
            if (entry.value().is_string()) {
                const std::string_view text = entry.string();
                if (text.starts_with("#version")) // the first line of a merges.txt
                    continue;
                const std::size_t space = text.find(' ');
                if (space == std::string_view::npos || text.find(' ', space + 1) != std::string_view::npos)
                    entry.fail(quote(text) + " is not two tokens with a space between them");
                left = text.substr(0, space);
                right = text.substr(space + 1);
            } else {
                if (entry.array().size() != 2)
                    entry.fail("is not a pair");
                left = entry.element(0).string();
                right = entry.element(1).string();
            }
            const std::int32_t a = known(entry, left), b = known(entry, right),
                               joined = known(entry, std::string(left).append(right));
            merges.set(a, b, {rank++, joined});
        }
    }

    void read_added_tokens(const json_view& list) {
        for (std::size_t i = 0; i < list.array().size(); ++i) {
            const json_view token = list.element(i);
            for (const char* flag : {"single_word", "lstrip", "rstrip"})
                refuse_flag(token, flag);
            const json_view content = token.member("content"), id = token.member("id");
            if (content.string().empty())
                content.fail("is empty");
            const std::int32_t number = read_id(id);
            if (const std::int32_t other = find(content.string()); other == no_token)
                add_token(id, content.string(), number);
            else if (other != number)
                id.fail(std::to_string(number) + " but " + quote(content.string()) + " has id " +
                        std::to_string(other));
            added[is_set(token, "normalized") ? 1 : 0].add(content.string(), number);
        }
    }

    void read_pre_tokenizers(const json_view& part) {
        read_pre_tokenizer(part);
        if (!is_byte_level)
            part.fail("does not end with ByteLevel: other vocabularies are not supported");
    }

    void read_pre_tokenizer(const json_view& part) {
        const std::string& type = type_of(part);
        if (is_byte_level)
            part.fail(quote(type) + " after ByteLevel is not supported");
        if (type == "Sequence") {
            const json_view list = part.member("pretokenizers");
            for (std::size_t i = 0; i < list.array().size(); ++i)
                read_pre_tokenizer(list.element(i));
        } else if (type == "Digits") {
            const bool individual = part.member("individual_digits").boolean();
            splits.emplace_back(individual ? R"(\p{N})" : R"(\p{N}+)", part.place());
        } else if (type == "Split") {
            if (const json_view behavior = part.member("behavior"); behavior.string() != "Isolated")
                behavior.fail(quote(behavior.string()) + " is not supported");
            refuse_flag(part, "invert");
            const json_view pattern = part.member("pattern");
            if (const auto text = pattern.find("String"))
                splits.emplace_back(literally(text->string()), text->place());
            else
                splits.emplace_back(pattern.member("Regex").string(), pattern.member("Regex").place());
        } else if (type == "ByteLevel") {
            is_byte_level = true;
            add_prefix_space = part.member("add_prefix_space").boolean();
            if (const auto use = part.find("use_regex"); !use || use->boolean())
                words.emplace(gpt2_words(), part.place());
        } else {
            refuse(part);
        }
    }

    static void check_post_processor(const json_view& part) {
        const std::string& type = type_of(part);
        if (type == "Sequence") {
            const json_view list = part.member("processors");
            for (std::size_t i = 0; i < list.array().size(); ++i)
                check_post_processor(list.element(i));
        } else if (type == "TemplateProcessing") {
            const json_view single = part.member("single");
            if (single.array().size() != 1 || !single.element(0).find("Sequence"))
                single.fail("a template that adds tokens is not supported");
        } else if (type != "ByteLevel") { // which moves offsets only
            refuse(part);
        }
    }
};

// The state of one call of encode().
class tokenizer::encoder {
public:
    encoder(const parts& p, std::vector<std::int32_t>& out) : parts_(p), out_(out), merger_(p.merges) {}

    // Finds the added tokens parts.added[pass], and between them those of the next pass.
    void text(std::string_view rest, std::size_t pass = 0) {
        if (rest.empty())
            return;
        if (pass == parts_.added.size())
            return piece(rest, 0);
        std::size_t at = 0;
        while (const auto hit = parts_.added[pass].find(rest, at)) {
            text(rest.substr(at, hit->begin - at), pass + 1);
            out_.push_back(hit->token);
            at = hit->end;
        }
        text(rest.substr(at), pass + 1);
    }

private:
    template <class F>
    static void for_each_piece(const unicode_regex& regex, std::string_view text, F&& f) {
        regex_splitter pieces(regex, text);
        for (std::string_view p = pieces.next(); !p.empty(); p = pieces.next())
            f(p);
    }

    // Cuts a piece that the first `done` pre-tokenizers have made.
    void piece(std::string_view text, std::size_t done) {
        if (done < parts_.splits.size())
            return for_each_piece(parts_.splits[done], text, [&](std::string_view p) { piece(p, done + 1); });
        if (parts_.add_prefix_space && !text.starts_with(' '))
            text = prefixed_.emplace_back(" ").append(text);
        if (parts_.words)
            for_each_piece(*parts_.words, text, [&](std::string_view w) { word(w); });
        else
            word(text);
    }

    void word(std::string_view text) {
        const auto [known, is_new] = seen_.try_emplace(text, range{out_.size(), 0});
        range& ids = known->second;
        if (is_new) {
            append_tokens(text);
            ids.count = out_.size() - ids.begin;
        } else {
            out_.resize(out_.size() + ids.count);
            std::copy_n(out_.begin() + static_cast<std::ptrdiff_t>(ids.begin), ids.count,
                        out_.end() - static_cast<std::ptrdiff_t>(ids.count));
        }
    }

    void append_tokens(std::string_view text) {
        if (parts_.ignore_merges)
            if (const std::int32_t whole = parts_.find(spell(text)); whole != no_token)
                return out_.push_back(whole);
        word_.clear();
        for (const char c : text)
            if (const std::int32_t token = parts_.byte_tokens[static_cast<std::uint8_t>(c)];
                token != no_token)
                word_.push_back(token);
        merger_.apply(word_);
        out_.insert(out_.end(), word_.begin(), word_.end());
    }

    struct range {
        std::size_t begin, count;
    };
    const parts& parts_;
    std::vector<std::int32_t>& out_;
    pair_merger merger_;
    std::vector<std::int32_t> word_;
    std::deque<std::string> prefixed_;                 // owns texts that words of seen_ point into
    std::unordered_map<std::string_view, range> seen_; // words, and the range of their tokens in out_
};

tokenizer tokenizer::read(const std::filesystem::path& file) {
    return parse(read_text_file(file), file.string());
}

tokenizer tokenizer::parse(std::string_view text, std::string origin) {
    const json_document document{parse_json(text, origin), origin};
    return tokenizer(std::make_shared<const parts>(document.root(), std::move(origin)));
}

std::vector<std::int32_t> tokenizer::encode(std::string_view utf8) const {
    if (const std::size_t valid = valid_prefix(utf8); valid != utf8.size())
        throw input_error("the text is not UTF-8 at byte " + std::to_string(valid));
    if (utf8.size() >= std::numeric_limits<std::uint32_t>::max())
        throw input_error("the text is longer than 4 GiB");
    std::vector<std::int32_t> ids;
    encoder(*parts_, ids).text(utf8);
    return ids;
}

std::string tokenizer::decode(std::span<const std::int32_t> ids) const {
    std::string bytes, text;
    for (const std::int32_t id : ids)
        bytes += bytes_of(id);
    take_last_text(text, bytes);
    return text;
}

const std::string& tokenizer::bytes_of(std::int32_t id) const {
    const auto found = parts_->bytes.find(id);
    if (found == parts_->bytes.end())
        throw input_error(parts_->origin, "no token has id " + std::to_string(id));
    return found->second;
}

std::size_t tokenizer::size() const noexcept { return parts_->size; }

std::optional<std::int32_t> tokenizer::id_of(std::string_view token) const {
    const std::int32_t id = parts_->find(token);
    return id == no_token ? std::nullopt : std::optional(id);
}

std::string stream_decoder::push(std::int32_t id) {
    pending_ += tokenizer_.bytes_of(id);
    std::string text;
    std::string_view rest = pending_;
    take_text(text, rest);
    pending_.erase(0, pending_.size() - rest.size());
    return text;
}

std::string stream_decoder::finish() {
    std::string text;
    take_last_text(text, std::exchange(pending_, {}));
    return text;
}

} // namespace kv1_lm
