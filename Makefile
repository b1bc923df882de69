# `make demo` and `make test` are all a newcomer needs. Everything is installed into $(VENV), once.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WEIGHTS ?= weights/smollm2
ARCHS ?= sm_89 sm_90
FUZZ_SECONDS ?= 1200
FUZZ_SEED ?= 1
TORCH_INDEX ?=

.DEFAULT_GOAL := help
.PHONY: help demo demo-real train-demo test test-compiled test-compiled-short counts fuzz examples lint types docs kernels bench wheel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "After any of them the command is $(BIN)/pyramid-rt; after '. $(BIN)/activate' it is pyramid-rt itself."

demo: $(VENV)/.runtime ## complete Python code with the embedded pyramid, then compare the methods
	@$(BIN)/pyramid-rt demo

# Its lower tiers are the model without some middle layers, untrained: good for tests, no help to speed. Hence plain decoding.
demo-real: $(VENV)/.dev $(WEIGHTS)/pyramid.json ## fetch SmolLM2-135M-Instruct (92 MB, 1.4 GB unpacked) and answer a chat question
	@$(BIN)/pyramid-rt generate --weights $(WEIGHTS) --method ar --chat --max-new-tokens 120 \
		"What is the capital of France, and what is it known for?"

# Resumes where it was stopped; see the model card for what it takes.
train-demo: $(VENV)/.dev ## train the demo pyramid anew (hours), then find its defaults
	@$(BIN)/python -m bench.demo_training
	@$(BIN)/pyramid-rt tune pyramid_rt/demo --prompts bench/demo_training/prompts.txt

# Threads that spin while they wait make a loaded machine crawl (2 tokens/s instead of 70 were seen).
test examples demo-real: export OMP_WAIT_POLICY ?= passive
# A process per core, each of one thread: interpreted kernels use no more.
test: export OMP_NUM_THREADS ?= 1
test: $(VENV)/.dev ## run every check
	@$(BIN)/pytest -n auto --dist worksteal

fuzz: $(VENV)/.dev ## look for inputs that break it: FUZZ_SECONDS for each of three kinds, FUZZ_SEED
	@PYTHONPATH=tests $(BIN)/python -P -m fuzz --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED)

examples: $(VENV)/.dev ## run every example by its own tests
	@$(BIN)/pytest tests/examples

# The kernels as a GPU would run them, executed by the machine of tests/ptx: its own session, since the rest of
# the tests needs Triton's interpreter. Every launch is repeated under SEEDS schedules, whose bits must agree.
MACHINES ?= sm_80 sm_90
SEEDS ?= 20
test-compiled test-compiled-short: export OMP_NUM_THREADS ?= 1
test-compiled test-compiled-short: export OMP_WAIT_POLICY ?= passive
test-compiled: $(VENV)/.dev ## run every kernel compiled, without a GPU, in adversarial schedules
	@for arch in $(MACHINES); do \
		PYRAMID_PTX=$$arch PYRAMID_PTX_SEEDS=$(SEEDS) $(BIN)/pytest -n auto --dist worksteal tests/kernels || exit 1; \
		PYRAMID_PTX=$$arch $(BIN)/pytest -n auto tests/ptx tests/models/test_triton_backend.py || exit 1; \
	done

# A part that CI has two minutes for. Every op in bfloat16, what kernels ship in, for sm_80 under two schedules; for
# sm_90 the faults planted one by one at arrivals and waits, the counted bytes, 8 sampled tokens of each method.
LONGER := float32_decodes or somewhere or off_by_one or generation_is_counted
test-compiled-short: $(VENV)/.dev ## a part of the same, in two minutes
	@PYRAMID_PTX=sm_80 PYRAMID_PTX_SEEDS=1 $(BIN)/pytest -q -n auto --dist worksteal tests/kernels/decide \
		tests/kernels/forward tests/kernels/test_noise.py -k "not (refuses or bounds or 49152 or dtype0 or dtype2)"
	@PYRAMID_PTX=sm_90 PYRAMID_PTX_TOKENS=8 $(BIN)/pytest -q -n auto --dist worksteal tests/ptx/test_bits.py \
		tests/ptx/test_counts.py tests/ptx/test_planted.py tests/ptx/test_runtime.py \
		-k "not ($(LONGER)) and (not bfloat16_decodes or 0.8)"

counts: $(VENV)/.dev ## count bytes and instructions of every compiled kernel, without a GPU
	@PYTHONPATH=tests $(BIN)/python -P -m ptx.counted

lint: $(VENV)/.dev ## style, form and strict types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

types: $(VENV)/.dev
	@$(BIN)/mypy

docs: $(VENV)/.dev ## build the pages of docs/ into site/, strictly
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

kernels: $(VENV)/.dev ## compile every kernel for ARCHS and hold its machine code to a gate; needs no GPU
	@$(BIN)/python -m bench.compile_gate $(addprefix --arch ,$(ARCHS))

bench: $(VENV)/.dev ## measure against transformers on this CPU
	@mkdir -p build
	@$(BIN)/python -m bench.peers --device cpu --json build/peers-cpu.json

# A build folder left from before would put files that are gone into the wheel.
wheel: $(VENV)/.runtime ## build dist/*.whl
	@rm -rf build/lib build/bdist.* dist
	@$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

clean: ## remove what was installed and built here; weights stay
	@rm -rf $(VENV) build dist site *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache

# With an NVIDIA GPU and a torch that is new enough, that torch stays: it fits the driver. With a GPU and no
# such torch, the newest is installed with the rest; without a GPU, the version the project is tested with.
# Outside, that version comes with CUDA unless TORCH_INDEX names an index of CPU builds.
$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is $$($(PYTHON) -V 2>&1); 3.11 or newer is needed: make PYTHON=python3.x ..."; exit 1; }
	@echo "setting up $(VENV) (once)"
	@if ! nvidia-smi >/dev/null 2>&1; then \
		$(PYTHON) -m venv $(VENV) \
			&& $(BIN)/pip install --quiet $(addprefix --index-url ,$(TORCH_INDEX)) torch==2.13.0; \
	elif $(PYTHON) -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' \
		2>/dev/null; then \
		$(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
		$(PYTHON) -m venv $(VENV); \
	fi
	@touch $@

$(VENV)/.runtime: pyproject.toml | $(VENV)/.venv
	@$(BIN)/pip install --quiet -e .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.venv
	@$(BIN)/pip install --quiet -e '.[dev]'
	@touch $@ $(VENV)/.runtime

$(WEIGHTS)/pyramid.json: | $(VENV)/.dev
	@$(BIN)/python -m bench.smollm2 fetch --out $(WEIGHTS)
