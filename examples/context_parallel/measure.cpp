// SPDX-License-Identifier: Apache-2.0
#include "measure.hpp"

#include <algorithm>
#include <chrono>
#include <memory>
#include <random>
#include <thread>

namespace context_parallel {

namespace {

// The same on all ranks: any seed does, for nothing here depends on the values.
std::vector<float> random_values(std::size_t n, std::uint32_t seed) {
    std::minstd_rand random(seed);
    std::uniform_real_distribution<float> uniform(-1.7f, 1.7f); // of variance one, about
    std::vector<float> x(n);
    for (float& v : x)
        v = uniform(random);
    return x;
}

// Keys, values and queries of any step, and what is done with them layer by layer.
class token_source {
public:
    explicit token_source(const workload& work)
        : layer_(work.shape.layers.front()), layers_(work.shape.layers.size()), heads_(work.heads),
          tokens_(work.tokens), chunk_(std::clamp<std::size_t>(work.tokens, 1, 4096)),
          k_(random_values(chunk_ * layer_.kv_heads * layer_.key_dim, 1)),
          v_(random_values(chunk_ * layer_.kv_heads * layer_.value_dim, 2)),
          q_(random_values(heads_ * layer_.key_dim, 3)), out_(heads_ * layer_.value_dim) {}

    template <class Append, class Commit>
    void fill(Append&& append, Commit&& commit) const {
        for (std::size_t done = 0; done < tokens_; done += chunk_) {
            const std::size_t n = std::min(chunk_, tokens_ - done);
            for (std::size_t layer = 0; layer < layers_; ++layer)
                append(layer, keys(n), values(n));
            commit();
        }
    }
    template <class Attend, class Commit>
    void decode(Attend&& attend, Commit&& commit) {
        for (std::size_t layer = 0; layer < layers_; ++layer)
            attend(layer, keys(1), values(1), kv1::tensor_view(q_.data(), 1, heads_, layer_.key_dim),
                   kv1::mutable_tensor_view(out_.data(), 1, heads_, layer_.value_dim));
        commit();
    }

private:
    [[nodiscard]] kv1::tensor_view keys(std::size_t n) const {
        return {k_.data(), n, layer_.kv_heads, layer_.key_dim};
    }
    [[nodiscard]] kv1::tensor_view values(std::size_t n) const {
        return {v_.data(), n, layer_.kv_heads, layer_.value_dim};
    }

    kv1::layer_description layer_;
    std::size_t layers_, heads_, tokens_, chunk_;
    std::vector<float> k_, v_, q_, out_;
};

// One sequence over some ranks.
class decoder {
public:
    decoder(MPI_Comm ranks, const workload& work)
        : ranks_(ranks), cache_(ranks, work.shape, work.how), s_(cache_.create_sequence()), source_(work) {
        result.ranks = static_cast<std::size_t>(cache_.ranks());
        const double start = MPI_Wtime();
        source_.fill([&](std::size_t layer, auto k, auto v) { cache_.append(s_, layer, k, v); },
                     [&] { cache_.commit(s_); });
        result.fill_seconds = MPI_Wtime() - start;
        step(); // buffers find their size
        result.token_seconds.clear();
        result.communication_seconds.clear();
    }

    void step() {
        cache_.forget_spent();
        const double start = MPI_Wtime();
        source_.decode([&](std::size_t layer, auto k, auto v, auto q,
                           auto out) { cache_.append_and_attend(s_, layer, k, v, q, out); },
                       [&] { cache_.commit(s_); });
        double slowest = MPI_Wtime() - start, spent = cache_.spent().seconds;
        result.collectives = cache_.spent().calls;
        result.communication_bytes = cache_.spent().bytes;
        require_mpi(MPI_Allreduce(MPI_IN_PLACE, &slowest, 1, MPI_DOUBLE, MPI_MAX, ranks_));
        require_mpi(MPI_Allreduce(MPI_IN_PLACE, &spent, 1, MPI_DOUBLE, MPI_SUM, ranks_));
        result.token_seconds.push_back(slowest);
        result.communication_seconds.push_back(spent / cache_.ranks());
    }

    void count_bytes() {
        const std::uint64_t mine = cache_.bytes_in_use();
        std::vector<std::uint64_t> all(result.ranks);
        require_mpi(MPI_Allgather(&mine, 1, MPI_UINT64_T, all.data(), 1, MPI_UINT64_T, ranks_));
        result.bytes.assign(all.begin(), all.end());
    }

    measurement result;

private:
    MPI_Comm ranks_;
    distributed_cache cache_;
    sequence s_;
    token_source source_;
};

// The same in one kv_cache.
class undistributed_decoder {
public:
    explicit undistributed_decoder(const workload& work)
        : run_(work.how.run), cache_(work.shape), s_(cache_.create_sequence()), source_(work) {
        const double start = MPI_Wtime();
        source_.fill([&](std::size_t layer, auto k, auto v) { cache_.append(s_, layer, k, v, run_); },
                     [&] { cache_.commit(s_); });
        result.fill_seconds = MPI_Wtime() - start;
        step();
        result.token_seconds.clear();
        result.communication_seconds.clear();
    }

    void step() {
        const double start = MPI_Wtime();
        source_.decode(
            [&](std::size_t layer, auto k, auto v, auto q, auto out) {
                cache_.append(s_, layer, k, v, run_);
                cache_.attend(s_, layer, q, out, {}, run_);
            },
            [&] { cache_.commit(s_); });
        result.token_seconds.push_back(MPI_Wtime() - start);
        result.communication_seconds.push_back(0.0);
        result.bytes = {cache_.statistics().bytes_in_use};
    }

    measurement result;

private:
    thread_source run_;
    kv1::kv_cache cache_;
    kv1::sequence_id s_;
    token_source source_;
};

// Returns once all ranks are here. Waiting takes no processor, which those that still work may need.
void meet(MPI_Comm ranks) {
    MPI_Request request = MPI_REQUEST_NULL;
    require_mpi(MPI_Ibarrier(ranks, &request));
    for (int done = 0; done == 0;) {
        require_mpi(MPI_Test(&request, &done, MPI_STATUS_IGNORE));
        if (done == 0)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

// The first ranks of a communicator; null on the others.
class first_ranks {
public:
    first_ranks(MPI_Comm all, int count) {
        int rank = 0;
        require_mpi(MPI_Comm_rank(all, &rank));
        require_mpi(MPI_Comm_split(all, rank < count ? 0 : MPI_UNDEFINED, rank, &comm_));
    }
    first_ranks(const first_ranks&) = delete;
    first_ranks& operator=(const first_ranks&) = delete;
    ~first_ranks() {
        if (comm_ != MPI_COMM_NULL)
            MPI_Comm_free(&comm_);
    }
    [[nodiscard]] MPI_Comm get() const noexcept { return comm_; }

private:
    MPI_Comm comm_ = MPI_COMM_NULL;
};

} // namespace

measurement measure(MPI_Comm ranks, const workload& work) {
    decoder d(ranks, work);
    for (std::size_t i = 0; i < work.steps; ++i)
        d.step();
    d.count_bytes();
    return std::move(d.result);
}

std::vector<measurement> compare(MPI_Comm ranks, const workload& work) {
    int rank = 0, size = 1;
    require_mpi(MPI_Comm_rank(ranks, &rank));
    require_mpi(MPI_Comm_size(ranks, &size));
    std::unique_ptr<undistributed_decoder> one;
    if (rank == 0)
        one = std::make_unique<undistributed_decoder>(work);
    std::vector<std::unique_ptr<first_ranks>> groups;
    std::vector<std::unique_ptr<decoder>> decoders; // null where this rank has no part
    for (int count = 1;; count = std::min(2 * count, size)) {
        groups.push_back(std::make_unique<first_ranks>(ranks, count));
        const MPI_Comm comm = groups.back()->get();
        decoders.push_back(comm == MPI_COMM_NULL ? nullptr : std::make_unique<decoder>(comm, work));
        meet(ranks);
        if (count == size)
            break;
    }
    for (std::size_t i = 0; i < work.steps; ++i) {
        if (one)
            one->step();
        meet(ranks);
        for (const auto& d : decoders) {
            if (d)
                d->step();
            meet(ranks);
        }
    }
    std::vector<measurement> all;
    if (one)
        all.push_back(std::move(one->result));
    for (const auto& d : decoders)
        if (d) {
            d->count_bytes();
            all.push_back(std::move(d->result));
        }
    return all;
}

double median(std::vector<double> x) {
    const auto middle = x.begin() + static_cast<std::ptrdiff_t>(x.size() / 2);
    std::ranges::nth_element(x, middle);
    return *middle;
}

} // namespace context_parallel
