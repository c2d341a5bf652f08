/* SPDX-License-Identifier: Apache-2.0
 *
 * failing_new.hpp for C: lets the calling thread's n-th allocation of the library fail.
 */
#ifndef KV1_TESTS_C_FAILING_ALLOCATIONS_H
#define KV1_TESTS_C_FAILING_ALLOCATIONS_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* From now on so many allocations succeed, and the ones after them fail. */
void allow_allocations(size_t count);
/* All succeed again; whether one has failed meanwhile. */
int allow_all_allocations(void);

#ifdef __cplusplus
}
#endif

#endif
