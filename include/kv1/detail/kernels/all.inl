// SPDX-License-Identifier: Apache-2.0
//
// Every kernel family, in the order of their dependencies. Parsed once per target, inside the target's
// namespace and region: only kv1's own guardless sources may be included from here.

#include <kv1/detail/kernels/convert.inl>
#include <kv1/detail/kernels/quantize.inl>
#include <kv1/detail/kernels/pack.inl>
#include <kv1/detail/kernels/append.inl>
#include <kv1/detail/kernels/encode.inl>
#include <kv1/detail/kernels/dots.inl>
#include <kv1/detail/kernels/scores.inl>
#include <kv1/detail/kernels/pairs.inl>
#include <kv1/detail/kernels/values.inl>
#include <kv1/detail/kernels/attend.inl>
#include <kv1/detail/kernels/tables.inl>
