// SPDX-License-Identifier: Apache-2.0
//
// Includes the kernels that convert, encode, append, turn and transpose, which need no dot product, in the order of their
// dependencies. Parsed once per instruction set, inside its namespace and region, so it includes nothing but kv1's own
// sources without include guards.

#include <kv1/detail/kernels/convert.inl>
#include <kv1/detail/kernels/quantize.inl>
#include <kv1/detail/kernels/pack.inl>
#include <kv1/detail/kernels/append.inl>
#include <kv1/detail/kernels/encode.inl>
#include <kv1/detail/kernels/turn.inl>
#include <kv1/detail/kernels/basis.inl>
#include <kv1/detail/kernels/latent.inl>
