# An overlay port: it packages the sources it lies among (--overlay-ports=<kv1>/cmake/vcpkg-port). A registry's
# copy begins with vcpkg_from_github() of a release instead; nothing else changes.
get_filename_component(SOURCE_PATH "${CMAKE_CURRENT_LIST_DIR}/../.." ABSOLUTE)

set(VCPKG_BUILD_TYPE release) # header-only port

vcpkg_cmake_configure(
    SOURCE_PATH "${SOURCE_PATH}"
    OPTIONS
        -DKV1_BUILD_TESTS=OFF
        -DKV1_BUILD_BENCH=OFF
        -DKV1_BUILD_EXAMPLES=OFF
        -DKV1_FETCH_DEPENDENCIES=OFF
        -DKV1_INSTALL_CMAKEDIR=share/kv1
)

vcpkg_cmake_install()
vcpkg_cmake_config_fixup()
vcpkg_fixup_pkgconfig(SKIP_CHECK) # it requires xsimd.pc, which xsimd's port does not keep

file(REMOVE_RECURSE "${CURRENT_PACKAGES_DIR}/share/doc")
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
file(INSTALL "${CMAKE_CURRENT_LIST_DIR}/usage" DESTINATION "${CURRENT_PACKAGES_DIR}/share/${PORT}")
