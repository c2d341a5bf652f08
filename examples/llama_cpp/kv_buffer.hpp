// SPDX-License-Identifier: Apache-2.0
//
// Memory that ggml asks the backend for: reserved, and taken from the system as it is touched. Most of it is what it
// seems to be: results between nodes, states of recurrent layers, which the CPU backend works on where they lie. The
// tensors of a KV cache in it are a slot_cache's, and their memory can not be touched at all.
#pragma once

#include "slot_cache.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

namespace kv1_ggml {

class kv_buffer {
public:
    explicit kv_buffer(std::size_t bytes) : bytes_(bytes) {
        if (bytes == 0)
            return;
        void* const at = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED)
            throw std::bad_alloc();
        memory_ = static_cast<std::byte*>(at);
        const std::lock_guard lock(mutex());
        all().push_back(this);
    }
    kv_buffer(const kv_buffer&) = delete;
    kv_buffer& operator=(const kv_buffer&) = delete;
    ~kv_buffer() {
        if (memory_ == nullptr)
            return;
        {
            const std::lock_guard lock(mutex());
            std::erase(all(), this);
        }
        ::munmap(memory_, bytes_);
    }

    // ggml wants an address for a buffer of no bytes, too.
    [[nodiscard]] std::byte* base() noexcept { return memory_ != nullptr ? memory_ : &nothing_; }
    [[nodiscard]] slot_cache& cache() noexcept { return cache_; }

    // Takes a tensor that was placed here in. False: no cache can have it.
    bool add(const ggml_tensor* tensor) {
        const std::optional<cache_name> name = cache_name_of(tensor);
        if (tensor->view_src != nullptr || !name)
            return true;
        if (!cache_.add(tensor, *name))
            return false;
        // What lies wholly in these pages is the tensor's alone. Whoever reads it nevertheless is told by a fault.
        const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
        const auto first = static_cast<std::size_t>(static_cast<std::byte*>(tensor->data) - memory_);
        const std::size_t begin = (first + page - 1) / page * page,
                          end = (first + tensor->nb[2] * size_of(tensor->ne[2])) / page * page;
        if (begin < end)
            ::mprotect(memory_ + begin, end - begin, PROT_NONE);
        owned_.push_back({begin, end});
        return true;
    }
    [[nodiscard]] bool has_cache() const noexcept { return !owned_.empty(); }

    void clear(std::uint8_t value) {
        cache_.clear();
        std::size_t at = 0;
        const auto fill = [&](std::size_t end) {
            if (at >= end)
                return;
            const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
            if (value != 0)
                std::memset(memory_ + at, value, end - at);
            else if (at % page == 0 && ::madvise(memory_ + at, end - at, MADV_DONTNEED) == 0)
                return;
            else
                std::memset(memory_ + at, 0, end - at);
        };
        std::vector<range> owned = owned_;
        std::sort(owned.begin(), owned.end(), [](range a, range b) { return a.begin < b.begin; });
        for (const range r : owned)
            if (r.begin < r.end) {
                fill(r.begin);
                at = r.end;
            }
        fill(bytes_);
    }

    // The buffer whose cache has a tensor at this address, or null.
    static kv_buffer* of(const void* address) {
        const std::lock_guard lock(mutex());
        for (kv_buffer* b : all())
            if (address >= b->memory_ && address < b->memory_ + b->bytes_)
                return b->cache_.at(address) != nullptr ? b : nullptr;
        return nullptr;
    }

private:
    struct range {
        std::size_t begin, end;
    };
    // ggml copies tensors in host memory by address (ggml_backend_tensor_copy).
    static std::vector<kv_buffer*>& all() {
        static std::vector<kv_buffer*> buffers;
        return buffers;
    }
    static std::mutex& mutex() {
        static std::mutex m;
        return m;
    }

    std::byte nothing_{};
    std::byte* memory_ = nullptr;
    std::size_t bytes_;
    std::vector<range> owned_;
    slot_cache cache_;
};

} // namespace kv1_ggml
