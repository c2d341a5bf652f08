// SPDX-License-Identifier: Apache-2.0
//
// Errors of MPI's as exceptions.
#pragma once

#include <mpi.h>

#include <array>
#include <cstddef>
#include <stdexcept>
#include <string>

namespace context_parallel {

/// Throws std::runtime_error with MPI's text, on the rank that meets the error. It takes a communicator whose
/// errors return, or a call that concerns none.
inline void require_mpi(int result) {
    if (result == MPI_SUCCESS)
        return;
    std::array<char, MPI_MAX_ERROR_STRING> text{};
    int length = 0;
    MPI_Error_string(result, text.data(), &length);
    throw std::runtime_error("MPI: " + std::string(text.data(), static_cast<std::size_t>(length)));
}

} // namespace context_parallel
