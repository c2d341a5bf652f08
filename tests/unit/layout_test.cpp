// SPDX-License-Identifier: Apache-2.0
//
// The tile layout, exhaustively for small shapes, and literally as design documents describe it.
#include "compare.hpp"
#include "packed_model.hpp"
#include "random.hpp"

#include <kv1/detail/cache_rows.hpp>
#include <kv1/detail/page_fields.hpp>
#include <kv1/layout.hpp>

#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

using kv1::kv_format;
using kv1::page_layout;
using kv1::section_layout;
using kv1_test::tally;

namespace {

constexpr std::array<std::size_t, 5> page_sizes{16, 32, 48, 64, 128};

std::vector<std::size_t> dims() {
    std::vector<std::size_t> list;
    for (std::size_t d = 1; d <= 40; ++d)
        list.push_back(d);
    list.insert(list.end(), {64, 80, 96, 127, 128, 192, 256});
    return list;
}

// Width of a stored code or value.
std::size_t bits_of_value(kv_format f) { return 8 * kv1::packed_bytes(f, 8) / 8; }

// body(section, page bytes): both sides of a page, for every format, dim and page size.
template <class F>
void for_each_section(F&& body) {
    for (const kv_format f : kv1::all_kv_formats)
        for (const std::size_t d : dims())
            for (const std::size_t tokens : page_sizes) {
                const page_layout layout(f, d, f, d, tokens);
                body(layout.keys(), layout);
                body(layout.values(), layout);
            }
}

std::string describe(const section_layout& s) {
    return std::string(to_string(s.format)) + (s.keys ? " K " : " V ") + std::to_string(s.channels) +
           " channels, " + std::to_string(s.tokens) + " tokens";
}

std::vector<std::byte> random_page(kv1_test::generator& g, std::size_t bytes) {
    std::vector<std::byte> page(bytes);
    for (auto& b : page)
        b = static_cast<std::byte>(g.bits() & 0xff);
    return page;
}

} // namespace

TEST_CASE("every field of every token and channel has bits of its own inside its section", "[layout]") {
    tally t;
    for_each_section([&](const section_layout& s, const page_layout&) {
        std::vector<std::uint32_t> used(s.bytes() / 4, 0);
        bool inside = true, apart = true;
        for (int p = 0; p < s.traits().slice_count(); ++p) {
            const std::uint32_t mask = kv1::detail::field_mask(s.traits().field_bits(p));
            for (std::size_t token = 0; token < s.tokens; ++token)
                for (std::size_t c = 0; c < s.channels; ++c) {
                    const kv1::detail::field_place at = s.place(p, token, c);
                    if (at.lane >= used.size() || at.shift < 0 || at.shift + s.traits().field_bits(p) > 32) {
                        inside = false;
                        continue;
                    }
                    apart = apart && (used[at.lane] & mask << at.shift) == 0;
                    used[at.lane] |= mask << at.shift;
                }
        }
        t.expect(inside, describe(s), "reaches outside");
        t.expect(apart, describe(s), "overlaps itself");
    });
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("sections and metadata follow each other in whole lines and do not overlap", "[layout]") {
    tally t;
    for (const kv_format kf : kv1::all_kv_formats)
        for (const kv_format vf : kv1::all_kv_formats)
            for (const std::size_t d : dims())
                for (const std::size_t tokens : page_sizes) {
                    const page_layout layout(kf, d, vf, d + 3, tokens);
                    std::size_t at = 0;
                    for (const section_layout* s : {&layout.keys(), &layout.values()}) {
                        t.expect(s->offset == at && s->bytes() % 64 == 0, describe(*s));
                        at += s->bytes();
                    }
                    for (const section_layout* s : {&layout.keys(), &layout.values()}) {
                        const std::size_t metadata = s->traits().metadata_bytes();
                        if (metadata >= 2) {
                            t.expect(s->scale_offset == at, describe(*s), "scales");
                            at += 2 * tokens;
                        }
                        if (metadata == 4) {
                            t.expect(s->minimum_offset == at, describe(*s), "minima");
                            at += 2 * tokens;
                        }
                    }
                    t.expect(layout.bytes() == (at + 63) / 64 * 64, describe(layout.keys()));
                    t.expect(layout.page_tokens() == tokens && layout.values().channels == d + 3, "shape");
                }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("a page takes the row format's bytes where dims and tokens fill lines", "[layout]") {
    tally t;
    std::size_t full = 0;
    for_each_section([&](const section_layout& s, const page_layout& layout) {
        const std::size_t row = kv1::packed_bytes(s.format, s.channels);
        t.expect(s.bytes() >= s.tokens * row, describe(s), "too few");
        // channels of a K lane and tokens of a V lane: of the narrowest field that the format has
        const std::size_t bits = bits_of_value(s.format) == 3 ? 1 : bits_of_value(s.format);
        const std::size_t along = s.keys ? s.channels : s.tokens, across = s.keys ? s.tokens : s.channels;
        if (along % (32 / bits) == 0 && across % 16 == 0) {
            ++full;
            t.expect(s.bytes() == s.tokens * row, describe(s), "too many");
        }
        // what padding may cost at most: K channels to whole lanes, V tokens to whole lanes and channels to
        // 16
        const std::size_t lanes_along = (along + 32 / bits - 1) / (32 / bits) * (32 / bits);
        t.expect(s.bytes() == (across + 15) / 16 * 16 * lanes_along * bits_of_value(s.format) / 8,
                 describe(s));
        static_cast<void>(layout);
    });
    KV1_REQUIRE_CLEAN(t);
    REQUIRE(full > 200);
    // the numbers that the project's documents give
    REQUIRE(page_layout(kv_format::affine2, 32, kv_format::affine2, 32, 64).bytes() == 64 * 24);
    REQUIRE(page_layout(kv_format::affine2, 128, kv_format::affine2, 128, 64).bytes() == 64 * 72);
    REQUIRE(page_layout(kv_format::fp16, 128, kv_format::fp16, 128, 64).bytes() == 64 * 512);
}

TEST_CASE("codes and plain bits come back from where they were stored", "[layout]") {
    kv1_test::generator g(1);
    tally t;
    for_each_section([&](const section_layout& s, const page_layout& layout) {
        std::vector<std::byte> page = random_page(g, layout.bytes());
        const std::vector<std::byte> before = page;
        const std::size_t bits = bits_of_value(s.format);
        const std::uint64_t top = (std::uint64_t{1} << bits) - 1;
        std::vector<std::uint32_t> codes(s.tokens * s.channels);
        for (auto& c : codes)
            c = static_cast<std::uint32_t>(g.bits() & top);
        for (std::size_t i = 0; i < codes.size(); ++i)
            kv1::detail::store_code(s, page.data(), i / s.channels, i % s.channels, codes[i]);
        bool same = true;
        for (std::size_t i = 0; i < codes.size(); ++i)
            same = same && kv1::detail::load_code(s, page.data(), i / s.channels, i % s.channels) == codes[i];
        t.expect(same, describe(s));
        // a run of channels is the same codes, and is stored as they are, one by one
        std::vector<std::byte> by_runs = before;
        for (std::size_t token = 0; token < s.tokens; ++token)
            for (std::size_t first = 0; first < s.channels; first += kv1::detail::run_channels) {
                const kv1::detail::code_run run = kv1::detail::load_run(s, page.data(), token, first);
                for (std::size_t i = 0; i < std::min(run.size(), s.channels - first); ++i)
                    same = same && run[i] == codes[token * s.channels + first + i];
                kv1::detail::store_run(s, by_runs.data(), token, first, run);
            }
        t.expect(same, describe(s), "loaded by runs");
        t.expect(by_runs == page, describe(s), "stored by runs");
        // nothing outside the section's lines was written
        t.expect(
            std::equal(page.begin(), page.begin() + static_cast<std::ptrdiff_t>(s.offset), before.begin()),
            describe(s), "before the section");
        const auto end = static_cast<std::ptrdiff_t>(s.offset + s.bytes());
        t.expect(std::equal(page.begin() + end, page.end(), before.begin() + end), describe(s),
                 "past the section");
    });
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("metadata comes back from where it was stored", "[layout]") {
    kv1_test::generator g(2);
    tally t;
    for (const kv_format f : kv1::all_kv_formats)
        for (const std::size_t tokens : page_sizes) {
            const page_layout layout(f, 24, f, 40, tokens);
            std::vector<std::byte> page = random_page(g, layout.bytes());
            std::vector<kv1::detail::row_metadata> stored;
            for (const section_layout* s : {&layout.keys(), &layout.values()})
                for (std::size_t i = 0; i < tokens; ++i) {
                    stored.push_back(
                        {static_cast<std::uint16_t>(g.bits()), static_cast<std::uint16_t>(g.bits())});
                    kv1::detail::store_metadata(*s, page.data(), i, stored.back());
                }
            std::size_t n = 0;
            for (const section_layout* s : {&layout.keys(), &layout.values()})
                for (std::size_t i = 0; i < tokens; ++i, ++n) {
                    const std::size_t kept = s->traits().metadata_bytes();
                    const kv1::detail::row_metadata m = kv1::detail::load_metadata(*s, page.data(), i);
                    t.expect(m.scale == (kept >= 2 ? stored[n].scale : 0), describe(*s), i);
                    t.expect(m.minimum == (kept == 4 ? stored[n].minimum : 0), describe(*s), i);
                }
        }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("where all channels share metadata, the group is the section", "[layout]") {
    tally t;
    for_each_section([&](const section_layout& s, const page_layout&) {
        if (s.groups() != 1)
            return;
        const section_layout own = s.group(0);
        t.expect(own.own_lines() == s.own_lines() && own.shared_lines() == s.shared_lines() &&
                     own.first_shared() == s.first_shared() && own.unit_lines() == s.unit_lines(),
                 describe(s), "lines");
        for (std::size_t token = 0; token < s.tokens; ++token)
            for (std::size_t c = 0; c < s.channels; c += 3)
                for (int p = 0; p < s.traits().slice_count(); ++p) {
                    const kv1::detail::field_place a = s.place(p, token, c), b = own.place(p, token, c);
                    t.expect(a.lane == b.lane && a.shift == b.shift, describe(s), token, c);
                }
    });
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("a group's share of a section holds its channels' codes and metadata", "[layout]") {
    kv1_test::generator g(4);
    tally t;
    for (const kv_format f : kv1::all_kv_formats)
        for (const std::size_t tokens : page_sizes)
            for (const auto& [d, group] : {std::pair{64u, 32u}, {96u, 32u}, {192u, 64u}, {128u, 128u}}) {
                const page_layout layout(f, d, f, d, tokens, group, group), one(f, d, f, d, tokens);
                std::vector<std::byte> page = random_page(g, layout.bytes());
                for (const section_layout* s : {&layout.keys(), &layout.values()}) {
                    const section_layout& same = s->keys ? one.keys() : one.values();
                    t.expect(s->groups() == d / group && s->bytes() == same.bytes(), describe(*s), "lines");
                    for (std::size_t k = 0; k < s->groups(); ++k) {
                        const section_layout own = s->group(k);
                        t.expect(own.groups() == 1 && own.channels == group, describe(own));
                        for (std::size_t i = 0; i < tokens; ++i) {
                            const kv1::detail::row_metadata m{static_cast<std::uint16_t>(g.bits()),
                                                              static_cast<std::uint16_t>(g.bits())};
                            kv1::detail::store_metadata(*s, page.data(), i, m, k);
                            const auto its = kv1::detail::load_metadata(own, page.data(), i);
                            const std::size_t kept = s->traits().metadata_bytes();
                            t.expect(its.scale == (kept >= 2 ? m.scale : 0) &&
                                         its.minimum == (kept == 4 ? m.minimum : 0),
                                     describe(*s), "metadata", k, i);
                            for (std::size_t c = 0; c < group; c += 7)
                                t.expect(kv1::detail::load_code(own, page.data(), i, c) ==
                                             kv1::detail::load_code(*s, page.data(), i, k * group + c),
                                         describe(*s), "codes", k, i, c);
                        }
                    }
                }
                // arrays of metadata follow the lines, [group][token], and nothing lies where another does
                std::size_t at = layout.values().offset + layout.values().bytes();
                for (const section_layout* s : {&layout.keys(), &layout.values()}) {
                    const std::size_t array = 2 * tokens * s->groups(), kept = s->traits().metadata_bytes();
                    t.expect(kept < 2 || s->scale_offset == at, describe(*s), "scales");
                    at += kept >= 2 ? array : 0;
                    t.expect(kept < 4 || s->minimum_offset == at, describe(*s), "minima");
                    at += kept == 4 ? array : 0;
                }
                t.expect(layout.bytes() == (at + 63) / 64 * 64, describe(layout.keys()), "bytes");
            }
    KV1_REQUIRE_CLEAN(t);
    REQUIRE(kv1::row_bytes(kv_format::affine2, 128, 32) == 48);
    REQUIRE(kv1::row_bytes(kv_format::compact2, 128, 64) == 36);
}

TEST_CASE("a K line holds sixteen tokens, each lane that token's four row-format bytes", "[layout]") {
    kv1_test::generator g(3);
    tally t;
    for (const kv_format f : {kv_format::affine8, kv_format::affine4, kv_format::affine2,
                              kv_format::scaled_binary, kv_format::binary})
        for (const std::size_t d : dims())
            for (const std::size_t tokens : page_sizes) {
                const page_layout layout(f, d, f, d, tokens);
                const section_layout& s = layout.keys();
                const auto bits = static_cast<int>(bits_of_value(f));
                std::vector<std::byte> page(layout.bytes());
                std::vector<std::vector<std::byte>> rows;
                for (std::size_t token = 0; token < tokens; ++token) {
                    const auto codes = kv1_test::random_codes(g, d, bits);
                    rows.push_back(kv1_test::packed_model(codes, bits));
                    for (std::size_t c = 0; c < d; ++c)
                        kv1::detail::store_code(s, page.data(), token, c, codes[c]);
                }
                // tiles of 16 tokens, in each the lines of its channel groups; a line is 16 lanes of 4 bytes
                const std::size_t lines = (d * static_cast<std::size_t>(bits) + 31) / 32;
                for (std::size_t token = 0; token < tokens; ++token)
                    for (std::size_t l = 0; l < lines; ++l)
                        for (std::size_t j = 0; j < 4; ++j) {
                            const std::size_t at = ((token / 16 * lines + l) * 16 + token % 16) * 4 + j;
                            const auto& row = rows[token];
                            const std::byte expected = 4 * l + j < row.size() ? row[4 * l + j] : std::byte{0};
                            t.expect(page[at] == expected, describe(s), token, l, j);
                        }
            }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("a V line holds sixteen channels, and byte i, field f of a lane is token 4f + i", "[layout]") {
    kv1_test::generator g(4);
    tally t;
    for (const kv_format f : {kv_format::affine8, kv_format::affine4, kv_format::affine2,
                              kv_format::scaled_binary, kv_format::binary})
        for (const std::size_t d : dims())
            for (const std::size_t tokens : page_sizes) {
                const page_layout layout(f, d, f, d, tokens);
                const section_layout& s = layout.values();
                const std::size_t bits = bits_of_value(f), per_lane = 32 / bits;
                std::vector<std::byte> page(layout.bytes());
                const auto codes = kv1_test::random_codes(g, d * tokens, static_cast<int>(bits));
                for (std::size_t i = 0; i < codes.size(); ++i)
                    kv1::detail::store_code(s, page.data(), i / d, i % d, codes[i]);
                // groups of 16 channels, in each the lines of consecutive runs of tokens
                const std::size_t lines = (tokens + per_lane - 1) / per_lane;
                for (std::size_t c = 0; c < d; ++c)
                    for (std::size_t l = 0; l < lines; ++l)
                        for (std::size_t i = 0; i < 4; ++i)
                            for (std::size_t field = 0; field < 8 / bits; ++field) {
                                const std::size_t token = l * per_lane + 4 * field + i;
                                const std::size_t at =
                                    s.offset + ((c / 16 * lines + l) * 16 + c % 16) * 4 + i;
                                const unsigned stored =
                                    std::to_integer<unsigned>(page[at]) >> (bits * field) &
                                    ((1u << bits) - 1u);
                                t.expect(stored == (token < tokens ? codes[token * d + c] : 0u), describe(s),
                                         token, c);
                            }
            }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("plain lanes hold consecutive channels of a key and consecutive tokens of a value", "[layout]") {
    tally t;
    for (const std::size_t d : dims())
        for (const std::size_t tokens : page_sizes)
            for (const kv_format f : {kv_format::fp32, kv_format::fp16}) {
                const page_layout layout(f, d, f, d, tokens);
                const std::size_t per_lane = 32 / bits_of_value(f);
                for (std::size_t token = 0; token < tokens; ++token)
                    for (std::size_t c = 0; c < d; ++c) {
                        const std::size_t k_lines = (d + per_lane - 1) / per_lane,
                                          v_lines = tokens / per_lane;
                        const auto k = layout.keys().place(0, token, c);
                        t.expect(k.lane == (token / 16 * k_lines + c / per_lane) * 16 + token % 16 &&
                                     k.shift == static_cast<int>(c % per_lane * bits_of_value(f)),
                                 describe(layout.keys()), token, c);
                        const auto v = layout.values().place(0, token, c);
                        t.expect(v.lane == (c / 16 * v_lines + token / per_lane) * 16 + c % 16 &&
                                     v.shift == static_cast<int>(token % per_lane * bits_of_value(f)),
                                 describe(layout.values()), token, c);
                    }
            }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("two lines of 3-bit codes share a third line", "[layout]") {
    // of a byte, by the code's field in two lines: where its low bits and its high bit lie, in the first line (0), the
    // second (1) or the shared one (2)
    struct bits {
        std::size_t line;
        int shift;
    };
    constexpr bits low[] = {{0, 0}, {0, 3}, {0, 6}, {2, 0}, {1, 0}, {1, 3}, {1, 6}, {2, 3}};
    constexpr bits high[] = {{0, 2}, {0, 5}, {2, 6}, {2, 2}, {1, 2}, {1, 5}, {2, 7}, {2, 5}};
    tally t;
    for (const std::size_t d : dims())
        for (const std::size_t tokens : page_sizes)
            for (const bool keys : {true, false}) {
                const page_layout layout(kv_format::affine3, d, kv_format::affine3, d, tokens);
                const section_layout& s = keys ? layout.keys() : layout.values();
                const std::size_t along = ((keys ? d : tokens) + 31) / 32 * 32;
                t.expect(s.own_lines() == along / 16 && s.shared_lines() == along / 32, describe(s));
                for (std::size_t token = 0; token < tokens; ++token)
                    for (std::size_t c = 0; c < d; ++c) {
                        const std::size_t across = keys ? token : c, n = keys ? c : token;
                        const std::size_t unit = across / 16 * (along / 16 + along / 32) * 16 + across % 16;
                        const std::size_t in_line = n % 16, byte = keys ? in_line / 4 : in_line % 4;
                        const std::size_t field = n / 16 % 2 * 4 + (keys ? in_line % 4 : in_line / 4);
                        const auto expect_at = [&](int p, const bits& b) {
                            const auto at = s.place(p, token, c);
                            const std::size_t line = b.line == 2 ? along / 16 + n / 32 : n / 32 * 2 + b.line;
                            t.expect(at.lane == unit + line * 16 &&
                                         at.shift == static_cast<int>(8 * byte) + b.shift,
                                     describe(s), token, c);
                        };
                        expect_at(0, low[field]);
                        expect_at(1, high[field]);
                    }
            }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("row sizes are those of the format table", "[layout]") {
    for (const kv_format f : kv1::all_kv_formats)
        for (const std::size_t d : dims()) {
            REQUIRE(kv1::packed_bytes(f, d) == (d * bits_of_value(f) + 7) / 8);
            REQUIRE(kv1::row_bytes(f, d) == (d * bits_of_value(f) + 7) / 8 + kv1::info_of(f).metadata_bytes);
        }
    STATIC_REQUIRE(kv1::row_bytes(kv_format::affine2, 32) == 12);
    STATIC_REQUIRE(kv1::row_bytes(kv_format::affine2, 128) == 36);
    STATIC_REQUIRE(kv1::channel_page_bytes(kv_format::affine2, 32, 64) == 64 * 10);
    STATIC_REQUIRE(kv1::channel_page_bytes(kv_format::compact3, 128, 64) == 64 * 48 + 128 * 2);
}

TEST_CASE("every format has a name, and a type that names it", "[layout]") {
    for (const kv_format f : kv1::all_kv_formats) {
        REQUIRE(to_string(f) != "unknown");
        REQUIRE(kv1::all_formats::contains(f));
        REQUIRE(kv1::formats<kv1::affine<2>>::contains(f) == (f == kv_format::affine2));
    }
    REQUIRE(to_string(static_cast<kv_format>(99)) == "unknown");
    STATIC_REQUIRE(kv1::kv_format_of<kv1::affine<2>> == kv_format::affine2);
    STATIC_REQUIRE(kv1::kv_format_of<kv1::plain<kv1::float16>> == kv_format::fp16);
    STATIC_REQUIRE(kv1::storage_format<kv1::binary>);
    STATIC_REQUIRE_FALSE(kv1::storage_format<kv1::affine<5>>);
    STATIC_REQUIRE_FALSE(kv1::storage_format<float>);
}
