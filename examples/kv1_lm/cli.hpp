// SPDX-License-Identifier: Apache-2.0
//
// The command line of kv1-lm.
#pragma once

#include <iosfwd>

namespace kv1_lm {

/// Runs one command. Returns the exit code: 0, 1 for a failure of the program or the machine, 2 for wrong
/// input; each failure is one line in `err`. Does not throw.
int run(int argc, const char* const* argv, std::istream& in, std::ostream& out, std::ostream& err);

} // namespace kv1_lm
