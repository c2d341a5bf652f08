/* SPDX-License-Identifier: Apache-2.0
 *
 * What is stored, as it is stored: rows that go out and come back, block tables, and codes that an engine
 * finds in a page by its layout.
 */
#include "check.h"

#include <math.h>

enum { dim = 48, tokens = 40, page = 16 };

static float x[tokens * dim], decoded[tokens * dim], again[tokens * dim];
static unsigned char packed[2][tokens * dim * 4];
static uint16_t scales[2][tokens], minima[2][tokens];
static kv1_error error;

/* Of numbers that are neither infinite nor subnormal. */
static double from_half(uint16_t bits) {
    const int exponent = (bits >> 10) & 31;
    const double value = exponent == 0 ? 0.0 : ldexp(1024 + (bits & 1023), exponent - 25);
    return (bits & 0x8000) != 0 ? -value : value;
}

static uint16_t half_at(const unsigned char* bytes, size_t offset) {
    return (uint16_t)(bytes[offset] | bytes[offset + 1] << 8);
}

static kv1_rows rows_of(int side) {
    kv1_rows r;
    r.packed = packed[side];
    r.scales = scales[side];
    r.minima = minima[side];
    return r;
}

static kv1_const_rows const_rows_of(int side) {
    kv1_const_rows r;
    r.packed = packed[side];
    r.scales = scales[side];
    r.minima = minima[side];
    return r;
}

static kv1_code append(kv1_cache* cache, kv1_sequence s, size_t n) {
    const kv1_tensor tensor = kv1_contiguous(x, KV1_FP32, n, 1, dim);
    return kv1_append(cache, s, 0, tensor, tensor, NULL, &error);
}

static void rows(kv1_format format) {
    const kv1_layer layer = layer_of(1, dim, format);
    const kv1_cache_options options = options_for(&layer, 1, 128, page);
    kv1_cache* cache = made(&options);
    const kv1_sequence s = sequence_of(cache), copy = sequence_of(cache);
    kv1_statistics statistics;
    kv1_const_rows none = {NULL, NULL, NULL};
    size_t n = 0;
    CHECK(append(cache, s, tokens) == KV1_OK);
    kv1_statistics_init(&statistics);
    CHECK(kv1_cache_statistics(cache, &statistics, &error) == KV1_OK);
    CHECK(statistics.bytes_stored == 2 * tokens * kv1_row_bytes(format, dim, 0));
    CHECK(kv1_packed_bytes(format, dim) <= kv1_row_bytes(format, dim, 0));
    CHECK(kv1_export_rows(cache, s, 0, KV1_KEYS, 0, 0, tokens, rows_of(0), &error) == KV1_OK);
    CHECK(kv1_export_rows(cache, s, 0, KV1_VALUES, 0, 0, tokens, rows_of(1), &error) == KV1_OK);
    CHECK(kv1_append_rows(cache, copy, 0, tokens, none, none, &error) == KV1_INVALID_ARGUMENT);
    CHECK(kv1_append_rows(cache, copy, 0, tokens, const_rows_of(0), const_rows_of(1), &error) == KV1_OK);
    CHECK(kv1_length(cache, copy, 0, &n, &error) == KV1_OK && n == tokens);
    CHECK(kv1_read(cache, s, 0, KV1_KEYS, 0, 0, tokens, decoded, &error) == KV1_OK);
    CHECK(kv1_read(cache, copy, 0, KV1_KEYS, 0, 0, tokens, again, &error) == KV1_OK);
    CHECK(memcmp(decoded, again, sizeof decoded) == 0);
    CHECK(kv1_read(cache, copy, 0, KV1_VALUES, 0, 0, tokens, again, &error) == KV1_OK);
    CHECK(memcmp(decoded, again, sizeof decoded) == 0);
    CHECK(kv1_export_rows(cache, s, 0, KV1_KEYS, 0, 30, 11, rows_of(0), &error) == KV1_OUT_OF_RANGE);
    CHECK(kv1_export_rows(cache, s, 0, KV1_KEYS, 1, 0, 1, rows_of(0), &error) == KV1_OUT_OF_RANGE);
    CHECK(kv1_export_rows(cache, s, 1, KV1_KEYS, 0, 0, 1, rows_of(0), &error) == KV1_OUT_OF_RANGE);
    CHECK(kv1_export_rows(cache, s, 0, 7, 0, 0, 1, rows_of(0), &error) == KV1_INVALID_ARGUMENT);
    CHECK(kv1_append_rows(cache, copy, 0, SIZE_MAX, const_rows_of(0), const_rows_of(1), &error) != KV1_OK);
    kv1_cache_destroy(cache);
}

/* Values that are part of the keys have no rows of their own. */
static void rows_of_latents(void) {
    kv1_layer layer = layer_of(1, dim, KV1_AFFINE2);
    kv1_cache_options options;
    kv1_cache* cache;
    kv1_sequence s, copy;
    kv1_page_layout layout;
    const kv1_const_rows none = {NULL, NULL, NULL};
    layer.value_dim = 32;
    layer.values_in_keys = 1;
    options = options_for(&layer, 1, 128, page);
    cache = made(&options);
    s = sequence_of(cache);
    copy = sequence_of(cache);
    CHECK(kv1_append(cache, s, 0, kv1_contiguous(x, KV1_FP32, tokens, 1, dim), kv1_no_values(), NULL,
                     &error) == KV1_OK);
    CHECK(kv1_export_rows(cache, s, 0, KV1_KEYS, 0, 0, tokens, rows_of(0), &error) == KV1_OK);
    CHECK(kv1_append_rows(cache, copy, 0, tokens, const_rows_of(0), const_rows_of(1), &error) ==
          KV1_INVALID_ARGUMENT);
    CHECK(kv1_append_rows(cache, copy, 0, tokens, const_rows_of(0), none, &error) == KV1_OK);
    CHECK(kv1_read(cache, s, 0, KV1_KEYS, 0, 0, tokens, decoded, &error) == KV1_OK);
    CHECK(kv1_read(cache, copy, 0, KV1_KEYS, 0, 0, tokens, again, &error) == KV1_OK);
    CHECK(memcmp(decoded, again, sizeof decoded) == 0);
    kv1_page_layout_init(&layout);
    CHECK(kv1_cache_layout(cache, 0, &layout, &error) == KV1_OK && layout.values_in_keys == 1);
    CHECK(layout.keys.channels == dim && layout.values.channels == 32);
    kv1_cache_destroy(cache);
}

/* A key's two-bit codes, out of the page that a block table names: lane = token, the lane's bits = 16
 * channels. */
static void walk(const kv1_cache* cache, const kv1_page_layout* layout, const int32_t* blocks, size_t last) {
    size_t t, c, bytes = 0;
    const void* begin = NULL;
    for (t = 0; t < last; ++t) {
        const unsigned char* at;
        const size_t in_page = t % page;
        double scale, minimum;
        CHECK(kv1_page(cache, 0, 0, (uint32_t)blocks[t / page], &begin, &bytes, &error) == KV1_OK);
        CHECK(bytes == layout->bytes);
        at = (const unsigned char*)begin;
        scale = from_half(half_at(at, layout->keys.scale_offset + 2 * in_page));
        minimum = from_half(half_at(at, layout->keys.minimum_offset + 2 * in_page));
        for (c = 0; c < dim; ++c) {
            const size_t line = in_page / 16 * layout->keys.unit_lines + c / 16;
            const size_t byte = layout->keys.offset + line * 64 + in_page % 16 * 4 + c % 16 / 4;
            const int code = at[byte] >> (2 * (c % 4)) & 3;
            CHECK(fabs(scale * code + minimum - (double)decoded[t * dim + c]) < 1e-6);
        }
    }
}

static void pages(void) {
    const kv1_layer layer = layer_of(1, dim, KV1_AFFINE2);
    const kv1_cache_options options = options_for(&layer, 1, 128, page);
    kv1_cache* cache = made(&options);
    const kv1_sequence both[2] = {sequence_of(cache), sequence_of(cache)};
    kv1_page_layout layout;
    kv1_block_tables tables;
    int32_t indptr[3], indices[8], last_page_tokens[2];
    const void* begin = NULL;
    size_t blocks = 0, bytes = 0;
    CHECK(append(cache, both[0], tokens) == KV1_OK && append(cache, both[1], 32) == KV1_OK);
    kv1_page_layout_init(&layout);
    CHECK(kv1_cache_layout(cache, 0, &layout, &error) == KV1_OK);
    CHECK(layout.page_tokens == page && layout.keys.format == KV1_AFFINE2 && layout.keys.channels == dim);
    CHECK(layout.bytes >= 2 * page * kv1_row_bytes(KV1_AFFINE2, dim, 0) && layout.bytes % 64 == 0);
    CHECK(kv1_cache_layout(cache, 1, &layout, &error) == KV1_OUT_OF_RANGE && error.layer == 1);

    CHECK(kv1_count_blocks(cache, both, 2, 0, &blocks, &error) == KV1_OK && blocks == 5);
    tables.indptr = indptr;
    tables.indices = indices;
    tables.index_capacity = 4;
    tables.last_page_tokens = last_page_tokens;
    CHECK(kv1_export_block_tables(cache, both, 2, 0, tables, &blocks, &error) == KV1_SHAPE_MISMATCH);
    tables.index_capacity = 8;
    CHECK(kv1_export_block_tables(cache, both, 2, 0, tables, &blocks, &error) == KV1_OK && blocks == 5);
    CHECK(indptr[0] == 0 && indptr[1] == 3 && indptr[2] == 5);
    CHECK(last_page_tokens[0] == tokens - 2 * page && last_page_tokens[1] == page);
    CHECK(kv1_read(cache, both[0], 0, KV1_KEYS, 0, 0, tokens, decoded, &error) == KV1_OK);
    walk(cache, &layout, indices, tokens);

    CHECK(kv1_drop_pages(cache, both[0], 1, 1, &error) == KV1_OK);
    CHECK(kv1_count_blocks(cache, both, 2, 0, &blocks, &error) == KV1_OK && blocks == 4);
    CHECK(kv1_page(cache, 0, 0, 1000, &begin, &bytes, &error) == KV1_OUT_OF_RANGE && begin == NULL);
    CHECK(kv1_open_keys(cache, both[0], 0, 0, &begin, &bytes, &error) == KV1_OUT_OF_RANGE);
    kv1_cache_destroy(cache);
}

/* Keys per channel have no rows; those of the open page lie in fp16. */
static void open_keys(void) {
    kv1_layer layer = layer_of(1, dim, KV1_AFFINE2);
    kv1_cache_options options;
    kv1_cache* cache;
    kv1_sequence s;
    kv1_page_layout layout;
    const void* begin = NULL;
    size_t bytes = 0, c;
    layer.key_axis = KV1_PER_CHANNEL;
    options = options_for(&layer, 1, 128, page);
    cache = made(&options);
    s = sequence_of(cache);
    CHECK(append(cache, s, 20) == KV1_OK);
    CHECK(kv1_export_rows(cache, s, 0, KV1_KEYS, 0, 0, 1, rows_of(0), &error) == KV1_INVALID_ARGUMENT);
    kv1_page_layout_init(&layout);
    CHECK(kv1_cache_layout(cache, 0, &layout, &error) == KV1_OK && layout.keys.axis == KV1_PER_CHANNEL);
    CHECK(kv1_open_keys(cache, s, 0, 0, &begin, &bytes, &error) == KV1_OK && bytes == 2 * page * dim);
    for (c = 0; c < dim && begin != NULL; ++c) /* two channels a lane, of the page's token 3 */
        CHECK(fabs(from_half(half_at((const unsigned char*)begin, c / 2 * 64 + 3 * 4 + c % 2 * 2)) -
                   (double)x[19 * dim + c]) <= 0x1p-11);
    kv1_cache_destroy(cache);
}

int main(void) {
    int format;
    fill(x, tokens * dim);
    CHECK(formats() > KV1_CODEBOOK2);
    for (format = 0; format < formats(); ++format)
        rows((kv1_format)format);
    rows_of_latents();
    CHECK(strcmp(kv1_format_name(KV1_AFFINE2), "affine2") == 0);
    CHECK(kv1_row_bytes(KV1_AFFINE2, 128, 0) == 36 && kv1_row_bytes(KV1_AFFINE2, 128, 32) == 48);
    CHECK(kv1_row_bytes(KV1_AFFINE2, 128, 48) == 0);
    pages();
    open_keys();
    return report();
}
