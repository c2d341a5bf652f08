// SPDX-License-Identifier: Apache-2.0
//
// What an engine does that merely includes the header. Its object file is read by check_codegen.py.
#include <kv1/kv_cache.hpp>

// A cache knows its kernels from the start: a program that makes none compiles none.
kv1::result<kv1::kv2_cache> open(const kv1::cache_description& description);

kv1::result<kv1::kv2_cache> open(const kv1::cache_description& description) {
    return kv1::kv2_cache::create(description);
}

kv1::status serve(kv1::kv2_cache& cache, kv1::sequence_id id, const float* k, const float* v, const float* q,
                  float* out, std::size_t heads, std::size_t head_dim);

kv1::status serve(kv1::kv2_cache& cache, kv1::sequence_id id, const float* k, const float* v, const float* q,
                  float* out, std::size_t heads, std::size_t head_dim) {
    if (const kv1::status s = cache.try_append(id, 0, {k, 1, heads, head_dim}, {v, 1, heads, head_dim}); !s)
        return s;
    return cache.try_attend(id, 0, {q, 1, heads, head_dim}, {out, 1, heads, head_dim});
}
