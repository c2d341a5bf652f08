// SPDX-License-Identifier: Apache-2.0
//
// One program of translation units with different -march flags and orders of inclusion. On a processor
// without AVX2 it also shows that the linker took none of kv1's functions from the -march=x86-64-v3 part for
// the others.
#include "check.hpp"
#include "part.hpp"

#include <cstdio>

int main([[maybe_unused]] int argc, char**) {
#if defined(KV1_ODR_HAS_V3)
    if (argc > 1 && !has_v3()) {
        std::puts("skipped: this processor cannot run what is linked first");
        return 77;
    }
#endif
    const outcome base = run_default(), before = run_xsimd_before(), after = run_xsimd_after();
    bool good = check(base.good && before.good && after.good, "a call failed");
    good &= check(before.out == base.out && after.out == base.out, "parts of one ISA differ");
    good &= check(before.bytes == base.bytes && after.bytes == base.bytes, "rows of one ISA differ");
    good &= check(before.abi == base.abi && after.abi == base.abi, "types of one ISA differ");
    good &= check(before.batch_bytes > 0 && before.batch_bytes == after.batch_bytes,
                  "the user's xsimd is not the same before and after kv1");
#if defined(KV1_ODR_HAS_V3)
    // the part is entered only where its every instruction can run
    if (has_v3()) {
        const outcome v3 = run_v3();
        good &= check(v3.good, "a call failed");
        good &= check(v3.bytes == base.bytes, "rows differ between ISAs");
        good &= check(near(v3.out, base.out), "outputs differ between ISAs");
        good &= check(v3.abi != base.abi, "translation units of two ISAs share types");
    } else {
        std::puts("the -march=x86-64-v3 part is linked but not run: this processor is older");
    }
#endif
    std::puts(good ? "ok" : "FAILED");
    return good ? 0 : 1;
}
