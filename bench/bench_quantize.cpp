// SPDX-License-Identifier: Apache-2.0
//
// Row-format encoding: quantize/<scheme>/<target>/d<channels>. Items are values, bytes are fp32 bytes read.

#include "support.hpp"

#include <kv1/row.hpp>

#include <array>

namespace {

template <kv1::quantizer Q>
void encode(benchmark::State& state, std::size_t channels) {
    constexpr std::size_t rows = 256;
    const std::vector<float> x = bench::normal_values(rows * channels, 1);
    std::vector<std::byte> packed(kv1::packed_size<Q::bits>(channels));
    typename Q::metadata metadata{};
    for (auto _ : state)
        for (std::size_t r = 0; r < rows; ++r) {
            kv1::encode_row<Q>(std::span(x).subspan(r * channels, channels), packed, metadata);
            benchmark::DoNotOptimize(packed.data());
        }
    const auto values = state.iterations() * static_cast<std::int64_t>(rows * channels);
    state.SetItemsProcessed(values);
    state.SetBytesProcessed(values * 4);
}

template <kv1::quantizer Q>
void register_scheme(const std::string& name) {
    for (const kv1::target t : bench::supported_targets())
        for (const std::size_t channels : {std::size_t{32}, std::size_t{128}})
            bench::register_on(t,
                               "quantize/" + name + "/" + bench::name_of(t) + "/d" + std::to_string(channels),
                               [channels](benchmark::State& state) { encode<Q>(state, channels); });
}

} // namespace

int main(int argc, char** argv) {
    register_scheme<kv1::affine<2>>("affine2");
    register_scheme<kv1::affine<3>>("affine3");
    register_scheme<kv1::affine<4>>("affine4");
    register_scheme<kv1::affine<8>>("affine8");
    register_scheme<kv1::scaled_binary>("scaled_binary");
    register_scheme<kv1::binary>("binary");
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv))
        return 1;
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
}
