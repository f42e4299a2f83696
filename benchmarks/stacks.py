"""Times one training stack: `python -m benchmarks.stacks NAME --job job.json` prints one line of JSON.

Every stack trains the same 4-bit checkpoint on the same rows, with LoRA of rank 16 on all linear layers, AdamW and one
learning rate, through its own trainer. All else is as the stack's documentation sets it up, but for the environment
variables that common/process_state.py sets for all of them (the allocator's expandable segments, cuBLAS's workspace).
A process runs one stack only: unsloth patches libraries that the others use, and no stack's memory counts as another's.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "accelerate", "triton", "liger-kernel", "unsloth")
RANK, LEARNING_RATE, SEED = 16, 2e-4, 0
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Job:
    """What a stack trains, and for how long."""

    model: str  # folder of a 4-bit checkpoint with its tokenizer
    rows: str  # a file with one JSON list of token ids a line, each `tokens` long
    tokens: int  # of a row; a micro-batch is one row
    accumulation: int  # micro-batches of an optimizer step
    warmup: int  # optimizer steps before the timed ones
    steps: int  # timed optimizer steps
    card_gib: float | None  # limit of torch's allocator, on a CPU of the process's data (RLIMIT_DATA); None sets none
    started_at: float  # time.time() when the process was started


# Each of these functions returns a stack's trainer, and imports its libraries itself: unsloth must come first.
def ours(job: Job, folder: str, *, dpo: bool = False, **options: Any) -> Any:
    """This repository's trainer. dpo: on pairs; the reference is computed here. options: fields of TrainSpec."""
    from datasets import Dataset

    from common.data.rows import Rows
    from common.model.activation_checkpointing import checkpoint_activations
    from common.model.lean_layers import use_lean_layers
    from common.model.loading import load_4bit, load_tokenizer
    from common.model.lora import attach_lora
    from common.plan.machine_plan import plan_for_card
    from common.recipe import DataSpec, LoraSpec, ModelSpec, PreferenceSpec, Recipe, TrainSpec
    from common.run.reference import with_reference
    from common.run.trainer_config import build_trainer

    train = TrainSpec(
        job.tokens,
        job.accumulation,
        LEARNING_RATE,
        lr_schedule="constant",
        warmup_ratio=0.0,
        max_steps=job.warmup + job.steps,
        save_every=1_000_000,
        **options,
    )
    data, lora = DataSpec(job.rows, drift_source=None), LoraSpec(RANK, RANK)
    preference = PreferenceSpec("dpo") if dpo else None
    recipe = Recipe(ModelSpec(job.model), data, lora, train, None, preference=preference, out=folder)
    plan = plan_for_card(recipe)
    tokenizer, model = load_tokenizer(recipe.model), load_4bit(recipe.model, layout=plan.layout)
    model = attach_lora(model, recipe.lora, SEED)
    use_lean_layers(model, train.kernels)
    checkpoint_activations(model, plan.checkpointing)
    rows = [{"input_ids": ids, "labels": ids, "seq_lengths": [len(ids)]} for ids in read_rows(job)]
    packed = Rows(Dataset.from_list([packed_pair(pair) for pair in read_pairs(job)] if dpo else rows), None, [])
    if dpo:
        packed = with_reference(model, tokenizer, packed, recipe, plan)
    return build_trainer(model, tokenizer, packed, recipe, plan, Path(folder))


def trl(job: Job, folder: str, **options: Any) -> Any:
    """TRL, PEFT and bitsandbytes as their documentation sets them up. options: fields of SFTConfig.

    TRL checkpoints the activations of every layer unless an option says otherwise.
    """
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTTrainer

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, None: torch.float32}[mixed_precision()]
    torch.manual_seed(SEED)
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype),
        args=sft_config(job, folder, **options),
        train_dataset=dataset(job),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, target_modules="all-linear"),
    )


def trl_dpo(job: Job, folder: str, *, precompute: bool) -> Any:
    """TRL's DPOTrainer, else as trl. precompute: the reference before the first step instead of in each."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class TokenisedTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # it is tokenised; the stock method reads texts

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, None: torch.float32}[mixed_precision()]
    torch.manual_seed(SEED)
    return TokenisedTrainer(
        AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype),
        args=trl_config(DPOConfig, job, folder, precompute_ref_log_probs=precompute),
        train_dataset=Dataset.from_list(read_pairs(job)),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, target_modules="all-linear"),
    )


def unsloth(job: Job, folder: str, load: dict[str, Any] | None = None, **options: Any) -> Any:
    """unsloth as its documentation sets it up. load: options of its from_pretrained. options: of its get_peft_model."""
    from unsloth import FastLanguageModel  # first: it patches what is imported after it

    from trl import SFTTrainer  # isort: skip

    model, tokenizer = FastLanguageModel.from_pretrained(
        job.model, max_seq_length=job.tokens, load_in_4bit=True, **(load or {})
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=RANK,
        lora_dropout=0,
        bias="none",
        target_modules=TARGETS,
        use_gradient_checkpointing="unsloth",
        random_state=SEED,
        max_seq_length=job.tokens,
        **options,
    )
    return SFTTrainer(model, args=sft_config(job, folder), train_dataset=dataset(job), processing_class=tokenizer)


STACKS: dict[str, Callable[[Job, str], Any]] = {
    "ours": ours,
    "ours, stock layers": lambda job, folder: ours(job, folder, kernels="stock"),
    "trl": trl,
    "trl + liger": lambda job, folder: trl(job, folder, use_liger_kernel=True),
    "trl, selective": lambda job, folder: trl(job, folder, gradient_checkpointing_kwargs={"selective": True}),
    # transformers 5.16 and newer: the inputs of the layers wait in pinned host memory.
    "trl, offload": lambda job, folder: trl(job, folder, activation_checkpointing_kwargs={"offload": True}),
    "transformers, every 2nd layer": lambda job, folder: trl(
        job, folder, activation_checkpointing_kwargs={"every_n_layers": 2}
    ),
    "unsloth": unsloth,
    "unsloth, auto": lambda job, folder: unsloth(job, folder, checkpoint_skip_layers="auto"),
    # As unsloth's page on fine-tuning with 500K tokens of context turns it on.
    "unsloth, tiled MLP": lambda job, folder: unsloth(job, folder, {"unsloth_tiled_mlp": True}),
    "unsloth, not compiled": unsloth,
}
# On pairs: a micro-batch holds one, two answers of half the row's tokens each, with a common prompt.
DPO_STACKS: dict[str, Callable[[Job, str], Any]] = {
    "ours, dpo": lambda job, folder: ours(job, folder, dpo=True),
    "trl, dpo": lambda job, folder: trl_dpo(job, folder, precompute=False),
    "trl, dpo, precomputed": lambda job, folder: trl_dpo(job, folder, precompute=True),
}
ALL_STACKS = STACKS | DPO_STACKS
# Read by a stack's libraries when they are imported. UNSLOTH_COMPILE_DISABLE "disables auto compiler"
# (https://unsloth.ai/docs/basics/unsloth-environment-flags); the result's "compiled_graphs" says what is left of it.
ENVIRONMENT = {"unsloth, not compiled": {"UNSLOTH_COMPILE_DISABLE": "1"}}
# For their Triton kernels, or for pinned host memory.
NEEDS_GPU = ("trl + liger", "trl, offload", *(name for name in STACKS if name.startswith("unsloth")))


def mixed_precision() -> str | None:
    """The number format of the trainers' autocast: bf16 where the GPU has it, else fp16; on a CPU none."""
    import torch

    if not torch.cuda.is_available():
        return None
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def sft_config(job: Job, folder: str, **options: Any) -> Any:
    from trl import SFTConfig

    return trl_config(SFTConfig, job, folder, **options)


def trl_config(kind: Callable[..., Any], job: Job, folder: str, **options: Any) -> Any:
    precision = mixed_precision()
    return kind(
        output_dir=folder,
        max_length=job.tokens,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=job.accumulation,
        max_steps=job.warmup + job.steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=precision is None,
        seed=SEED,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )


def read_rows(job: Job) -> list[list[int]]:
    return [json.loads(line) for line in Path(job.rows).read_text().splitlines()]


def read_pairs(job: Job) -> list[dict[str, list[int]]]:
    """A pair of each row: two answers to a prompt of a quarter of the row's tokens, a quarter each."""
    quarter = job.tokens // 4
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [{name: ids[n * quarter : (n + 1) * quarter] for n, name in enumerate(names)} for ids in read_rows(job)]


def packed_pair(pair: dict[str, list[int]]) -> dict[str, list[int]]:
    """The pair as common.data packs it."""
    prompt, chosen, rejected = pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]
    return {
        "input_ids": prompt + chosen + prompt + rejected,
        "labels": [-100] * len(prompt) + chosen + [-100] * len(prompt) + rejected,
        "seq_lengths": [len(prompt + chosen), len(prompt + rejected)],
        "signs": [1, -1],
    }


def dataset(job: Job) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": read_rows(job)})


def run(name: str, job: Job) -> dict[str, Any]:
    """Trains. Returns losses, seconds of each timed step and to the end of the first step, peaks in bytes.

    compiled_graphs: how many graphs torch.compile made; None where it was not used.
    """
    if name.startswith("unsloth"):
        import unsloth  # noqa: F401 - before torch
    import torch
    from transformers import TrainerCallback

    from benchmarks.results_folder import installed_versions

    gpu = torch.cuda.is_available()
    if job.card_gib is not None:
        limit = int(job.card_gib * (1 << 30))
        if gpu:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        else:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    ends: list[float] = []
    first_step = 0.0

    class Stopwatch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            nonlocal first_step
            if gpu:
                torch.cuda.synchronize()
            first_step = first_step or time.time() - job.started_at
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        trainer = ALL_STACKS[name](job, folder)
        trainer.add_callback(Stopwatch())
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    timed = [b - a for a, b in zip(ends, ends[1:], strict=False)][job.warmup - 1 :]
    dynamo = sys.modules.get("torch._dynamo.utils")
    return {
        "stack": name,
        "seconds": timed,
        "losses": losses,
        "first_step_seconds": first_step,
        "allocated_bytes": torch.cuda.max_memory_allocated() if gpu else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if gpu else None,
        "resident_bytes": resident_bytes(),
        "policy": str(getattr(trainer, "policy", "")) or None,
        "compiled_graphs": dynamo.counters["stats"]["unique_graphs"] if dynamo else None,
        "versions": installed_versions(PACKAGES),
    }


def resident_bytes() -> int:
    """The process's highest resident memory. common.machine.device has it too, but needs our version of torch."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stack", choices=ALL_STACKS)
    parser.add_argument("--job", type=Path, required=True, help="a JSON file with the fields of Job")
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT.get(args.stack, {}))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    result = run(args.stack, Job(**json.loads(args.job.read_text())))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
