# SPDX-License-Identifier: Apache-2.0
#
# The Conan recipe: created and consumed in a Conan home of this test's own, without any remote. xsimd comes
# from a recipe that wraps the one kv1 was configured with.
include(${CMAKE_CURRENT_LIST_DIR}/../support.cmake)

set(ENV{CONAN_HOME} ${dir}/home)
set(ENV{KV1_TEST_XSIMD_INCLUDE} ${xsimd_include})
set(ENV{CXX} ${cxx})
execute(output ${conan} profile detect)
execute(output ${conan} remote disable "*")
set(options -s compiler.cppstd=20 -c tools.cmake.cmake_layout:test_folder=${dir}/build)
# The recipe names one version of xsimd, as Conan Center's do; here there is the machine's.
file(WRITE ${dir}/xsimd.profile "include(default)\n[replace_requires]\nxsimd/*: xsimd/${xsimd_version}\n")
list(APPEND options -pr:h ${dir}/xsimd.profile)

execute(output ${conan} create ${kv1_source}/tests/conan/xsimd --version ${xsimd_version})
execute(output ${conan} create ${kv1_source} ${options})
expect("${output}" "kv1 [0-9]+ on [a-z0-9_]+: 1 tokens x 1 layers")

# One package for all settings: nothing more is to be built for another one.
execute(output ${conan} create ${kv1_source} ${options} -s build_type=Debug --build=never --test-folder=)
execute(output ${conan} list "kv1/${kv1_version}:*")
string(REGEX MATCHALL "\n +[0-9a-f]+\n" packages "\n${output}")
list(LENGTH packages count)
if(NOT count EQUAL 1)
  message(FATAL_ERROR "${count} packages")
endif()

refused("Invalid.*cppstd.*(17|lower than the required minimum)" ${conan} create ${kv1_source} ${options}
        -s compiler.cppstd=17 --test-folder=)
refused("kv1/${kv1_version} needs gcc 12 or newer" ${conan} create ${kv1_source} ${options} -s compiler=gcc
        -s compiler.version=11 -s compiler.libcxx=libstdc++11 --test-folder=)
