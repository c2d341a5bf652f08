// SPDX-License-Identifier: Apache-2.0
//
// Kernels that convert, encode, append and turn: what needs no dot product. In the order of their dependencies; parsed once
// per instruction set, inside its namespace and region: only kv1's own guardless sources may be included from here.

#include <kv1/detail/kernels/convert.inl>
#include <kv1/detail/kernels/quantize.inl>
#include <kv1/detail/kernels/pack.inl>
#include <kv1/detail/kernels/append.inl>
#include <kv1/detail/kernels/encode.inl>
#include <kv1/detail/kernels/latent.inl>
