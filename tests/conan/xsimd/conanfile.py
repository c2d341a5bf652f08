# SPDX-License-Identifier: Apache-2.0
#
# For kv1's own tests, where Conan Center cannot be reached: a package of the xsimd in the folder
# KV1_TEST_XSIMD_INCLUDE, in the shape of Conan Center's.
import os

from conan import ConanFile
from conan.tools.files import copy


class XsimdConan(ConanFile):
    name = "xsimd"
    package_type = "header-library"

    def package(self):
        copy(
            self,
            "xsimd/*.hpp",
            os.environ["KV1_TEST_XSIMD_INCLUDE"],
            os.path.join(self.package_folder, "include"),
        )

    def package_info(self):
        self.cpp_info.bindirs = []
        self.cpp_info.libdirs = []
        self.cpp_info.set_property("cmake_file_name", "xsimd")
        self.cpp_info.set_property("cmake_target_name", "xsimd")
