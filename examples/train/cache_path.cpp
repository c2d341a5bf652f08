// SPDX-License-Identifier: Apache-2.0
#include "cache_path.hpp"

#include "rotary.hpp"

#ifdef KV1_TRAIN_CUDA
#include "device_path.hpp"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <kv1/fake_quantize.hpp>

#include <torch/autograd.h>

#include <ATen/Parallel.h>

#include <algorithm>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace kv1_train {

namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::tensor_list;

kv1::fake_quantize_options options_of(const trained_side& side) {
    return {.levels = side.policy.levels,
            .round_metadata = side.round_metadata,
            .hadamard = side.policy.hadamard};
}

Tensor turn(const Tensor& x, const rotary_table& table, bool inverse) {
    const std::int64_t positions = x.size(1), half = x.size(3) / 2;
    const auto angles = [&](const Tensor& t) {
        return t.narrow(0, 0, positions).view({1, positions, 1, half});
    };
    const Tensor cosines = angles(table.cosines);
    const Tensor sines = inverse ? -angles(table.sines) : angles(table.sines);
    const Tensor wide = x.to(torch::kFloat32);
    if (table.pairs == kv1::rotary_pairs::half_split) {
        const Tensor a = wide.narrow(-1, 0, half), b = wide.narrow(-1, half, half);
        return torch::cat({a * cosines - b * sines, a * sines + b * cosines}, -1);
    }
    const Tensor pairs = wide.view({x.size(0), positions, x.size(2), half, 2});
    const Tensor a = pairs.select(-1, 0), b = pairs.select(-1, 1);
    return torch::stack({a * cosines - b * sines, a * sines + b * cosines}, -1).view(x.sizes());
}

// All arguments but x. Tensors that are missing are empty.
struct cache_path {
    rotary_table table;
    trained_side side;
    Tensor means, error_factors;
    std::int64_t sinks = 0;
    bool turns_means = false;
    [[nodiscard]] bool turns() const { return table.cosines.numel() != 0; }
    [[nodiscard]] bool centres() const { return side.policy.means && means.numel() != 0; }
    [[nodiscard]] bool weighs_errors() const { return side.policy.error_weights; }
};

// The means of all heads at a position, [positions][heads][channels].
Tensor turned_means(const cache_path& path, std::int64_t positions) {
    const auto angles = [&](const Tensor& t) { return t.narrow(0, 0, positions).unsqueeze(1); };
    const Tensor cosines = angles(path.table.mean_cosines), sines = angles(path.table.mean_sines);
    const bool halves = path.table.pairs == kv1::rotary_pairs::half_split;
    const Tensor pairs =
        halves ? path.means.unflatten(-1, {2, -1}).transpose(-1, -2) : path.means.unflatten(-1, {-1, 2});
    const Tensor a = pairs.select(-1, 0), b = pairs.select(-1, 1);
    const Tensor first = a * cosines - b * sines, second = a * sines + b * cosines;
    return halves ? torch::cat({first, second}, -1) : torch::stack({first, second}, -1).flatten(-2);
}

Tensor quantize_on_cpu(const Tensor& x, const cache_path& path) {
    const Tensor in = x.to(torch::kFloat32).contiguous();
    Tensor out = torch::empty_like(in);
    const auto channels = static_cast<std::size_t>(in.size(-1)),
               heads = static_cast<std::size_t>(in.size(-2)),
               positions = static_cast<std::size_t>(in.size(-3)),
               sinks = static_cast<std::size_t>(path.sinks);
    const float* from = in.data_ptr<float>();
    float* to = out.data_ptr<float>();
    const Tensor factors = path.weighs_errors() ? path.error_factors.contiguous() : Tensor();
    Tensor means; // [positions or 1][heads][channels]
    if (path.centres())
        means = path.turns_means ? turned_means(path, in.size(-3)).contiguous() : path.means.contiguous();
    kv1::fake_quantize_options options = options_of(path.side);
    at::parallel_for(0, in.numel() / in.size(-1), 256, [&, options](std::int64_t begin, std::int64_t end) {
        kv1::fake_quantize_options mine = options;
        for (auto row = static_cast<std::size_t>(begin); row < static_cast<std::size_t>(end); ++row) {
            const std::span<const float> x_row(from + row * channels, channels);
            if (row / heads % positions < sinks) {
                std::ranges::copy(x_row, to + row * channels);
                continue;
            }
            if (means.defined())
                mine.centre = {means.data_ptr<float>() +
                                   row % (path.turns_means ? positions * heads : heads) * channels,
                               channels};
            if (factors.defined())
                mine.error_factors = {factors.data_ptr<float>() + row % heads * channels * channels,
                                      channels * channels};
            kv1::fake_quantize(path.side.policy.format, channels, x_row, {to + row * channels, channels},
                               mine);
        }
    });
    return out;
}

#ifdef KV1_TRAIN_CUDA
cuda::cache_path_job job_for(const Tensor& x, Tensor& y) {
    if (x.size(-1) % 32 != 0 || x.size(-1) > 256)
        throw std::invalid_argument("on CUDA head_dim is a multiple of 32, 256 at the most");
    cuda::cache_path_job job;
    job.x = x.data_ptr();
    job.y = y.data_ptr();
    job.rows = x.numel() / x.size(-1);
    job.positions = x.size(1);
    job.heads = x.size(2);
    job.channels = static_cast<std::int32_t>(x.size(-1));
    job.bf16 = x.scalar_type() == torch::kBFloat16;
    return job;
}

void set_format(cuda::cache_path_job& job, const trained_side& side) {
    using kv1::kv_format;
    const kv_format format = side.policy.format;
    if (side.policy.levels == kv1::level_choice::clip_search)
        throw std::invalid_argument("a clip search is trained for on processors alone");
    const kv1::format_info info = kv1::info_of(format);
    if (info.codebook)
        throw std::invalid_argument(std::string(info.short_name) + " is trained for on processors alone");
    job.format = is_plain(format)                     ? cuda::scheme::plain
                 : format == kv_format::binary        ? cuda::scheme::binary
                 : format == kv_format::scaled_binary ? cuda::scheme::scaled_binary
                 : info.compact                       ? cuda::scheme::compact
                 : info.fits_levels                   ? cuda::scheme::affine
                                    : throw std::invalid_argument(std::string(info.short_name) +
                                                                  " is trained for on processors alone");
    job.max_code = (1 << info.code_bits) - 1;
    job.least_squares = side.policy.levels == kv1::level_choice::least_squares;
    job.hadamard = side.policy.hadamard;
    job.round_metadata = side.round_metadata;
}

void set_table(cuda::cache_path_job& job, const rotary_table& table) {
    job.cosines = table.cosines.data_ptr<float>();
    job.sines = table.sines.data_ptr<float>();
    job.half_split = table.pairs == kv1::rotary_pairs::half_split;
}

// What is cached, and what is plain where it is asked for.
tensor_list run_on_cuda(const Tensor& x, const cache_path& path, bool also_plain) {
    const Tensor in = x.contiguous();
    tensor_list out{torch::empty_like(in)};
    cuda::cache_path_job job = job_for(in, out[0]);
    if (also_plain) {
        out.push_back(torch::empty_like(in));
        job.plain = out[1].data_ptr();
    }
    if (path.turns())
        set_table(job, path.table);
    if (path.centres()) {
        job.means = path.means.data_ptr<float>();
        if (path.turns_means) {
            job.mean_cosines = path.table.mean_cosines.data_ptr<float>();
            job.mean_sines = path.table.mean_sines.data_ptr<float>();
        }
    }
    if (path.weighs_errors())
        job.error_factors = path.error_factors.data_ptr<float>();
    job.sinks = path.sinks;
    set_format(job, path.side);
    const c10::cuda::CUDAGuard on_its_device(in.device());
    cuda::run(job, c10::cuda::getCurrentCUDAStream().stream());
    return out;
}

// Turned back; `more`, where it is defined, is added first.
Tensor turn_back_on_cuda(const Tensor& dy, const Tensor& more, const rotary_table& table) {
    const Tensor in = dy.contiguous(), added = more.defined() ? more.contiguous() : more;
    Tensor out = torch::empty_like(in);
    cuda::cache_path_job job = job_for(in, out);
    job.added = added.defined() ? added.data_ptr() : nullptr;
    set_table(job, table);
    job.inverse = true;
    const c10::cuda::CUDAGuard on_its_device(in.device());
    cuda::run(job, c10::cuda::getCurrentCUDAStream().stream());
    return out;
}
#else
tensor_list run_on_cuda(const Tensor&, const cache_path&, bool) {
    throw std::runtime_error("this kv1-train was built without CUDA");
}
Tensor turn_back_on_cuda(const Tensor&, const Tensor&, const rotary_table&) {
    throw std::runtime_error("this kv1-train was built without CUDA");
}
#endif

tensor_list forward_pass(const Tensor& x, const cache_path& path, bool also_plain) {
    if (x.is_cuda())
        return run_on_cuda(x, path, also_plain);
    const Tensor turned = path.turns() ? turn(x, path.table, false) : x;
    const Tensor y = is_plain(path.side.policy.format) ? turned : quantize_on_cpu(turned, path);
    tensor_list out{y.to(x.scalar_type())};
    if (also_plain)
        out.push_back(turned.to(x.scalar_type()));
    return out;
}

Tensor backward_pass(const tensor_list& dy, const rotary_table& table) {
    const Tensor more = dy.size() > 1 ? dy[1] : Tensor();
    if (table.cosines.numel() == 0)
        return more.defined() ? dy[0] + more : dy[0];
    if (dy[0].is_cuda())
        return turn_back_on_cuda(dy[0], more, table);
    const Tensor all = more.defined() ? dy[0] + more : dy[0];
    return turn(all.contiguous(), table, true).to(all.scalar_type());
}

// A policy and what goes with it as a number: a custom Function takes tensors and scalars alone.
enum path_flag : std::int64_t {
    hadamard = 1,
    means = 2,
    round_metadata = 4,
    half_split = 8,
    turns_means = 16,
    also_plain = 32,
    error_weights = 64,
    first_level_choice = 128
};

kv1::rotary_pairs pairs_of(std::int64_t flags) {
    return (flags & half_split) != 0 ? kv1::rotary_pairs::half_split : kv1::rotary_pairs::interleaved;
}

struct cache_path_function : torch::autograd::Function<cache_path_function> {
    static tensor_list forward(AutogradContext* context, const Tensor& x, const Tensor& cosines,
                               const Tensor& sines, const Tensor& mean_cosines, const Tensor& mean_sines,
                               const Tensor& centre, const Tensor& error_factors, std::int64_t format,
                               std::int64_t flags, std::int64_t sinks) {
        context->saved_data["cosines"] = cosines;
        context->saved_data["sines"] = sines;
        context->saved_data["flags"] = flags;
        const kv1::vector_policy policy{.format = static_cast<kv1::kv_format>(format),
                                        .levels = static_cast<kv1::level_choice>(flags / first_level_choice),
                                        .hadamard = (flags & hadamard) != 0,
                                        .means = (flags & means) != 0,
                                        .error_weights = (flags & error_weights) != 0};
        return forward_pass(x,
                            {{cosines, sines, mean_cosines, mean_sines, pairs_of(flags)},
                             {policy, (flags & round_metadata) != 0},
                             centre,
                             error_factors,
                             sinks,
                             (flags & turns_means) != 0},
                            (flags & also_plain) != 0);
    }
    static tensor_list backward(AutogradContext* context, tensor_list dy) {
        const rotary_table table{context->saved_data["cosines"].toTensor(),
                                 context->saved_data["sines"].toTensor(),
                                 {},
                                 {},
                                 pairs_of(context->saved_data["flags"].toInt())};
        return {backward_pass(dy, table),
                Tensor(),
                Tensor(),
                Tensor(),
                Tensor(),
                Tensor(),
                Tensor(),
                Tensor(),
                Tensor(),
                Tensor()};
    }
};

tensor_list apply(const Tensor& x, const cache_path& path, bool both = false) {
    const kv1::vector_policy& p = path.side.policy;
    std::int64_t flags = static_cast<std::int64_t>(p.levels) * first_level_choice;
    for (const auto& [is_set, flag] : {std::pair{p.hadamard, hadamard},
                                       {p.means, means},
                                       {p.error_weights, error_weights},
                                       {path.side.round_metadata, round_metadata},
                                       {path.table.pairs == kv1::rotary_pairs::half_split, half_split},
                                       {path.turns_means, turns_means},
                                       {both, also_plain}})
        flags |= is_set ? std::int64_t{flag} : 0;
    const rotary_table& t = path.table;
    return cache_path_function::apply(x, t.cosines, t.sines, t.mean_cosines, t.mean_sines, path.means,
                                      path.error_factors, static_cast<std::int64_t>(p.format), flags,
                                      path.sinks);
}

Tensor nothing() { return torch::empty({0}); }

cache_path path_of(const rotary_table& table, const trained_side& side, const side_constants& c,
                   std::int64_t sinks) {
    if (side.policy.error_weights && !c.error_factors.defined())
        throw std::invalid_argument("a policy with error weights needs their factors");
    const auto given = [](const Tensor& t) { return t.defined() ? t : nothing(); };
    return {table, side, given(c.means), given(c.error_factors), sinks, c.turn};
}

} // namespace

rotary_table rotary_table::make(std::int64_t positions, std::int64_t head_dim, float theta,
                                kv1::rotary_pairs pairs, torch::Device device) {
    const kv1_lm::rotary_angles angles = kv1_lm::make_rotary_angles(
        static_cast<std::size_t>(positions), static_cast<std::size_t>(head_dim), theta);
    // a mean of 1 in each pair's first channel turns to cosines and sines
    const auto channels = static_cast<std::size_t>(head_dim), half = channels / 2;
    const kv1::rotary_embedding rotary{kv1::rotary_frequencies(static_cast<double>(theta), channels),
                                       kv1::rotary_pairs::half_split};
    std::vector<float> ones(channels), at(channels), mean_cosines, mean_sines;
    std::fill_n(ones.begin(), half, 1.0f);
    for (std::int64_t position = 0; position < positions; ++position) {
        kv1::turn_mean(rotary, ones, static_cast<std::uint64_t>(position), at);
        const auto middle = at.begin() + static_cast<std::ptrdiff_t>(half);
        mean_cosines.insert(mean_cosines.end(), at.begin(), middle);
        mean_sines.insert(mean_sines.end(), middle, at.end());
    }
    const auto tensor = [&](const std::vector<float>& values) {
        return torch::tensor(values).view({positions, head_dim / 2}).to(device);
    };
    return {tensor(angles.cosines), tensor(angles.sines), tensor(mean_cosines), tensor(mean_sines), pairs};
}

torch::Tensor rotate(const torch::Tensor& x, const rotary_table& table) {
    return apply(x, path_of(table, {}, {}, 0))[0];
}

torch::Tensor through_cache(const torch::Tensor& x, const trained_side& side, const side_constants& constants,
                            std::int64_t sinks) {
    if (is_plain(side.policy.format))
        return x;
    const Tensor none = nothing();
    return apply(x, path_of({none, none, none, none, {}}, side, constants, sinks))[0];
}

keys_seen rotate_through_cache(const torch::Tensor& x, const rotary_table& table, const trained_side& side,
                               const side_constants& constants, std::int64_t sinks, bool also_plain) {
    if (is_plain(side.policy.format)) {
        const Tensor turned = rotate(x, table);
        return {turned, also_plain ? turned : Tensor()};
    }
    const tensor_list seen = apply(x, path_of(table, side, constants, sinks), also_plain);
    return {seen[0], also_plain ? seen[1] : Tensor()};
}

} // namespace kv1_train
