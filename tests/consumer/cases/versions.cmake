# SPDX-License-Identifier: Apache-2.0
#
# Which requests the installed package meets. Before 1.0 a minor version is as good as a major one.
include(${CMAKE_CURRENT_LIST_DIR}/../support.cmake)

configure_command(configure request)
list(APPEND configure ${with_xsimd})
search(${prefix} ${prefix_path})
string(REGEX MATCH "^([0-9]+)\\.([0-9]+)\\.([0-9]+)" matched ${kv1_version})
set(major ${CMAKE_MATCH_1})
set(minor ${CMAKE_MATCH_2})
math(EXPR next_minor "${minor} + 1")
math(EXPR next_patch "${CMAKE_MATCH_3} + 1")

foreach(request IN ITEMS "" ${major}.${minor} ${kv1_version} "${kv1_version} EXACT")
  execute(output ${configure} "-DREQUEST=${request}")
  expect("${output}" "kv1 ${kv1_version} with xsimd in")
endforeach()
foreach(request IN ITEMS ${major}.${next_minor} ${major}.${minor}.${next_patch} 99)
  refused("compatible with requested version \"${request}\".*version: ${kv1_version}" ${configure}
          -DREQUEST=${request})
endforeach()
if(minor GREATER 0)
  math(EXPR previous "${minor} - 1")
  refused("compatible with requested version" ${configure} -DREQUEST=${major}.${previous})
endif()

if(NOT kv1_c)
  refused("came without its C library: configure kv1 with -DKV1_BUILD_C=ON" ${configure}
          "-DREQUEST=COMPONENTS c")
endif()
refused("kv1_FOUND to FALSE" ${configure} "-DREQUEST=COMPONENTS nonsense")
