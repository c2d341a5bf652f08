# SPDX-License-Identifier: Apache-2.0
#
# check_standard.cmake -DCOMPILER=<c++> -DINCLUDE=<folder> -DHEADERS=<list> -DWORK=<folder>
foreach(header IN LISTS HEADERS)
  file(WRITE ${WORK}/cxx17.cpp "#include <${header}>\n")
  execute_process(COMMAND ${COMPILER} -std=c++17 -fsyntax-only -I ${INCLUDE} ${WORK}/cxx17.cpp RESULT_VARIABLE code
                  ERROR_VARIABLE text)
  string(REGEX MATCHALL "error: [^\n]*" errors "${text}")
  list(LENGTH errors count)
  # The second one is the file that is not there, which ends the compilation.
  if(code EQUAL 0
     OR NOT count EQUAL 2
     OR NOT errors MATCHES "^error: [^;]*kv1 needs C[+][+]20: [^;]*;error: [^;]*kv1-needs-C[+][+]20")
    message(FATAL_ERROR "${header} as C++17:\n${text}")
  endif()
endforeach()
