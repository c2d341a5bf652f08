# SPDX-License-Identifier: Apache-2.0
#
# README shows a program that is compiled and run: the very text of examples/quickstart.cpp, from its first #include
# on. And it is a page that is read, not a notebook.
cmake_minimum_required(VERSION 3.21)
file(READ ${ROOT}/README.md readme)
file(READ ${ROOT}/examples/quickstart.cpp program)
string(FIND "${program}" "#include" start)
string(SUBSTRING "${program}" ${start} -1 program)
string(FIND "${readme}" "```cpp\n${program}```\n" found)
if(found EQUAL -1)
  message(FATAL_ERROR "README.md does not show examples/quickstart.cpp as it is")
endif()
file(SIZE ${ROOT}/README.md size)
if(size GREATER 8192)
  message(FATAL_ERROR "README.md has ${size} bytes, 8192 at the most: measurements go to bench/README.md, "
                      "quality to examples/evaluation/README.md, training to examples/train/README.md")
endif()
