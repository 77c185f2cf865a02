# make demo          train a CLIP on emoji, evaluate it, search with it (README: "Two commands")
# make test          lint and the tests that are not marked slow: at most 10 minutes on 2 cores
# make test-all      `make test`, then the tests marked slow
# make test-lowest   all tests with the lowest versions that setup.py allows
# make test-peers    features, gradients, files and inputs against open_clip, transformers and OpenAI's code
# make docs          the documentation site in build/docs, warnings as errors
# make mutate        mutation testing of a sample, MUTANTS=240 SEED=0: some hours on 2 cores (docs/testing.md)
# make bench-tokenizer  the speed of the CLIP tokenizer against open_clip's, the ratio in the last line
# make bench-train      a training step of ViT-B/32 against open_clip's on torch, the ratio in the last line
# make bench-loss       the losses against their dense form: seconds and memory
# make bench-loading    loading ViT-L/14 and RN50x64 against reading their bytes: seconds and memory
# make bench-probe      the linear probe's search against scikit-learn's, the ratio in the last line
# make bench-published  the same weights and data through CLIP_benchmark's command and clip_jax's
# make bench-input      reading, decoding and tokenizing pairs against open_clip's loader, the ratio in the last line
# make bench-storage    reading from an object store that is simulated: rates, requests, two billion records
# make bench-corruption the memory over 5,000 batches with bad records
# make bench-truth      FLOPs, memory and time of a step, predicted and measured on this machine
# make accelerator      ten minutes of measurements on a GPU or TPU: parity, steps, MFU, memory; JSON and a table
# make plan-all         docs/plans.md: the nine models compiled for five kinds of slices; some hours
# make clean         remove environments, caches and the demo's run
#
# PYTHON=python3.12 chooses the interpreter of a new environment.

PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
PEERS ?= .venv-peers
DEMO ?= runs/emoji
MUTANTS ?= 240
SEED ?= 0
BIN := $(VENV)/bin

# The test extra installs the TPU compiler, which makes JAX search for a TPU and log that there is none.
export JAX_PLATFORMS ?= cpu
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all test-lowest test-peers docs mutate bench-tokenizer bench-train bench-loss bench-loading bench-probe \
	bench-published bench-input bench-storage bench-corruption bench-truth accelerator plan-all clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	$(BIN)/python -m clip_jax.main --config=configs/emoji.py --workdir=$(DEMO) --export=$(DEMO)/params.msgpack
	$(BIN)/python -m clip_jax.search --weights=$(DEMO)/params.msgpack "a happy dog"

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "not slow"

test-all: test
	$(BIN)/python -m pytest -m slow

# The tests only: the lint rules are those of the current ruff.
test-lowest: $(LOWEST)/.installed-test
	$(LOWEST)/bin/python -m pytest

test-peers: $(PEERS)/.installed-peers
	$(PEERS)/bin/python -m pytest tests/peers

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html docs build/docs

mutate: $(VENV)/.installed-test $(VENV)/.installed-mutate
	@$(BIN)/python tests/mutate.py --mutants=$(MUTANTS) --seed=$(SEED)

bench-tokenizer: $(PEERS)/.installed-peers
	@$(PEERS)/bin/python benchmarks/tokenizer.py

bench-train: $(PEERS)/.installed-peers
	@$(PEERS)/bin/python benchmarks/train.py

bench-loss: $(VENV)/.installed-test
	@$(BIN)/python benchmarks/loss.py

bench-loading: $(VENV)/.installed-test
	@$(BIN)/python benchmarks/loading.py

bench-probe: $(PEERS)/.installed-peers
	@$(PEERS)/bin/python benchmarks/probe.py

bench-published: $(PEERS)/.installed-peers
	@$(PEERS)/bin/python benchmarks/published.py

bench-input: $(PEERS)/.installed-peers
	@$(PEERS)/bin/python benchmarks/input.py

bench-storage: $(VENV)/.installed-test
	@$(BIN)/python benchmarks/storage.py

bench-corruption: $(VENV)/.installed-test
	@$(BIN)/python tests/test_data_corruption.py

bench-truth: $(VENV)/.installed-test
	@$(BIN)/python benchmarks/truth.py

# The interpreter of an environment that has JAX for the accelerator: make accelerator PYTHON=python3
accelerator:
	@JAX_PLATFORMS= $(PYTHON) benchmarks/accelerator.py

plan-all: $(VENV)/.installed-test
	@$(BIN)/python benchmarks/plans.py

clean:
	rm -rf $(VENV) $(LOWEST) $(PEERS) $(DEMO) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# ------------------------------------------------------------------------------------------- environments
# An environment is reinstalled when setup.py changes.

# The packages of published prompts, of which only data files are read: without their dependencies, torch among them.
PROMPTS := clip-benchmark==1.6.2 open_clip_torch==3.3.0

$(VENV)/.installed-%: setup.py | $(VENV)/bin/pip
	@echo "installing clip_jax[$*] and its dependencies into $(VENV); the first time takes a minute or two"
	@$(BIN)/pip install -qq -e '.[$*]'
	$(if $(filter test,$*),@$(BIN)/pip install -qq --no-deps $(PROMPTS))
	@touch $@

$(LOWEST)/.installed-test: setup.py tests/lowest.txt | $(LOWEST)/bin/pip
	@echo "installing clip_jax[test] and the lowest versions that it allows into $(LOWEST)"
	@$(LOWEST)/bin/pip install -qq -c tests/lowest.txt -e '.[test]'
	@$(LOWEST)/bin/pip install -qq --no-deps $(PROMPTS)
	@touch $@

# CLIP_benchmark's command imports these, without their dependencies.
CLIP_BENCHMARK := webdataset==1.0.2 braceexpand==0.1.7 pycocoevalcap==1.2

# Of tests/peers/test_sources.py, without dependencies: datasets allows older versions than the other tests use.
WRITERS := datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 xxhash==4.1.0

# torch first, by itself: a CPU build where there is one. torchvision's wheel needs CUDA; only its Python code is used.
$(PEERS)/.installed-peers: setup.py | $(PEERS)/bin/pip
	@echo "installing the peers, torch included, into $(PEERS); the first time takes some minutes"
	@$(PEERS)/bin/pip install -qq torch==2.13.0
	@$(PEERS)/bin/pip install -qq --no-deps torchvision==0.28.0
	@$(PEERS)/bin/pip install -qq -e '.[test,peers]'
	@$(PEERS)/bin/pip install -qq --no-deps $(PROMPTS) $(CLIP_BENCHMARK) $(WRITERS)
	@touch $@

$(VENV)/bin/pip $(LOWEST)/bin/pip $(PEERS)/bin/pip:
	@$(check_python)
	@$(PYTHON) -m venv $(@D)/..
	@$(@D)/python -m pip install -qq --upgrade pip

define check_python
command -v $(PYTHON) >/dev/null || { \
    echo "make: there is no '$(PYTHON)'. Install Python, e.g. apt install python3 python3-venv, or: make PYTHON=python3.12" >&2; exit 1; }; \
$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
    echo "make: $$($(PYTHON) -V 2>&1) is not supported: clip_jax needs Python 3.11, 3.12 or 3.13. Install one, then, e.g., make PYTHON=python3.12" >&2; exit 1; }; \
$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
    echo "make: '$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
endef
