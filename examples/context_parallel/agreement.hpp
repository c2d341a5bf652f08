// SPDX-License-Identifier: Apache-2.0
//
// A communicator whose ranks agree before they go on. Every collective call of a distributed cache begins
// with agree(): one MPI_Allreduce of 32 bytes in which each rank says what it was called with, as a digest,
// and whether it can do its part. Where one can not, or digests differ, all ranks throw the same rank_error
// and none enters the collectives that would have followed, whose sizes might not have fitted. A rank that
// never comes is an error, too, once `patience` is over.
#pragma once

#include <kv1/status.hpp>

#include <mpi.h>

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>

namespace context_parallel {

/// What all ranks throw where one fails, or where they disagree.
class rank_error : public std::runtime_error {
public:
    rank_error(int rank, kv1::errc code, kv1::error_location where, const std::string& message)
        : std::runtime_error(message), rank_(rank), code_(code), where_(where) {}
    /// The first rank that failed; -1 where ranks disagree, or do not answer.
    [[nodiscard]] int rank() const noexcept { return rank_; }
    [[nodiscard]] kv1::errc code() const noexcept { return code_; }
    [[nodiscard]] const kv1::error_location& where() const noexcept { return where_; }

private:
    int rank_;
    kv1::errc code_;
    kv1::error_location where_;
};

/// FNV-1a over 64-bit words: whether ranks were told the same, not a protection against malice.
class digest {
public:
    digest& add(std::uint64_t word) noexcept {
        for (int byte = 0; byte < 8; ++byte)
            value_ = (value_ ^ (word >> 8 * byte & 0xff)) * 0x100000001b3u;
        return *this;
    }
    digest& add(float x) noexcept { return add(std::uint64_t{std::bit_cast<std::uint32_t>(x)}); }
    template <class T>
    digest& add_all(std::span<const T> words) noexcept {
        add(std::uint64_t{words.size()});
        for (const T& word : words)
            add(word);
        return *this;
    }
    [[nodiscard]] std::uint64_t value() const noexcept { return value_; }

private:
    std::uint64_t value_ = 0xcbf29ce484222325u;
};

/// What a rank has spent on talking to others, waiting for them included.
struct traffic {
    double seconds = 0.0;
    std::uint64_t calls = 0; ///< of MPI's collectives
    std::uint64_t bytes = 0; ///< handed to them, or received
};

/// MPI's errors as statuses have no rule for them: thrown on the rank that meets them.
inline void require_mpi(int result) {
    if (result == MPI_SUCCESS)
        return;
    std::array<char, MPI_MAX_ERROR_STRING> text{};
    int length = 0;
    MPI_Error_string(result, text.data(), &length);
    throw std::runtime_error("MPI: " + std::string(text.data(), static_cast<std::size_t>(length)));
}

class agreement {
public:
    /// A duplicate of `parent`, so that nobody else's messages are met. Collective. `patience`: how long a
    /// rank waits for the others in agree(); zero: for ever.
    explicit agreement(MPI_Comm parent, std::chrono::duration<double> patience = {}) : patience_(patience) {
        require_mpi(MPI_Comm_dup(parent, &comm_));
        MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);
        MPI_Comm_rank(comm_, &rank_);
        MPI_Comm_size(comm_, &size_);
    }
    agreement(const agreement&) = delete;
    agreement& operator=(const agreement&) = delete;
    ~agreement() {
        if (!lost_)
            MPI_Comm_free(&comm_);
        else
            static_cast<void>(votes_.release()); // a reduction that never ended may still write there
    }

    [[nodiscard]] MPI_Comm comm() const noexcept { return comm_; }
    [[nodiscard]] int rank() const noexcept { return rank_; }
    [[nodiscard]] int size() const noexcept { return size_; }
    [[nodiscard]] const traffic& spent() const noexcept { return spent_; }
    void forget_spent() noexcept { spent_ = {}; }

    /// Throws the same rank_error on all ranks where `here` is an error on any, or `told` differs. Returns,
    /// or says in `changed`, whether any rank said that it has changed something.
    void agree(const digest& told, const kv1::status& here, bool& changed) {
        if (lost_)
            throw lost();
        votes& mine = votes_->mine;
        mine = {here ? 0u : static_cast<std::uint64_t>(size_ - rank_), told.value(), ~told.value(),
                changed ? 1u : 0u};
        timed(sizeof mine, [&] { reduce(); });
        const votes& all = votes_->all;
        changed = all[3] != 0;
        if (all[0] != 0)
            throw failure(size_ - static_cast<int>(all[0]), here);
        if (all[1] != ~all[2])
            throw rank_error(-1, kv1::errc::invalid_argument, {},
                             "ranks disagree: they make different calls, or with different arguments");
    }
    void agree(const digest& told, const kv1::status& here) {
        bool changed = false;
        agree(told, here, changed);
    }

    /// Runs a collective of MPI's, and counts it.
    template <class Call>
    void timed(std::size_t bytes, Call&& call) {
        const double start = MPI_Wtime();
        call();
        spent_.seconds += MPI_Wtime() - start;
        spent_.bytes += bytes;
        ++spent_.calls;
    }

private:
    using votes = std::array<std::uint64_t, 4>; // who fails; what was told, and its complement; who changed
    struct vote_buffers {
        votes mine{}, all{};
    };
    struct report {
        std::uint8_t code = 0;
        kv1::error_location where{};
        std::array<char, 240> text{};
    };

    void reduce() {
        auto& [mine, all] = *votes_;
        if (patience_.count() <= 0.0) {
            require_mpi(MPI_Allreduce(mine.data(), all.data(), 4, MPI_UINT64_T, MPI_MAX, comm_));
            return;
        }
        MPI_Request request;
        require_mpi(MPI_Iallreduce(mine.data(), all.data(), 4, MPI_UINT64_T, MPI_MAX, comm_, &request));
        const double end = MPI_Wtime() + patience_.count();
        for (int done = 0;;) {
            require_mpi(MPI_Test(&request, &done, MPI_STATUS_IGNORE));
            if (done != 0)
                return;
            if (MPI_Wtime() > end) {
                lost_ = true;
                throw lost();
            }
        }
    }
    [[nodiscard]] static rank_error lost() {
        return {-1, kv1::errc::io_error, {}, "a rank does not answer: the others go on without an agreement"};
    }
    [[nodiscard]] rank_error failure(int rank, const kv1::status& here) {
        report r;
        if (rank == rank_) {
            r.code = static_cast<std::uint8_t>(here.code());
            r.where = here.where();
            const std::string text = here.message();
            std::copy_n(text.begin(), std::min(text.size(), r.text.size() - 1), r.text.begin());
        }
        timed(sizeof r, [&] { require_mpi(MPI_Bcast(&r, sizeof r, MPI_BYTE, rank, comm_)); });
        return {rank, static_cast<kv1::errc>(r.code), r.where,
                "rank " + std::to_string(rank) + ": " + r.text.data()};
    }

    MPI_Comm comm_ = MPI_COMM_NULL;
    int rank_ = 0, size_ = 1;
    std::chrono::duration<double> patience_;
    bool lost_ = false;
    traffic spent_;
    std::unique_ptr<vote_buffers> votes_ = std::make_unique<vote_buffers>();
};

} // namespace context_parallel
