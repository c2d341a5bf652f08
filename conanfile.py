# SPDX-License-Identifier: Apache-2.0
import os
import re

from conan import ConanFile
from conan.errors import ConanInvalidConfiguration
from conan.tools.build import check_min_cppstd
from conan.tools.files import copy, get, load
from conan.tools.layout import basic_layout
from conan.tools.scm import Version

required_conan_version = ">=2.1"


class Kv1Conan(ConanFile):
    name = "kv1"
    description = "Key-value cache of transformers in two bits a value, with attention straight from the bits"
    license = "Apache-2.0"
    topics = ("llm", "inference", "kv-cache", "quantization", "attention", "simd", "header-only")
    package_type = "header-library"
    settings = "os", "arch", "compiler", "build_type"
    no_copy_source = True
    test_package_folder = "tests/conan/test_package"

    @property
    def _compilers_minimum_version(self):
        return {"gcc": "12", "clang": "14", "apple-clang": "15", "msvc": "193"}

    def set_version(self):
        header = os.path.join(self.recipe_folder, "include", "kv1", "version.hpp")
        if self.version is None and os.path.exists(header):
            numbers = re.findall(r"#define KV1_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", load(self, header))
            self.version = ".".join(numbers)

    # The recipe lies beside the sources; where it does not, conandata.yml says where a release is.
    def export_sources(self):
        for pattern in ("include/*", "LICENSE"):
            copy(self, pattern, self.recipe_folder, os.path.join(self.export_sources_folder, "src"))

    def source(self):
        if self.conan_data:
            get(self, **self.conan_data["sources"][self.version], strip_root=True)

    def layout(self):
        basic_layout(self, src_folder="src")

    def requirements(self):
        self.requires("xsimd/13.2.0", transitive_headers=True)

    def package_id(self):
        self.info.clear()

    def validate(self):
        check_min_cppstd(self, 20)
        minimum = self._compilers_minimum_version.get(str(self.settings.compiler))
        if minimum and Version(self.settings.compiler.version) < minimum:
            raise ConanInvalidConfiguration(f"{self.ref} needs {self.settings.compiler} {minimum} or newer")

    def package(self):
        copy(self, "LICENSE", self.source_folder, os.path.join(self.package_folder, "licenses"))
        for pattern in ("*.hpp", "*.inl", "*.h"):
            copy(
                self,
                pattern,
                os.path.join(self.source_folder, "include"),
                os.path.join(self.package_folder, "include"),
            )

    def package_info(self):
        self.cpp_info.bindirs = []
        self.cpp_info.libdirs = []
        self.cpp_info.set_property("cmake_file_name", "kv1")
        self.cpp_info.set_property("cmake_target_name", "kv1::kv1")
        self.cpp_info.set_property("pkg_config_name", "kv1")
