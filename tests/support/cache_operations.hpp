// SPDX-License-Identifier: Apache-2.0
//
// Reads bytes as operations, and applies each to a cache and to its model (cache_model.hpp). This is the body
// of fuzz_cache, and of its replay as a unit test. After each operation it calls validate(), and compares
// every sequence that the operation touched with its model, bit for bit. Throws std::logic_error at the first
// difference.
#pragma once

#include "prefix_operations.hpp"

#include <cstddef>
#include <cstdint>
#include <span>

namespace kv1_test {

class cache_operations : prefix_operations {
public:
    using tested_cache::tallies;

    static void run(std::span<const std::uint8_t> bytes, tallies& t) {
        if (bytes.empty())
            return;
        cache_operations all(bytes, t);
        while (!all.bytes_.empty())
            all.step();
        all.finish();
    }

private:
    using prefix_operations::prefix_operations;

    void step() {
        switch (next() % 20) {
        case 0:
            create();
            break;
        case 1:
        case 2:
        case 3:
            append(1 + below(40), false);
            break;
        case 4:
            append(1 + below(5), true);
            break;
        case 5:
            fork();
            break;
        case 6:
            truncate();
            break;
        case 7:
            drop();
            break;
        case 8:
        case 9:
            commit();
            break;
        case 10:
            rollback();
            break;
        case 11:
            destroy();
            break;
        case 12:
        case 19:
            attend();
            break;
        case 13:
            store_prefix();
            break;
        case 14:
            match_prefix();
            break;
        case 15:
            refuse();
            break;
        case 16:
            import_rows();
            break;
        case 17:
            batch();
            break;
        case 18:
            save_and_load();
            break;
        }
        require(cache_.try_validate(), "validate");
    }

    void finish() {
        for (const living& l : living_)
            compare(l);
        for (const living& l : living_)
            require(cache_.try_destroy_sequence(l.id), "destroy");
        cache_.prefixes().clear();
        require(cache_.try_validate(), "validate at the end");
        require(cache_.statistics().pages_in_use == 0, "no page is lost");
    }
};

} // namespace kv1_test
