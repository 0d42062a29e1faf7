# Needs python3 >= 3.10 with venv, a C++20 compiler and make. Everything else goes into .venv.
#
#   make demo    the whole job on the embedded model      make lint    what CI checks besides tests
#   make test    ctest and pytest                         make bench   the benchmarks, with their peers
#   make clean   remove .venv and all build output
PYTHON ?= python3
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# The torch that constraints.txt pins, as a CPU build: from the configured index, else from PyTorch's own.
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)
TORCH_INDEX := https://download.pytorch.org/whl/cpu
BUILD_INPUTS := CMakeLists.txt pyproject.toml $(wildcard cmake/* csrc/*/*)
CPP := $(wildcard csrc/*/*.h csrc/*/*.inl csrc/*/*.cpp tests/cpp/*.h tests/cpp/*.cpp tests/fuzz/*.h tests/fuzz/*.cpp)

.PHONY: demo test ctest pytest test-slow sanitize fuzz lint format notebooks bench clean

demo: $(VENV)/.package
	$(BIN)/phiquant demo --out build/demo

test: ctest pytest

ctest: $(VENV)/.tools
	@./.ci/need-gtest
	$(BIN)/cmake -S . -B build/cpp -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DPHIQUANT_BUILD_EXTENSION=OFF -DPHIQUANT_BUILD_TESTS=ON -DPHIQUANT_WERROR=ON
	$(BIN)/cmake --build build/cpp -j $(JOBS)
	$(BIN)/ctest --test-dir build/cpp --output-on-failure -j $(JOBS)

# One process for each core, with a thread each: two of as many threads as cores would hold each other up.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

pytest: $(VENV)/.dev
	$(PYTEST)

# Marked slow: the notebooks, a kill in the middle of an export, every miniature in every format, the emulator ...
test-slow: $(VENV)/.dev
	$(PYTEST) -m slow

# The C++ tests again, under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/.tools
	@./.ci/need-gtest
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPHIQUANT_BUILD_EXTENSION=OFF -DPHIQUANT_BUILD_TESTS=ON -DPHIQUANT_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize -j $(JOBS)
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure -j $(JOBS)

# Fuzzing of what reads foreign bytes, FUZZ_SECONDS (15) a target: the readers, and guided by coverage the C++ (needs clang).
fuzz: $(VENV)/.dev
	PATH="$(abspath $(BIN)):$$PATH" ./.ci/fuzz

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/torch-abi-audit --check torch $$($(BIN)/python -c 'from phiquant import _C; print(_C.__file__)')

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

# Run the notebooks and store their outputs.
notebooks: $(VENV)/.dev
	$(BIN)/python notebooks/execute.py

bench: $(VENV)/.dev
	$(PIP) --no-build-isolation --editable '.[bench]'
	for name in fake_quant numerics methods activations awq frontier frontier_files gptq_speed solver_speed qat qat_methods mixed_precision stream tied runtimes export dry_run; do $(BIN)/python benchmarks/$$name.py || missed="$$missed $$name"; done; \
	    [ -z "$$missed" ] || { echo "bars missed:$$missed"; exit 1; }

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# cmake, ninja and what the build of the extension needs, torch last: it is the large one.
$(VENV)/.tools: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) scikit-build-core pybind11 cmake ninja
	touch $@

$(VENV)/.torch: $(VENV)/.tools
	$(PIP) '$(TORCH)+cpu' 2>/dev/null || $(PIP) --index-url $(TORCH_INDEX) '$(TORCH)'
	touch $@

# Not isolated: an isolated build would fetch the CUDA build of torch to compile against.
$(VENV)/.package: $(VENV)/.torch $(BUILD_INPUTS)
	$(PIP) --no-build-isolation --editable '.[all]'
	touch $@

$(VENV)/.dev: $(VENV)/.package
	$(PIP) --no-build-isolation --editable '.[dev]'
	$(PIP) onnxruntime-qnn coloredlogs humanfriendly || echo 'onnxruntime-qnn does not install here: its emulator is not tested'
	touch $@
