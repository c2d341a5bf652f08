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
#include <kv1/detail/target_features.hpp>
#include <kv1/status.hpp>

#include <array>
#include <atomic>
#include <cstddef>
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

namespace detail {

// Where the answers of CPUID lie: leaf 1 in ecx, leaf 7 in ebx and ecx, its subleaf 1 in eax.
enum class cpuid_word : std::uint8_t { leaf_1_ecx, leaf_7_ebx, leaf_7_ecx, leaf_7_1_eax };

// Registers that the operating system must save for a feature, as bits of XCR0.
enum class register_state : std::uint8_t { any = 0, ymm = 0x6, zmm = 0xe6 };

struct cpu_feature {
    std::string_view name; // the compilers'
    cpuid_word word;
    int bit;
    register_state state = register_state::any;
};

// All that the lists in target_features.hpp name.
inline constexpr std::array cpu_features{
    cpu_feature{"sse3", cpuid_word::leaf_1_ecx, 0},
    cpu_feature{"ssse3", cpuid_word::leaf_1_ecx, 9},
    cpu_feature{"sse4.1", cpuid_word::leaf_1_ecx, 19},
    cpu_feature{"sse4.2", cpuid_word::leaf_1_ecx, 20},
    cpu_feature{"popcnt", cpuid_word::leaf_1_ecx, 23},
    cpu_feature{"avx", cpuid_word::leaf_1_ecx, 28, register_state::ymm},
    cpu_feature{"fma", cpuid_word::leaf_1_ecx, 12, register_state::ymm},
    cpu_feature{"f16c", cpuid_word::leaf_1_ecx, 29, register_state::ymm},
    cpu_feature{"bmi", cpuid_word::leaf_7_ebx, 3},
    cpu_feature{"avx2", cpuid_word::leaf_7_ebx, 5, register_state::ymm},
    cpu_feature{"bmi2", cpuid_word::leaf_7_ebx, 8},
    cpu_feature{"avxvnni", cpuid_word::leaf_7_1_eax, 4, register_state::ymm},
    cpu_feature{"avx512f", cpuid_word::leaf_7_ebx, 16, register_state::zmm},
    cpu_feature{"avx512dq", cpuid_word::leaf_7_ebx, 17, register_state::zmm},
    cpu_feature{"avx512cd", cpuid_word::leaf_7_ebx, 28, register_state::zmm},
    cpu_feature{"avx512bw", cpuid_word::leaf_7_ebx, 30, register_state::zmm},
    cpu_feature{"avx512vl", cpuid_word::leaf_7_ebx, 31, register_state::zmm},
    cpu_feature{"avx512vbmi", cpuid_word::leaf_7_ecx, 1, register_state::zmm},
    cpu_feature{"avx512vnni", cpuid_word::leaf_7_ecx, 11, register_state::zmm},
};

// A bit for each of cpu_features.
using feature_set = std::uint32_t;
static_assert(cpu_features.size() <= 32);

void list_names_a_feature_that_cpu_features_lacks(); // never defined: calling it is no constant

consteval feature_set features_in(std::string_view list) {
    feature_set found = 0;
    while (!list.empty()) {
        const std::string_view name = list.substr(0, list.find(','));
        list.remove_prefix(name.size() < list.size() ? name.size() + 1 : name.size());
        std::size_t place = 0;
        while (place < cpu_features.size() && cpu_features[place].name != name)
            ++place;
        if (place == cpu_features.size())
            list_names_a_feature_that_cpu_features_lacks();
        found |= feature_set{1} << place;
    }
    return found;
}

struct target_traits {
    target id;
    std::string_view name; // the enumerator's
    feature_set needs;     // none: the target is compiled in everywhere
};

// The one table of targets, in the enumeration's order.
inline constexpr std::array target_table{
    target_traits{target::scalar, "scalar", 0},
    target_traits{target::baseline, "baseline", 0},
    target_traits{target::sse41, "sse41", features_in(KV1_FEATURES_SSE41)},
    target_traits{target::avx2, "avx2", features_in(KV1_FEATURES_AVX2)},
    target_traits{target::avx_vnni, "avx_vnni", features_in(KV1_FEATURES_AVX_VNNI)},
    target_traits{target::avx512, "avx512", features_in(KV1_FEATURES_AVX512)},
    target_traits{target::avx512_vnni, "avx512_vnni", features_in(KV1_FEATURES_AVX512_VNNI)},
    target_traits{target::avx512_vbmi, "avx512_vbmi", features_in(KV1_FEATURES_AVX512_VBMI)},
};

void rows_are_not_in_the_order_of_enumerators(); // never defined, like the other

consteval auto targets_of_table() {
    std::array<target, target_table.size()> ids{};
    for (std::size_t i = 0; i < ids.size(); ++i) {
        ids[i] = target_table[i].id;
        if (static_cast<std::size_t>(ids[i]) != i)
            rows_are_not_in_the_order_of_enumerators();
    }
    return ids;
}

// Null for a number that is no enumerator.
constexpr const target_traits* traits_of(target t) noexcept {
    const auto place = static_cast<std::size_t>(t);
    return place < target_table.size() ? &target_table[place] : nullptr;
}

} // namespace detail

/// Every target, slowest first.
inline constexpr std::array all_targets = detail::targets_of_table();

/// The enumerator's name.
[[nodiscard]] constexpr std::string_view to_string(target t) noexcept {
    const detail::target_traits* traits = detail::traits_of(t);
    return traits != nullptr ? traits->name : "unknown";
}

/// The target of that name, if there is one.
[[nodiscard]] constexpr std::optional<target> target_from_string(std::string_view name) noexcept {
    for (const target t : all_targets)
        if (to_string(t) == name)
            return t;
    return std::nullopt;
}

namespace detail {

// What the processor and the operating system support, if the kernels for it are compiled in. Every feature is
// tested by itself: none is inferred from another, since hypervisors mask features one by one.
inline feature_set detect_features() noexcept {
    feature_set found = 0;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(KV1_STATIC_DISPATCH)
    std::array<unsigned, 4> words{}; // by cpuid_word
    unsigned a = 0, b = 0, c = 0, d = 0, subleaves = 0;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0)
        return found;
    words[static_cast<std::size_t>(cpuid_word::leaf_1_ecx)] = c;
    unsigned saved = 0, saved_high = 0;
    if ((c >> 27 & 1u) != 0) // OSXSAVE: xgetbv may be executed
        __asm__ volatile("xgetbv" : "=a"(saved), "=d"(saved_high) : "c"(0));
    if (__get_cpuid_count(7, 0, &subleaves, &b, &c, &d) != 0) {
        words[static_cast<std::size_t>(cpuid_word::leaf_7_ebx)] = b;
        words[static_cast<std::size_t>(cpuid_word::leaf_7_ecx)] = c;
        if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0)
            words[static_cast<std::size_t>(cpuid_word::leaf_7_1_eax)] = a;
    }
    for (std::size_t i = 0; i < cpu_features.size(); ++i) {
        const cpu_feature& f = cpu_features[i];
        const auto state = static_cast<unsigned>(f.state);
        if ((words[static_cast<std::size_t>(f.word)] >> f.bit & 1u) != 0 && (saved & state) == state)
            found |= feature_set{1} << i;
    }
#endif
    return found;
}

inline feature_set features_here() noexcept {
    static const feature_set features = detect_features();
    return features;
}

struct environment_choice {
    std::optional<target> chosen;
    bool refused = false;
};

} // namespace detail

/// Whether the target is compiled in and this processor can run it.
[[nodiscard]] inline bool is_supported(target t) noexcept {
    const detail::target_traits* traits = detail::traits_of(t);
    return traits != nullptr && (traits->needs & ~detail::features_here()) == 0;
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
