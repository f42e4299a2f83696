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
PROMPT ?=
FORMAT ?=
QUANT ?=
BASE ?=
TO ?=
TASKS ?=
GPUS ?=
NNODES ?=
RDZV_ENDPOINT ?=
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
# The first Python on the PATH that is new enough
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help finetune plan dryrun chat eval merge export report lm-eval test check setup bench gpu-check parity memory demo _recipe

help: ## this list
	@echo "make TARGET [MODEL=$(MODEL)] [DATA=my.jsonl] [OUT=outputs/mine] [ARGS=\"--max-steps 50\"]"; echo
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1\t\2/p' Makefile | expand -t 14
	@echo; echo "recipes (MODEL=): $$(ls recipes/*.py | sed -E 's:.*/(.*)\.py:\1:; /^_/d; s:_:-:g' | paste -sd' ')"

# Each command is `python -m recipes COMMAND NAME flags`; its flags are in common/commands/COMMAND.py.
PROCESS_FLAGS = $(if $(GPUS),--gpus "$(GPUS)") $(if $(NNODES),--nnodes "$(NNODES)" --rdzv-endpoint "$(RDZV_ENDPOINT)")

finetune: _recipe $(VENV)/.installed ## fine-tune MODEL; GPUS=2; flags in ARGS: --max-steps N, --resume, --overwrite
	@$(PY) -m recipes finetune "$(MODEL)" $(PROCESS_FLAGS) $(if $(DATA),--data "$(DATA)") $(if $(OUT),--out "$(OUT)") $(ARGS)

plan: _recipe $(VENV)/.installed ## what MODEL needs of a card, before any download; CARD_GIB=16 GPUS=2 SEQ_LEN=4096 JSON=plan.json
	@$(PY) -m recipes plan "$(MODEL)" $(PROCESS_FLAGS) $(if $(CARD_GIB),--card-gib "$(CARD_GIB)") $(if $(SEQ_LEN),--seq-len "$(SEQ_LEN)") \
		$(if $(JSON),--json "$(JSON)") $(ARGS)

dryrun: _recipe $(VENV)/.installed ## a few real steps with random weights, no download; LAYERS=2 (the default without a GPU)
	@$(PY) -m recipes dryrun "$(MODEL)" $(PROCESS_FLAGS) $(if $(LAYERS),--layers "$(LAYERS)") $(ARGS)

# The value of a variable in single quotes, for the shell: a prompt may hold any character.
quoted = '$(subst ','\'',$(value $(1)))'
RUN_FLAGS = "$(MODEL)" $(if $(OUT),--out "$(OUT)")
# As the commands name it: without a slash at the end of OUT, and with the home folder in the place of ~.
MERGED_FOLDER = $(patsubst ~/%,$(HOME)/%,$(or $(TO),$(patsubst %/,%,$(or $(OUT),outputs/$(subst _,-,$(MODEL))))-merged))
TARGET_FLAGS = $(if $(BASE),--base "$(BASE)") $(if $(TO),--to "$(TO)")

chat: _recipe $(VENV)/.installed ## talk to what MODEL became; PROMPT="one question" answers it and ends
	@$(PY) -m recipes chat $(RUN_FLAGS) $(if $(value PROMPT),--prompt $(call quoted,PROMPT)) $(ARGS)

eval: _recipe $(VENV)/.installed ## base against adapter on held-out rows: loss, perplexity, answers; DATA=other.jsonl
	@$(PY) -m recipes eval $(RUN_FLAGS) $(if $(DATA),--data "$(DATA)") $(if $(JSON),--json "$(JSON)") $(ARGS)

merge: _recipe $(VENV)/.installed ## 16-bit safetensors with the adapter inside; BASE=original TO=folder
	@$(PY) -m recipes merge $(RUN_FLAGS) $(TARGET_FLAGS) $(ARGS)

export: _recipe $(VENV)/.installed ## FORMAT=gguf, lora (the adapter alone) or ollama; QUANT=q8_0, f16 or bf16
	@$(PY) -m recipes export $(RUN_FLAGS) $(TARGET_FLAGS) $(if $(FORMAT),--format "$(FORMAT)") $(if $(QUANT),--quant "$(QUANT)") $(ARGS)

report: _recipe $(VENV)/.installed ## the run on one page, report.html, written again
	@$(PY) -m recipes report $(RUN_FLAGS) $(ARGS)

lm-eval: _recipe $(VENV)/.installed-eval ## lm-eval on the merged model: TASKS=gsm8k ARGS="--apply_chat_template --limit 100"
	@if [ ! -f "$(MERGED_FOLDER)/config.json" ]; then echo "error: there is no merged model in $(MERGED_FOLDER): make merge first" >&2; exit 2; fi
	@echo "lm-eval loads $(MERGED_FOLDER) and runs $(TASKS); its own progress follows"
	@$(VENV)/bin/lm_eval run --model hf --model_args "pretrained=$(MERGED_FOLDER)" --tasks "$(TASKS)" $(ARGS)

test: $(VENV)/.installed-dev ## the tests; ARGS="-m slow" or ARGS="-m gpu" for the others
	@$(PY) -m pytest -n auto --dist loadfile $(ARGS)

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

demo: $(VENV)/.installed ## BERT-large without and with activation checkpointing: counted, and measured on a GPU
	@$(PY) -m benchmarks.bert_large $(ARGS)

setup: $(VENV)/.installed ## only the set-up: .venv with the pinned requirements

# Runs before the set-up, which takes minutes: a mistyped MODEL fails at once.
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

$(VENV)/.installed-eval: requirements-eval.txt $(VENV)/.installed
	@$(PIP) -r requirements-eval.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	@$(PIP) -r requirements-dev.txt
	@touch $@
