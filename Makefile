# make demo: everything on the sample checkpoint.  make test: the whole test suite.
# Variables: PYTHON (interpreter to make the environment with), PIP_ARGS (extra arguments of pip,
# such as an index with CPU-only builds of torch), TensorRT_ROOT, ARGS (for pytest), WORKERS
# (processes that the tests run in).
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# With a CUDA compiler the GPU kernels are built too; their TensorRT adapter needs TensorRT's headers.
ifneq ($(shell command -v nvcc 2>/dev/null),)
ifdef TensorRT_ROOT
CMAKE_ARGS_LIST := -DTensorRT_ROOT=$(TensorRT_ROOT)
else
CMAKE_ARGS_LIST := -DCONVBERT_FETCH_TENSORRT_HEADERS=ON
endif
endif
NATIVE_SOURCES := $(shell find CMakeLists.txt plugins -type f \( -name '*.cpp' -o -name '*.cu*' -o -name '*.h' -o -name 'CMakeLists.txt' -o -name '*.map' -o -name '*.cmake' \) 2>/dev/null)

.PHONY: demo test install native gpu gpu-sanitize sanitize lint wheel clean

demo: install
	$(BIN)/convbert-deploy demo

# a file's tests stay in one process, which shares what they export; two processes of many threads
# each would only wait for one another
test: install
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(NATIVE_SOURCES)
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "error: $(PYTHON) cannot make environments; on Debian or Ubuntu: apt-get install python3-venv"; exit 3; }
	@command -v c++ >/dev/null || { echo "error: no C++ compiler; on Debian or Ubuntu: apt-get install g++"; exit 3; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	CMAKE_ARGS="$(CMAKE_ARGS_LIST)" $(BIN)/pip install $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@

# the libraries alone, into the environment, where the editable install looks first
native: install
	cmake -S . -B build/native $(CMAKE_ARGS_LIST) -DCMAKE_BUILD_TYPE=Release
	cmake --build build/native --parallel
	cmake --install build/native --prefix "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')"

# with an NVIDIA GPU: its tests, the plugins through their ABI, and the kernels beside torch
LIBRARIES = $$($(BIN)/python -c 'from convbert_deploy import plugin_library as p; print(p.tensorrt_library().parent)')
gpu: install
	$(BIN)/pytest -m gpu --require GPU,CUDA $(ARGS)
	$(LIBRARIES)/convbert_plugin_harness $(LIBRARIES)/libconvbert_trt_plugins.so
	$(BIN)/python benchmarks/gpu_kernels.py
	$(BIN)/python benchmarks/gpu_engines.py

# memory errors and races of the CUDA kernels, driven by the harness
gpu-sanitize: install
	for tool in memcheck racecheck; do compute-sanitizer --tool $$tool --error-exitcode 1 \
	  $(LIBRARIES)/convbert_plugin_harness $(LIBRARIES)/libconvbert_trt_plugins.so || exit 1; done

# the kernel tests on CPU libraries built with AddressSanitizer and UndefinedBehaviorSanitizer
SANITIZE := -fsanitize=address,undefined
sanitize: install
	cmake -S . -B build/sanitize -DCONVBERT_CUDA=OFF -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DCMAKE_CXX_FLAGS="$(SANITIZE) -fno-sanitize-recover=undefined -fno-omit-frame-pointer" \
	  -DCMAKE_SHARED_LINKER_FLAGS="$(SANITIZE)"
	cmake --build build/sanitize --parallel
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so):$$(c++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 \
	  $(BIN)/pytest --libraries build/sanitize/plugins \
	  --ignore-glob='*test_mutations*' -m "not gpu" tests/kernels $(ARGS)

lint: install
	$(BIN)/ruff check .

wheel: install
	CMAKE_ARGS="$(CMAKE_ARGS_LIST)" $(BIN)/pip wheel --no-deps -w dist .

clean:
	rm -rf build dist demo-output $(STAMP)
