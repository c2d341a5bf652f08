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

#include <span>
#include <stdexcept>
#include <string>
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

// All arguments but x. `centre` and the rotary table are empty tensors if there are none.
struct cache_path {
    rotary_table table;
    trained_side side;
    Tensor centre;
    [[nodiscard]] bool turns() const { return table.cosines.numel() != 0; }
    [[nodiscard]] bool centres() const { return side.policy.means && centre.numel() != 0; }
};

Tensor quantize_on_cpu(const Tensor& x, const cache_path& path) {
    const Tensor in = x.to(torch::kFloat32).contiguous();
    Tensor out = torch::empty_like(in);
    const auto channels = static_cast<std::size_t>(in.size(-1)),
               heads = static_cast<std::size_t>(in.size(-2));
    const float* from = in.data_ptr<float>();
    float* to = out.data_ptr<float>();
    const Tensor means = path.centres() ? path.centre.contiguous() : Tensor();
    kv1::fake_quantize_options options = options_of(path.side);
    at::parallel_for(0, in.numel() / in.size(-1), 256, [&, options](std::int64_t begin, std::int64_t end) {
        kv1::fake_quantize_options mine = options;
        for (auto row = static_cast<std::size_t>(begin); row < static_cast<std::size_t>(end); ++row) {
            if (means.defined())
                mine.centre = {means.data_ptr<float>() + row % heads * channels, channels};
            kv1::fake_quantize(path.side.policy.format, channels, {from + row * channels, channels},
                               {to + row * channels, channels}, mine);
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

Tensor run_on_cuda(const Tensor& x, const cache_path& path, bool inverse) {
    const Tensor in = x.contiguous();
    Tensor out = torch::empty_like(in);
    cuda::cache_path_job job = job_for(in, out);
    if (path.turns()) {
        job.cosines = path.table.cosines.data_ptr<float>();
        job.sines = path.table.sines.data_ptr<float>();
        job.inverse = inverse;
        job.half_split = path.table.pairs == kv1::rotary_pairs::half_split;
    }
    if (path.centres())
        job.centre = path.centre.data_ptr<float>();
    set_format(job, path.side);
    const c10::cuda::CUDAGuard on_its_device(in.device());
    cuda::run(job, c10::cuda::getCurrentCUDAStream().stream());
    return out;
}
#else
Tensor run_on_cuda(const Tensor&, const cache_path&, bool) {
    throw std::runtime_error("this kv1-train was built without CUDA");
}
#endif

Tensor forward_pass(const Tensor& x, const cache_path& path) {
    if (x.is_cuda())
        return run_on_cuda(x, path, false);
    const Tensor turned = path.turns() ? turn(x, path.table, false) : x;
    const Tensor y = is_plain(path.side.policy.format) ? turned : quantize_on_cpu(turned, path);
    return y.to(x.scalar_type());
}

Tensor backward_pass(const Tensor& dy, const rotary_table& table) {
    const cache_path back{table, {}, table.cosines};
    if (!back.turns())
        return dy;
    return dy.is_cuda() ? run_on_cuda(dy, back, true)
                        : turn(dy.contiguous(), table, true).to(dy.scalar_type());
}

kv1::rotary_pairs pairs_of(std::int64_t flags) {
    return (flags & 8) != 0 ? kv1::rotary_pairs::half_split : kv1::rotary_pairs::interleaved;
}

// A custom Function takes tensors and scalars alone. So a missing tensor is an empty one, and the policy is
// passed as flags.
struct cache_path_function : torch::autograd::Function<cache_path_function> {
    static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& cosines,
                          const Tensor& sines, const Tensor& centre, std::int64_t format,
                          std::int64_t flags) {
        context->saved_data["cosines"] = cosines;
        context->saved_data["sines"] = sines;
        const kv1::vector_policy policy{.format = static_cast<kv1::kv_format>(format),
                                        .levels = static_cast<kv1::level_choice>(flags >> 4),
                                        .hadamard = (flags & 1) != 0,
                                        .means = (flags & 2) != 0};
        const kv1::rotary_pairs pairs = pairs_of(flags);
        context->saved_data["flags"] = flags;
        return forward_pass(x, {{cosines, sines, pairs}, {policy, (flags & 4) != 0}, centre});
    }
    static tensor_list backward(AutogradContext* context, tensor_list dy) {
        const rotary_table table{context->saved_data["cosines"].toTensor(),
                                 context->saved_data["sines"].toTensor(),
                                 pairs_of(context->saved_data["flags"].toInt())};
        return {backward_pass(dy[0], table), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
    }
};

Tensor apply(const Tensor& x, const cache_path& path) {
    const kv1::vector_policy& p = path.side.policy;
    const std::int64_t flags = (p.hadamard ? 1 : 0) | (p.means ? 2 : 0) | (path.side.round_metadata ? 4 : 0) |
                               (path.table.pairs == kv1::rotary_pairs::half_split ? 8 : 0) |
                               static_cast<std::int64_t>(p.levels) << 4;
    return cache_path_function::apply(x, path.table.cosines, path.table.sines, path.centre,
                                      static_cast<std::int64_t>(p.format), flags);
}

Tensor nothing() { return torch::empty({0}); }

} // namespace

rotary_table rotary_table::make(std::int64_t positions, std::int64_t head_dim, float theta,
                                kv1::rotary_pairs pairs, torch::Device device) {
    const kv1_lm::rotary_angles angles = kv1_lm::make_rotary_angles(
        static_cast<std::size_t>(positions), static_cast<std::size_t>(head_dim), theta);
    const auto tensor = [&](const std::vector<float>& values) {
        return torch::tensor(values).view({positions, head_dim / 2}).to(device);
    };
    return {tensor(angles.cosines), tensor(angles.sines), pairs};
}

torch::Tensor rotate(const torch::Tensor& x, const rotary_table& table) {
    return apply(x, {table, {}, nothing()});
}

torch::Tensor through_cache(const torch::Tensor& x, const trained_side& side, const torch::Tensor& centre) {
    return is_plain(side.policy.format) ? x : apply(x, {{nothing(), nothing(), {}}, side, centre});
}

torch::Tensor rotate_through_cache(const torch::Tensor& x, const rotary_table& table,
                                   const trained_side& side, const torch::Tensor& centre) {
    return apply(x, {table, side, centre});
}

} // namespace kv1_train
