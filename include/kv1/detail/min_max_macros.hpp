// SPDX-License-Identifier: Apache-2.0
//
// Where `min` and `max` are macros, as they are after <windows.h> without NOMINMAX, libstdc++'s headers do
// not compile: other standard libraries protect themselves. All of them that kv1 includes are therefore
// included here, while the macros are set aside. kv1's own code writes (std::min)(a, b), which no macro of
// that name matches.
#pragma once

#if defined(min) || defined(max)
#pragma push_macro("min")
#pragma push_macro("max")
#undef min
#undef max
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <complex>
#include <filesystem>
#include <functional>
#include <iterator>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <ostream>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>
#pragma pop_macro("max")
#pragma pop_macro("min")
#endif
