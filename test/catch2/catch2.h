#pragma once

// Catch2 v2 and v3 differ in their headers only, as far as we use them.
#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif
