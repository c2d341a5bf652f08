// SPDX-License-Identifier: Apache-2.0
//
// Prints a digest of everything that kv1 stores or refuses, for many vectors, line by line of target,
// quantizer and kind of vector. Compiled with different flags the program must print the same; so it avoids
// floating-point arithmetic of its own where flags could change it.
//
//   codes [flush]    flush: denormal numbers are taken for zero, in operands and results
#include <kv1/convert.hpp>
#include <kv1/kv_cache.hpp>
#include <kv1/row.hpp>

#include <array>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <span>
#include <string_view>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

void flush_denormals() {
#if defined(__x86_64__)
    _mm_setcsr(_mm_getcsr() | 0x8040u); // flush-to-zero, denormals-are-zero
#elif defined(__aarch64__)
    std::uint64_t control = 0;
    __asm__ volatile("mrs %0, fpcr" : "=r"(control));
    __asm__ volatile("msr fpcr, %0" : : "r"(control | 1u << 24));
#endif
}

class digest { // FNV-1a
public:
    template <class T>
    void add(const T& value) {
        unsigned char bytes[sizeof(T)];
        std::memcpy(bytes, &value, sizeof(T));
        for (const unsigned char b : bytes)
            state_ = (state_ ^ b) * 1099511628211u;
    }
    std::uint64_t value() const { return state_; }

private:
    std::uint64_t state_ = 14695981039346656037u;
};

struct generator {
    std::uint64_t state;
    std::uint32_t next() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return static_cast<std::uint32_t>(state >> 33); // 31 bits
    }
};

// An integer times a power of two: exact, whatever the flags.
float scaled(std::int32_t n, int exponent) {
    const bool negative = n < 0;
    std::uint32_t magnitude = static_cast<std::uint32_t>(negative ? -n : n);
    if (magnitude == 0)
        return 0.0f;
    const int top = 31 - std::countl_zero(magnitude); // below 24: fits the mantissa
    magnitude = (magnitude << (23 - top)) & 0x7fffffu;
    return std::bit_cast<float>((negative ? 0x80000000u : 0u) |
                                static_cast<std::uint32_t>(top + exponent + 127) << 23 | magnitude);
}

enum class kind { random, grid, tiny, zeros, mixed, large, non_finite };
constexpr std::array kinds{kind::random, kind::grid,  kind::tiny,      kind::zeros,
                           kind::mixed,  kind::large, kind::non_finite};
constexpr const char* kind_names[] = {"random", "grid", "tiny", "zeros", "mixed", "large", "non-finite"};

void fill(kind k, generator& g, std::span<float> x) {
    // grid: steps and half steps of a scale that is no power of two, so that quotients are exact ties
    const auto step = static_cast<std::int32_t>(g.next() % 2000 + 3) * 2;
    const auto levels = static_cast<std::int32_t>((1u << (g.next() % 8 + 1)) - 1);
    for (std::size_t i = 0; i < x.size(); ++i) {
        const std::uint32_t r = g.next();
        switch (k) {
        case kind::random:
            x[i] = scaled(static_cast<std::int32_t>(r % 0x1000000u) - 0x800000, -22);
            break;
        case kind::grid: {
            const std::int32_t half_steps =
                i == 0   ? 0
                : i == 1 ? 2 * levels
                         : static_cast<std::int32_t>(r % (2u * static_cast<unsigned>(levels) + 1u));
            x[i] = scaled(half_steps * (step / 2), -10);
            break;
        }
        case kind::tiny: // denormals of both signs
            x[i] = std::bit_cast<float>((r & 1u) << 31 | (r >> 1) % 0x800000u);
            break;
        case kind::zeros:
            x[i] = std::bit_cast<float>((r & 1u) << 31);
            break;
        case kind::mixed: // magnitudes from denormal to 2^8: the order of a sum matters
            x[i] = std::bit_cast<float>((r & 1u) << 31 | ((r >> 1) % 135u) << 23 | g.next() % 0x800000u);
            break;
        case kind::large: // to both sides of what fp16 holds
            x[i] = scaled(static_cast<std::int32_t>(r % 0x20000u) - 0x10000, 0);
            break;
        case kind::non_finite:
            x[i] = scaled(static_cast<std::int32_t>(r % 256u) - 128, -4);
            break;
        }
    }
    if (k == kind::non_finite) {
        const std::uint32_t bits[] = {0x7f800000u, 0xff800000u, 0x7fc00000u, 0xffc00001u, 0x7f800001u};
        x[g.next() % x.size()] = std::bit_cast<float>(bits[g.next() % 5]);
    }
}

template <class Q>
void encode(const char* name, kv1::target t) {
    for (const kind k : kinds) {
        generator g{static_cast<std::uint64_t>(Q::bits) * 1000 + static_cast<std::uint64_t>(k)};
        digest d;
        std::size_t refused = 0;
        for (std::size_t round = 0; round < 600; ++round) {
            std::vector<float> x(g.next() % 140 + 1);
            fill(k, g, x);
            std::vector<std::uint8_t> codes(x.size());
            typename Q::metadata metadata{};
            const kv1::status s = kv1::try_quantize<Q>(x, codes, metadata);
            d.add(s.code());
            d.add(s.where().channel);
            for (const std::uint8_t c : codes)
                d.add(c);
            if constexpr (requires { metadata.scale; })
                d.add(metadata.scale.bits());
            if constexpr (requires { metadata.minimum; })
                d.add(metadata.minimum.bits());
            // the plain definition as well
            const kv1::status again = Q::quantize(x, codes, metadata);
            d.add(again.code());
            for (const std::uint8_t c : codes)
                d.add(c);
            if constexpr (requires { metadata.scale; })
                d.add(metadata.scale.bits());
            refused += s ? 0u : 1u;
        }
        std::printf("%s %s%d %s: %016llx, %zu refused\n", to_string(t).data(), name, Q::bits,
                    kind_names[static_cast<int>(k)], static_cast<unsigned long long>(d.value()), refused);
    }
}

using cache_type = kv1::basic_kv_cache<
    kv1::formats<kv1::affine<2>, kv1::codebook2, kv1::codebook4, kv1::plain<kv1::float16>>>;

// Levels and codes chosen by what errors cost: correlated channels, exactly the same numbers with any flags.
kv1::vector_encoding weighted(std::size_t heads, std::size_t dim) {
    kv1::vector_encoding e{.levels = kv1::level_choice::least_squares};
    e.hadamard = kv1::rotation_width(dim);
    for (std::size_t i = 0; i < heads * dim * dim; ++i) {
        const std::size_t row = i / dim % dim, column = i % dim;
        e.error_weights.push_back(row == column           ? static_cast<float>(2 + row % 5)
                                  : row % 2 == column % 2 ? 0.0625f
                                                          : 0.0f);
    }
    return e;
}

// A basis of channels that lie dim / 4 apart, four by four: rows of a unit quaternion's matrix.
std::vector<float> quaternion_basis(std::size_t heads, std::size_t dim) {
    constexpr float a = 0.1f, b = 0.3f, c = 0.5f, d = 0.80622577f;
    constexpr float matrix[4][4] = {{a, -b, -c, -d}, {b, a, -d, c}, {c, d, a, -b}, {d, -c, b, a}};
    std::vector<float> all(heads * dim * dim);
    for (std::size_t i = 0; i < heads * dim; ++i)
        for (std::size_t k = 0; k < 4; ++k) {
            const std::size_t row = i % dim, apart = dim / 4;
            all[i * dim + k * apart + row % apart] = matrix[row / apart][k];
        }
    return all;
}

std::vector<float> vectors(kind k, generator& g, std::size_t count, std::size_t dim) {
    std::vector<float> x(count * dim);
    for (std::size_t i = 0; i < count; ++i)
        fill(k, g, std::span(x).subspan(i * dim, dim));
    return x;
}

// What a cache stores of tokens that are appended many at once.
enum class encoded { no, weighted, turning_in_basis };
void append(kv1::target t, kv1::kv_format format, encoded how) {
    for (const kind k : kinds) {
        generator g{static_cast<std::uint64_t>(k) + 77};
        digest d;
        std::size_t refused = 0;
        for (const std::size_t dim : {std::size_t{20}, std::size_t{64}, std::size_t{128}}) {
            constexpr std::size_t tokens = 150, heads = 2;
            kv1::layer_description layer{heads, dim, dim, format, format};
            if (how != encoded::no)
                layer.key_encoding = layer.value_encoding = weighted(heads, dim);
            if (how == encoded::turning_in_basis) {
                layer.key_encoding.basis = layer.value_encoding.basis = quaternion_basis(heads, dim);
                for (std::size_t i = 0; i < heads * dim; ++i)
                    layer.key_encoding.means.push_back(scaled(static_cast<std::int32_t>(i % 37) - 18, -4));
                for (std::size_t i = 0; i < dim / 2; ++i)
                    layer.rotary.frequencies.push_back(
                        scaled(1000 + static_cast<std::int32_t>(i), -static_cast<int>(i)));
            }
            auto cache = cache_type::create(kv1::uniform_cache(1, layer, 2 * tokens));
            const auto sequence = cache->try_create_sequence();
            const std::vector<float> x = vectors(k, g, tokens * heads, dim);
            const kv1::tensor_view view(x.data(), tokens, heads, dim);
            const kv1::status s = cache->try_append(*sequence, 0, view, view);
            d.add(s.code());
            d.add(s.where().token);
            refused += s ? 0u : 1u;
            if (!s)
                continue;
            std::vector<std::byte> packed(tokens * dim / 4);
            std::vector<kv1::float16> scales(tokens, kv1::float16(0.0f)),
                minima(format == kv1::kv_format::affine2 ? tokens : 0, kv1::float16(0.0f));
            for (const kv1::kv_side side : {kv1::kv_side::key, kv1::kv_side::value})
                for (std::size_t head = 0; head < heads; ++head) {
                    static_cast<void>(cache->try_export_rows(*sequence, 0, side, head, 0, tokens,
                                                             {packed, scales, minima}));
                    for (const std::byte b : packed)
                        d.add(b);
                    for (std::size_t i = 0; i < tokens; ++i) {
                        d.add(scales[i].bits());
                        d.add(minima.empty() ? 0u : minima[i].bits());
                    }
                }
        }
        std::printf("%s append %s%s %s: %016llx, %zu refused\n", to_string(t).data(),
                    kv1::to_string(format).data(),
                    how == encoded::no         ? ""
                    : how == encoded::weighted ? " weighted"
                                               : " turning, in a basis",
                    kind_names[static_cast<int>(k)], static_cast<unsigned long long>(d.value()), refused);
    }
}

// Full pages of keys per channel.
void seal(kv1::target t, kv1::kv_format format, bool weights) {
    for (const kind k : kinds) {
        generator g{static_cast<std::uint64_t>(k) + 99};
        digest d;
        std::size_t refused = 0;
        for (const std::size_t dim : {std::size_t{20}, std::size_t{64}}) {
            constexpr std::size_t tokens = 64, heads = 2;
            kv1::layer_description layer{heads, dim, dim, format, format};
            layer.key_axis = kv1::quantization_axis::per_channel;
            if (weights)
                layer.key_encoding = weighted(heads, dim);
            auto cache = cache_type::create(kv1::uniform_cache(1, layer, tokens, tokens));
            const auto sequence = cache->try_create_sequence();
            const std::vector<float> x = vectors(k, g, tokens * heads, dim);
            const kv1::tensor_view view(x.data(), tokens, heads, dim);
            const kv1::status s = cache->try_append(*sequence, 0, view, view);
            d.add(s.code());
            d.add(s.where().token);
            refused += s ? 0u : 1u;
            for (std::size_t head = 0; head < heads && s; ++head) {
                const auto page = cache->try_page(0, head, 0);
                for (const std::byte b : *page)
                    d.add(b);
            }
        }
        std::printf("%s channels %s%s %s: %016llx, %zu refused\n", to_string(t).data(),
                    kv1::to_string(format).data(), weights ? " weighted" : "",
                    kind_names[static_cast<int>(k)], static_cast<unsigned long long>(d.value()), refused);
    }
}

template <class T>
void convert(const char* name, kv1::target t) {
    digest narrowed, widened, scalars;
    generator g{7};
    std::vector<float> wide(1000);
    std::vector<T> narrow(wide.size());
    for (int round = 0; round < 100; ++round) {
        for (float& x : wide) // any bits at all
            x = std::bit_cast<float>(g.next() << 1 ^ g.next());
        static_cast<void>(kv1::try_convert<T>(std::span<const float>(wide), std::span<T>(narrow)));
        for (std::size_t i = 0; i < wide.size(); ++i) {
            narrowed.add(narrow[i].bits());
            scalars.add(T(wide[i]).bits());
        }
        for (T& h : narrow)
            h = T::from_bits(static_cast<std::uint16_t>(g.next()));
        static_cast<void>(kv1::try_convert<T>(std::span<const T>(narrow), std::span<float>(wide)));
        for (std::size_t i = 0; i < wide.size(); ++i) {
            widened.add(std::bit_cast<std::uint32_t>(wide[i]));
            scalars.add(std::bit_cast<std::uint32_t>(static_cast<float>(narrow[i])));
        }
    }
    std::printf("%s %s: %016llx %016llx %016llx\n", to_string(t).data(), name,
                static_cast<unsigned long long>(narrowed.value()),
                static_cast<unsigned long long>(widened.value()),
                static_cast<unsigned long long>(scalars.value()));
}

} // namespace

int main(int argc, char** argv) {
    if (argc > 1 && std::string_view(argv[1]) == "flush")
        flush_denormals();
    for (const kv1::target t : kv1::all_targets) {
        if (!kv1::try_set_target(t))
            continue;
        encode<kv1::affine<1>>("affine", t);
        encode<kv1::affine<2>>("affine", t);
        encode<kv1::affine<3>>("affine", t);
        encode<kv1::affine<4>>("affine", t);
        encode<kv1::affine<5>>("affine", t);
        encode<kv1::affine<6>>("affine", t);
        encode<kv1::affine<7>>("affine", t);
        encode<kv1::affine<8>>("affine", t);
        encode<kv1::scaled_binary>("scaled_binary", t);
        encode<kv1::binary>("binary", t);
        encode<kv1::compact<2>>("compact", t);
        encode<kv1::compact<3>>("compact", t);
        encode<kv1::codebook2>("codebook", t);
        encode<kv1::least_squares<kv1::codebook2>>("least_squares codebook", t);
        encode<kv1::codebook4>("codebook", t);
        encode<kv1::least_squares<kv1::codebook4>>("least_squares codebook", t);
        encode<kv1::least_squares<kv1::affine<2>>>("least_squares affine", t);
        encode<kv1::least_squares<kv1::compact<2>>>("least_squares compact", t);
        encode<kv1::clip_search<kv1::affine<2>>>("clip_search affine", t);
        encode<kv1::clip_search<kv1::compact<2>>>("clip_search compact", t);
        append(t, kv1::kv_format::affine2, encoded::no);
        append(t, kv1::kv_format::affine2, encoded::weighted);
        append(t, kv1::kv_format::codebook2, encoded::weighted);
        append(t, kv1::kv_format::codebook2, encoded::turning_in_basis);
        append(t, kv1::kv_format::codebook4, encoded::weighted);
        seal(t, kv1::kv_format::affine2, false);
        seal(t, kv1::kv_format::affine2, true);
        seal(t, kv1::kv_format::codebook2, true);
        convert<kv1::float16>("float16", t);
        convert<kv1::bfloat16>("bfloat16", t);
    }
}
