# SPDX-License-Identifier: Apache-2.0
#
# Nothing is installed but headers, the CMake package, the pkg-config file and the licence (and the C library
# where it was asked for). The other cases use what is installed here, to a prefix that configuring did not know.
include(${CMAKE_CURRENT_LIST_DIR}/../support.cmake)

file(REMOVE_RECURSE ${prefix})
execute(output ${CMAKE_COMMAND} --install ${kv1_build} --prefix ${prefix})
file(GLOB_RECURSE files RELATIVE ${prefix} ${prefix}/*)
set(expected "^(include/kv1/.*\\.(hpp|inl|h)|share/(doc|licenses)/kv1/LICENSE|share/pkgconfig/kv1\\.pc|\
(share|lib[^/]*|lib/[^/]*)/cmake/kv1/kv1(Config|ConfigVersion|Targets|Xsimd|Kernels)\\.cmake")
if(kv1_c)
  string(APPEND expected "|.*/kv1Targets-[a-z]+\\.cmake|(lib[^/]*|lib/[^/]*)/(libkv1_c\\.[a-z0-9.]+|pkgconfig/kv1-c\\.pc)")
endif()
foreach(file IN LISTS files)
  if(NOT file MATCHES "${expected})$")
    message(FATAL_ERROR "installs ${file}")
  endif()
endforeach()
foreach(file IN ITEMS include/kv1/kv1.hpp include/kv1/detail/simd/passes.hpp share/pkgconfig/kv1.pc)
  if(NOT file IN_LIST files)
    message(FATAL_ERROR "does not install ${file}")
  endif()
endforeach()

# No file of the package may name a folder of this machine.
foreach(file IN LISTS files)
  if(NOT file MATCHES "^include/|/libkv1_c")
    file(READ ${prefix}/${file} text)
    foreach(place IN ITEMS ${kv1_source} ${kv1_build} ${xsimd_include})
      string(FIND "${text}" "${place}" at)
      if(NOT at EQUAL -1)
        message(FATAL_ERROR "${file} names ${place}")
      endif()
    endforeach()
  endif()
endforeach()
