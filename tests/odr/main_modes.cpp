// SPDX-License-Identifier: Apache-2.0
//
// One program of translation units with exceptions and without, for two instruction sets, on kernels that
// were compiled once for all of them. Whatever is linked first, calls throw and catch where there are
// exceptions.
#include <kv1/kv1.hpp>

#include "check.hpp"
#include "failing_new.hpp"
#include "part.hpp"

#include <cstdio>

static_assert(KV1_EXCEPTIONS == 1);

namespace {

bool throws() {
    try {
        kv1::kv2_cache cache(kv1::uniform_cache(1, {1, 32, 32}, 64));
        static_cast<void>(cache.length(kv1::sequence_id{}));
    } catch (const kv1::error& e) {
        return e.code() == kv1::errc::invalid_sequence;
    }
    return false;
}

// Every allocation of create() in turn has no memory.
bool out_of_memory_is_a_status() {
    const kv1::cache_description shape = kv1::uniform_cache(3, {2, 32, 64}, 64);
    for (std::size_t n = 0; n < 1000; ++n) {
        bool failed = false;
        kv1::errc code = kv1::errc::ok;
        {
            const kv1_test::failing_new guard(n);
            code = kv1::kv2_cache::create(shape).code();
            failed = guard.failed();
        }
        if (code != (failed ? kv1::errc::out_of_memory : kv1::errc::ok))
            return false;
        if (!failed)
            return n > 0;
    }
    return false;
}

} // namespace

int main() {
    const outcome base = run_default(), without = run_no_exceptions();
    bool good = check(base.good && without.good, "a call failed");
    good &= check(without.out == base.out && without.bytes == base.bytes,
                  "parts with exceptions and without differ");
    good &= check(without.abi != base.abi, "parts with exceptions and without share types");
    good &= check(throws(), "a throwing call did not throw");
    good &= check(out_of_memory_is_a_status(), "exhausted memory is no status");
#if defined(KV1_ODR_HAS_V3)
    if (has_v3()) {
        const outcome v3 = run_v3();
        good &= check(v3.good, "a call failed");
        good &= check(v3.bytes == base.bytes, "rows differ between ISAs");
        good &= check(v3.out == base.out, "outputs differ between ISAs");
        good &= check(v3.abi != base.abi, "translation units of two ISAs share types");
    }
#endif
    std::puts(good ? "ok" : "FAILED");
    return good ? 0 : 1;
}
