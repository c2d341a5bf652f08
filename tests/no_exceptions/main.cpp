// SPDX-License-Identifier: Apache-2.0
//
// Compiled with -fno-exceptions: the whole life of a cache through the try_ forms. operator new that has no
// memory would end this program, so it counts plain forms and lets the ones that may fail, fail.
#include <kv1/cache_file.hpp>
#include <kv1/kv1.hpp>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <numeric>
#include <vector>

static_assert(KV1_EXCEPTIONS == 0);

namespace {

std::size_t allowed = static_cast<std::size_t>(-1); // allocations of the forms that may fail
bool refused = false;

} // namespace

void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
    if (allowed == 0) {
        refused = true;
        return nullptr;
    }
    allowed -= allowed == static_cast<std::size_t>(-1) ? 0 : 1;
    return std::malloc(size == 0 ? 1 : size);
}
void* operator new[](std::size_t size, const std::nothrow_t& tag) noexcept { return operator new(size, tag); }
void* operator new(std::size_t size) {
    void* p = std::malloc(size == 0 ? 1 : size);
    if (p == nullptr)
        std::abort();
    return p;
}
void* operator new[](std::size_t size) { return operator new(size); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, const std::nothrow_t&) noexcept { std::free(p); }
void operator delete[](void* p, const std::nothrow_t&) noexcept { std::free(p); }

namespace {

int failures = 0;
void expect(bool holds, const char* what) {
    if (!holds) {
        std::fprintf(stderr, "%s\n", what);
        ++failures;
    }
}

// call() at its first, second, ... failing allocation gives out_of_memory, and then ok.
template <class Call>
void fails_cleanly(const char* what, const kv1::kv_cache& cache, Call&& call) {
    for (std::size_t n = 0; n < 100; ++n) {
        allowed = n;
        refused = false;
        const kv1::errc code = call();
        const bool failed = refused;
        allowed = static_cast<std::size_t>(-1);
        expect(code == (failed ? kv1::errc::out_of_memory : kv1::errc::ok), what);
        expect(static_cast<bool>(cache.try_validate()), what);
        if (!failed)
            return;
    }
    expect(false, what);
}

} // namespace

int main() {
    kv1::cache_description d = kv1::uniform_cache(2, {1, 16, 16}, 256, 16);
    auto made = kv1::kv_cache::create(d);
    expect(static_cast<bool>(made), "create");
    if (!made)
        return 1;
    kv1::kv_cache& cache = *made;
    const std::vector<float> x(80 * 16, 0.5f);
    std::array<float, 16> out{};
    kv1::sequence_id id, twin;
    fails_cleanly("create a sequence", cache, [&] {
        const auto r = cache.try_create_sequence();
        if (r)
            id = *r;
        return r.code();
    });
    for (const std::size_t layer : {0u, 1u})
        fails_cleanly("append", cache, [&] {
            return cache.try_append(id, layer, {x.data(), 40, 1, 16}, {x.data(), 40, 1, 16}).code();
        });
    fails_cleanly("fork", cache, [&] {
        const auto r = cache.try_fork(id);
        if (r)
            twin = *r;
        return r.code();
    });
    expect(static_cast<bool>(cache.try_attend(twin, 1, {x.data(), 1, 1, 16}, {out.data(), 1, 1, 16})),
           "attend");
    std::vector<std::int32_t> tokens(40);
    std::iota(tokens.begin(), tokens.end(), 0);
    fails_cleanly("store", cache, [&] { return cache.try_store_prefix(id, tokens).code(); });
    fails_cleanly("drop", cache, [&] { return cache.try_drop_pages(twin, 0, 1).code(); });
    expect(cache.try_truncate(twin, 41).code() == kv1::errc::out_of_range, "truncate too far");
    expect(static_cast<bool>(cache.try_truncate(twin, 33)), "truncate");
    std::vector<std::byte> memory(1 << 16);
    fails_cleanly("swap out", cache, [&] { return kv1::try_swap_out(cache, twin, memory).code(); });
    expect(cache.try_length(twin).code() == kv1::errc::invalid_sequence, "a stale handle");
    fails_cleanly("swap in", cache, [&] { return kv1::try_swap_in(cache, memory).code(); });
    memory[70] ^= std::byte{1};
    expect(kv1::try_swap_in(cache, memory).code() == kv1::errc::checksum_mismatch, "a flipped bit");
    expect(cache.try_append(id, 0, {x.data(), 80, 1, 16}, {x.data(), 80, 1, 16}).code() == kv1::errc::ok,
           "append");
    for (int i = 0; i < 3; ++i)
        expect(cache.try_append(id, 0, {x.data(), 80, 1, 16}, {x.data(), 80, 1, 16}).code() ==
                   (i == 0 ? kv1::errc::ok : kv1::errc::capacity_exceeded),
               "a full pool");
    std::puts(failures == 0 ? "every failure was a status" : "failed");
    return failures == 0 ? 0 : 1;
}
