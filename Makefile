# `make demo` and `make test` do all their set-up on a fresh machine; both are cheap to run again.
#
#   make demo            train, get killed in the middle of a save, resume
#   make test            lint, build, GoogleTest and Catch2 through CTest, sanitizers, short fuzzing, pytest
#   make test TORCH=2.11.0   the same with another torch (2.11 to 2.15; default: the one in $(VENV), else the newest)
#   make gpu             on a machine with a GPU, without network: builds against $(PYTHON)'s torch, GPU tests, GPU benchmarks
#   make sanitize        the torch-free rooms under AddressSanitizer and UndefinedBehaviorSanitizer
#   make race            what threads share under ThreadSanitizer
#   make fuzz            the parsers of untrusted bytes under libFuzzer (needs clang)
#   make docs            the pages of docs/ with the API reference, into build/docs
#   make bench           the benchmarks against torch
#   make format          clang-format and ruff, in place
PYTHON ?= python3
VENV ?= .venv
TORCH ?=
BUILD ?= build/cmake

export TORCH_CUDA_ARCH_LIST ?= 9.0
export HSDP_CKPT_CUDA ?=
export HSDP_CKPT_BUILD_DIR = $(BUILD)

IN = . $(VENV)/bin/activate &&
CXX_FILES = $$(git ls-files '*.h' '*.cpp' '*.cu')

.PHONY: demo test gpu bench fuzz sanitize race format lint build build-tests ctest pytest clean
.DEFAULT_GOAL := test

demo: build
	$(IN) python -m examples.demo $(ARGS)

test: lint build-tests
	$(MAKE) sanitize
	$(MAKE) race
	$(MAKE) fuzz FUZZ_SECONDS=16
	$(MAKE) ctest
	$(MAKE) docs
	$(MAKE) pytest

# ---- set-up --------------------------------------------------------------------------------------------------------
# What the machine's package manager has to bring: headers and libraries, no Python.
# With what they recommend: libFuzzer and the sanitizers come that way with clang.
DEBIAN_PACKAGES = g++ libgtest-dev libgmock-dev catch2 libisal-dev zlib1g-dev clang

.PHONY: system
system:
	@command -v dpkg-query >/dev/null || { command -v c++ >/dev/null || { echo "a C++20 compiler is missing"; exit 1; }; \
	  echo "not a Debian: where GoogleTest, Catch2, zlib are not found, CMake fetches them"; exit 0; }; \
	missing=$$(for p in $(DEBIAN_PACKAGES); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q "ok installed" || echo $$p; done; \
	  $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv; \
	  $(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || echo python3-dev); \
	missing=$$(echo $$missing); \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ]; then echo "installing $$missing"; apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq -o APT::Install-Recommends=true $$missing >/dev/null; \
	  else echo "These packages are missing; install them first: sudo apt-get install $$missing"; exit 1; fi; \
	fi

# The stamp's name holds what was asked for, so that another TORCH installs another torch.
STAMP = $(VENV)/.ready-$(or $(TORCH),any)
$(STAMP): requirements-dev.txt | system
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.ready-*
	$(IN) python -m pip install --quiet --disable-pip-version-check "torch$(if $(TORCH),==$(TORCH),>=2.11)" -r requirements-dev.txt
	touch $@

build: $(STAMP)
	$(IN) python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .

build-tests: export HSDP_CKPT_TESTS = 1
build-tests: export HSDP_CKPT_WERROR = 1
build-tests: build

# ---- checks --------------------------------------------------------------------------------------------------------
lint: $(STAMP)
	$(IN) ruff check . && ruff format --check . && mypy && clang-format --dry-run -Werror $(CXX_FILES)

format: $(STAMP)
	$(IN) ruff check --fix . && ruff format . && clang-format -i $(CXX_FILES)

ctest: build-tests
	$(IN) ctest --test-dir $(BUILD) --no-tests=error --output-on-failure -j 2

pytest: build-tests
	$(IN) python -m pytest $(ARGS)

# The rooms without torch build in seconds: run their tests under the sanitizers too.
sanitize: $(STAMP)
	$(IN) cmake -S . -B build/sanitize -G Ninja -DHSDP_CKPT_TORCH=OFF -DHSDP_CKPT_TESTS=ON -DHSDP_CKPT_WERROR=ON \
	  -DHSDP_CKPT_SANITIZE=address,undefined >/dev/null && cmake --build build/sanitize -j 2 && \
	  ctest --test-dir build/sanitize --no-tests=error --output-on-failure -j 2

# What background threads share with training, under ThreadSanitizer.
race: $(STAMP)
	$(IN) cmake -S . -B build/race -G Ninja -DHSDP_CKPT_TORCH=OFF -DHSDP_CKPT_TESTS=ON -DHSDP_CKPT_WERROR=ON \
	  -DHSDP_CKPT_SANITIZE=thread >/dev/null && cmake --build build/race -j 2 --target thread_tests && \
	  build/race/test/thread_tests --gtest_brief=1

# libFuzzer over the parsers of untrusted bytes, with ASan and UBSan; needs clang. FUZZ_SECONDS in all;
# new inputs stay in build/fuzz/corpus, from which the next run goes on.
FUZZ_SECONDS ?= 60
fuzz: $(STAMP)
	$(IN) test/fuzz/run.sh $(FUZZ_SECONDS)

# A broken link, a page that no menu has and an unknown name are errors.
.PHONY: docs
docs: $(STAMP)
	$(IN) mkdocs --quiet build --strict

bench: build-tests
	$(IN) python test/bench/run.py $(ARGS)

# No venv and no network here: the Python at hand with its torch. Skips of GPU tests are failures.
gpu: export HSDP_CKPT_CUDA = 1
gpu: export HSDP_CKPT_TESTS = 1
gpu: export HSDP_CKPT_FETCH = 0
gpu: export HSDP_CKPT_REQUIRE_GPU = 1
gpu:
	$(PYTHON) setup.py -q build_ext --inplace
	if [ -x $(BUILD)/test/catch2_tests ]; then $(BUILD)/test/catch2_tests "[gpu]"; else echo "no Catch2 here: its GPU tests are not run"; fi
	$(PYTHON) -m pytest -m gpu $(ARGS)
	$(PYTHON) test/bench/run.py --gpu

clean:
	rm -rf build dist torch_hsdp_ckpt/*.so *.egg-info
