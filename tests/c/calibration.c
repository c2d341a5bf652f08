/* SPDX-License-Identifier: Apache-2.0
 *
 * A calibration from C: taken from queries, keys and values, kept in memory and in a file, and made a cache of.
 */
#include "check.h"

#include <stdlib.h>

enum { layers = 2, kv_heads = 2, heads = 4, dim = 32, tokens = 60, outputs = 24, room = 1 << 17 };

static float q[tokens * heads * dim], k[tokens * kv_heads * dim], v[tokens * kv_heads * dim];
static float projection[outputs * heads * dim], out[heads * dim], other[heads * dim];
static unsigned char memory[room];
static const char* path = "kv1_c_calibration_test.kv1calib";
static kv1_error error;

typedef struct stream {
    size_t at, size;
} stream;

static int32_t write_some(void* context, const void* bytes, size_t size) {
    stream* to = (stream*)context;
    if (size > room - to->at)
        return 0;
    memcpy(memory + to->at, bytes, size);
    to->at += size;
    return 1;
}

static int32_t read_some(void* context, void* bytes, size_t size) {
    stream* from = (stream*)context;
    if (size > from->size - from->at)
        return 0;
    memcpy(bytes, memory + from->at, size);
    from->at += size;
    return 1;
}

static kv1_calibrator* begun(const kv1_cache_options* shape, const kv1_fingerprint* model) {
    kv1_calibrator_options options;
    kv1_calibrator* calibrator = NULL;
    kv1_calibrator_options_init(&options);
    options.policy = "c3+ls+basis+had+mean+ew,c2+ls+had+ew@4:8";
    options.model = model;
    CHECK(kv1_calibrator_create(shape, &options, &calibrator, &error) == KV1_OK);
    return calibrator;
}

static kv1_code add(kv1_calibrator* calibrator, size_t layer) {
    return kv1_calibrator_add(calibrator, layer, kv1_contiguous(q, KV1_FP32, tokens, heads, dim),
                              kv1_contiguous(k, KV1_FP32, tokens, kv_heads, dim),
                              kv1_contiguous(v, KV1_FP32, tokens, kv_heads, dim), 0, NULL, &error);
}

static kv1_calibration* calibrated(const kv1_cache_options* shape, const kv1_fingerprint* model) {
    kv1_calibrator* calibrator = begun(shape, model);
    kv1_calibration* calibration = NULL;
    size_t layer;
    CHECK(add(calibrator, 0) == KV1_INVALID_ARGUMENT && error.layer == 0); /* the projection comes first */
    for (layer = 0; layer < layers; ++layer) {
        CHECK(kv1_calibrator_set_output_projection(calibrator, layer,
                                                   kv1_contiguous(projection, KV1_FP32, outputs, heads, dim),
                                                   NULL, &error) == KV1_OK);
        CHECK(kv1_calibrator_finish(calibrator, NULL, &calibration, &error) == KV1_INVALID_ARGUMENT);
        CHECK(calibration == NULL && error.layer == (int64_t)layer);
        CHECK(add(calibrator, layer) == KV1_OK);
    }
    CHECK(add(calibrator, layers) == KV1_OUT_OF_RANGE);
    CHECK(kv1_calibrator_set_output_products(calibrator, 0, projection, 7, &error) == KV1_INVALID_ARGUMENT);
    CHECK(kv1_calibrator_finish(calibrator, NULL, &calibration, &error) == KV1_OK);
    kv1_calibrator_destroy(calibrator);
    return calibration;
}

/* What a cache of a calibration attends to. */
static void attend(const kv1_calibration* calibration, const kv1_cache_options* options, float* to) {
    kv1_cache* cache = NULL;
    kv1_sequence s;
    CHECK(kv1_cache_create_calibrated(calibration, options, &cache, &error) == KV1_OK);
    s = sequence_of(cache);
    CHECK(kv1_append(cache, s, 1, kv1_contiguous(k, KV1_FP32, tokens, kv_heads, dim),
                     kv1_contiguous(v, KV1_FP32, tokens, kv_heads, dim), NULL, &error) == KV1_OK);
    CHECK(kv1_attend(cache, s, 1, kv1_contiguous(q, KV1_FP32, 1, heads, dim),
                     kv1_contiguous_output(to, KV1_FP32, 1, heads, dim), NULL, NULL, &error) == KV1_OK);
    kv1_cache_destroy(cache);
}

static void kept(const kv1_calibration* calibration, const kv1_cache_options* options,
                 const kv1_fingerprint* model) {
    kv1_calibration* loaded = NULL;
    kv1_fingerprint another;
    stream bytes = {0, 0};
    kv1_sink sink;
    kv1_source source;
    char text[100];
    sink.write = write_some;
    sink.context = &bytes;
    source.read = read_some;
    source.rewind = NULL;
    source.context = &bytes;
    attend(calibration, options, out);

    CHECK(kv1_calibration_save(calibration, sink, &error) == KV1_OK);
    bytes.size = bytes.at;
    bytes.at = 0;
    CHECK(kv1_calibration_load(source, model, &loaded, &error) == KV1_OK);
    CHECK(bytes.at == bytes.size);
    attend(loaded, options, other);
    CHECK(memcmp(out, other, sizeof out) == 0);
    kv1_calibration_destroy(loaded);

    CHECK(kv1_calibration_save_file(calibration, path, &error) == KV1_OK);
    CHECK(kv1_calibration_load_file(path, model, &loaded, &error) == KV1_OK);
    attend(loaded, options, other);
    CHECK(memcmp(out, other, sizeof out) == 0);
    CHECK(kv1_calibration_policy(loaded, text, sizeof text) ==
          strlen("c3+ls+basis+had+mean+ew,c2+ls+had+ew@4:8"));
    CHECK(strcmp(text, "c3+ls+basis+had+mean+ew,c2+ls+had+ew@4:8") == 0);
    CHECK(kv1_calibration_set_policy(loaded, "c9", &error) == KV1_INVALID_ARGUMENT);
    CHECK(kv1_calibration_set_policy(loaded, "c4+ls+had", &error) == KV1_OK);
    attend(loaded, options, other);
    CHECK(memcmp(out, other, sizeof out) != 0);
    kv1_calibration_destroy(loaded);

    CHECK(kv1_fingerprint_of("another", 7, NULL, &another) == KV1_OK);
    CHECK(kv1_calibration_load_file(path, &another, &loaded, &error) == KV1_DIFFERENT_MODEL &&
          loaded == NULL);
    CHECK(kv1_calibration_load_file("there/is/none", model, &loaded, &error) == KV1_IO_ERROR);
    bytes.at = 0;
    bytes.size -= 5;
    CHECK(kv1_calibration_load(source, model, &loaded, &error) == KV1_TRUNCATED);
    remove(path);
}

static void refusals(const kv1_calibration* calibration, const kv1_rotary* slower) {
    kv1_layer wide = layer_of(kv_heads, dim, KV1_AFFINE2);
    kv1_cache_options shape;
    kv1_cache* cache = NULL;
    wide.value_dim = 2 * dim;
    shape = options_for(&wide, layers, 64, 16);
    CHECK(kv1_cache_create_calibrated(calibration, &shape, &cache, &error) == KV1_DIFFERENT_CACHE);
    CHECK(cache == NULL && error.layer == 0 && strstr(error.rule, "values") != NULL);
    wide = layer_of(kv_heads, dim, KV1_AFFINE2);
    wide.rotary = slower;
    CHECK(kv1_cache_create_calibrated(calibration, &shape, &cache, &error) == KV1_DIFFERENT_CACHE);
    CHECK(strstr(error.rule, "turn") != NULL);
    shape.layer_count = 3;
    CHECK(kv1_cache_create_calibrated(calibration, &shape, &cache, &error) == KV1_DIFFERENT_CACHE);
    CHECK(kv1_cache_create_calibrated(NULL, &shape, &cache, &error) == KV1_INVALID_ARGUMENT);
    CHECK(kv1_calibration_save_file(NULL, path, NULL) == KV1_INVALID_ARGUMENT);
    CHECK(kv1_calibration_policy(NULL, NULL, 0) == 0);
    kv1_calibrator_destroy(NULL);
    kv1_calibration_destroy(NULL);
}

/* The second layer gains more by wider codes. */
static void choice(const kv1_cache_options* shape) {
    kv1_layer_option ways[4] = {
        {0, "c2+ls@4:8", 0.3}, {0, "c4+ls@4:8", 0.2}, {1, "c2+ls@4:8", 0.5}, {1, "c4+ls@4:8", 0.1}};
    const double narrow = 2 * kv_heads * (dim / 4 + 2),
                 wide = 2 * kv_heads * (dim / 2 + 2); /* bytes of a layer */
    char text[64], little[5];
    size_t length = 9;
    CHECK(kv1_choose_layers(shape, ways, 4, narrow + wide, text, sizeof text, &length, &error) == KV1_OK);
    CHECK(strcmp(text, "c2+ls,c2+ls/1:c4+ls,c4+ls@4:8") == 0 && length == strlen(text));
    CHECK(kv1_choose_layers(shape, ways, 4, 2 * wide, little, sizeof little, &length, &error) == KV1_OK);
    CHECK(strcmp(little, "c4+l") == 0 && length == strlen("c4+ls,c4+ls@4:8"));
    CHECK(kv1_choose_layers(shape, ways, 4, 2 * narrow, NULL, 0, &length, &error) == KV1_OK);
    CHECK(length == strlen("c2+ls,c2+ls@4:8"));
    CHECK(kv1_choose_layers(shape, ways, 4, 2 * narrow - 1, text, sizeof text, &length, &error) ==
          KV1_INVALID_ARGUMENT);
    CHECK(length == 0 && strstr(error.rule, "budget") != NULL);
    CHECK(kv1_choose_layers(shape, ways, 2, 2 * wide, text, sizeof text, &length, &error) ==
          KV1_INVALID_ARGUMENT);
    CHECK(error.layer == 1);
    ways[3].policy = "c4+ls@4:16";
    CHECK(kv1_choose_layers(shape, ways, 4, 2 * wide, text, sizeof text, &length, &error) ==
          KV1_INVALID_ARGUMENT);
    CHECK(error.layer == 1 && strstr(error.rule, "fp16") != NULL);
    ways[3].policy = "c4+ls/0:c2+ls@4:8";
    CHECK(kv1_choose_layers(shape, ways, 4, 2 * wide, text, sizeof text, &length, &error) ==
          KV1_INVALID_ARGUMENT);
    ways[3].policy = "c9";
    CHECK(kv1_choose_layers(shape, ways, 4, 2 * wide, text, sizeof text, &length, &error) ==
          KV1_INVALID_ARGUMENT);
    ways[3].policy = NULL;
    CHECK(kv1_choose_layers(shape, ways, 4, 2 * wide, text, sizeof text, &length, &error) ==
          KV1_INVALID_ARGUMENT);
    ways[3].layer = layers;
    ways[3].policy = "c4+ls@4:8";
    CHECK(kv1_choose_layers(shape, ways, 4, 2 * wide, text, sizeof text, &length, &error) ==
          KV1_OUT_OF_RANGE);
    CHECK(kv1_choose_layers(NULL, ways, 4, 2 * wide, text, sizeof text, &length, NULL) ==
          KV1_INVALID_ARGUMENT);
}

int main(void) {
    kv1_layer layer = layer_of(kv_heads, dim, KV1_AFFINE2);
    const kv1_cache_options options = options_for(&layer, layers, 64, 16);
    float frequencies[dim / 2];
    kv1_rotary rotary;
    kv1_fingerprint model;
    kv1_calibration* calibration;
    kv1_rotary_frequencies(10000.0, dim, frequencies);
    kv1_rotary_init(&rotary);
    rotary.frequencies = frequencies;
    rotary.pair_count = dim / 2;
    layer.rotary = &rotary;
    fill(q, tokens * heads * dim);
    fill(k, tokens * kv_heads * dim);
    fill(v, tokens * kv_heads * dim);
    fill(projection, outputs * heads * dim);
    CHECK(kv1_fingerprint_of("a model", 7, NULL, &model) == KV1_OK);
    calibration = calibrated(&options, &model);
    kept(calibration, &options, &model);
    choice(&options);
    frequencies[1] *= 0.5f;
    refusals(calibration, &rotary);
    kv1_calibration_destroy(calibration);
    return report();
}
