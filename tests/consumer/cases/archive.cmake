# SPDX-License-Identifier: Apache-2.0
#
# What a release's archive would hold of the files that are needed to use kv1.
include(${CMAKE_CURRENT_LIST_DIR}/../support.cmake)

set(root ${dir}/kv1-${kv1_version})
file(COPY ${kv1_source}/include ${kv1_source}/cmake ${kv1_source}/CMakeLists.txt ${kv1_source}/LICENSE
     DESTINATION ${root})
execute(output ${CMAKE_COMMAND} -E chdir ${dir} ${CMAKE_COMMAND} -E tar czf ${work}/kv1.tar.gz kv1-${kv1_version})
