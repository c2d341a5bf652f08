# SPDX-License-Identifier: Apache-2.0
# kv1::kernels: the library with its kernels and its cache compiled once, for programs that include it in many places.
#
# Linking it instead of kv1::kv1 takes the kernels, xsimd and the cache's parts out of the program's translation
# units. It is compiled in the project that asks for it, with that project's flags, also where kv1 comes installed.
if(NOT TARGET kv1_kernels)
  # <kv1/kernels.hpp> in two parts: kernels take long to compile, and seldom change with the rest.
  foreach(part IN ITEMS kernels caches)
    file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/kv1_${part}.cpp
         CONTENT "#include <kv1/detail/external_@part@.hpp>\n" @ONLY)
  endforeach()
  add_library(kv1_kernels STATIC EXCLUDE_FROM_ALL ${CMAKE_CURRENT_BINARY_DIR}/kv1_kernels.cpp
                                                  ${CMAKE_CURRENT_BINARY_DIR}/kv1_caches.cpp)
  add_library(kv1::kernels ALIAS kv1_kernels)
  set_target_properties(kv1_kernels PROPERTIES CXX_EXTENSIONS OFF POSITION_INDEPENDENT_CODE ON)
  target_compile_definitions(kv1_kernels PUBLIC KV1_EXTERNAL_KERNELS)
  target_link_libraries(kv1_kernels PUBLIC kv1::kv1)
endif()
