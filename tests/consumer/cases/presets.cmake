# SPDX-License-Identifier: Apache-2.0
#
# CMake reads the presets, and each of them has a workflow.
include(${CMAKE_CURRENT_LIST_DIR}/../support.cmake)

foreach(kind IN ITEMS configure build test workflow)
  execute(${kind} ${CMAKE_COMMAND} -S ${kv1_source} --list-presets=${kind})
  foreach(name IN ITEMS dev release asan tsan no-simd clang ci)
    expect("${${kind}}" "\"${name}\"")
  endforeach()
endforeach()
