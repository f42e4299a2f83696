"""The counted peak of a DPO step at real dimensions: ours beside TRL's DPOTrainer with PEFT. No GPU, no download.

    python -m benchmarks.preference_memory             # 45 s on one core
    python -m benchmarks.preference_memory --layers 2  # the first layers only, to try it

Both train a pair of two answers of 2,048 tokens with Llama 3 8B in 4 bits and LoRA of rank 16. TRL's numbers come from
its own code: DPOTrainer's loss, the fused head that it gives the model, transformers' layers and PEFT's adapters run on
fake tensors, and common.plan.ledger writes down what they allocate. Three things are put in their place, because fake
tensors are on a CPU: flash attention (benchmarks.published.stack), the two Triton kernels of the head, which allocate
nothing, and what TRL reads of a tensor for its metrics. Results go to benchmarks/results/preference_memory.json;
docs/preferences.md shows them.
"""

import argparse
import logging
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import convert_outputs_to_fp32
from bitsandbytes import functional as bnb
from peft import PeftModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import custom_op
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import register_flop_formula
from transformers import AttentionInterface
from trl import DPOTrainer
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from benchmarks.models import recipe_of
from benchmarks.published.stack import FlashAttention, act_as_on_gpu
from benchmarks.results_folder import RESULTS, installed_versions, write_result
from common.machine.device import GIB
from common.model.activation_checkpointing import Policy
from common.model.config import load_config
from common.model.optimizer import build_optimizer
from common.plan.card import WORKSPACE_BYTES, Card
from common.plan.count import count_step
from common.plan.fake_model import fake_lora_model
from common.plan.forecast import Forecast
from common.plan.mixed_layers import find_mixed_layers
from common.plan.planner import Planner
from common.plan.step import Step
from common.recipe import Recipe

BF16 = torch.bfloat16
ANSWER_TOKENS = 2048  # of an answer with its prompt; all of them are trained, so that no mask of padding is needed
# Outputs beside the log-likelihoods that DPOTrainer asks of the head, for its metrics (trl/trainer/dpo_trainer.py).
HEAD_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
MASKLESS = "sdpa_without_mask"  # what torch's SDPA runs on a GPU where it gets no mask


def attend(_: Any, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> tuple[Tensor, None]:
    return FlashAttention.apply(*(states.transpose(1, 2) for states in (query, key, value))), None


class _KnownValues(TorchDispatchMode):
    """Answers what TRL asks of values, which fake tensors have not: a number is 1, and a mask is true everywhere."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if operator is torch.ops.aten.index.Tensor and args[1][0].dtype == torch.bool:
            values, mask = args[0], args[1][0]
            return values.new_empty((mask.numel(), *values.shape[mask.dim() :]))
        return operator(*args, **(kwargs or {}))


@custom_op("benchmarks::addmm_fp32", mutates_args=("total",))
def addmm_fp32(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds the product of two bf16 matrices to an fp32 one, in place."""
    raise NotImplementedError("it is counted, never computed")


addmm_fp32.register_fake(lambda *_: None)


@register_flop_formula(torch.ops.benchmarks.addmm_fp32)
def _(total: Any, a: Any, b: Any, **_: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


@contextmanager
def head_as_on_gpu() -> Iterator[None]:
    """TRL's fused head takes the way that it takes on a GPU. Its kernels work in place, and so does its matmul."""
    kernel: Any = defaultdict(lambda: lambda *_, **__: None)
    with (
        patch.object(trl_utils, "_use_triton", lambda _: True),
        patch.object(chunked_logprob, "_use_triton", lambda _: True),
        patch.object(chunked_logprob, "_forward_kernel", kernel),
        patch.object(chunked_logprob, "_backward_kernel", kernel),
        patch.object(chunked_logprob, "_addmm_fp32", addmm_fp32),
    ):
        yield


def trl_model(recipe: Recipe, layers: int, mode: FakeTensorMode, *, checkpointing: bool) -> PeftModel:
    """What DPOTrainer makes of a 4-bit model with a peft_config: adapters in bf16, its head, accelerate's autocast."""
    model = fake_lora_model(
        recipe.model,
        recipe.lora,
        layers,
        mode,
        in_4bit=find_mixed_layers(recipe.model, BF16).in_4bit,
        dtype=BF16,
        attention=MASKLESS,
        kernels="stock",
    )
    with mode:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(BF16)
    trl_utils.add_fused_lm_head(model.get_base_model(), outputs=HEAD_OUTPUTS)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(CHECKPOINTING)
    model.forward = MethodType(torch.autocast("cpu", BF16)(model.forward.__func__), model)
    model.forward = MethodType(convert_outputs_to_fp32(model.forward.__func__), model)
    return model


# transformers' own, but for the random state, which fake tensors have not.
CHECKPOINTING = {"use_reentrant": False, "preserve_rng_state": False}


def trl_trainer(model: PeftModel, *, precomputed: bool) -> DPOTrainer:
    """A DPOTrainer with what its loss reads, as DPOConfig has it. Its own __init__ needs a data set and weights."""
    trainer = object.__new__(DPOTrainer)
    values = {
        "model": model,
        "ref_model": None,
        "precompute_ref_logps": precomputed,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=CHECKPOINTING),
        "accelerator": SimpleNamespace(
            device=torch.device("cpu"),
            gather=lambda value: value,
            gather_for_metrics=lambda value: value,
            unwrap_model=lambda wrapped: wrapped,
        ),
        "beta": 0.1,
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "use_weighting": False,
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    for name, value in values.items():
        setattr(trainer, name, value)
    return trainer


def count_trl(recipe: Recipe, layers: int, *, precomputed: bool, checkpointing: bool) -> Step:
    """The last micro-batch of a step of DPOTrainer, one pair, and the optimizer's update."""
    bnb.name2qmap.setdefault("dynamic", bnb.create_dynamic_map())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = trl_model(recipe, layers, mode, checkpointing=checkpointing)
    trainer = trl_trainer(model, precomputed=precomputed)
    optimizer = build_optimizer(model, recipe.train)
    with mode:
        names = ("input_ids", "attention_mask", "completion_mask")
        inputs = {name: torch.ones((2, ANSWER_TOKENS), dtype=torch.int64) for name in names}
        if precomputed:
            inputs |= {f"ref_{answer}_logps": torch.zeros(1) for answer in ("chosen", "rejected")}

        def loss() -> Tensor:
            with _KnownValues():
                value: Tensor = trainer.compute_loss(model, dict(inputs))
            return value

        with head_as_on_gpu():
            return count_step(model, loss, optimizer, accumulates=True, max_grad_norm=1.0)


def count_all(layers: int | None = None) -> list[dict[str, Any]]:
    """Each way to run the step, with its peak in bytes; layers: how many of the model, None for all."""
    act_as_on_gpu()
    AttentionInterface.register(MASKLESS, attend)
    recipe = recipe_of("llama3-8b-dpo")
    recipe = replace(recipe, train=replace(recipe.train, seq_len=2 * ANSWER_TOKENS))
    if layers:
        recipe = replace(recipe, model=replace(recipe.model, weights="random", layers=layers))
    depth: int = load_config(recipe.model).num_hidden_layers
    forecast, planner = Forecast(recipe), Planner(recipe, Card.of_size(24))
    chosen = planner.choose()
    assert chosen is not None
    ours = {
        "ours, as planned for 24 GiB": chosen.policy,
        "ours": Policy(depth),
        "ours, offload": Policy(depth, offload=True),
    }
    found = [
        {"stack": name, "policy": str(policy), **_counted(forecast.step(2 * ANSWER_TOKENS, policy))}
        for name, policy in ours.items()
    ]
    for precomputed, checkpointing in ((True, True), (False, True), (True, False), (False, False)):
        step = count_trl(recipe, depth, precomputed=precomputed, checkpointing=checkpointing)
        name = f"TRL, reference {'precomputed' if precomputed else 'in each step'}"
        policy = Policy(depth, 0 if checkpointing else depth)
        found.append({"stack": name, "policy": str(policy), **_counted(step)})
    return found


def _counted(step: Step) -> dict[str, Any]:
    at_peak = {kind: size for kind, size in step.at_peak().items() if size}
    flops = sum(segment.work.flops for segment in step.segments)
    return {"predicted_bytes": step.peak() + WORKSPACE_BYTES, "at_peak": at_peak, "flops": flops}


def table_lines(results: dict[str, Any]) -> list[str]:
    """The lines of the table in docs/preferences.md."""
    least = min(row["flops"] for row in results["rows"])
    return [
        f"| {row['stack']} | {row['policy']} | {row['predicted_bytes'] / GIB:.1f} GiB | {row['flops'] / least:.2f} × |"
        for row in results["rows"]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="of the model, from the first (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS / "preference_memory.json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    results = {
        "date": date.today().isoformat(),
        "command": "python -m benchmarks.preference_memory",
        "model": recipe_of("llama3-8b-dpo").model.name,
        "layers": args.layers,
        "answer_tokens": ANSWER_TOKENS,
        "versions": installed_versions(("torch", "transformers", "peft", "bitsandbytes", "trl", "accelerate")),
        "rows": count_all(args.layers),
    }
    write_result(results, args.out)
    print("\n".join(table_lines(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
