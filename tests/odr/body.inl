// SPDX-License-Identifier: Apache-2.0
//
// The body of every part, in a namespace of the part; with or without exceptions.

inline outcome run() {
    constexpr std::size_t tokens = 70, head_dim = 48;
    std::vector<float> k, v, q;
    unsigned state = 1;
    const auto next = [&state] {
        state = state * 1664525u + 1013904223u;
        return static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
    };
    for (std::size_t i = 0; i < tokens * head_dim; ++i) {
        k.push_back(next());
        v.push_back(next());
    }
    for (std::size_t i = 0; i < 2 * head_dim; ++i)
        q.push_back(next());
    outcome o;
    auto made = kv1::kv2_cache::create(kv1::uniform_cache(1, {1, head_dim, head_dim}, tokens, 32));
    if (!made)
        return o;
    kv1::kv2_cache& cache = *made;
    const auto id = cache.try_create_sequence();
    o.out.resize(2 * head_dim);
    o.bytes.resize(tokens * 12);
    std::vector<kv1::float16> scales(tokens), minima(tokens);
    o.good = id &&
             cache.try_append(*id, 0, {k.data(), tokens, 1, head_dim}, {v.data(), tokens, 1, head_dim}) &&
             cache.try_attend(*id, 0, {q.data(), 1, 2, head_dim}, {o.out.data(), 1, 2, head_dim}) &&
             cache.try_export_rows(*id, 0, kv1::kv_side::value, 0, 0, tokens,
                                   {std::as_writable_bytes(std::span(o.bytes)), scales, minima}) &&
             cache.try_attend({}, 0, {q.data(), 1, 2, head_dim}, {o.out.data(), 1, 2, head_dim}).code() ==
                 kv1::errc::invalid_sequence;
    o.abi = typeid(kv1::kv2_cache).name();
    return o;
}
