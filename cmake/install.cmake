# SPDX-License-Identifier: Apache-2.0
# What is installed: headers, the CMake package, the pkg-config file, the licence; examples and the C library
# only where they are asked for. The same CMake package is usable from the build folder: kv1_DIR=<build>/cmake.
include(CMakePackageConfigHelpers)

if(TARGET kv1_c)
  # A compiled library makes the package one of this architecture.
  set(kv1_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/kv1)
  set(kv1_architecture)
else()
  set(kv1_package_dir ${CMAKE_INSTALL_DATADIR}/cmake/kv1)
  set(kv1_architecture ARCH_INDEPENDENT)
endif()
set(KV1_INSTALL_CMAKEDIR "" CACHE STRING "Where the CMake package is installed; by default ${kv1_package_dir}")
if(KV1_INSTALL_CMAKEDIR)
  set(kv1_package_dir ${KV1_INSTALL_CMAKEDIR})
endif()

install(DIRECTORY include/kv1 DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(TARGETS kv1 EXPORT kv1Targets)
if(TARGET kv1_c)
  install(TARGETS kv1_c EXPORT kv1Targets)
endif()
install(EXPORT kv1Targets NAMESPACE kv1:: DESTINATION ${kv1_package_dir})
export(EXPORT kv1Targets NAMESPACE kv1:: FILE ${PROJECT_BINARY_DIR}/cmake/kv1Targets.cmake)

configure_package_config_file(cmake/kv1Config.cmake.in ${PROJECT_BINARY_DIR}/cmake/kv1Config.cmake
                              INSTALL_DESTINATION ${kv1_package_dir} NO_SET_AND_CHECK_MACRO)
# Before 1.0 a minor version may break its users.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/cmake/kv1ConfigVersion.cmake
                                 COMPATIBILITY SameMinorVersion ${kv1_architecture})
foreach(file IN ITEMS kv1Xsimd.cmake kv1Kernels.cmake)
  configure_file(cmake/${file} ${PROJECT_BINARY_DIR}/cmake/${file} COPYONLY)
endforeach()
install(FILES ${PROJECT_BINARY_DIR}/cmake/kv1Config.cmake ${PROJECT_BINARY_DIR}/cmake/kv1ConfigVersion.cmake
              cmake/kv1Xsimd.cmake cmake/kv1Kernels.cmake
        DESTINATION ${kv1_package_dir})
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})

# kv1_install_pc(<name> <folder>): paths are relative to the file where they can be, so that the package may be
# moved.
function(kv1_install_pc name folder)
  set(kv1_pc_includedir "\${prefix}/${CMAKE_INSTALL_INCLUDEDIR}")
  set(kv1_pc_libdir "\${prefix}/${CMAKE_INSTALL_LIBDIR}")
  if(IS_ABSOLUTE "${CMAKE_INSTALL_INCLUDEDIR}")
    set(kv1_pc_includedir "${CMAKE_INSTALL_INCLUDEDIR}")
  endif()
  if(IS_ABSOLUTE "${CMAKE_INSTALL_LIBDIR}")
    set(kv1_pc_libdir "${CMAKE_INSTALL_LIBDIR}")
  endif()
  set(prefix "${CMAKE_INSTALL_PREFIX}")
  if(NOT IS_ABSOLUTE "${folder}")
    file(RELATIVE_PATH prefix "/${folder}" "/")
    set(prefix "\${pcfiledir}/${prefix}")
  endif()
  set(kv1_pc_prefix "${prefix}")
  configure_file(cmake/${name}.pc.in ${PROJECT_BINARY_DIR}/${name}.pc @ONLY)
  install(FILES ${PROJECT_BINARY_DIR}/${name}.pc DESTINATION ${folder})
endfunction()

kv1_install_pc(kv1 ${CMAKE_INSTALL_DATADIR}/pkgconfig)
if(TARGET kv1_c)
  kv1_install_pc(kv1-c ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
endif()
