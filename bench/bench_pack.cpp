// SPDX-License-Identifier: Apache-2.0
//
// Bulk packing: pack|unpack/<bits>/<target>. Items are codes, bytes are packed bytes.

#include "support.hpp"

#include <kv1/packed_vector.hpp>

namespace {

constexpr std::size_t codes_count = std::size_t{1} << 16;

template <int Bits>
std::vector<std::uint8_t> random_codes() {
    std::mt19937 generator(1);
    std::vector<std::uint8_t> codes(codes_count);
    std::generate(codes.begin(), codes.end(),
                  [&] { return static_cast<std::uint8_t>(generator() & ((1u << Bits) - 1u)); });
    return codes;
}

void count(benchmark::State& state, std::size_t bytes) {
    state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(codes_count));
    state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(bytes));
}

template <int Bits>
void register_width() {
    for (const kv1::target t : bench::supported_targets()) {
        const std::string suffix = std::to_string(Bits) + "/" + bench::name_of(t);
        bench::register_on(t, "pack/" + suffix, [](benchmark::State& state) {
            const std::vector<std::uint8_t> codes = random_codes<Bits>();
            kv1::packed_vector<Bits> packed(codes_count);
            for (auto _ : state) {
                packed.span().pack(codes);
                benchmark::DoNotOptimize(packed.span().data());
            }
            count(state, packed.bytes().size());
        });
        bench::register_on(t, "unpack/" + suffix, [](benchmark::State& state) {
            const kv1::packed_vector<Bits> packed(random_codes<Bits>());
            std::vector<std::uint8_t> codes(codes_count);
            for (auto _ : state) {
                packed.span().unpack(codes);
                benchmark::DoNotOptimize(codes.data());
            }
            count(state, packed.bytes().size());
        });
    }
}

} // namespace

int main(int argc, char** argv) {
    register_width<1>();
    register_width<2>();
    register_width<3>();
    register_width<4>();
    register_width<8>();
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv))
        return 1;
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
}
