// SPDX-License-Identifier: Apache-2.0
//
// Running a test body once per target, and making sure that it really runs there.
#pragma once

#include <catch2/catch_test_macros.hpp>

#include <kv1/detail/kernels/registry.hpp>
#include <kv1/target.hpp>

#include <string>
#include <utility>

namespace kv1_test {

/// Puts the target back that was in use when it was made.
class target_guard {
public:
    target_guard() = default;
    target_guard(const target_guard&) = delete;
    target_guard& operator=(const target_guard&) = delete;
    ~target_guard() { static_cast<void>(kv1::try_set_target(before_)); }

private:
    kv1::target before_ = kv1::current_target();
};

/// The first of the targets that share the kernels without dot products (simd/passes.hpp).
inline kv1::target storing_target(kv1::target t) {
    switch (t) {
    case kv1::target::scalar:
    case kv1::target::baseline:
    case kv1::target::sse41:
    case kv1::target::avx2:
    case kv1::target::avx512:
        break;
    case kv1::target::avx_vnni:
        return kv1::target::avx2;
    case kv1::target::avx512_vnni:
    case kv1::target::avx512_vbmi:
        return kv1::target::avx512;
    }
    return t;
}

/// Switches to a supported target; fails the test where calls would still reach another target's kernels.
inline void use_target(kv1::target t) {
    REQUIRE(kv1::try_set_target(t));
    REQUIRE(kv1::current_target() == t);
    using registry = kv1::detail::common_registry<>;
    REQUIRE(&kv1::detail::common_kernels() == &registry::at(t));
    // kernels without dot products are shared, and none is another namespace's of the same name
    const kv1::detail::target_kernels &own = registry::at(t), &shared = registry::at(storing_target(t));
    REQUIRE(own.encode_affine == shared.encode_affine);
    REQUIRE((own.encode_vectors == shared.encode_vectors) == (t == storing_target(t))); // has dot products
    REQUIRE(own.turn_mean == shared.turn_mean);
    REQUIRE(own.enter_basis == shared.enter_basis);
    REQUIRE(own.leave_basis == shared.leave_basis);
    REQUIRE(own.rotate == shared.rotate);
    for (const kv1::target other : kv1::all_targets) {
        if (other == t || !kv1::is_supported(other))
            continue;
        INFO("against " << to_string(other));
        REQUIRE(&registry::at(other) != &registry::at(t));
        REQUIRE(registry::at(other).attend_rows != registry::at(t).attend_rows);
        if (storing_target(other) != storing_target(t))
            REQUIRE(registry::at(other).encode_affine != registry::at(t).encode_affine);
    }
}

/// body(target) on every supported target, scalar first.
template <class F>
void for_each_target(F&& body) {
    const target_guard guard;
    for (const kv1::target t : kv1::all_targets) {
        if (!kv1::is_supported(t))
            continue;
        INFO("target " << to_string(t));
        use_target(t);
        body(t);
        REQUIRE(kv1::current_target() == t);
    }
}

} // namespace kv1_test
