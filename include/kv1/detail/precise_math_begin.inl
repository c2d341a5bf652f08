// SPDX-License-Identifier: Apache-2.0
//
// From here to precise_math_end.inl floating-point arithmetic is evaluated as it is written, even in a
// translation unit that is compiled with -ffast-math: codes and metadata must not depend on flags. g++ gets
// its pragma only if such a flag is set, since the pragma hinders inlining. clang always gets one, since it
// has no macro for some of the flags. clang has no such region on processors other than x86-64;
// detail::as_written() does its work there.

#if defined(_MSC_VER) || (defined(__clang__) && defined(__x86_64__))
#pragma float_control(precise, on, push)
#elif defined(__GNUC__) && !defined(__clang__) &&                                                            \
    (defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__))
#pragma GCC push_options
#pragma GCC optimize("no-fast-math")
#endif
