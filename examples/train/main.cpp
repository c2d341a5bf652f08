// SPDX-License-Identifier: Apache-2.0
#include "train_cli.hpp"

#include <iostream>

int main(int argc, char** argv) { return kv1_train::run(argc, argv, std::cout, std::cerr); }
