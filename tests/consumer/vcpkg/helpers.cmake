# SPDX-License-Identifier: Apache-2.0
#
# Small doubles of the helper functions that vcpkg gives to a portfile, as far as their documentation tells.
# They refuse arguments that the real ones do not have.

macro(parse flags one many)
  cmake_parse_arguments(PARSE_ARGV 0 arg "${flags}" "${one}" "${many}")
  if(arg_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "unknown arguments: ${arg_UNPARSED_ARGUMENTS}")
  endif()
endmacro()

function(vcpkg_cmake_configure)
  parse("" "SOURCE_PATH" "OPTIONS;OPTIONS_DEBUG;OPTIONS_RELEASE")
  if(NOT VCPKG_BUILD_TYPE STREQUAL "release")
    message(FATAL_ERROR "a header-only port has nothing to build twice")
  endif()
  execute(output ${CMAKE_COMMAND} -S ${arg_SOURCE_PATH} -B ${CURRENT_BUILDTREES_DIR} -G ${generator}
          -DCMAKE_MAKE_PROGRAM=${make_program} -DCMAKE_CXX_COMPILER=${cxx} ${with_xsimd} -DCMAKE_BUILD_TYPE=Release
          -DCMAKE_INSTALL_PREFIX=${CURRENT_PACKAGES_DIR} -DFETCHCONTENT_FULLY_DISCONNECTED=ON ${arg_OPTIONS}
          ${arg_OPTIONS_RELEASE})
  if(output MATCHES "Manually-specified variables were not used by the project:[ \n]+(KV1[A-Z_]*)")
    message(FATAL_ERROR "the portfile sets ${CMAKE_MATCH_1}, which kv1 does not have")
  endif()
endfunction()

function(vcpkg_cmake_install)
  parse("DISABLE_PARALLEL;ADD_BIN_TO_PATH" "" "")
  execute(output ${CMAKE_COMMAND} --build ${CURRENT_BUILDTREES_DIR} --target install)
endfunction()

function(vcpkg_cmake_config_fixup)
  parse("DO_NOT_DELETE_PARENT_CONFIG_PATH;NO_PREFIX_CORRECTION" "PACKAGE_NAME;CONFIG_PATH;TOOLS_PATH" "")
  # Where the files are in share/<port> already, the real one corrects nothing that matters here.
  if(arg_CONFIG_PATH OR NOT EXISTS ${CURRENT_PACKAGES_DIR}/share/${PORT}/${PORT}Config.cmake)
    message(FATAL_ERROR "the CMake package is not in share/${PORT}")
  endif()
endfunction()

function(vcpkg_fixup_pkgconfig)
  parse("SKIP_CHECK" "" "RELEASE_FILES;DEBUG_FILES")
  file(GLOB files ${CURRENT_PACKAGES_DIR}/lib/pkgconfig/*.pc ${CURRENT_PACKAGES_DIR}/share/pkgconfig/*.pc)
  if(NOT files)
    message(FATAL_ERROR "no pkg-config file")
  endif()
endfunction()

function(vcpkg_install_copyright)
  parse("" "COMMENT" "FILE_LIST")
  file(READ ${arg_FILE_LIST} text)
  file(WRITE ${CURRENT_PACKAGES_DIR}/share/${PORT}/copyright "${text}")
endfunction()
