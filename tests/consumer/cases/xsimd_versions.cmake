# SPDX-License-Identifier: Apache-2.0
#
# An xsimd that does not fit is refused, wherever it comes from, with a message that names it and says what to
# do; beside one that fits it is passed over.
include(${CMAKE_CURRENT_LIST_DIR}/../support.cmake)

# Only the given prefixes are searched: the machine may have an xsimd of its own.
set(only_prefixes -DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF -DCMAKE_FIND_USE_SYSTEM_ENVIRONMENT_PATH=OFF
                  -DCMAKE_FIND_USE_PACKAGE_REGISTRY=OFF -DCMAKE_FIND_USE_SYSTEM_PACKAGE_REGISTRY=OFF)
fake_xsimd(${dir}/old 8.1.0)
fake_xsimd(${dir}/early 13.0.0)
fake_xsimd(${dir}/future 15.0.0)
fake_xsimd(${dir}/fits 14.9.0)

configure_command(configure request)
list(APPEND configure ${only_prefixes} -DREQUEST=)
set(range "kv1 needs xsimd 13.2 or newer, older than 15")
search(${prefix})
refused("${range}\\. Install one" ${configure})
foreach(found IN ITEMS "old 8.1.0" "early 13.0.0" "future 15.0.0")
  string(REPLACE " " ";" found ${found})
  list(GET found 0 folder)
  list(GET found 1 version)
  search(${prefix} ${dir}/${folder})
  refused("${range}\\. Found, but not usable: xsimd ${version} \\(${dir}/${folder}/.*Install one that fits"
          ${configure})
endforeach()
file(REMOVE_RECURSE ${dir}/build)
search(${prefix} ${dir}/old ${dir}/fits ${dir}/future)
execute(output ${configure})
expect("${output}" "with xsimd in ${dir}/fits/include")

# The same for kv1's sources, which would fetch one if they were allowed to.
file(REMOVE_RECURSE ${dir}/build)
configure_command(configure subdirectory)
list(APPEND configure ${only_prefixes} -DKV1_SOURCE=${kv1_source} -DKV1_FETCH_DEPENDENCIES=OFF)
search(${dir}/old)
refused("${range}\\. Found, but not usable: xsimd 8.1.0.*KV1_FETCH_DEPENDENCIES=ON" ${configure})
search()
refused("${range}, but the target xsimd is version 8.1.0.*Let the project that defines it" ${configure}
        -DOLD_XSIMD=${dir}/old)

# Without CMake the header itself refuses.
file(WRITE ${dir}/include.cpp "#include <kv1/kv_cache.hpp>\n")
refused("kv1 needs xsimd 13.2 or newer" ${cxx} -std=c++20 -fsyntax-only -I${kv1_source}/include
        -I${dir}/old/include ${dir}/include.cpp)
