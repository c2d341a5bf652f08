// SPDX-License-Identifier: Apache-2.0
//
// Kernels that attend, and the tables of them all. Parsed once per target, after storing.inl or in a namespace that uses
// one with the same instructions but for dot products: those targets share the rest.

#include <kv1/detail/kernels/dots.inl>
#include <kv1/detail/kernels/scores.inl>
#include <kv1/detail/kernels/pairs.inl>
#include <kv1/detail/kernels/values.inl>
#include <kv1/detail/kernels/attend.inl>
#include <kv1/detail/kernels/tables.inl>
