# SPDX-License-Identifier: Apache-2.0
include(${CMAKE_CURRENT_LIST_DIR}/../support.cmake)

configure_command(configure subdirectory)
search(${prefix_path})
execute(output ${configure} ${with_xsimd} -DKV1_SOURCE=${kv1_source})
build_and_run()

# The engine's install step must not install kv1.
execute(output ${CMAKE_COMMAND} --install ${dir}/build --prefix ${dir}/prefix --config Debug)
file(GLOB installed ${dir}/prefix/*)
if(installed)
  message(FATAL_ERROR "kv1 as a subdirectory installs ${installed}")
endif()
