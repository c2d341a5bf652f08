// SPDX-License-Identifier: Apache-2.0
//
// The functions of kv1/c/saving.h.
#pragma once

#include <kv1/c/saving.h>
#include <kv1/detail/c_api/cache.hpp>

#include <kv1/cache_file.hpp>
#include <kv1/cache_io.hpp>
#include <kv1/model_fingerprint.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <iterator>
#include <span>

namespace kv1::inline KV1_ABI::detail {

inline model_fingerprint c_model(const kv1_fingerprint* given) noexcept {
    model_fingerprint model;
    if (given != nullptr)
        std::copy(std::begin(given->bytes), std::end(given->bytes), model.bytes.begin());
    return model;
}

// What every save is given.
struct c_saving {
    c_sequences ids;
    save_options options;

    status take(const kv1_sequence* sequences, std::size_t count, const kv1_save_options* given) noexcept {
        kv1_save_options o;
        if (const status s = c_take(given, o); !s)
            return s;
        options = {c_model(o.model), o.prefixes != 0};
        return ids.assign(sequences, count);
    }
};

// load(handles, options) gives how many sequences it has loaded.
template <class Load>
kv1_code c_load(kv1_sequence* out, std::size_t capacity, std::size_t* count, const kv1_load_options* given,
                kv1_error* error, Load&& load) noexcept {
    if (count == nullptr || (out == nullptr && capacity != 0))
        return c_refuse_null(error);
    kv1_load_options o;
    if (const status s = c_take(given, o); !s)
        return c_report(s, error);
    c_sequences ids;
    if (const status s = ids.assign(out, capacity); !s)
        return c_report(s, error);
    const result<std::size_t> loaded = load(ids.view(), load_options{c_model(o.model)});
    if (loaded) {
        for (std::size_t i = 0; i < *loaded; ++i)
            out[i] = c_sequence(ids.view()[i]);
        *count = *loaded;
    }
    return c_report(loaded.reason(), error);
}

struct c_byte_sink {
    kv1_sink to;

    bool operator()(std::span<const std::byte> bytes) noexcept {
        return bytes.empty() || to.write(to.context, bytes.data(), bytes.size()) != 0;
    }
};
struct c_byte_source {
    kv1_source from;

    bool operator()(std::span<std::byte> bytes) noexcept {
        return bytes.empty() || from.read(from.context, bytes.data(), bytes.size()) != 0;
    }
};
struct c_rewinding_source : c_byte_source {
    bool rewind() noexcept { return from.rewind(from.context) != 0; }
};

// call(path) with a path of the system's.
template <class Call>
status c_with_path(const char* path, Call&& call) noexcept {
    std::filesystem::path native;
    try {
#if defined(_WIN32)
        native = std::filesystem::path(reinterpret_cast<const char8_t*>(path));
#else
        native = path;
#endif
    } catch (const std::bad_alloc&) {
        return c_no_memory();
    } catch (...) {
        return {errc::invalid_argument, "the path is no text"};
    }
    return call(native);
}

} // namespace kv1::inline KV1_ABI::detail

extern "C" {

kv1_code kv1_fingerprint_of(const void* bytes, size_t size, const kv1_fingerprint* before,
                            kv1_fingerprint* fingerprint) {
    using namespace kv1::detail;
    if (fingerprint == nullptr || (bytes == nullptr && size != 0))
        return KV1_INVALID_ARGUMENT;
    const kv1::model_fingerprint made =
        kv1::fingerprint_of(std::span(static_cast<const std::byte*>(bytes), size), c_model(before));
    std::copy(made.bytes.begin(), made.bytes.end(), fingerprint->bytes);
    return KV1_OK;
}

kv1_code kv1_saved_bytes(const kv1_cache* cache, const kv1_sequence* sequences, size_t count,
                         const kv1_save_options* options, size_t* bytes, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(cache, bytes))
        return c_refuse_null(error);
    c_saving saving;
    if (const kv1::status s = saving.take(sequences, count, options); !s)
        return c_report(s, error);
    const auto needed = kv1::try_saved_bytes(cache->cache, saving.ids.view(), saving.options);
    if (needed)
        *bytes = *needed;
    return c_report(needed.reason(), error);
}

kv1_code kv1_save(const kv1_cache* cache, const kv1_sequence* sequences, size_t count, kv1_sink sink,
                  const kv1_save_options* options, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(cache, sink.write))
        return c_refuse_null(error);
    c_saving saving;
    if (const kv1::status s = saving.take(sequences, count, options); !s)
        return c_report(s, error);
    return c_report(kv1::try_save(cache->cache, saving.ids.view(), c_byte_sink{sink}, saving.options), error);
}

kv1_code kv1_save_memory(const kv1_cache* cache, const kv1_sequence* sequences, size_t count, void* memory,
                         size_t size, size_t* written, const kv1_save_options* options, kv1_error* error) {
    using namespace kv1::detail;
    if (cache == nullptr || (memory == nullptr && size != 0))
        return c_refuse_null(error);
    c_saving saving;
    if (const kv1::status s = saving.take(sequences, count, options); !s)
        return c_report(s, error);
    const auto needed = kv1::try_saved_bytes(cache->cache, saving.ids.view(), saving.options);
    if (!needed)
        return c_report(needed.reason(), error);
    const kv1::status too_small{kv1::errc::shape_mismatch, "the memory is smaller than what is saved"};
    if (*needed > size)
        return c_report(too_small, error);
    std::size_t used = 0;
    const auto write = [&](std::span<const std::byte> bytes) noexcept {
        if (bytes.size() > size - used)
            return false; // another thread has stored a prefix meanwhile
        std::copy(bytes.begin(), bytes.end(), static_cast<std::byte*>(memory) + used);
        used += bytes.size();
        return true;
    };
    const kv1::status saved = kv1::try_save(cache->cache, saving.ids.view(), write, saving.options);
    if (saved && written != nullptr)
        *written = used;
    return c_report(saved.code() == kv1::errc::io_error ? too_small : saved, error);
}

kv1_code kv1_save_file(const kv1_cache* cache, const kv1_sequence* sequences, size_t count, const char* path,
                       const kv1_save_options* options, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(cache, path))
        return c_refuse_null(error);
    c_saving saving;
    if (const kv1::status s = saving.take(sequences, count, options); !s)
        return c_report(s, error);
    return c_report(c_with_path(path,
                                [&](const std::filesystem::path& native) {
                                    return kv1::try_save_file(cache->cache, saving.ids.view(), native,
                                                              saving.options);
                                }),
                    error);
}

kv1_code kv1_load(kv1_cache* cache, kv1_source source, kv1_sequence* sequences, size_t capacity,
                  size_t* count, const kv1_load_options* options, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(cache, source.read))
        return c_refuse_null(error);
    return c_load(sequences, capacity, count, options, error,
                  [&](std::span<kv1::sequence_id> out, const kv1::load_options& o) {
                      return source.rewind != nullptr
                                 ? kv1::try_load(cache->cache, c_rewinding_source{{source}}, out, o)
                                 : kv1::try_load(cache->cache, c_byte_source{source}, out, o);
                  });
}

kv1_code kv1_load_memory(kv1_cache* cache, const void* memory, size_t size, kv1_sequence* sequences,
                         size_t capacity, size_t* count, const kv1_load_options* options, kv1_error* error) {
    using namespace kv1::detail;
    if (cache == nullptr || (memory == nullptr && size != 0))
        return c_refuse_null(error);
    return c_load(sequences, capacity, count, options, error,
                  [&](std::span<kv1::sequence_id> out, const kv1::load_options& o) {
                      kv1::memory_source source({static_cast<const std::byte*>(memory), size});
                      return kv1::try_load(cache->cache, source, out, o);
                  });
}

kv1_code kv1_load_file(kv1_cache* cache, const char* path, kv1_sequence* sequences, size_t capacity,
                       size_t* count, const kv1_load_options* options, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(cache, path))
        return c_refuse_null(error);
    return c_load(sequences, capacity, count, options, error,
                  [&](std::span<kv1::sequence_id> out, const kv1::load_options& o) {
                      std::size_t loaded = 0;
                      const kv1::status s = c_with_path(path, [&](const std::filesystem::path& native) {
                          const auto n = kv1::try_load_file(cache->cache, native, out, o);
                          loaded = n ? *n : 0;
                          return n.reason();
                      });
                      return s ? kv1::result<std::size_t>(loaded) : kv1::result<std::size_t>(s);
                  });
}

kv1_code kv1_swap_out(kv1_cache* cache, kv1_sequence sequence, void* memory, size_t size, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(cache, memory))
        return c_refuse_null(error);
    return c_report(
        kv1::try_swap_out(cache->cache, c_sequence(sequence), {static_cast<std::byte*>(memory), size}),
        error);
}

kv1_code kv1_swap_in(kv1_cache* cache, const void* memory, size_t size, kv1_sequence* sequence,
                     kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(cache, memory, sequence))
        return c_refuse_null(error);
    const auto made = kv1::try_swap_in(cache->cache, {static_cast<const std::byte*>(memory), size});
    if (made)
        *sequence = c_sequence(*made);
    return c_report(made.reason(), error);
}

} // extern "C"
