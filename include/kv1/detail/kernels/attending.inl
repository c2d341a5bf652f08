// SPDX-License-Identifier: Apache-2.0
//
// Includes the kernels that are made of dot products, those that attend and those that encode under error weights, and
// the tables of all kernels. Parsed once per target, after storing.inl. A target that differs from another in its dot
// products alone uses that target's namespace instead of storing.inl.

#include <kv1/detail/kernels/dots.inl>
#include <kv1/detail/kernels/scores.inl>
#include <kv1/detail/kernels/pairs.inl>
#include <kv1/detail/kernels/values.inl>
#include <kv1/detail/kernels/slots.inl>
#include <kv1/detail/kernels/chunk.inl>
#include <kv1/detail/kernels/correct.inl>
#include <kv1/detail/kernels/attend.inl>
#include <kv1/detail/kernels/weigh.inl>
#include <kv1/detail/kernels/tables.inl>
