// SPDX-License-Identifier: Apache-2.0
//
// A model of the Llama family in a GGUF file, as the folder that Transformers would save of it: config.json,
// model.safetensors, tokenizer.json, tokenizer_config.json.
#pragma once

#include "float_tensors.hpp"
#include "gguf.hpp"
#include "json_file.hpp"

#include <cstddef>
#include <filesystem>
#include <iosfwd>
#include <string>
#include <vector>

namespace kv1_lm {

/// The members of config.json. Throws input_error for an architecture or an option that kv1's examples do not
/// run: architectures are llama, qwen2 and qwen3.
[[nodiscard]] json config_of(const gguf& file);

/// A byte-level BPE's tokenizer.json; llama.cpp's names for the ways to cut words are smollm, gpt-2, llama-bpe
/// and qwen2. Throws input_error for another tokenizer.
[[nodiscard]] json tokenizer_of(const gguf& file);

/// The weights in fp32, by Transformers' names: quantized ones are decoded exactly. GGUF stores the rows of llama's
/// projections of queries and keys in the order that interleaved RoPE wants; here they are in Transformers' order,
/// for half-split RoPE. Throws input_error for tensors that are no such model's.
[[nodiscard]] std::vector<float_tensor> weights_of(const gguf& file);

struct convert_options {
    std::filesystem::path gguf; ///< the file
    std::filesystem::path out;  ///< folder to make; it may exist, but hold none of the files
};

/// `kv1-lm convert`: writes the folder. Throws input_error.
void convert(const convert_options& options, std::ostream& out);

} // namespace kv1_lm
