// SPDX-License-Identifier: Apache-2.0
//
// Attention over keys and values as they are and through the cache: against the definition, a query at a time.
#include "attention.hpp"

#include <catch2/catch_test_macros.hpp>

#include <torch/autograd.h>
#include <torch/torch.h>

#include <cmath>
#include <string>
#include <vector>

using torch::Tensor;

namespace {

// Query by query, in double.
Tensor by_definition(const Tensor& q, const Tensor& plain_k, const Tensor& plain_v, const Tensor& k,
                     const Tensor& v, std::int64_t window) {
    const auto wide = [](const Tensor& x) { return x.detach().to(torch::kFloat64); };
    const Tensor wq = wide(q), wpk = wide(plain_k), wpv = wide(plain_v), wk = wide(k), wv = wide(v);
    const std::int64_t heads = q.size(2), dim = q.size(3), group = heads / k.size(2);
    Tensor out = torch::zeros({q.size(0), q.size(1), heads * dim}, torch::kFloat64);
    for (std::int64_t b = 0; b < q.size(0); ++b)
        for (std::int64_t i = 0; i < q.size(1); ++i)
            for (std::int64_t h = 0; h < heads; ++h) {
                std::vector<Tensor> keys, values;
                for (std::int64_t j = 0; j <= i; ++j) {
                    const bool plain = j > i - window;
                    keys.push_back((plain ? wpk : wk)[b][j][h / group]);
                    values.push_back((plain ? wpv : wv)[b][j][h / group]);
                }
                const Tensor scores = torch::matmul(torch::stack(keys), wq[b][i][h]) / std::sqrt(double(dim));
                out[b][i].narrow(0, h * dim, dim) =
                    torch::matmul(torch::softmax(scores, 0).unsqueeze(0), torch::stack(values)).squeeze(0);
            }
    return out;
}

struct inputs {
    Tensor q, plain_k, plain_v, k, v;
    inputs(std::int64_t length, std::int64_t dim, torch::TensorOptions options) {
        const auto make = [&](std::int64_t heads) {
            return torch::randn({2, length, heads, dim}, options).requires_grad_(true);
        };
        q = make(4);
        for (Tensor* x : {&plain_k, &plain_v, &k, &v})
            *x = make(2);
    }
    [[nodiscard]] std::vector<Tensor> all() const { return {q, plain_k, plain_v, k, v}; }
};

} // namespace

TEST_CASE("A query sees its window as it is, and the rest through the cache", "[train]") {
    torch::manual_seed(1);
    const inputs x(23, 8, torch::kFloat32);
    for (const std::int64_t window : {0, 1, 4, 16, 22, 23, 40}) {
        INFO("window " << window);
        const Tensor expected = by_definition(x.q, x.plain_k, x.plain_v, x.k, x.v, window);
        const Tensor out = kv1_train::attend(x.q, x.plain_k, x.plain_v, x.k, x.v, window);
        // fp32 sums of 23 terms of size 1
        REQUIRE((out - expected).abs().max().item<double>() < 1e-5);
    }
}

TEST_CASE("Attention's parts, joined by their log-sum-exp, have the output and gradients of the whole",
          "[train]") {
    if (!torch::cuda::is_available())
        SKIP("FlashAttention needs a GPU");
    torch::manual_seed(2);
    const inputs x(200, 64, torch::dtype(torch::kBFloat16).device(torch::kCUDA));
    const Tensor dout = torch::randn({2, 200, 256}, torch::dtype(torch::kBFloat16).device(torch::kCUDA));
    for (const std::int64_t window : {0, 1, 32, 64, 50, 199}) {
        INFO("window " << window);
        const auto run = [&](auto attend, torch::ScalarType type) {
            std::vector<Tensor> leaves;
            for (const Tensor& t : x.all())
                leaves.push_back(t.detach().to(type).requires_grad_(true));
            const Tensor out = attend(leaves[0], leaves[1], leaves[2], leaves[3], leaves[4], window);
            out.backward(dout.to(type));
            std::vector<Tensor> results{out.detach().to(torch::kFloat32)};
            for (const Tensor& leaf : leaves)
                results.push_back(leaf.grad().defined() ? leaf.grad().to(torch::kFloat32)
                                                        : torch::zeros_like(leaf, torch::kFloat32));
            return results;
        };
        const auto whole = run(kv1_train::attend_by_operations, torch::kFloat32);
        const auto parts =
            run([](const Tensor& q, const Tensor& pk, const Tensor& pv, const Tensor& k, const Tensor& v,
                   std::int64_t t) { return kv1_train::attend(q, pk, pv, k, v, t); },
                torch::kBFloat16);
        for (std::size_t i = 0; i < whole.size(); ++i) {
            INFO("result " << i);
            // Probabilities, outputs and gradients are rounded to bf16's 8 bits a few times on the way.
            const double error = (parts[i] - whole[i]).norm().item<double>(),
                         size = whole[i].norm().item<double>();
            REQUIRE(error <= 4 * 0x1p-8 * size);
        }
    }
}
