# SPDX-License-Identifier: Apache-2.0
#
# Examples are what users write: they get along with the public interface.
cmake_minimum_required(VERSION 3.21)
file(GLOB_RECURSE sources ${ROOT}/examples/*.hpp ${ROOT}/examples/*.cpp ${ROOT}/examples/*.cu)
if(NOT sources)
  message(FATAL_ERROR "no examples found in ${ROOT}")
endif()
set(uses "")
foreach(source IN LISTS sources)
  file(STRINGS ${source} lines REGEX "detail(::|/)|namespace detail")
  foreach(line IN LISTS lines)
    file(RELATIVE_PATH name ${ROOT} ${source})
    string(APPEND uses "\n  ${name}: ${line}")
  endforeach()
endforeach()
if(uses)
  message(FATAL_ERROR "examples use what is not part of an interface:${uses}")
endif()
