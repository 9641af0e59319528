# Verbs: demo, test, test-slow, test-long, fuzz, sanitize, bench, gate, readme, mutants, lint, dist, dist-check,
# emulate-cuda, gpu, gpu-wheels. Everything lives in .venv; nothing is installed elsewhere.
PYTHON ?= python3
PY := .venv/bin/python
# Most of what is installed is never imported: Python compiles what is, once.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(PY) -m pip install -q --no-compile -c constraints.txt
# One thread a process: two processes share two cores; tests about threads set their number.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal -q
export PIP_REQUIRE_VIRTUALENV = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' ! -name '*_fuzz.cpp' -o -name '*.cu' -o -name '*.cuh')
SOURCES += setup.py pyproject.toml

.PHONY: demo test test-slow test-long fuzz sanitize bench gate readme mutants lint dist dist-check emulate-cuda gpu \
  gpu-wheels clean

.venv/requirements: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP_INSTALL) torch numpy setuptools wheel ninja pybind11 build
	@touch $@

# csrc/native.cpp compiles while pip downloads.
.venv/installed: .venv/requirements $(SOURCES)
	FSS_KERNELS_BUILD=native $(PY) setup.py -q build_ext --inplace & native=$$!; \
	  $(PIP_INSTALL) --no-build-isolation -e '.[dev]' && wait $$native
	@touch $@

# Other libraries to compare with: where they do not install the benchmarks go on, and their results name what was missing.
.venv/peers: .venv/installed
	$(PIP_INSTALL) --no-build-isolation -e '.[peers]' && touch $@ || echo "bench: goes on without the extra peers"

# The main job: what runs here, is it right, how fast is it; a network trained for a minute; then report/index.html.
# Interpreting the Triton kernels takes as long as all of these together: `fss-kernels verify` alone does it.
demo: .venv/installed
	$(PY) -m fss_kernels info
	$(PY) -m fss_kernels verify --no-interpreter
	$(PY) -m benchmarks run --quick --out report/results.csv
	$(PY) -m fss_models demo --out report/demo
	$(PY) -m benchmarks report report/results.csv --out report/index.html --demo report/demo

# The fast part. Separate processes: the CPU's instruction set and a missing library are decided when a process starts.
# AVX-512 with and without bfloat16 products differ in dense_cosine only.
test: .venv/installed
	$(PYTEST) -m "not slow and not long"
	TRITON_INTERPRET=1 $(PYTEST) -m "not slow and not long" tests/interpreted
	set -e; isas=$$($(PY) -c "from fss_kernels import _loading as l; print(*set(l.supported_isas()) - {l.cpu_isa()})"); \
	for isa in $$isas; do \
	  case $$isa in avx512) chosen="dense_cosine and not reference";; *) chosen="not reference";; esac; \
	  echo "== CPU kernels for $$isa: $$chosen"; \
	  FSS_KERNELS_CPU_ISA=$$isa $(PYTEST) tests/test_numerics.py tests/ops -k "$$chosen"; \
	done

# The rest: builds and installations, nvcc and Triton for other devices, the GPU check's dry run, sanitizers, thousands of
# calls that must leave nothing behind, the interpreter on larger samples.
test-slow: .venv/installed
	$(PYTEST) -m "slow and not long"
	TRITON_INTERPRET=1 $(PYTEST) -m "slow and not long" tests/interpreted

# What takes longer than all of the above, after a change of a kernel or of the ops' registration: CUDA kernels on a CPU,
# Triton for more targets, the interpreter on the largest samples, every layout and the ends of the dtypes.
test-long: .venv/installed
	$(PYTEST) -m long
	TRITON_INTERPRET=1 $(PYTEST) -m long tests/interpreted tests/test_extremes.py

# make fuzz|sanitize|dist-check RECORD=1 adds the outcome, good or bad, to the committed results.
recorded = $(if $(RECORD),code=$$?; $(PY) -m benchmarks record $(1) $(2) && exit $$code)

# Random calls for half an hour, in rounds: each prints its seed, and what it tried of every op, at least 500.
FUZZ_SECONDS ?= 1800
fuzz: .venv/installed
	mkdir -p build; rm -f build/fuzz.jsonl; code=0; end=$$(( $$(date +%s) + $(FUZZ_SECONDS) )); \
	while [ $$code = 0 ] && [ $$(date +%s) -lt $$end ]; do \
	  FUZZ_OUT=build/fuzz.jsonl FUZZ_EXAMPLES=200 $(PYTEST) tests/fuzz --hypothesis-seed=$$(date +%s) || code=1; \
	done; (exit $$code); $(call recorded,fuzz,build/fuzz.jsonl)

# Every number of docs/benchmarks: ops, networks, host. Hours: what this machine has measured from the same sources is not
# measured again. `check` alone fails on a line that is short.
bench: .venv/peers
	$(PY) -m benchmarks run --resume
	$(PY) -m benchmarks run --resume --sweep --rounds 4
	$(PY) -m benchmarks networks --resume
	$(PY) -m benchmarks overhead --resume
	$(PY) -m benchmarks readme
	$(PY) -m benchmarks check --allow-short

# No op slower than 1.5 times its committed ratio to a stand-in bound by the same resource.
gate: .venv/installed
	$(PY) -m benchmarks gate

readme: .venv/installed
	$(PY) -m benchmarks readme

mutants: .venv/installed
	$(PY) tests/mutants/run.py

# The torch-free C++ cores, fuzzed under sanitizers: minutes. (tests/sanitize.py is compute-sanitizer's, on a GPU.)
sanitize: .venv/installed
	$(PY) tests/cpp/sanitize_cores.py --out build/sanitize.json; $(call recorded,sanitize,build/sanitize.json)

# The CUDA kernels on a CPU, thread by thread, against float64: minutes, and no GPU needed.
emulate-cuda: .venv/installed
	$(PY) tests/cpp/emulate_cuda.py

# An sdist, and the wheel built from the unpacked sdist: whatever the sdist lacks cannot be in the wheel.
dist: .venv/requirements
	rm -rf dist
	FSS_KERNELS_BUILD=cpu $(PY) -m build --no-isolation

# The very same wheel beside other PyTorch releases, a fresh environment each: gigabytes to download, minutes each.
TORCH ?= 2.10.0 newest
dist-check: .venv/requirements
	rm -f build/wheel.json
	$(PY) tests/distribution.py --python $(PYTHON) --out build/wheel.json $(TORCH); $(call recorded,wheel,build/wheel.json)

lint: .venv/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m benchmarks readme --check
	.venv/bin/clang-format --dry-run --Werror $(filter csrc/%,$(SOURCES)) $(wildcard csrc/*/*_fuzz.cpp tests/cpp/*.h)

# On a machine with a GPU and no network there is no .venv: its own Python, and the wheels carried to it.
GPU_PY := $(if $(DRY)$(wildcard .venv/installed),$(PY),$(PYTHON))
GPU_WHEELS := $(wildcard gpu-wheels/*.whl)
STAGE ?= core

# make gpu OUT=folder STAGE=build-test|core|peers|models; DRY=1 runs the code path of every stage on a CPU.
gpu: $(if $(DRY),.venv/installed)
	@test -n "$(OUT)$(DRY)" || { echo "usage: make gpu OUT=folder STAGE=build-test|core|peers|models [DRY=1] [RESUME=1]"; exit 2; }
	$(if $(GPU_WHEELS),$(if $(DRY),,PIP_REQUIRE_VIRTUALENV=0 $(GPU_PY) -m pip install -q --no-index --no-deps --no-compile --upgrade --target build/gpu-site $(GPU_WHEELS)))
	set -e; for stage in $(if $(DRY),build-test core peers models,$(STAGE)); do \
	  PYTHONPATH=$(CURDIR)/build/gpu-site:$$PYTHONPATH $(GPU_PY) -m benchmarks gpu --stage $$stage --out "$(or $(OUT),build/gpu-dry)" \
	    $(if $(DRY),--dry) $(if $(RESUME),--resume) $(if $(COMMIT),--commit $(COMMIT)); \
	done

# What such a machine (Python 3.12, Linux x86-64) lacks; pykeops and keopscore are pure Python without wheels.
gpu-wheels: .venv/installed
	$(PY) -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	  --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -d gpu-wheels \
	  rich markdown-it-py mdurl pygments tqdm 'jsonargparse[signatures]' docstring-parser typeshed-client pyyaml \
	  faiss-cpu pycocotools torchmetrics lightning-utilities pybind11 flash-maxsim late-interaction-kernels
	$(PY) -m pip wheel -q --no-deps -w gpu-wheels pykeops keopscore

clean:
	rm -rf .venv build dist report *.egg-info fss_kernels/*.so fss_kernels/_build_info.json
