# SPDX-License-Identifier: Apache-2.0
#
# A project of a Makefile and pkg-config.
include(${CMAKE_CURRENT_LIST_DIR}/../support.cmake)

# xsimd's own file may name another prefix than the one it was unpacked to.
function(write_xsimd_pc version include)
  file(WRITE ${dir}/pc-${version}/xsimd.pc
       "Name: xsimd\nDescription: SIMD\nVersion: ${version}\nCflags: -I${include}\n")
endfunction()
write_xsimd_pc(${xsimd_version} ${xsimd_include})
write_xsimd_pc(8.1.0 /nowhere)
write_xsimd_pc(15.0.0 /nowhere)

file(COPY ${prefix}/ DESTINATION ${dir}/moved)
set(pc ${dir}/moved/share/pkgconfig)
set(ENV{PKG_CONFIG_LIBDIR} ${dir}/nothing)
set(ENV{PKG_CONFIG_PATH} ${pc}:${dir}/pc-${xsimd_version})
execute(output ${pkg_config} --modversion kv1)
expect("${output}" "^${kv1_version}\n")
execute(output ${pkg_config} --cflags kv1)
expect("${output}" "moved/")
execute(output ${CMAKE_COMMAND} -E chdir ${dir} ${make} -f ${here}/makefile/Makefile SOURCE=${here} CXX=${cxx}
        "CXXFLAGS=-O0 -Wall -Wextra -Wpedantic -Werror ${cxx_flags}" PKG_CONFIG=${pkg_config})
execute(output ${dir}/engine)
expect("${output}" "^ok: kv1 ${kv1_version}")

refused("kv1" ${pkg_config} --print-errors --exists "kv1 >= 99")
foreach(version IN ITEMS 8.1.0 15.0.0)
  set(ENV{PKG_CONFIG_PATH} ${pc}:${dir}/pc-${version})
  refused("xsimd" ${pkg_config} --print-errors --exists kv1)
endforeach()

# A C program with the C library, where it was asked for.
find_program(cc NAMES cc gcc clang)
if(kv1_c AND cc)
  file(GLOB pc ${dir}/moved/lib*/pkgconfig ${dir}/moved/lib/*/pkgconfig)
  set(ENV{PKG_CONFIG_PATH} ${pc})
  execute(flags ${pkg_config} --static --cflags --libs kv1-c)
  separate_arguments(flags UNIX_COMMAND "${flags}")
  execute(output ${cc} -std=c99 ${kv1_source}/tests/c/engine.c -o ${dir}/c_engine ${flags})
  execute(output ${dir}/c_engine)
  expect("${output}" "^ok")
endif()
