# SPDX-License-Identifier: Apache-2.0
#
# find_package(kv1) of a kv1 in its build folder, never installed; with the kernels compiled once.
include(${CMAKE_CURRENT_LIST_DIR}/../support.cmake)

configure_command(configure installed)
search(${prefix_path})
execute(output ${configure} ${with_xsimd} -Dkv1_DIR=${kv1_build}/cmake -DKERNELS=ON)
expect("${output}" "kv1 ${kv1_version} from ${kv1_build}")
build_and_run()
