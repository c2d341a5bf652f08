// SPDX-License-Identifier: Apache-2.0
#include "pack.hpp"

#include "error.hpp"
#include "file.hpp"
#include "progress.hpp"
#include "token_file.hpp"
#include "tokenizer.hpp"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <ostream>
#include <string_view>
#include <thread>

namespace kv1_train {

namespace {

// Pieces of about `size` bytes, each the end of a document but for the last.
std::vector<std::string_view> cut(std::string_view text, std::string_view document_end, std::size_t size) {
    std::vector<std::string_view> pieces;
    while (!text.empty()) {
        const std::size_t end = text.size() > size ? text.find(document_end, size) : std::string_view::npos;
        const std::size_t length = end == std::string_view::npos ? text.size() : end + document_end.size();
        pieces.push_back(text.substr(0, length));
        text.remove_prefix(length);
    }
    return pieces;
}

} // namespace

void pack(const pack_options& options, std::ostream& out, std::ostream& err) {
    const auto words = kv1_lm::tokenizer::read(options.tokenizer / "tokenizer.json");
    const auto end = words.id_of(options.document_end);
    if (!end)
        throw kv1_lm::input_error("the tokenizer has no token " + kv1_lm::quote(options.document_end));
    token_writer writer(options.out, words.size(), options.shard_tokens);

    constexpr std::size_t piece_bytes = std::size_t{1} << 20;
    std::size_t bytes = 0;
    for (const std::filesystem::path& file : options.texts) {
        const std::string text = kv1_lm::read_text_file(file);
        bytes += text.size();
        const auto pieces = cut(text, options.document_end, piece_bytes);
        kv1_lm::progress_bar bar(err, options.show_progress, "MiB", pieces.size());

        std::int32_t last = -1;
        // a batch of pieces at a time, so that ids do not pile up
        const std::size_t batch = 8 * options.threads;
        for (std::size_t first = 0; first < pieces.size(); first += batch) {
            const std::size_t n = std::min(batch, pieces.size() - first);
            std::vector<std::vector<std::int32_t>> ids(n);
            std::atomic<std::size_t> next{0};
            std::exception_ptr failure;
            std::mutex failing;
            const auto work = [&] {
                for (std::size_t i = next++; i < n; i = next++)
                    try {
                        ids[i] = words.encode(pieces[first + i]);
                    } catch (...) {
                        const std::lock_guard lock(failing);
                        failure = std::current_exception();
                    }
            };
            {
                std::vector<std::jthread> threads;
                for (std::size_t t = 1; t < options.threads; ++t)
                    threads.emplace_back(work);
                work();
            }
            if (failure)
                try {
                    std::rethrow_exception(failure);
                } catch (const kv1_lm::input_error& e) {
                    throw kv1_lm::input_error(file.string(), e.what());
                }
            for (const auto& part : ids) {
                writer.append(part);
                if (!part.empty())
                    last = part.back();
            }
            bar.show(first + n, std::to_string(writer.tokens()) + " tokens");
        }
        if (last != *end)
            writer.append(std::span(&*end, 1));
    }
    writer.finish();
    out << writer.tokens() << " tokens of " << bytes << " bytes in " << options.out.string() << '\n';
}

} // namespace kv1_train
