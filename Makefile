# `make demo` and `make test` do all their set-up on a fresh machine; both are cheap to run again.
#
#   make demo            train, get killed in the middle of a save, resume
#   make test            lint, build, GoogleTest and Catch2 through CTest, sanitizers, fuzzing, and
#                        pytest
#   make test TORCH=2.11.0   the same with another torch (2.11 to 2.15; default: the one in $(VENV),
#                        else the newest)
#   make frameworks      the frameworks of examples/frameworks, for `make pytest`
#   make soak            the slow cases of pytest's matrices, of which `make test` runs a sample
#   make simgpu          tests on simulated GPUs, SEEDS of each kind (docs/gpu.md)
#   make gpu             on a machine with a GPU, without network: builds against $(PYTHON)'s torch,
#                        GPU tests, GPU benchmarks
#   make sanitize        the torch-free rooms under AddressSanitizer and UndefinedBehaviorSanitizer
#   make race            what threads share under ThreadSanitizer
#   make odr             the torch-free rooms linked as a whole, which finds types defined twice
#   make fuzz            the parsers of untrusted bytes under libFuzzer (needs clang)
#   make docs            the pages of docs/ with the API reference, into build/docs
#   make bench           the benchmarks against torch, two of them on simulated GPUs
#   make format          clang-format and ruff, in place
PYTHON ?= python3
VENV ?= .venv
FRAMEWORKS_VENV ?= $(VENV)-frameworks
TORCH ?=
BUILD ?= build/cmake

export TORCH_CUDA_ARCH_LIST ?= 9.0
export HSDP_CKPT_CUDA ?=
export HSDP_CKPT_BUILD_DIR = $(BUILD)

IN = . $(VENV)/bin/activate &&
PIP = $(IN) python -m pip install --quiet --disable-pip-version-check
CXX_FILES = $$(git ls-files '*.h' '*.cpp' '*.cu')

.PHONY: demo test soak simgpu gpu bench fuzz sanitize race odr format lint build build-tests ctest
.PHONY: pytest frameworks clean
.DEFAULT_GOAL := test

demo: build
	$(IN) python -m examples.demo $(ARGS)

test: lint build-tests
	$(MAKE) sanitize
	$(MAKE) race
	$(MAKE) odr
	$(MAKE) fuzz FUZZ_SECONDS=16
	$(MAKE) ctest
	$(MAKE) simgpu SIMGPU=--sample
	$(MAKE) docs
	$(MAKE) pytest

# ---- set-up --------------------------------------------------------------------------------------
# What the machine's package manager has to bring: headers and libraries, no Python.
# With what they recommend: libFuzzer and the sanitizers come that way with clang.
DEBIAN_PACKAGES = g++ libgtest-dev libgmock-dev catch2 libisal-dev zlib1g-dev clang
HAS_VENV = $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null
HAS_HEADERS = $(PYTHON) -c 'import pathlib, sysconfig; \
  (pathlib.Path(sysconfig.get_path("include")) / "Python.h").stat()' 2>/dev/null
APT_INSTALL = DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
  -o APT::Install-Recommends=true

.PHONY: system
system:
	@command -v dpkg-query >/dev/null || { \
	  command -v c++ >/dev/null || { echo "a C++20 compiler is missing"; exit 1; }; \
	  echo "not a Debian: where GoogleTest, Catch2, zlib are not found, CMake fetches them"; \
	  exit 0; \
	}; \
	missing=$$(for p in $(DEBIAN_PACKAGES); do \
	  dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q "ok installed" || echo $$p; \
	done; $(HAS_VENV) || echo python3-venv; $(HAS_HEADERS) || echo python3-dev); \
	missing=$$(echo $$missing); \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ]; then \
	  echo "These packages are missing; install them first: sudo apt-get install $$missing"; exit 1; \
	fi; \
	echo "installing $$missing"; apt-get update -qq && $(APT_INSTALL) $$missing >/dev/null

# The stamp's name holds what was asked for, so that another TORCH installs another torch.
STAMP = $(VENV)/.ready-$(or $(TORCH),any)
$(STAMP): requirements-dev.txt | system
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.ready-*
	$(PIP) "torch$(if $(TORCH),==$(TORCH),>=2.11)" -r requirements-dev.txt
	touch $@

# They bring hundreds of packages along: an environment of their own, with torch from the other one.
FRAMEWORKS = examples/frameworks/requirements.txt
TORCHAO = examples/frameworks/torchao.txt
FRAMEWORKS_STAMP = $(FRAMEWORKS_VENV)/.ready-$(or $(TORCH),any)
PACKAGES = python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(FRAMEWORKS_STAMP): $(FRAMEWORKS) $(TORCHAO) | $(STAMP)
	$(IN) python -m venv $(FRAMEWORKS_VENV)
	printf '%s\n' "$$($(VENV)/bin/$(PACKAGES))" "$(CURDIR)" \
	  >"$$($(FRAMEWORKS_VENV)/bin/$(PACKAGES))/torch.pth"
	$(FRAMEWORKS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -r $(FRAMEWORKS)
	$(FRAMEWORKS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --no-deps --upgrade --target $(FRAMEWORKS_VENV)/torchao -r $(TORCHAO)
	touch $@

frameworks: $(FRAMEWORKS_STAMP)

build: $(STAMP)
	$(PIP) --no-build-isolation --no-deps -e .

build-tests: export HSDP_CKPT_TESTS = 1
build-tests: export HSDP_CKPT_WERROR = 1
build-tests: build

# ---- checks --------------------------------------------------------------------------------------
lint: $(STAMP)
	$(IN) ruff check . && ruff format --check . && mypy && clang-format --dry-run -Werror $(CXX_FILES)

format: $(STAMP)
	$(IN) ruff check --fix . && ruff format . && clang-format -i $(CXX_FILES)

ctest: build-tests
	$(IN) ctest --test-dir $(BUILD) --no-tests=error --output-on-failure -j 2

pytest: export HSDP_CKPT_REQUIRE_FRAMEWORKS = 1
pytest: export HSDP_TEST_FRAMEWORKS_PYTHON = $(abspath $(FRAMEWORKS_VENV))/bin/python
pytest: build-tests frameworks
	$(IN) python -m pytest $(ARGS)

# The slow cases of matrices whose sample is in `make pytest`.
soak: build-tests
	$(IN) python -m pytest -m soak $(ARGS)

# Torch's own CUDA build on GPUs that a library stands in for; nothing where that isn't built.
SEEDS ?= 1
SIMGPU ?= --seeds $(SEEDS)
simgpu: build-tests
	if [ -e $(BUILD)/test/simgpu/libsimgpu_cuda.so ]; then \
	  $(IN) python test/simgpu/matrix.py $(SIMGPU) $(ARGS); \
	else echo "no simulated GPU: it needs torch's CUDA build and a CUDA toolkit"; fi

# The rooms without torch build in seconds: run their tests under the sanitizers too.
CORE = -G Ninja -DHSDP_CKPT_TORCH=OFF -DHSDP_CKPT_TESTS=ON -DHSDP_CKPT_WERROR=ON
sanitize: $(STAMP)
	$(IN) cmake -S . -B build/sanitize $(CORE) -DHSDP_CKPT_SANITIZE=address,undefined >/dev/null && \
	  cmake --build build/sanitize -j 2 && \
	  ctest --test-dir build/sanitize --no-tests=error --output-on-failure -j 2

# What background threads share with training, under ThreadSanitizer.
race: $(STAMP)
	$(IN) cmake -S . -B build/race $(CORE) -DHSDP_CKPT_SANITIZE=thread >/dev/null && \
	  cmake --build build/race -j 2 --target thread_tests && \
	  build/race/test/thread_tests --gtest_brief=1

# The one definition rule: a type that two files define differently does not link.
odr: $(STAMP)
	$(IN) cmake -S . -B build/odr $(CORE) -DHSDP_CKPT_ODR=ON -DCMAKE_BUILD_TYPE=None >/dev/null && \
	  cmake --build build/odr -j 2

# libFuzzer over the parsers of untrusted bytes, with ASan and UBSan; needs clang. FUZZ_SECONDS in
# all; new inputs stay in build/fuzz/corpus, from which the next run goes on.
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
	if [ -x $(BUILD)/test/catch2_tests ]; then $(BUILD)/test/catch2_tests "[gpu]"; \
	else echo "no Catch2 here: its GPU tests are not run"; fi
	$(PYTHON) -m pytest -m gpu $(ARGS)
	$(PYTHON) test/bench/run.py --gpu

clean:
	rm -rf build dist torch_hsdp_ckpt/*.so *.egg-info
