# SPDX-License-Identifier: Apache-2.0
#
# find_package(kv1) of an installed kv1, after its prefix was moved.
include(${CMAKE_CURRENT_LIST_DIR}/../support.cmake)

file(COPY ${prefix}/ DESTINATION ${dir}/moved)
configure_command(configure installed)
search(${dir}/moved ${prefix_path})
execute(output ${configure} ${with_xsimd})
expect("${output}" "kv1 ${kv1_version} from ${dir}/moved")
build_and_run()
