// A main of our own, the same for Catch2 v2 (headers only) and v3 (a library).
#define CATCH_CONFIG_RUNNER
#include "catch2.h"

int main(int argc, char** argv) { return Catch::Session().run(argc, argv); }
