// SPDX-License-Identifier: Apache-2.0
//
// Run-time choice of the instruction set ("target") that kernels run on.
//
// By default the best target that the processor supports is used. The environment variable KV1_TARGET
// (scalar, baseline, sse41, avx2, avx_vnni, avx512, avx512_vnni, avx512_vbmi), read once at first use, or
// set_target() force another one, for tests, measurements and bug reports. A KV1_TARGET that is unknown or
// that this processor lacks makes the construction of a cache fail with errc::unsupported_target; free
// functions then run on the best target.
//
// Targets never change a stored byte: quantizing gives the same codes and metadata on every one.
#pragma once

#include <kv1/detail/config.hpp>
#include <kv1/status.hpp>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string_view>
#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

// One for all translation units of a program: a cache may be compiled in another one than its callers.
namespace kv1::KV1_KERNELS_ABI {
inline constexpr int no_target = -1;
inline std::atomic<int> target_in_use{no_target}; // the number of a target, once one was asked for
} // namespace kv1::KV1_KERNELS_ABI

namespace kv1::inline KV1_ABI {

/// An instruction set that kernels are compiled for.
enum class target : std::uint8_t {
    scalar,      ///< plain C++, the oracle of the tests
    baseline,    ///< what the translation unit was compiled for (SSE2 on plain x86-64, NEON on AArch64)
    sse41,       ///< SSSE3 and SSE4.1
    avx2,        ///< AVX2, FMA, F16C
    avx_vnni,    ///< the same with AVX-VNNI
    avx512,      ///< AVX-512 F, CD, VL, DQ, BW
    avx512_vnni, ///< the same with AVX-512 VNNI
    avx512_vbmi, ///< the same with AVX-512 VBMI
};

/// Every target, slowest first.
inline constexpr std::array all_targets{target::scalar,      target::baseline,   target::sse41,
                                        target::avx2,        target::avx_vnni,   target::avx512,
                                        target::avx512_vnni, target::avx512_vbmi};

/// The enumerator's name.
[[nodiscard]] constexpr std::string_view to_string(target t) noexcept {
    switch (t) {
    case target::scalar:
        return "scalar";
    case target::baseline:
        return "baseline";
    case target::sse41:
        return "sse41";
    case target::avx2:
        return "avx2";
    case target::avx_vnni:
        return "avx_vnni";
    case target::avx512:
        return "avx512";
    case target::avx512_vnni:
        return "avx512_vnni";
    case target::avx512_vbmi:
        return "avx512_vbmi";
    }
    return "unknown";
}

/// The target of that name, if there is one.
[[nodiscard]] constexpr std::optional<target> target_from_string(std::string_view name) noexcept {
    for (const target t : all_targets)
        if (to_string(t) == name)
            return t;
    return std::nullopt;
}

namespace detail {

// What the processor and the operating system support. Every feature a target's code may use is tested by
// itself: no level is inferred from a higher one, since hypervisors mask features one by one.
struct cpu_features {
    bool sse41 = false;
    bool avx2 = false;
    bool avx_vnni = false;
    bool avx512 = false;
    bool avx512_vnni = false;
    bool avx512_vbmi = false;
};

inline cpu_features detect_cpu() noexcept {
    cpu_features found;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(KV1_STATIC_DISPATCH)
    constexpr auto has = [](unsigned word, int bit) { return ((word >> bit) & 1u) != 0u; };
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0)
        return found;
    found.sse41 = has(c, 0) && has(c, 9) && has(c, 19); // SSE3 SSSE3 SSE4.1
    if (!has(c, 27))                                    // OSXSAVE: xgetbv may be executed
        return found;
    const bool level1 = has(c, 0) && has(c, 9) && has(c, 12) && has(c, 19) && has(c, 20) && has(c, 23) &&
                        has(c, 28) && has(c, 29); // SSE3 SSSE3 FMA SSE4.1 SSE4.2 POPCNT AVX F16C
    unsigned xcr0 = 0, xcr0_high = 0;
    __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(xcr0_high) : "c"(0));
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0)
        return found;
    found.avx2 = level1 && (xcr0 & 0x6u) == 0x6u && has(b, 3) && has(b, 5) && has(b, 8); // BMI AVX2 BMI2
    found.avx512 = found.avx2 && (xcr0 & 0xe6u) == 0xe6u && has(b, 16) && has(b, 17) && has(b, 28) &&
                   has(b, 30) && has(b, 31); // F DQ CD BW VL
    found.avx512_vnni = found.avx512 && has(c, 11);
    found.avx512_vbmi = found.avx512_vnni && has(c, 1);
    found.avx_vnni = found.avx2 && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && has(a, 4);
#endif
    return found;
}

inline const cpu_features& cpu() noexcept {
    static const cpu_features features = detect_cpu();
    return features;
}

struct environment_choice {
    std::optional<target> chosen;
    bool refused = false;
};

} // namespace detail

/// Whether the target is compiled in and this processor can run it.
[[nodiscard]] inline bool is_supported(target t) noexcept {
    switch (t) {
    case target::scalar:
    case target::baseline:
        return true;
    case target::sse41:
        return detail::cpu().sse41;
    case target::avx2:
        return detail::cpu().avx2;
    case target::avx_vnni:
        return detail::cpu().avx_vnni;
    case target::avx512:
        return detail::cpu().avx512;
    case target::avx512_vnni:
        return detail::cpu().avx512_vnni;
    case target::avx512_vbmi:
        return detail::cpu().avx512_vbmi;
    }
    return false;
}

/// The fastest supported target.
[[nodiscard]] inline target best_target() noexcept {
    target best = target::baseline;
    for (const target t : all_targets)
        if (is_supported(t) && t > best)
            best = t;
    return best;
}

namespace detail {

inline const environment_choice& environment_target() noexcept {
    static const environment_choice choice = [] {
        environment_choice c;
        if (const char* name = std::getenv("KV1_TARGET"); name != nullptr && *name != '\0') {
            c.chosen = target_from_string(name);
            c.refused = !c.chosen || !is_supported(*c.chosen);
        }
        return c;
    }();
    return choice;
}

inline target first_target() noexcept {
    const environment_choice& e = environment_target();
    int none = KV1_KERNELS_ABI::no_target;
    const int chosen = static_cast<int>(e.chosen && !e.refused ? *e.chosen : best_target());
    return KV1_KERNELS_ABI::target_in_use.compare_exchange_strong(none, chosen, std::memory_order_relaxed)
               ? static_cast<target>(chosen)
               : static_cast<target>(none); // that another thread has chosen meanwhile
}

} // namespace detail

/// The target that kernels run on now. Thread-safe.
[[nodiscard]] inline target current_target() noexcept {
    const int chosen = KV1_KERNELS_ABI::target_in_use.load(std::memory_order_relaxed);
    return chosen != KV1_KERNELS_ABI::no_target ? static_cast<target>(chosen) : detail::first_target();
}

/// Forces a target for calls that start from now on, in all threads.
inline status try_set_target(target t) noexcept {
    if (!is_supported(t))
        return {errc::unsupported_target, "the target is not compiled in or this processor lacks it"};
    KV1_KERNELS_ABI::target_in_use.store(static_cast<int>(t), std::memory_order_relaxed);
    return {};
}

#if KV1_EXCEPTIONS
/// Forces a target for calls that start from now on, in all threads. Throws kv1::error: unsupported_target if
/// this processor cannot run it or it is not compiled in.
inline void set_target(target t) { detail::throw_if_error(try_set_target(t)); }
#endif

} // namespace kv1::inline KV1_ABI
