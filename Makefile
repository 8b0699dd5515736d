# `make demo` trains and verifies on real digits, `make face` on drawn faces, `make test` runs all tests; `make help` lists
# the rest.
# They make their own virtual environment, one per torch version, and build what they need.
# NB: the clone's path may hold spaces, and a target may not: targets are relative, recipes quote.
TORCH ?= 2.11
PYTHON ?= python3
VENV := .venv/torch-$(TORCH)
BUILD := build/torch-$(TORCH)
BIN := "$(CURDIR)/$(VENV)/bin"
TORCHES := $(patsubst requirements/torch-%.txt,%,$(wildcard requirements/torch-*.txt))
JOBS := $(if $(MAX_JOBS),-j $(MAX_JOBS))
TESTS ?= tests/python
# Two files of tests at a time (what a file builds is built once): most tests are single-threaded, and the threads of the
# others wait asleep for each other.
WORKERS ?= 2
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile
CTEST := ctest --output-on-failure -j $(WORKERS)
WITH_TOOLS := PATH=$(BIN):"$$PATH"
export PIP_DISABLE_PIP_VERSION_CHECK := 1

ifeq ($(filter $(TORCH),$(TORCHES)),)
  $(error there is no requirements/torch-$(TORCH).txt; TORCH may be one of: $(TORCHES))
endif

.PHONY: all help setup install test test-cpp test-python test-asan test-asan-cpp test-tsan mutants demo face bench docs lint format clean
all: install

help: ## this list
	@echo "make [TARGET] [TORCH=$(TORCH)] [PYTHON=$(PYTHON)]      torch versions: $(TORCHES)"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1\t\2/p' Makefile | expand -t 18

$(VENV)/.installed: requirements/torch-$(TORCH).txt $(addprefix requirements/,build.txt test.txt demo.txt face.txt test-face.txt test-integrations.txt oracles.txt)
	@bash scripts/check_tools.sh "$(PYTHON)"
	@echo "== torch $(TORCH) and what the demo and the tests need, into $(VENV): 5.7 GB, a minute or two on a fast line"
	"$(PYTHON)" -m venv "$(VENV)"
	$(BIN)/python -m pip install --progress-bar on $(foreach file,$(filter-out %/oracles.txt,$^),-r $(file))
	@# What tests compare with and nothing depends on, in a folder of its own: it asks for a torch of long ago.
	$(BIN)/python -m pip install --quiet --no-deps --target "$(VENV)/oracles" --upgrade -r requirements/oracles.txt
	@touch $@

setup: $(VENV)/.installed ## the virtual environment

# Compiles what changed (the build folder is kept) and installs the package.
INSTALL := $(WITH_TOOLS) TORCHMARGIN_BUILD_DIR="$(BUILD)" TORCHMARGIN_CMAKE_ARGS="-DTORCHMARGIN_WERROR=ON $$TORCHMARGIN_CMAKE_ARGS"
install: setup ## builds the library and installs the package (the default)
	@bash scripts/check_tools.sh "$(PYTHON)"
	@echo "== the library, in $(BUILD): about four minutes the first time on two cores"
	@$(INSTALL) $(BIN)/python setup.py --quiet compile
	@$(INSTALL) $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	@cat "$(BUILD)/torchmargin-summary.txt"

test: test-cpp test-python ## all tests, C++ and Python

test-cpp: install ## the C++ tests
	@echo "== the C++ tests: about four minutes to compile the first time on two cores"
	$(WITH_TOOLS) cmake -S . -B "$(BUILD)" -DTORCHMARGIN_BUILD_TESTS=ON
	$(WITH_TOOLS) cmake --build "$(BUILD)" $(JOBS)
	$(CTEST) --test-dir "$(BUILD)"

test-python: install ## the Python tests (TESTS="..." some of them)
	$(PYTEST) $(TESTS)

# The C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer, and the Python tests with that library. Without two that
# take minutes there and run the code of others on other numbers and dtypes.
WITHOUT_NUMBERS := -DeviceSweep.HeadsOfNarrowDtypesAreNearFloat64:DeviceSweep.UpstreamInOnePassOrByParts
SANITIZED := build/torch-$(TORCH)-asan
CMAKE_SANITIZED = $(WITH_TOOLS) cmake -G Ninja -S . -DCMAKE_CXX_FLAGS_RELEASE="-O1 -DNDEBUG" -DTORCHMARGIN_WERROR=ON -DTORCHMARGIN_BUILD_TESTS=ON -DTORCHMARGIN_CUDA=OFF \
  -DTORCHMARGIN_TORCH_DIR="$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["platlib"])')/torch"
test-asan-cpp: setup ## the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(CMAKE_SANITIZED) -B "$(SANITIZED)" -DTORCHMARGIN_SANITIZE=address,undefined
	$(WITH_TOOLS) cmake --build "$(SANITIZED)" $(JOBS)
	GTEST_FILTER=$(WITHOUT_NUMBERS) $(CTEST) --test-dir "$(SANITIZED)"

test-asan: test-asan-cpp install ## the same, and the Python tests with that library
	ASAN_OPTIONS=detect_leaks=0 TORCHMARGIN_LIBRARY="$(CURDIR)/$(SANITIZED)/libtorchmargin.so" \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  $(BIN)/python -m pytest -q tests/python $(ASAN_PYTEST_ARGS)

# The CPU kernels, and the CUDA kernels on the tests' stand-in for a GPU, under ThreadSanitizer.
TSAN := build/torch-$(TORCH)-tsan
test-tsan: setup ## the kernels under ThreadSanitizer
	$(CMAKE_SANITIZED) -B "$(TSAN)" -DTORCHMARGIN_SANITIZE=thread
	$(WITH_TOOLS) cmake --build "$(TSAN)" $(JOBS) --target torchmargin_thread_tests torchmargin_device_on_host_tests
	"$(TSAN)/tests/cpp/torchmargin_thread_tests"
	"$(TSAN)/tests/cpp/torchmargin_device_on_host_tests" --gtest_filter='*/1.*'

# Bugs planted one at a time, each of which the tests that its patch names must find. MUTANTS: some of them, or "sample".
mutants: install ## bugs planted in the code, which tests must find (MUTANTS=sample: a few)
	$(WITH_TOOLS) scripts/mutants.sh "$(CURDIR)/$(BUILD)" $(MUTANTS)

demo: install ## every loss on real digits, out/index.html (QUICK=1: one or two minutes)
	$(BIN)/python -m torchmargin.demo $(if $(QUICK),--quick) $(DEMO_ARGS)

face: install ## the face recipe on drawn people: out/face/index.html (QUICK=1: one or two minutes)
	$(BIN)/python -m recipes.face tour $(if $(QUICK),--quick) $(FACE_ARGS)

bench: install ## times against eager and torch.compile
	$(BIN)/python benchmarks/cpu.py $(BENCH_ARGS)

$(VENV)/.docs: requirements/docs.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -r requirements/docs.txt
	@touch $@

# Warnings are errors, of doxygen and of Sphinx.
docs: install $(VENV)/.docs ## the documentation site, out/docs/index.html (wants doxygen)
	@command -v doxygen > /dev/null || { echo "make docs: there is no doxygen, which reads the C++ headers (Debian: apt install doxygen)" >&2; exit 1; }
	@mkdir -p out/cpp
	doxygen docs/Doxyfile
	$(BIN)/python -m sphinx -W --keep-going --fresh-env --quiet -d out/docs-trees -b html docs out/docs

# In their own versions, whatever the machine has: what is well formatted differs between them.
$(VENV)/.lint: requirements/lint.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -r requirements/lint.txt
	@touch $@

CXX_SOURCES := git ls-files -z '*.h' '*.cpp' '*.cu' '*.cuh' | xargs -0
lint: $(VENV)/.lint ## formats, lint and types; builds nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(CXX_SOURCES) $(BIN)/clang-format --dry-run --Werror
	$(BIN)/python -m mypy

format: $(VENV)/.lint ## formats all sources
	$(BIN)/ruff format .
	$(CXX_SOURCES) $(BIN)/clang-format -i

clean: ## removes what was built; the virtual environments stay
	rm -rf build dist python/*.egg-info out
