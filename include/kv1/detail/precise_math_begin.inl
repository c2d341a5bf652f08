// SPDX-License-Identifier: Apache-2.0
//
// Until precise_math_end.inl floating-point arithmetic is evaluated as it is written, also in a translation
// unit that is compiled with -ffast-math: codes and metadata must not depend on flags. Without such flags g++
// is left alone, since its pragma is in the way of inlining; clang does not tell about all of them. On other
// processors than x86-64 clang knows no such region: there detail::as_written() is in the optimizer's way.

#if defined(_MSC_VER) || (defined(__clang__) && defined(__x86_64__))
#pragma float_control(precise, on, push)
#elif defined(__GNUC__) && !defined(__clang__) &&                                                            \
    (defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__))
#pragma GCC push_options
#pragma GCC optimize("no-fast-math")
#endif
