// SPDX-License-Identifier: Apache-2.0
//
// Every quantizer of the library.
#pragma once

#include <kv1/quantizers/affine.hpp>
#include <kv1/quantizers/binary.hpp>
#include <kv1/quantizers/clip_search.hpp>
#include <kv1/quantizers/codebook.hpp>
#include <kv1/quantizers/compact.hpp>
#include <kv1/quantizers/least_squares.hpp>
#include <kv1/quantizers/scaled_binary.hpp>
