// SPDX-License-Identifier: Apache-2.0
//
// The trainer's parts against what they are to be: the reference's logits, autograd, kv1's fake quantization,
// the text.
#include "batch_reader.hpp"
#include "cache_path.hpp"
#include "language_model.hpp"
#include "loss.hpp"
#include "optimizer.hpp"
#include "safetensors.hpp"
#include "safetensors_reader.hpp"
#include "sampler_order.hpp"
#include "shipped_model.hpp"
#include "token_file.hpp"
#include "tokenizer.hpp"
#include "training_fixture.hpp"

#include "compare.hpp"

#include <kv1/fake_quantize.hpp>
#include <kv1/kv_cache.hpp>

#include <catch2/generators/catch_generators.hpp>
#include <catch2/matchers/catch_matchers.hpp>

#include <torch/autograd.h>
#include <torch/cuda.h>
#include <torch/utils.h>

#include <algorithm>
#include <set>

using torch::Tensor;

namespace {

bool near(const Tensor& a, const Tensor& b, double tolerance) {
    return (a - b).abs().max().item<double>() <= tolerance;
}

// Factors of error weights for rotated vectors: errors in a few directions cost most.
Tensor error_factors(std::int64_t heads, std::int64_t channels) {
    const Tensor few = torch::randn({heads, channels, channels / 4});
    const Tensor weights = torch::matmul(few, few.transpose(1, 2)).contiguous();
    Tensor factors = torch::empty_like(weights);
    const auto n = static_cast<std::size_t>(channels);
    for (std::int64_t h = 0; h < heads; ++h)
        REQUIRE(kv1::try_factor_error_weights(n, {weights[h].data_ptr<float>(), n * n},
                                              {factors[h].data_ptr<float>(), n * n}, {.hadamard = true}));
    return factors;
}

} // namespace

TEST_CASE("The model's logits are the reference's, whatever its keys and values go through", "[train]") {
    const torch::NoGradGuard no_gradient;
    const std::filesystem::path folder = KV1_LM_MODEL_DIR;
    kv1_train::language_model model(kv1_lm::model_config::read(folder / "config.json"), torch::kCPU);
    model.load(kv1_lm::safetensors::read(folder / "model.safetensors"));
    const kv1_test::safetensors_file file(KV1_TEST_DATA_DIR "/model.safetensors");

    for (std::size_t which = 0; which < 2; ++which) {
        const nlohmann::json& greedy = kv1_test::golden().at("greedy").at(which);
        std::vector<std::int64_t> ids = greedy.at("ids");
        ids.resize(greedy.at("prompt_tokens").get<std::size_t>());
        for (const auto& [bits, text] : {std::pair{"0", "32"}, {"1", "1"}, {"1.5", "1.5"}, {"2", "2"}}) {
            const std::string name = "prompt" + std::to_string(which) + ".bits" + bits + ".logits";
            INFO(name);
            kv1_train::training_policy kv = kv1_train::parse_policy(text, "--kv");
            kv.round_metadata = true;
            const Tensor logits = model.logits(torch::tensor(ids).unsqueeze(0), kv, torch::kFloat32);
            // as for kv1-lm: fp32 sums in another order
            REQUIRE(near(logits, torch::tensor(file.values<float>(name)).view(logits.sizes()), 2e-3));
        }
    }
}

TEST_CASE("A policy is trained for as far as it has a gradient", "[train]") {
    using kv1::kv_format;
    const kv1_train::training_policy p =
        kv1_train::parse_policy("c3+ls+had,c2+mean/0:c2/11:c3+cs,16", "--kv");
    REQUIRE(p.key(1).policy == kv1::vector_policy{.format = kv_format::compact3,
                                                  .levels = kv1::level_choice::least_squares,
                                                  .hadamard = true});
    REQUIRE(p.value(1).policy.means);
    REQUIRE(p.key(0).policy.format == kv_format::compact2);
    REQUIRE(p.key(11).policy.levels == kv1::level_choice::clip_search);
    REQUIRE(p.value(11).policy.format == kv_format::fp16);
    REQUIRE(kv1_train::parse_policy(to_string(p), "--kv") == p);
    REQUIRE(kv1_train::parse_policy("c2+ls@4:32", "--kv").cache.fp16_window == 32);
    kv1_train::check_layers(p, 12, "--kv");
    REQUIRE_THROWS_WITH(kv1_train::check_layers(p, 11, "--kv"),
                        "--kv: layer 11: the model has layers 0 to 10");
    for (const auto& [text, why] :
         {std::pair{"c3,c2/0", "--kv 'c3,c2/0': invalid argument: a layer that differs is written "
                               "/LAYER:KEYS,VALUES (position 7)"},
          {"c2+ls+basis,c2", "--kv 'c2+ls+basis,c2': training has no +basis, +channel and +g"},
          {"2/1:2+channel,2", "--kv '2/1:2+channel,2': training has no +basis, +channel and +g"},
          {"2,2+g32", "--kv '2,2+g32': training has no +basis, +channel and +g"},
          {"16+had", "--kv '16+had': 16 and 32 take no options"},
          {"2,1.5+ls", "--kv '2,1.5+ls': 1 and 1.5 take no +ls and +cs"},
          {"2#128", "--kv '2#128': training has no pages (#)"}})
        REQUIRE_THROWS_WITH(kv1_train::parse_policy(text, "--kv"), why);
}

TEST_CASE("A layer's own formats are what its keys and values go through", "[train]") {
    const torch::NoGradGuard no_gradient;
    const std::filesystem::path folder = KV1_LM_MODEL_DIR;
    kv1_train::language_model model(kv1_lm::model_config::read(folder / "config.json"), torch::kCPU);
    model.load(kv1_lm::safetensors::read(folder / "model.safetensors"));
    const Tensor tokens = torch::arange(40, torch::kInt64).unsqueeze(0);
    const auto logits = [&](const char* formats) {
        return model.logits(tokens, kv1_train::parse_policy(formats, "--kv"), torch::kFloat32);
    };
    std::string all = "16";
    for (std::size_t i = 0; i < model.config().layers; ++i)
        all.append("/").append(std::to_string(i)).append(":2");
    REQUIRE(torch::equal(logits(all.c_str()), logits("2")));
    REQUIRE_FALSE(torch::equal(logits("2/3:16"), logits("2")));
    REQUIRE_FALSE(torch::equal(logits("2/3:16"), logits("2/4:16")));
}

TEST_CASE("Rotation's gradient is its own inverse, and quantization lets it through", "[train]") {
    torch::manual_seed(3);
    const auto pairs = GENERATE(kv1::rotary_pairs::interleaved, kv1::rotary_pairs::half_split);
    const auto table = kv1_train::rotary_table::make(10, 8, 10000.0f, pairs, torch::kCPU);
    const Tensor x = torch::randn({2, 10, 3, 8}).requires_grad_(true), dy = torch::randn({2, 10, 3, 8});
    const Tensor turned = kv1_train::rotate(x, table);
    turned.backward(dy);
    // rotations keep lengths, and products with what is turned alike
    REQUIRE(near(turned.square().sum(-1), x.square().sum(-1), 1e-5));
    REQUIRE(near((turned * dy).sum(-1), (x * x.grad()).sum(-1), 1e-5));

    const Tensor y = x.detach().clone().requires_grad_(true);
    kv1_train::through_cache(y, {{.hadamard = true}}, {}).backward(dy);
    REQUIRE(torch::equal(y.grad(), dy));
}

TEST_CASE("Tensors go through the cache as kv1's fake quantization says, head by head", "[train]") {
    torch::manual_seed(4);
    const Tensor x = torch::randn({2, 5, 3, 32}), centre = torch::randn({3, 32});
    const Tensor factors = error_factors(3, 32);
    for (const char* text :
         {"3+ls+had+mean", "c2+ls+had+mean", "2+cs+had+mean", "c3+had+mean", "c3+ls+had+mean+ew"}) {
        const kv1_train::trained_side side{kv1::parse_policy(text).common.key, true};
        const Tensor y = kv1_train::through_cache(x, side, {centre, false, factors});
        for (std::int64_t row = 0; row < 30; ++row) {
            const auto values = [](const Tensor& t, std::int64_t i) {
                return std::span<const float>(t.data_ptr<float>() + 32 * i, 32);
            };
            std::vector<float> expected(32);
            kv1::fake_quantize_options o{
                .levels = side.policy.levels, .hadamard = true, .centre = values(centre, row % 3)};
            if (side.policy.error_weights)
                o.error_factors = {factors.data_ptr<float>() + row % 3 * 32 * 32, 32 * 32};
            kv1::fake_quantize(side.policy.format, 32, values(x, row), expected, o);
            REQUIRE(kv1_test::same_bits(values(y, row), expected));
        }
    }
}

TEST_CASE("Keys and their means turn as in a cache, and its sinks stay as they are", "[train]") {
    torch::manual_seed(8);
    constexpr std::int64_t positions = 40, heads = 2, dim = 32, sinks = 3;
    const auto pairs = GENERATE(kv1::rotary_pairs::interleaved, kv1::rotary_pairs::half_split);
    const auto table = kv1_train::rotary_table::make(positions + 9, dim, 1e4f, pairs, torch::kCPU);
    const Tensor means = torch::randn({heads, dim}) * 3;
    const Tensor x = (torch::randn({2, positions, heads, dim}) + means).requires_grad_(true);
    const kv1_train::trained_side side{kv1::parse_policy("c2+ls+had+mean").common.key, true};
    const auto seen = kv1_train::rotate_through_cache(x, table, side, {means, true}, sinks, true);
    REQUIRE(torch::equal(seen.plain, kv1_train::rotate(x.detach(), table)));

    kv1::layer_description layer{heads, dim, dim, kv1::kv_format::compact2, kv1::kv_format::fp32};
    layer.key_encoding = {.levels = kv1::level_choice::least_squares};
    layer.key_encoding.hadamard = kv1::rotation_width(dim);
    layer.key_encoding.means.assign(means.data_ptr<float>(), means.data_ptr<float>() + heads * dim);
    layer.rotary = {kv1::rotary_frequencies(1e4, dim), pairs};
    for (std::int64_t b = 0; b < 2; ++b) {
        const Tensor plain = seen.plain[b].detach().contiguous(),
                     cached = seen.cached[b].detach().contiguous();
        REQUIRE(torch::equal(cached.narrow(0, 0, sinks), plain.narrow(0, 0, sinks)));
        kv1::kv_cache cache(kv1::uniform_cache(1, layer, positions));
        const kv1::sequence_id sequence = cache.create_sequence();
        const kv1::tensor_view keys(plain.data_ptr<float>(), positions, heads, dim);
        cache.append(sequence, 0, keys, keys);
        for (std::int64_t h = 0; h < heads; ++h) {
            std::vector<float> back(positions * dim);
            cache.read(sequence, 0, kv1::kv_side::key, static_cast<std::size_t>(h), 0, positions, back);
            const Tensor expected = torch::tensor(back).view({positions, dim});
            REQUIRE(torch::equal(cached.select(1, h).narrow(0, sinks, positions - sinks),
                                 expected.narrow(0, sinks, positions - sinks)));
        }
    }

    // the gradients of both are turned back, and meet
    const Tensor to_cached = torch::randn_like(x), to_plain = torch::randn_like(x);
    (seen.cached * to_cached + seen.plain * to_plain).sum().backward();
    const Tensor y = x.detach().clone().requires_grad_(true);
    (kv1_train::rotate(y, table) * (to_cached + to_plain)).sum().backward();
    REQUIRE(near(x.grad(), y.grad(), 1e-5));
    const auto alone = kv1_train::rotate_through_cache(x.detach(), table, side, {means, true}, sinks);
    REQUIRE(torch::equal(alone.cached, seen.cached));
    REQUIRE_FALSE(alone.plain.defined());
}

TEST_CASE("Tensors go through the cache on a GPU as on a processor", "[train]") {
    if (!torch::cuda::is_available())
        SKIP("no GPU");
    torch::manual_seed(9);
    for (const auto pairs : {kv1::rotary_pairs::interleaved, kv1::rotary_pairs::half_split})
        for (const std::int64_t dim : {32, 64, 96, 128})
            for (const char* text :
                 {"c2+ls+had+mean", "3+ls+mean", "c3+had", "c2+ls+had+mean+ew", "3+ls+had+ew"}) {
                INFO(text << ", " << dim << " channels");
                const kv1_train::trained_side side{kv1::parse_policy(text).common.key, true};
                const Tensor means = torch::randn({3, dim}) * 3, x = torch::randn({2, 50, 3, dim}) + means;
                const Tensor factors = error_factors(3, dim);
                const auto seen = [&](torch::Device device) {
                    const Tensor in = x.to(device).detach().requires_grad_(true);
                    const auto both = kv1_train::rotate_through_cache(
                        in, kv1_train::rotary_table::make(50, dim, 1e5f, pairs, device), side,
                        {means.to(device), true, factors.to(device)}, 4, true);
                    (both.cached * 2 + both.plain * both.plain.detach()).sum().backward();
                    return std::vector<Tensor>{both.cached.cpu(), both.plain.cpu(), in.grad().cpu()};
                };
                const auto there = seen(torch::kCUDA), here = seen(torch::kCPU);
                REQUIRE(near(there[1], here[1], 1e-5));
                REQUIRE(near(there[2], here[2], 1e-4));
                // Sums of a warp have another order, so that a number halfway between two codes may get the other.
                const double others =
                    (there[0] - here[0]).abs().gt(1e-4).to(torch::kFloat64).mean().item<double>();
                REQUIRE(others < 0.01);
            }
}

TEST_CASE("The loss's gradient is the one that autograd finds", "[train]") {
    torch::manual_seed(5);
    const Tensor logits = torch::randn({6, 17}).requires_grad_(true), teacher = torch::randn({6, 17});
    const Tensor targets = torch::randint(17, {6}, torch::kInt64);
    const Tensor log_p = torch::log_softmax(logits, 1), log_t = torch::log_softmax(teacher, 1);
    const Tensor cross_entropy = -log_p.gather(1, targets.unsqueeze(1)).mean();
    const Tensor divergence = (log_t.exp() * (log_t - log_p)).sum(1).mean();
    (3.0 * (0.75 * cross_entropy + 0.25 * divergence)).backward();

    const auto loss = kv1_train::loss_of(logits.detach(), targets, teacher, 0.25, 3.0);
    REQUIRE(near(loss.cross_entropy, cross_entropy.detach(), 1e-6));
    REQUIRE(near(loss.divergence, divergence.detach(), 1e-6));
    REQUIRE(near(loss.gradient, logits.grad(), 1e-6));
}

TEST_CASE("AdamW's first steps are what its formula says", "[train]") {
    Tensor weights = torch::tensor({1.0f, 2.0f}), gradients = torch::tensor({0.5f, -0.25f});
    kv1_train::adamw optimizer(weights, 1,
                               {.beta1 = 0.9, .beta2 = 0.95, .epsilon = 0.0, .weight_decay = 0.1});
    optimizer.update(weights, gradients, 0.01, 0);
    // the first step goes a whole rate against the gradient's sign; one weight decays, the other does not
    REQUIRE(near(weights, torch::tensor({1.0f - 0.001f - 0.01f, 2.0f + 0.01f}), 1e-6));
    optimizer.update(weights, gradients, 0.01, 1);
    REQUIRE(near(weights[1], torch::tensor(2.0f + 0.02f), 1e-6));
}

TEST_CASE("The rate climbs, and falls along a cosine", "[train]") {
    const kv1_train::schedule s{.peak = 1.0, .last = 0.1, .warmup = 4, .steps = 104};
    REQUIRE(s.rate(0) == 0.25);
    REQUIRE(s.rate(3) == 1.0);
    REQUIRE(s.rate(54) == 0.1 + 0.5 * 0.9);
    REQUIRE(s.rate(104) == 0.1);
}

TEST_CASE("Every epoch reads each window once, in an order of its own", "[train]") {
    constexpr kv1_train::sample_order order{.seed = 9, .tokens = 10007, .length = 100};
    constexpr std::uint64_t windows = order.windows();
    STATIC_REQUIRE(windows == 99);
    std::vector<std::size_t> earlier;
    for (std::uint64_t epoch = 0; epoch < 20; ++epoch) {
        std::vector<std::size_t> starts;
        for (std::uint64_t n = 0; n < windows; ++n)
            starts.push_back(order.start(epoch * windows + n));
        REQUIRE(starts != earlier);
        earlier = starts;
        std::ranges::sort(starts);
        REQUIRE(starts.back() + order.length < order.tokens);
        for (std::size_t i = 1; i < starts.size(); ++i)
            REQUIRE(starts[i] - starts[i - 1] == order.length);
    }
    constexpr kv1_train::sample_order single{.seed = 9, .tokens = 150, .length = 100};
    REQUIRE(single.windows() == 1);
    for (std::uint64_t n = 0; n < 50; ++n)
        REQUIRE(single.start(n) + 100 < 150);
}

TEST_CASE("Packed text is the tokenizer's ids, also across shards", "[train]") {
    const kv1_test::training_fixture f;
    const auto words = kv1_lm::tokenizer::read(f.path() / "model/tokenizer.json");
    std::vector<std::int32_t> ids = words.encode(kv1_test::training_fixture::text());
    ids.push_back(*words.id_of("<|end|>"));
    const std::vector<std::int64_t> expected(ids.begin(), ids.end());

    const auto packed = kv1_test::run_kv1_train({"pack", "--text", f.file("text.txt"), "--tokenizer",
                                                 f.file("model"), "--out", f.file("shards"), "--document-end",
                                                 "<|end|>", "--shard-tokens", "100"});
    REQUIRE(packed.code == 0);
    for (const char* folder : {"tokens", "shards"}) {
        const auto text = kv1_train::token_file::open(f.path() / folder);
        REQUIRE(text.size() == expected.size());
        std::vector<std::int64_t> all(expected.size());
        text.read(0, all);
        REQUIRE(all == expected);
        std::vector<std::int64_t> part(250);
        text.read(95, part);
        REQUIRE(std::equal(part.begin(), part.end(), expected.begin() + 95));
    }
}

TEST_CASE("Ids of a vocabulary that two bytes do not hold are packed in four", "[train]") {
    const kv1_test::training_fixture f;
    const std::vector<std::int32_t> ids{5, 65535, 65536, 151642, 0, 70000};
    kv1_train::token_writer writer(f.path() / "wide", 151643, 4);
    writer.append(ids);
    writer.finish();
    const auto text = kv1_train::token_file::open(f.path() / "wide");
    std::vector<std::int64_t> read(ids.size());
    text.read(0, read);
    REQUIRE(std::ranges::equal(read, ids));
}

TEST_CASE("kv1-train says in a line what is wrong with its input", "[train]") {
    const kv1_test::training_fixture f;
    const auto refused = [&](std::vector<std::string> arguments, const std::string& why) {
        const auto result = kv1_test::run_kv1_train(arguments);
        INFO(result.err);
        REQUIRE(result.code == 2);
        REQUIRE(std::ranges::count(result.err, '\n') == 1);
        REQUIRE(result.err.find(why) != std::string::npos);
    };
    refused({"train"}, "is required");
    refused(f.train("run", {"--kv", "5"}), "--kv '5': invalid argument: a policy begins with");
    refused(f.train("run", {"--micro-batch", "3"}), "does not divide");
    refused(f.train("run", {"--init"}), "model.safetensors");
    refused({"pack", "--text", f.file("text.txt"), "--tokenizer", f.file("model"), "--out", f.file("tokens"),
             "--document-end", "<|end|>"},
            "exists already");
    refused({"pack", "--text", f.file("text.txt"), "--tokenizer", f.file("model"), "--out", f.file("more")},
            "the tokenizer has no token");
}
