// SPDX-License-Identifier: Apache-2.0
#include "cli.hpp"

#include <iostream>

int main(int argc, char** argv) { return kv1_lm::run(argc, argv, std::cin, std::cout, std::cerr); }
