# Fine-tuning recipes. `make` lists the targets; `make finetune` and `make test` set up what they need.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

MODEL ?= tiny
DATA ?=
OUT ?=
CARD_GIB ?=
SEQ_LEN ?=
JSON ?=
LAYERS ?=
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
# The first Python that is new enough
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help finetune plan dryrun test check setup bench gpu-check parity memory _recipe

help: ## this list
	@echo "make TARGET [MODEL=$(MODEL)] [DATA=my.jsonl] [OUT=outputs/mine] [ARGS=\"--max-steps 50\"]"; echo
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1\t\2/p' Makefile | expand -t 14
	@echo; echo "recipes (MODEL=): $$(ls recipes/*.py | sed -E 's:.*/(.*)\.py:\1:; /^_/d; s:_:-:g' | paste -sd' ')"

finetune: _recipe $(VENV)/.installed ## fine-tune MODEL; flags in ARGS: --max-steps N, --resume, --overwrite
	@$(PY) -m recipes "$(MODEL)" $(if $(DATA),--data "$(DATA)") $(if $(OUT),--out "$(OUT)") $(ARGS)

plan: _recipe $(VENV)/.installed ## what MODEL needs of a card, before any download; CARD_GIB=16 SEQ_LEN=4096 JSON=plan.json
	@$(PY) -m recipes "$(MODEL)" --plan $(if $(CARD_GIB),--card-gib "$(CARD_GIB)") $(if $(SEQ_LEN),--seq-len "$(SEQ_LEN)") \
		$(if $(JSON),--json "$(JSON)") $(ARGS)

dryrun: _recipe $(VENV)/.installed ## a few real steps with random weights, no download; LAYERS=2 (the default without a GPU)
	@$(PY) -m recipes "$(MODEL)" --dry-run $(if $(LAYERS),--layers "$(LAYERS)") $(ARGS)

test: $(VENV)/.installed-dev ## the tests; ARGS="-m slow" or ARGS="-m gpu" for the others
	@$(PY) -m pytest $(ARGS)

check: $(VENV)/.installed-dev ## ruff and mypy
	@$(PY) -m ruff format --check . && $(PY) -m ruff check . && $(PY) -m mypy

bench: $(VENV)/.installed ## our step beside TRL, liger, transformers and unsloth: speed, memory, losses
	@$(PY) -m benchmarks.bench $(ARGS)

gpu-check: $(VENV)/.installed-dev ## everything that only a GPU can show, in pieces; ARGS=--rehearse without one
	@$(PY) -m benchmarks.gpu_check $(ARGS)

parity: $(VENV)/.installed ## our run beside a plain TRL + PEFT script: losses and time
	@$(PY) -m benchmarks.parity $(ARGS)

memory: $(VENV)/.installed ## on a GPU: predicted against measured memory and time, every policy
	@$(PY) -m benchmarks.memory $(ARGS)

setup: $(VENV)/.installed ## only the set-up: .venv with the pinned requirements

# Before the set-up, which takes minutes: a mistyped MODEL fails at once.
_recipe:
	@if [ -z "$(PYTHON)" ]; then echo "error: Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3" >&2; exit 2; fi
	@$(PYTHON) -m recipes --check "$(MODEL)"

$(PY):
	@if [ -z "$(PYTHON)" ]; then echo "error: Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3" >&2; exit 2; fi
	@echo "setting up $(VENV) with $$($(PYTHON) --version); this takes minutes, and a few GB for the CUDA build of torch"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt constraints.txt | $(PY)
	@$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	@$(PIP) -r requirements-dev.txt
	@touch $@
