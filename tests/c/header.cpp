// SPDX-License-Identifier: Apache-2.0
//
// kv1.h is a header of C++, too, of any standard and without the rest of kv1. This file is compiled only.
#include <kv1/kv1.h>

namespace {

kv1_code create(kv1_cache** cache, kv1_error* error) {
    kv1_encoding encoding;
    kv1_encoding_init(&encoding);
    encoding.levels = KV1_LEVELS_LEAST_SQUARES;
    kv1_layer layer;
    kv1_layer_init(&layer);
    layer.key_format = KV1_AFFINE2;
    layer.key_encoding = &encoding;
    kv1_cache_options options;
    kv1_cache_options_init(&options);
    options.layers = &layer;
    return kv1_cache_create(&options, cache, error);
}

kv1_code attend(const kv1_cache* cache, kv1_sequence sequence, const float* q, float* out) {
    kv1_attention options;
    kv1_attention_init(&options);
    options.mask.kind = KV1_MASK_NONE;
    return kv1_attend(cache, sequence, 0, kv1_contiguous(q, KV1_FP32, 1, 1, 32),
                      kv1_contiguous_output(out, KV1_FP32, 1, 1, 32), &options, nullptr, nullptr);
}

kv1_code save(const kv1_cache* cache, kv1_sequence sequence) {
    kv1_save_options options;
    kv1_save_options_init(&options);
    kv1_load_options load;
    kv1_load_options_init(&load);
    kv1_page_layout layout;
    kv1_page_layout_init(&layout);
    kv1_statistics statistics;
    kv1_statistics_init(&statistics);
    return kv1_save_file(cache, &sequence, 1, "x", &options, nullptr);
}

} // namespace

extern "C" kv1_code kv1_test_header();
extern "C" kv1_code kv1_test_header() {
    kv1_cache* cache = nullptr;
    const kv1_sequence sequence = {0, 0};
    float numbers[32] = {};
    if (create(&cache, nullptr) != KV1_OK || attend(cache, sequence, numbers, numbers) != KV1_OK)
        return KV1_INVALID_ARGUMENT;
    return save(cache, sequence);
}
