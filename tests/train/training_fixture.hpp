// SPDX-License-Identifier: Apache-2.0
//
// A model folder small enough to train in a test, a text to learn by heart, and kv1-train's command line.
#pragma once

#include "temporary_folder.hpp"
#include "tiny_tokenizer.hpp"

#include "train_cli.hpp"

#include <catch2/catch_test_macros.hpp>

#include <filesystem>
#include <sstream>
#include <string>
#include <vector>

namespace kv1_test {

struct train_result {
    int code = 0;
    std::string out, err;
};

inline train_result run_kv1_train(const std::vector<std::string>& arguments) {
    std::vector<const char*> argv{"kv1-train"};
    for (const std::string& a : arguments)
        argv.push_back(a.c_str());
    std::ostringstream out, err;
    const int code = kv1_train::run(static_cast<int>(argv.size()), argv.data(), out, err);
    return {code, out.str(), err.str()};
}

/// Folders: model/ (config and tokenizer, no weights), text.txt, tokens/ (the text, packed).
class training_fixture {
public:
    training_fixture() {
        std::filesystem::create_directory(path() / "model");
        folder_.write("model/config.json", R"({"model_type": "banana_kv1", "vocab_size": 288,
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "tie_word_embeddings": true, "eos_token_id": 0})");
        folder_.write("model/tokenizer.json", tiny_tokenizer().dump());
        folder_.write("text.txt", text());
        const train_result packed =
            run_kv1_train({"pack", "--text", file("text.txt"), "--tokenizer", file("model"), "--out",
                           file("tokens"), "--document-end", "<|end|>", "--threads", "2"});
        INFO(packed.err);
        REQUIRE(packed.code == 0);
    }

    /// A few kilobytes: one paragraph, over and over.
    static std::string text() {
        std::string all;
        for (int i = 0; i < 12; ++i)
            all += "The cat sat on the mat, and the dog lay by the door. Rain fell on the old tin roof all "
                   "night long, while the clock on the wall told every hour. In the morning the sun came "
                   "out, the cat went to the garden, and the dog ran to the river to drink.\n";
        return all;
    }

    [[nodiscard]] const std::filesystem::path& path() const noexcept { return folder_.path(); }
    [[nodiscard]] std::string file(const std::string& name) const { return (path() / name).string(); }

    /// The common part of a run's arguments.
    [[nodiscard]] std::vector<std::string> train(const std::string& out,
                                                 const std::vector<std::string>& more = {}) const {
        std::vector<std::string> all{"train",
                                     "--data",
                                     file("tokens"),
                                     "--model",
                                     file("model"),
                                     "--out",
                                     file(out),
                                     "--device",
                                     "cpu",
                                     "--length",
                                     "64",
                                     "--batch",
                                     "8",
                                     "--lr",
                                     "3e-3",
                                     "--warmup",
                                     "5",
                                     "--held-out",
                                     "130",
                                     "--validation-batches",
                                     "1",
                                     "--seed",
                                     "7"};
        all.insert(all.end(), more.begin(), more.end());
        return all;
    }

private:
    temporary_folder folder_;
};

} // namespace kv1_test
