// SPDX-License-Identifier: Apache-2.0
//
// See precise_math_begin.inl.

#if defined(_MSC_VER) || (defined(__clang__) && defined(__x86_64__))
#pragma float_control(pop)
#elif defined(__GNUC__) && !defined(__clang__) &&                                                            \
    (defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__))
#pragma GCC pop_options
#endif
