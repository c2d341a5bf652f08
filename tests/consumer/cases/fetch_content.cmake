# SPDX-License-Identifier: Apache-2.0
include(${CMAKE_CURRENT_LIST_DIR}/../support.cmake)

configure_command(configure fetch_content)
list(APPEND configure ${with_xsimd} -DKV1_URL=${work}/kv1.tar.gz)
# an installed kv1 is preferred
search(${prefix} ${prefix_path})
execute(output ${configure})
expect("${output}" "kv1 from sources: \n")
# without one the archive is unpacked and built
file(REMOVE_RECURSE ${dir}/build)
search(${prefix_path})
execute(output ${configure})
expect("${output}" "kv1 from sources: ${dir}/build/_deps/kv1-src\n")
build_and_run()
