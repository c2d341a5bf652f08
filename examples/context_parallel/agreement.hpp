// SPDX-License-Identifier: Apache-2.0
//
// A communicator whose ranks agree before they go on. Every collective call of a distributed cache begins
// with agree(): one MPI_Allreduce of 32 bytes in which each rank says what it was called with, as a digest,
// and whether it can do its part. Where one can not, or digests differ, all ranks throw the same rank_error
// and none enters the collectives that would have followed, whose sizes might not have fitted.
//
// A rank that does not come, to this or to any other collective, is an error on those that wait, once
// `patience` is over. They can not agree on anything after that: every later call is that error, too.
#pragma once

#include "mpi_error.hpp"

#include <kv1/status.hpp>

#include <mpi.h>

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

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

class agreement {
public:
    /// A duplicate of `parent`, so that nobody else's messages are met. Collective. `patience`: how long a
    /// rank waits for the others in a collective; zero: for ever.
    explicit agreement(MPI_Comm parent, std::chrono::duration<double> patience = {}) : patience_(patience) {
        require_mpi(MPI_Comm_dup(parent, &comm_));
        MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);
        MPI_Comm_rank(comm_, &rank_);
        MPI_Comm_size(comm_, &size_);
    }
    agreement(const agreement&) = delete;
    agreement& operator=(const agreement&) = delete;
    ~agreement() {
        if (!lost_) // what never ended still needs it
            MPI_Comm_free(&comm_);
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
        votes_ = {here ? 0u : static_cast<std::uint64_t>(size_ - rank_), told.value(), ~told.value(),
                  changed ? 1u : 0u};
        run(
            votes_.size() * sizeof votes_[0],
            [&](MPI_Request* pending) {
                const int n = static_cast<int>(votes_.size());
                return pending == nullptr
                           ? MPI_Allreduce(MPI_IN_PLACE, votes_.data(), n, MPI_UINT64_T, MPI_MAX, comm_)
                           : MPI_Iallreduce(MPI_IN_PLACE, votes_.data(), n, MPI_UINT64_T, MPI_MAX, comm_,
                                            pending);
            },
            votes_);
        changed = votes_[3] != 0;
        if (votes_[0] != 0)
            throw failure(size_ - static_cast<int>(votes_[0]), here);
        if (votes_[1] != ~votes_[2])
            throw rank_error(-1, kv1::errc::invalid_argument, {},
                             "ranks disagree: they make different calls, or with different arguments");
    }
    void agree(const digest& told, const kv1::status& here) {
        bool changed = false;
        agree(told, here, changed);
    }

    /// Runs a collective of MPI's to its end, and counts it. start(pending) gives MPI's result: with a request
    /// it begins a call that does not wait, with nullptr it makes one that does. `touched` are the vectors
    /// that it reads and writes. Where a rank is lost MPI may do so at any time after: they are never freed.
    template <class Start, class... Vectors>
    void run(std::size_t bytes, Start&& start, Vectors&... touched) {
        const double begin = MPI_Wtime();
        if (patience_.count() <= 0.0) {
            require_mpi(start(static_cast<MPI_Request*>(nullptr)));
        } else {
            MPI_Request request = MPI_REQUEST_NULL;
            require_mpi(start(&request));
            for (int done = 0; done == 0;) {
                require_mpi(MPI_Test(&request, &done, MPI_STATUS_IGNORE));
                if (done == 0 && MPI_Wtime() - begin > patience_.count()) {
                    lost_ = true;
                    static_cast<void>(new std::tuple<Vectors...>(std::move(touched)...));
                    throw lost();
                }
            }
        }
        spent_.seconds += MPI_Wtime() - begin;
        spent_.bytes += bytes;
        ++spent_.calls;
    }

private:
    struct report {
        std::uint8_t code = 0;
        kv1::error_location where{};
        std::array<char, 240> text{};
    };

    [[nodiscard]] static rank_error lost() {
        return {-1, kv1::errc::io_error, {}, "a rank does not answer: the others go on without an agreement"};
    }
    // The error of the first rank that failed, on all ranks.
    [[nodiscard]] rank_error failure(int rank, const kv1::status& here) {
        report& r = report_.front() = {};
        if (rank == rank_) {
            r.code = static_cast<std::uint8_t>(here.code());
            r.where = here.where();
            const std::string text = here.message();
            std::copy_n(text.begin(), std::min(text.size(), r.text.size() - 1), r.text.begin());
        }
        run(
            sizeof(report),
            [&](MPI_Request* pending) {
                report* const all = report_.data();
                return pending == nullptr ? MPI_Bcast(all, sizeof(report), MPI_BYTE, rank, comm_)
                                          : MPI_Ibcast(all, sizeof(report), MPI_BYTE, rank, comm_, pending);
            },
            report_);
        const report& said = report_.front();
        return {rank, static_cast<kv1::errc>(said.code), said.where,
                "rank " + std::to_string(rank) + ": " + said.text.data()};
    }

    MPI_Comm comm_ = MPI_COMM_NULL;
    int rank_ = 0, size_ = 1;
    std::chrono::duration<double> patience_;
    bool lost_ = false;
    traffic spent_;
    // Who fails; what was told, and its complement; who changed something. The largest of all ranks' decide.
    std::vector<std::uint64_t> votes_ = std::vector<std::uint64_t>(4);
    std::vector<report> report_ = std::vector<report>(1);
};

} // namespace context_parallel
