// SPDX-License-Identifier: Apache-2.0
//
// try_copy(): copies a description, whose members are standard containers, or returns a status.
// seek_memory(): whether such containers will get their memory.
#pragma once

#include <kv1/cache_description.hpp>
#include <kv1/detail/arena.hpp>
#include <kv1/status.hpp>

#include <cstddef>
#include <new>

namespace kv1::inline KV1_ABI::detail {

// The number of bytes that the containers of a copy allocate.
template <class Description> // of a cache or a slot store
std::size_t copied_bytes(const Description& d) noexcept {
    std::size_t bytes = d.layers.size() * sizeof(layer_description);
    for (const layer_description& l : d.layers) {
        bytes += l.rotary.frequencies.size() * sizeof(float);
        for (const vector_encoding* e : {&l.key_encoding, &l.value_encoding})
            bytes += (e->means.size() + e->error_weights.size() + e->basis.size()) * sizeof(float);
    }
    return bytes;
}

// Without exceptions a container that gets no memory ends the program. So the memory is allocated and freed
// first, to see whether it is there. Another thread may still take it before the containers do; only moving
// what they are in is safe from that.
inline status seek_memory([[maybe_unused]] std::size_t bytes) noexcept {
#if !KV1_EXCEPTIONS
    void* const room = ::operator new(bytes, std::nothrow);
    if (room == nullptr)
        return {errc::out_of_memory, "an allocation failed"};
    ::operator delete(room);
#endif
    return {};
}

template <class Description>
status try_copy(const Description& from, Description& to) noexcept {
    if (const status s = seek_memory(copied_bytes(from)); !s)
        return s;
    return guarded([&] { to = from; });
}

} // namespace kv1::inline KV1_ABI::detail
