# Fine-tuning recipes. `make` lists the targets; `make finetune` and `make test` set up what they need.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

MODEL ?= tiny
SET ?=
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
REPO ?=
TASKS ?=
RUNS ?=
GPU ?=
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
.PHONY: help finetune data plan dryrun chat eval merge export report compare push lm-eval test check setup bench gpu-check parity memory demo _python _typed _recipe _merged

help: _typed ## this list
	@echo "make TARGET [MODEL=$(MODEL)] [DATA=my.jsonl] [OUT=outputs/mine] [SET=\"train.seed=2 lora.rank=64\"] [ARGS=\"--max-steps 50\"]"; echo
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1\t\2/p' Makefile | expand -t 14
	@echo; echo "recipes (MODEL=): $$(ls recipes/*.py | sed -E 's:.*/(.*)\.py:\1:; /^_/d; s:_:-:g' | paste -sd' ')"

# The value of a variable as one word of bash: it may hold any character, and arrives as it was typed.
define newline


endef
quoted = '$(subst $(newline),'$$'\n'',$(subst ','\'',$(value $(1))))'
# "--flag=VALUE" where the variable has one. With the equals sign a value may begin with a dash.
flag = $(if $(value $(2)),$(1)=$(call quoted,$(2)))

# Each command is `python -m recipes COMMAND NAME flags`; its flags are in common/commands/COMMAND.py.
RECIPE = $(call quoted,MODEL) $(call flag,--set,SET)
OUT_FLAG = $(call flag,--out,OUT)
RUN_FLAGS = $(call flag,--data,DATA) $(OUT_FLAG)
GPU_FLAG = $(call flag,--gpu,GPU)
PROCESS_FLAGS = $(GPU_FLAG) $(call flag,--gpus,GPUS) $(call flag,--nnodes,NNODES) $(call flag,--rdzv-endpoint,RDZV_ENDPOINT)
TARGET_FLAGS = $(OUT_FLAG) $(call flag,--base,BASE) $(call flag,--to,TO)

finetune: _recipe $(VENV)/.installed ## fine-tune MODEL; GPU=1 or GPUS=2; flags in ARGS: --max-steps N, --resume, --overwrite
	@$(PY) -m recipes finetune $(RECIPE) $(PROCESS_FLAGS) $(RUN_FLAGS) $(ARGS)

data: _recipe $(VENV)/.installed ## what MODEL would be trained on, with examples; DATA=my.jsonl SEQ_LEN=4096 JSON=data.json
	@$(PY) -m recipes data $(RECIPE) $(call flag,--data,DATA) $(call flag,--seq-len,SEQ_LEN) $(call flag,--json,JSON) $(ARGS)

plan: _recipe $(VENV)/.installed ## what MODEL needs of a card, before any download; CARD_GIB=16, GPU=t4, GPUS=2, SEQ_LEN=4096, JSON=plan.json
	@$(PY) -m recipes plan $(RECIPE) $(PROCESS_FLAGS) $(call flag,--card-gib,CARD_GIB) $(call flag,--seq-len,SEQ_LEN) \
		$(call flag,--json,JSON) $(ARGS)

dryrun: _recipe $(VENV)/.installed ## a few real steps with random weights, no download; LAYERS=2 (the default without a GPU)
	@$(PY) -m recipes dryrun $(RECIPE) $(PROCESS_FLAGS) $(call flag,--layers,LAYERS) $(ARGS)

chat: _recipe $(VENV)/.installed ## talk to what MODEL became; PROMPT="one question" answers it and ends
	@$(PY) -m recipes chat $(RECIPE) $(GPU_FLAG) $(OUT_FLAG) $(call flag,--prompt,PROMPT) $(ARGS)

eval: _recipe $(VENV)/.installed ## base against adapter on held-out rows: loss, perplexity, answers; DATA=other.jsonl
	@$(PY) -m recipes eval $(RECIPE) $(GPU_FLAG) $(RUN_FLAGS) $(call flag,--json,JSON) $(ARGS)

merge: _recipe $(VENV)/.installed ## 16-bit safetensors with the adapter inside; BASE=original TO=folder
	@$(PY) -m recipes merge $(RECIPE) $(GPU_FLAG) $(TARGET_FLAGS) $(ARGS)

export: _recipe $(VENV)/.installed ## FORMAT=gguf, lora (the adapter alone) or ollama; QUANT=q8_0, q4_k_m, f16 ...
	@$(PY) -m recipes export $(RECIPE) $(GPU_FLAG) $(TARGET_FLAGS) $(call flag,--format,FORMAT) $(call flag,--quant,QUANT) $(ARGS)

report: _recipe $(VENV)/.installed ## the run on one page, report.html, written again; also of a run under way
	@$(PY) -m recipes report $(RECIPE) $(OUT_FLAG) $(ARGS)

compare: _typed $(VENV)/.installed ## runs side by side, as text and on a page: RUNS="outputs/a outputs/b" TO=page.html
	@$(PY) -m recipes compare $(call flag,--runs,RUNS) $(call flag,--to,TO) $(ARGS)

push: _recipe $(VENV)/.installed ## upload adapter, tokenizer and model card to the hub, after asking: REPO=me/name
	@$(PY) -m recipes push $(RECIPE) $(OUT_FLAG) $(call flag,--repo,REPO) $(ARGS)

# Sets `model`, as bash reads it: where a merge writes.
MERGED = out=$(if $(value OUT),$(call quoted,OUT),outputs/$(subst _,-,$(MODEL))); \
	model=$(if $(value TO),$(call quoted,TO),"$${out%/}-merged"); model="$${model/\#\~\//$$HOME/}"

# Runs before the set-up of lm-eval, which takes minutes.
_merged: _recipe
	@$(MERGED); \
	if [ ! -f "$$model/config.json" ]; then echo "error: there is no merged model in $$model: make merge first" >&2; exit 2; fi

lm-eval: _merged $(VENV)/.installed-eval ## lm-eval on the merged model: TASKS=gsm8k ARGS="--apply_chat_template --limit 100"
	@$(MERGED); \
	echo "lm-eval loads $$model and runs "$(call quoted,TASKS)"; its own progress follows"; \
	$(VENV)/bin/lm_eval run --model hf --model_args "pretrained=$$model" --tasks $(call quoted,TASKS) $(ARGS)

test: _typed $(VENV)/.installed-dev ## the tests; ARGS="-m slow" or ARGS="-m gpu" for the others
	@$(PY) -m pytest -n auto --dist loadfile $(ARGS)

check: _typed $(VENV)/.installed-dev ## ruff and mypy
	@$(PY) -m ruff format --check . && $(PY) -m ruff check . && $(PY) -m mypy

bench: _typed $(VENV)/.installed ## our step beside TRL, liger, transformers and unsloth: speed, memory, losses
	@$(PY) -m benchmarks.bench $(ARGS)

gpu-check: _typed $(VENV)/.installed-dev ## everything that only a GPU can show, in pieces; ARGS=--rehearse without one
	@$(PY) -m benchmarks.gpu_check $(ARGS)

parity: _typed $(VENV)/.installed ## our run beside a plain TRL + PEFT script: losses and time
	@$(PY) -m benchmarks.parity $(ARGS)

memory: _typed $(VENV)/.installed ## on a GPU: predicted against measured memory and time, every policy
	@$(PY) -m benchmarks.memory $(ARGS)

demo: _typed $(VENV)/.installed ## BERT-large without and with activation checkpointing: counted, and measured on a GPU
	@$(PY) -m benchmarks.bert_large $(ARGS)

setup: _typed $(VENV)/.installed ## only the set-up: .venv with the pinned requirements

# These run before the set-up, which takes minutes: what is mistyped fails at once.
_python:
	@if [ -z "$(PYTHON)" ]; then echo "error: Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3" >&2; exit 2; fi

# The names of the variables that were typed. make itself ignores those that nobody reads.
TYPED = $(strip $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name))))
_typed: _python
	@$(if $(TYPED),$(PYTHON) -m recipes --check-variables "$(or $(MAKECMDGOALS),help)" $(foreach name,$(TYPED),'$(name)'))

_recipe: _typed
	@$(PYTHON) -m recipes --check $(RECIPE)

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
