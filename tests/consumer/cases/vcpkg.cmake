# SPDX-License-Identifier: Apache-2.0
#
# The vcpkg port, run with doubles of vcpkg's helper functions: vcpkg itself is not needed, and not tested.
include(${CMAKE_CURRENT_LIST_DIR}/../support.cmake)
include(${CMAKE_CURRENT_LIST_DIR}/../vcpkg/helpers.cmake)

set(port_dir ${kv1_source}/cmake/vcpkg-port)
file(READ ${port_dir}/vcpkg.json manifest)
string(JSON PORT GET "${manifest}" name)
string(JSON VERSION GET "${manifest}" version)
set(CURRENT_PACKAGES_DIR ${dir}/packages)
set(CURRENT_BUILDTREES_DIR ${dir}/buildtrees)
search(${prefix_path})
include(${port_dir}/portfile.cmake)

# What vcpkg's own checks after a build ask of a header-only package.
file(GLOB_RECURSE files RELATIVE ${CURRENT_PACKAGES_DIR} ${CURRENT_PACKAGES_DIR}/*)
foreach(file IN LISTS files)
  if(NOT file MATCHES "^(include/kv1/|share/kv1/(copyright|usage|kv1[A-Za-z]+\\.cmake)$|share/pkgconfig/kv1\\.pc$)")
    message(FATAL_ERROR "the package has ${file}")
  endif()
endforeach()
foreach(file IN ITEMS share/kv1/copyright share/kv1/usage share/kv1/kv1Config.cmake include/kv1/kv1.hpp)
  if(NOT file IN_LIST files)
    message(FATAL_ERROR "the package has no ${file}")
  endif()
endforeach()
file(GLOB folders RELATIVE ${CURRENT_PACKAGES_DIR} ${CURRENT_PACKAGES_DIR}/*)
expect("${folders}" "^include;share$")

# The consumer's manifest names this port, and its project finds the package.
file(READ ${here}/vcpkg/vcpkg.json manifest)
string(JSON dependency GET "${manifest}" dependencies 0)
expect("${dependency}" "^${PORT}$")
file(READ ${here}/vcpkg/vcpkg-configuration.json configuration)
string(JSON overlay GET "${configuration}" overlay-ports 0)
get_filename_component(overlay ${here}/vcpkg/${overlay} ABSOLUTE)
expect("${overlay}" "^${port_dir}$")
configure_command(configure vcpkg)
search(${CURRENT_PACKAGES_DIR} ${prefix_path})
execute(output ${configure} ${with_xsimd})
expect("${output}" "kv1 ${VERSION} from ${CURRENT_PACKAGES_DIR}/share/kv1")
build_and_run()
