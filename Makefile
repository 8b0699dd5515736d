# The two commands: `make demo` trains and verifies on real digits, `make test` runs all tests.
# Both make their own virtual environment, one per torch version, and build what they need.
#   TORCH=2.15 chooses another of requirements/torch-*.txt; QUICK=1 shortens the demo.
TORCH ?= 2.11
PYTHON ?= python3
VENV := .venv/torch-$(TORCH)
BUILD := $(CURDIR)/build/torch-$(TORCH)
BIN := $(CURDIR)/$(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: all setup install test test-cpp test-python test-asan test-asan-cpp test-tsan mutants demo bench lint format clean
all: install

$(VENV)/.installed: requirements/torch-$(TORCH).txt requirements/build.txt requirements/test.txt requirements/demo.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { echo "torchmargin needs Python 3.10 or newer"; exit 1; }
	@command -v cmake >/dev/null || { echo "torchmargin needs CMake (package cmake)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "torchmargin needs Python's venv (Debian: package python3-venv)"; exit 1; }
	$(BIN)/pip install --quiet $(foreach file,$^,-r $(file))
	@touch $@

setup: $(VENV)/.installed

# Compiles what changed (the build folder is kept) and installs the package.
install: setup
	PATH="$(BIN):$$PATH" TORCHMARGIN_BUILD_DIR="$(BUILD)" TORCHMARGIN_CMAKE_ARGS="-DTORCHMARGIN_BUILD_TESTS=ON" \
	  $(BIN)/pip install --quiet --no-build-isolation --no-deps --force-reinstall .

test: test-cpp test-python

test-cpp: install
	ctest --test-dir $(BUILD) --output-on-failure

test-python: install
	$(BIN)/python -m pytest -q tests/python

# The C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer, and the Python tests with that library.
SANITIZED := $(CURDIR)/build/torch-$(TORCH)-asan
CMAKE_SANITIZED = PATH="$(BIN):$$PATH" cmake -G Ninja -S . -DTORCHMARGIN_BUILD_TESTS=ON -DTORCHMARGIN_CUDA=OFF \
  -DTORCHMARGIN_TORCH_DIR="$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["platlib"])')/torch"
test-asan-cpp: setup
	$(CMAKE_SANITIZED) -B $(SANITIZED) -DTORCHMARGIN_SANITIZE=address,undefined
	PATH="$(BIN):$$PATH" cmake --build $(SANITIZED)
	ctest --test-dir $(SANITIZED) --output-on-failure

test-asan: test-asan-cpp install
	ASAN_OPTIONS=detect_leaks=0 TORCHMARGIN_LIBRARY=$(SANITIZED)/libtorchmargin.so \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  $(BIN)/python -m pytest -q tests/python $(ASAN_PYTEST_ARGS)

# The CPU kernels, and the CUDA kernels on the tests' stand-in for a GPU, under ThreadSanitizer.
test-tsan: setup
	$(CMAKE_SANITIZED) -B build/torch-$(TORCH)-tsan -DTORCHMARGIN_SANITIZE=thread
	PATH="$(BIN):$$PATH" cmake --build build/torch-$(TORCH)-tsan --target torchmargin_thread_tests torchmargin_device_on_host_tests
	build/torch-$(TORCH)-tsan/tests/cpp/torchmargin_thread_tests
	build/torch-$(TORCH)-tsan/tests/cpp/torchmargin_device_on_host_tests --gtest_filter='*/1.*'

# Bugs planted in the CUDA kernels, each of which their tests must find.
mutants: install
	PATH="$(BIN):$$PATH" scripts/mutants.sh $(BUILD)

demo: install
	$(BIN)/python -m torchmargin.demo $(if $(QUICK),--quick) $(DEMO_ARGS)

bench: install
	$(BIN)/python benchmarks/cpu.py $(BENCH_ARGS)

lint: setup
	$(BIN)/pip install --quiet ruff
	$(BIN)/ruff check . && clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp')

clean:
	rm -rf build dist python/*.egg-info out
