# SPDX-License-Identifier: Apache-2.0
#
# What the cases share. Everything they write lies under ${work}/<case>; kv1 is installed in ${work}/prefix.
cmake_policy(VERSION 3.21...3.31)
include(${SETTINGS})
set(dir ${work}/${CASE})
set(prefix ${work}/prefix)
file(REMOVE_RECURSE ${dir})
file(MAKE_DIRECTORY ${dir})
# Variables of the machine must not lead a consumer to another kv1 or to compiler options of its own.
foreach(name IN ITEMS CMAKE_PREFIX_PATH kv1_DIR kv1_ROOT CXXFLAGS CPPFLAGS LDFLAGS PKG_CONFIG_PATH)
  unset(ENV{${name}})
endforeach()

# execute(<out variable> <command>...): fails the test when the command does
function(execute out)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  list(JOIN ARGN " " command)
  message("$ ${command}\n${output}")
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "failed (${status})")
  endif()
  set(${out} "${output}" PARENT_SCOPE)
endfunction()

# refused(<regular expression> <command>...): the command must fail, and say why
function(refused reason)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  list(JOIN ARGN " " command)
  message("$ ${command}\n${output}")
  # CMake breaks its messages into lines.
  string(REGEX REPLACE "[ \n]+" " " words "${output}")
  if(status EQUAL 0)
    message(FATAL_ERROR "this should have been refused")
  elseif(NOT words MATCHES "${reason}")
    message(FATAL_ERROR "refused, but not with a message like: ${reason}")
  endif()
endfunction()

function(expect text pattern)
  if(NOT text MATCHES "${pattern}")
    message(FATAL_ERROR "expected: ${pattern}")
  endif()
endfunction()

# The command that configures ${here}/<folder>; further arguments follow it. Debug: nothing here is about speed. One
# consumer compiles the kernels of all instruction sets; the others compile one set, which takes a third of the time.
function(configure_command out folder)
  if(NOT CASE STREQUAL "installed")
    string(APPEND cxx_flags " -DKV1_STATIC_DISPATCH")
  endif()
  set(command ${CMAKE_COMMAND} -S ${here}/${folder} -B ${dir}/build -G ${generator}
      -DCMAKE_MAKE_PROGRAM=${make_program} -DCMAKE_CXX_COMPILER=${cxx} "-DCMAKE_CXX_FLAGS=${cxx_flags}"
      -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG= -DCMAKE_COMPILE_WARNING_AS_ERROR=ON)
  set(${out} "${command}" PARENT_SCOPE)
endfunction()

# search(<prefix>...): where consumers find packages, in this order
function(search)
  list(JOIN ARGN ":" prefixes)
  set(ENV{CMAKE_PREFIX_PATH} "${prefixes}")
endfunction()
# The xsimd that kv1 itself was configured with, wherever it was found; its own dependencies are at prefix_path.
set(with_xsimd -Dxsimd_DIR=${xsimd_dir})

# build_and_run(): the engine that was configured
function(build_and_run)
  execute(output ${CMAKE_COMMAND} --build ${dir}/build --config Debug)
  file(GLOB programs ${dir}/build/engine ${dir}/build/engine.exe ${dir}/build/Debug/engine.exe)
  execute(output ${programs})
  expect("${output}" "^ok: kv1 ${kv1_version}")
endfunction()

# fake_xsimd(<folder> <version>): a package that looks like an xsimd of this version, without its headers
function(fake_xsimd folder version)
  string(REPLACE "." ";" parts ${version})
  list(GET parts 0 major)
  list(GET parts 1 minor)
  list(GET parts 2 patch)
  set(header "#define XSIMD_VERSION_MAJOR ${major}\n#define XSIMD_VERSION_MINOR ${minor}\n")
  string(APPEND header "#define XSIMD_VERSION_PATCH ${patch}\n")
  file(WRITE ${folder}/include/xsimd/config/xsimd_config.hpp "${header}")
  file(WRITE ${folder}/include/xsimd/xsimd.hpp "#include \"config/xsimd_config.hpp\"\n")
  set(package ${folder}/lib/cmake/xsimd)
  file(WRITE ${package}/xsimdConfig.cmake "add_library(xsimd INTERFACE IMPORTED)
set_target_properties(xsimd PROPERTIES INTERFACE_INCLUDE_DIRECTORIES \"${folder}/include\")\n")
  file(WRITE ${package}/xsimdConfigVersion.cmake "set(PACKAGE_VERSION ${version})
if(PACKAGE_FIND_VERSION_MAJOR STREQUAL \"${major}\")
  set(PACKAGE_VERSION_COMPATIBLE TRUE)
endif()\n")
endfunction()
