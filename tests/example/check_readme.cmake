# SPDX-License-Identifier: Apache-2.0
# README shows a program that is compiled and run: this very text, from its first #include on.
file(READ ${README} readme)
file(READ ${PROGRAM} program)
string(FIND "${program}" "#include" start)
string(SUBSTRING "${program}" ${start} -1 program)
string(FIND "${readme}" "```cpp\n${program}```\n" found)
if(found EQUAL -1)
  message(FATAL_ERROR "README.md does not show ${PROGRAM} as it is")
endif()
