// SPDX-License-Identifier: Apache-2.0
//
// What means that turn (turning_means.hpp) add to the scores of slots whose positions do not follow each other, found
// before attention begins. Kernels give a run of tokens its waves from the middle on, at a few operations a token. A
// token that stands alone costs them cosines and sines of all pairs. Here slots are sorted by the run of 256 positions
// that they stand in. Each run's waves are made once, and its slots take theirs, wherever they lie. What they take is an
// additive mask, [queries][query heads][places], and kernels have no more to do with the mean. That is not done under soft
// caps, which lie between a mean's share and a mask, under ALiBi's slopes, which multiply a mask, and where the mask would
// have more than 2^24 numbers (64 MiB): kernels then take each token's cosines and sines.
//
// Example: of positions 7, 300, 8, 513, 9, 301 there are three runs, with the slots 0, 2, 4; 1, 5; and 3.
#pragma once

#include <kv1/detail/buffer.hpp>
#include <kv1/detail/kernels/attention_job.hpp>
#include <kv1/detail/kernels/interface.hpp>
#include <kv1/detail/turning_means.hpp>
#include <kv1/layout.hpp>
#include <kv1/tensor.hpp>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numbers>

namespace kv1::inline KV1_ABI::detail {

class slot_waves {
public:
    // Sorts the places of a job whose positions do not follow each other. False: no memory. used() says whether this is
    // how the mean's share is found; it is not where positions follow each other, or where runs have few slots.
    [[nodiscard]] bool sort(const attention_job& job, std::size_t queries) noexcept {
        if (job.key_turning == nullptr || job.block_positions == nullptr || !are_scattered(job))
            return true;
        std::int32_t low = (std::numeric_limits<std::int32_t>::max)(), high = -1;
        std::size_t count = 0;
        each_slot(job, [&](std::size_t, std::int32_t at) {
            low = (std::min)(low, at);
            high = (std::max)(high, at);
            ++count;
        });
        if (count == 0)
            return true;
        const auto first_run = static_cast<std::size_t>(low) / run_tokens;
        const std::size_t range = static_cast<std::size_t>(high) / run_tokens - first_run + 1;
        if (range > count)
            return true;
        buffer<std::size_t> next; // of each run: where its next slot goes
        if (!next.resize(range))
            return false;
        each_slot(job, [&](std::size_t, std::int32_t at) {
            ++next[static_cast<std::size_t>(at) / run_tokens - first_run];
        });
        const auto some = static_cast<std::size_t>(
            std::count_if(next.begin(), next.end(), [](std::size_t n) { return n != 0; }));
        if (some * fewest_slots > count)
            return true;
        if (!runs_.reserve(some) || !make_room(place_of_, count) || !make_room(in_run_, count))
            return false;
        for (std::size_t r = 0, at = 0; r < range; ++r)
            if (const std::size_t n = next[r]; n != 0) {
                runs_.push_back({first_run + r, at, at + n});
                next[r] = at;
                at += n;
            }
        each_slot(job, [&](std::size_t place, std::int32_t at) {
            const std::size_t position = static_cast<std::size_t>(at),
                              next_slot = next[position / run_tokens - first_run]++;
            place_of_[next_slot] = static_cast<std::uint32_t>(place);
            in_run_[next_slot] = static_cast<std::uint8_t>(position % run_tokens);
        });
        means_ = job.key_turning;
        target_ = job.target;
        scale_ = job.scale;
        group_ = job.head_group;
        rows_ = queries * group_;
        return true;
    }
    [[nodiscard]] bool used() const noexcept { return !runs_.empty(); }

    // What is added to: [queries][query heads][places].
    void add_to(float* added, std::size_t places) noexcept {
        added_ = added;
        places_ = places;
    }
    // Some rows of one KV head each.
    [[nodiscard]] std::size_t tasks(std::size_t kv_heads) const noexcept {
        return used() ? kv_heads * blocks() : 0;
    }
    void run(std::size_t task, const tensor_view& queries) noexcept {
        const std::size_t head = task / blocks(), first_row = task % blocks() * most_rows;
        const turning_mean& m = means_[head];
        workspace w(m, (std::min)(most_rows, rows_ - first_row));
        if (m.count == 0)
            return;
        if (!w.make(queries.channels())) {
            starved_.store(true, std::memory_order_relaxed);
            return;
        }
        for (std::size_t r = 0; r < w.rows(); ++r) {
            const std::size_t row = first_row + r;
            w.take(r, scale_, *target_, queries, row / group_, head * group_ + row % group_);
        }
        const std::size_t at_once = w.runs_at_once();
        for (std::size_t first = 0; first < runs_.size(); first += at_once) {
            const std::size_t n = (std::min)(at_once, runs_.size() - first);
            for (std::size_t i = 0; i < n; ++i)
                w.turn_to(runs_[first + i].number, i);
            w.add(*target_, n);
            for (std::size_t i = 0; i < n; ++i)
                spread(runs_[first + i], w, i, first_row, [&](std::size_t row) {
                    return added_ + (row / group_ * queries.heads() + head * group_ + row % group_) * places_;
                });
        }
    }
    // Whether a task had no memory.
    [[nodiscard]] bool starved() const noexcept { return starved_.load(std::memory_order_relaxed); }

private:
    static constexpr std::size_t run_tokens = 2 * wave_tokens;
    static_assert(run_tokens - 1 <= (std::numeric_limits<std::uint8_t>::max)());
    static constexpr std::size_t most_rows = 16;
    // A run costs about what this many tokens cost that stand alone.
    static constexpr std::size_t fewest_slots = 16;

    struct run_of_slots {
        std::size_t number, first, last; // its positions over run_tokens; its slots
    };
    struct alignas(line_bytes) line {
        float numbers[line_lanes];
    };

    // The waves of a KV head's rows, [pair or term][row], and their sums over a few runs.
    class workspace {
    public:
        workspace(const turning_mean& m, std::size_t rows) noexcept : m_(m), rows_(rows) {}

        [[nodiscard]] bool make(std::size_t channels) noexcept {
            const std::size_t wide = rows_ * runs_at_once();
            if (!make_room(query_, channels) || !make_room(units_, 2 * m_.count) ||
                !make_room(steps_, 2 * m_.count) || !make_room(still_, 2 * m_.count * rows_) ||
                !make_room(factors_, 2 * m_.terms * wide) ||
                !make_room(halves_, 2 * wide * wave_tokens / line_lanes) ||
                !make_room(sums_, run_tokens * wide))
                return false;
            for (std::size_t j = 0; j < m_.count; ++j)
                set_unit(j, 2 * run_tokens, steps_.data());
            return true;
        }
        [[nodiscard]] std::size_t rows() const noexcept { return rows_; }
        [[nodiscard]] std::size_t runs_at_once() const noexcept {
            return (std::max)(std::size_t{1}, 32 / rows_);
        }

        // The waves of a row at position 0.
        void take(std::size_t r, float scale, const target_kernels& target, const tensor_view& queries,
                  std::size_t token, std::size_t head) noexcept {
            target.load_floats(queries.type(), queries.at(token, head), queries.channels(), query_.data());
            for (std::size_t j = 0; j < m_.count; ++j) {
                const float a = scale * query_[m_.first_channel[j]], b = scale * query_[m_.second_channel[j]];
                still_[2 * j * rows_ + r] = a * m_.first[j] + b * m_.second[j];
                still_[(2 * j + 1) * rows_ + r] = b * m_.first[j] - a * m_.second[j];
            }
        }
        // Turns them to the middle of a run, the index-th of those that are added up together.
        void turn_to(std::size_t run, std::size_t index) noexcept {
            if (run != 0 && run == run_ + 1)
                for (std::size_t j = 0; j < m_.count; ++j) {
                    double &c = units_[2 * j], &s = units_[2 * j + 1];
                    const double next = c * steps_[2 * j] - s * steps_[2 * j + 1];
                    s = s * steps_[2 * j] + c * steps_[2 * j + 1];
                    c = next;
                }
            else
                for (std::size_t j = 0; j < m_.count; ++j)
                    set_unit(j, 2 * run_tokens * std::uint64_t{run} + run_tokens - 1, units_.data());
            run_ = run;
            const std::size_t wide = rows_ * runs_at_once();
            float* const even = factors_.data() + index * rows_;
            float* const odd = even + m_.terms * wide;
            for (std::size_t j = 0; j < m_.quick(); ++j) {
                const auto c = static_cast<float>(units_[2 * j]), s = static_cast<float>(units_[2 * j + 1]);
                const float* const own = still_.data() + 2 * j * rows_;
                for (std::size_t r = 0; r < rows_; ++r) {
                    even[j * wide + r] = own[r] * c + own[rows_ + r] * s;
                    odd[j * wide + r] = own[rows_ + r] * c - own[r] * s;
                }
            }
            for (std::size_t r = 0; m_.shares != nullptr && r < rows_; ++r)
                fold(r, even + m_.quick() * wide + r, odd + m_.quick() * wide + r);
        }
        // Adds up the waves of the first `runs` runs that were turned to.
        void add(const target_kernels& target, std::size_t runs) noexcept {
            const std::size_t wide = rows_ * runs_at_once(), used = rows_ * runs;
            float* const even = halves_.data()->numbers;
            float* const odd = even + wide * wave_tokens;
            std::fill_n(even, 2 * wide * wave_tokens, 0.0f);
            for (std::size_t j = 0; j < m_.terms; ++j) {
                const float* const factors = factors_.data() + j * wide;
                target.add_multiples(even, wave_tokens, factors, used, m_.waves[j], wave_tokens);
                target.add_multiples(odd, wave_tokens, factors + m_.terms * wide, used,
                                     m_.waves[j] + wave_tokens, wave_tokens);
            }
            for (std::size_t r = 0; r < used; ++r) {
                float* const middle = sums_.data() + r * run_tokens + wave_tokens;
                const float *const e = even + r * wave_tokens, *const o = odd + r * wave_tokens;
                for (std::size_t i = 0; i < wave_tokens; ++i) {
                    middle[i] = e[i] + o[i];
                    *(middle - 1 - i) = e[i] - o[i];
                }
            }
        }
        // What a row's tokens get in a run, by their positions there.
        [[nodiscard]] const float* sums_of(std::size_t index, std::size_t r) const noexcept {
            return sums_.data() + (index * rows_ + r) * run_tokens;
        }

    private:
        // Folds a row's waves of slow pairs into those of polynomials.
        void fold(std::size_t r, float* even, float* odd) const noexcept {
            float e[slow_terms] = {}, o[slow_terms] = {};
            const float* shares = m_.shares;
            for (std::size_t j = m_.quick(); j < m_.count; ++j, shares += 2 * slow_terms) {
                const auto c = static_cast<float>(units_[2 * j]), s = static_cast<float>(units_[2 * j + 1]);
                const float a = still_[2 * j * rows_ + r], b = still_[(2 * j + 1) * rows_ + r];
                const float along = a * c + b * s, across = b * c - a * s;
                for (std::size_t k = 0; k < slow_terms; ++k) {
                    e[k] += along * shares[k];
                    o[k] += across * shares[slow_terms + k];
                }
            }
            const std::size_t wide = rows_ * runs_at_once();
            for (std::size_t k = 0; k < slow_terms; ++k) {
                even[k * wide] = e[k];
                odd[k * wide] = o[k];
            }
        }
        // Cosine and sine of a pair at half a position times `halves`. A turn is 2^64.
        void set_unit(std::size_t j, std::uint64_t halves, double* units) const noexcept {
            const double angle =
                std::ldexp(static_cast<double>(static_cast<std::int64_t>(m_.half_turns[j] * halves)), -63) *
                std::numbers::pi;
            units[2 * j] = std::cos(angle);
            units[2 * j + 1] = std::sin(angle);
        }

        const turning_mean& m_;
        std::size_t rows_, run_ = (std::numeric_limits<std::size_t>::max)() - 1;
        buffer<float> query_;
        buffer<double> units_, steps_;  // [pair]{cosine, sine}: at the middle of a run, and of a whole one
        buffer<float> still_, factors_; // [pair][2][row]; [even, odd][term][run][row]
        buffer<line> halves_;           // [even, odd][run][row][wave_tokens]
        buffer<float> sums_;            // [run][row][run_tokens]
    };

    // Gives the slots of a run their waves. rows(row) is where a row's mask begins.
    template <class Rows>
    void spread(const run_of_slots& run, const workspace& w, std::size_t index, std::size_t first_row,
                const Rows& rows) const noexcept {
        std::size_t r = 0;
        for (; r + 2 <= w.rows(); r += 2) {
            float *const a = rows(first_row + r), *const b = rows(first_row + r + 1);
            const float *const from_a = w.sums_of(index, r), *const from_b = w.sums_of(index, r + 1);
            for (std::size_t s = run.first; s < run.last; ++s) {
                const std::size_t place = place_of_[s], at = in_run_[s];
                a[place] += from_a[at];
                b[place] += from_b[at];
            }
        }
        for (; r < w.rows(); ++r) {
            float* const a = rows(first_row + r);
            const float* const from_a = w.sums_of(index, r);
            for (std::size_t s = run.first; s < run.last; ++s)
                a[place_of_[s]] += from_a[in_run_[s]];
        }
    }

    // Room for numbers that are all written. False: no memory.
    template <class T>
    [[nodiscard]] static bool make_room(buffer<T>& b, std::size_t n) noexcept {
        if (!b.reserve(n))
            return false;
        b.set_size(n);
        return true;
    }

    [[nodiscard]] std::size_t blocks() const noexcept { return (rows_ + most_rows - 1) / most_rows; }

    // Calls body(place, position) for the job's places whose slots have a key.
    template <class Body>
    static void each_slot(const attention_job& job, const Body& body) noexcept {
        const std::size_t page = job.layout->page_tokens();
        for (std::size_t place = job.first_visible, end = place; place < job.last_token; place = end) {
            end = (std::min)(job.last_token, place / page * page + page);
            const std::int32_t* const at = slot_positions(job, place);
            for (std::size_t i = 0; i < end - place; ++i)
                if (at[i] >= 0)
                    body(place + i, at[i]);
        }
    }
    // Whether more than an eighth of the job's tiles have slots that do not stand one after the other.
    [[nodiscard]] static bool are_scattered(const attention_job& job) noexcept {
        const std::size_t first = job.first_visible / tile_tokens,
                          last = (job.last_token + tile_tokens - 1) / tile_tokens;
        std::size_t scattered = 0;
        for (std::size_t tile = first; tile < last; ++tile) {
            const std::int32_t* const at = slot_positions(job, tile * tile_tokens);
            std::size_t some = 0;
            while (some < tile_tokens && at[some] < 0)
                ++some;
            if (some == tile_tokens)
                continue;
            const auto start = static_cast<std::uint32_t>(at[some]) - static_cast<std::uint32_t>(some);
            std::uint32_t others = 0;
            for (std::size_t i = 0; i < tile_tokens; ++i)
                others |= at[i] < 0
                              ? 0
                              : static_cast<std::uint32_t>(at[i]) ^ (start + static_cast<std::uint32_t>(i));
            scattered += others != 0 ? 1 : 0;
            if (scattered * 8 > last - first)
                return true;
        }
        return false;
    }

    const turning_mean* means_ = nullptr; // of the KV heads
    const target_kernels* target_ = nullptr;
    float scale_ = 0.0f;
    std::size_t group_ = 1, rows_ = 0; // query heads and rows of a KV head
    float* added_ = nullptr;
    std::size_t places_ = 0;
    buffer<run_of_slots> runs_;      // that have slots, in order
    buffer<std::uint32_t> place_of_; // [slots by run]: in the job's table
    buffer<std::uint8_t> in_run_;    // [slots by run]: in the run
    std::atomic<bool> starved_{false};
};

} // namespace kv1::inline KV1_ABI::detail
