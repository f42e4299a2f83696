"""Packed rows of pairs and of rated answers, made by hand, and losses by the formulas of their papers in float64."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from common.data.rows import Rows
from common.machine.layout import Layout
from common.model.activation_checkpointing import Policy, checkpoint_activations
from common.model.lean_layers import use_lean_layers
from common.model.loading import load_4bit, load_tokenizer
from common.model.lora import attach_lora
from common.plan.plan import Plan
from common.recipe import DataSpec, LoraSpec, ModelSpec, PreferenceSpec, Recipe, TrainSpec
from common.tokens.labels import IGNORED
from tests.conftest import FP32

Answer = tuple[list[int], list[int], float]  # prompt, answer, sign


def make_answers(count: int, seed: int, *, pairs: bool) -> list[Answer]:
    """`count` pairs, each as two answers to a prompt, or rated answers. No token is one of the special ones."""
    draw = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [draw.randrange(100, 900) for _ in range(draw.randint(least, most))]

    if not pairs:
        return [(ids(3, 9), ids(2, 7), draw.choice([1.0, -1.0])) for _ in range(count)]
    prompts = [ids(3, 9) for _ in range(count)]
    return [(prompt, ids(2, 7), sign) for prompt in prompts for sign in (1.0, -1.0)]


def pack_by_hand(answers: list[Answer], examples: int) -> Dataset:
    """Rows of so many examples each."""
    rows = []
    for start in range(0, len(answers), examples):
        row: dict[str, Any] = {"input_ids": [], "labels": [], "seq_lengths": [], "signs": []}
        for prompt, answer, sign in answers[start : start + examples]:
            row["input_ids"] += prompt + answer
            row["labels"] += [IGNORED] * len(prompt) + answer
            row["seq_lengths"].append(len(prompt) + len(answer))
            row["signs"].append(sign)
        rows.append(row)
    return Dataset.from_list(rows)


def made_rows(spec: PreferenceSpec, rows: int = 12, held_out: int = 3) -> Rows:
    """Rows of two pairs or of four rated answers; the last row has one pair, or one answer."""
    pairs = spec.kind == "pairs"
    per_row = 4
    train = make_answers(rows * (2 if pairs else 4) - (1 if pairs else 3), 1, pairs=pairs)
    evaluation = make_answers(held_out * (2 if pairs else 4), 2, pairs=pairs)
    return Rows(pack_by_hand(train, per_row), pack_by_hand(evaluation, per_row), [], kind=spec.kind)


def made_recipe(folder: Path, out: Path, spec: PreferenceSpec, **train: Any) -> Recipe:
    values = {"rows_per_step": 4, "learning_rate": 5e-3, "max_steps": 3, "sample_answers": 0, **train}
    return Recipe(
        ModelSpec(str(folder), bits=16),
        DataSpec("made by hand", drift_source=None),
        LoraSpec(rank=4, alpha=8),
        TrainSpec(seq_len=128, **values),
        card_gib=None,
        preference=spec,
        out=str(out),
    )


def made_plan(recipe: Recipe, micro_batch_rows: int = 2) -> Plan:
    return Plan(micro_batch_rows, recipe.train.most_rows_per_step // micro_batch_rows, Layout(), Policy(2, 1), "a test")


def prepare_by_hand(
    recipe: Recipe,
    micro_batch_rows: int = 2,
    rows: Rows | None = None,
    layout: Layout = Layout(),  # noqa: B008 - frozen
):
    """A recipe's story up to training."""
    Path(recipe.out).mkdir(parents=True, exist_ok=True)
    assert recipe.preference is not None
    plan, tokenizer = made_plan(recipe, micro_batch_rows), load_tokenizer(recipe.model)
    model = attach_lora(load_4bit(recipe.model, FP32, layout=layout), recipe.lora, recipe.train.seed)
    use_lean_layers(model, recipe.train.kernels)
    checkpoint_activations(model, plan.checkpointing)
    return model, tokenizer, rows or made_rows(recipe.preference), recipe, plan


def move_adapter(model: torch.nn.Module, seed: int = 0, std: float = 0.05) -> None:
    """Gives the adapter weights as of a run that has learnt something."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)


def answers_of(rows: Dataset) -> list[list[Answer]]:
    """The answers of each packed row."""
    found = []
    for row in rows:
        start, answers = 0, []
        for length, sign in zip(row["seq_lengths"], row["signs"], strict=True):
            ids, labels = (row[name][start : start + length] for name in ("input_ids", "labels"))
            begin = next(i for i, label in enumerate(labels) if label != IGNORED)
            answers.append((ids[:begin], ids[begin:], sign))
            start += length
        found.append(answers)
    return found


class Exact:
    """The model with its adapter in float64, on one example at a time: no packing, no fused loss, no lean layers."""

    def __init__(self, folder: str, adapter: dict[str, Tensor], lora: LoraSpec) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        self.model.requires_grad_(False)
        self.adapter = {name: tensor.detach().double().requires_grad_() for name, tensor in adapter.items()}
        self.on = True
        for name, module in self.model.named_modules():
            if name.rpartition(".")[2] in lora.target_modules:
                a, b = (self.adapter[f"base_model.model.{name}.lora_{side}.default.weight"] for side in "AB")
                module.register_forward_hook(
                    lambda _, given, output, a=a, b=b: (
                        output + given[0] @ a.T @ b.T * lora.alpha / lora.rank if self.on else output
                    )
                )

    def likelihood(self, prompt: list[int], answer: list[int]) -> Tensor:
        """Log-likelihood of the answer in nats, with the adapter."""
        logits = self.model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
        log_probabilities = torch.log_softmax(logits, -1)
        places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
        return log_probabilities[places, torch.tensor(answer)].sum()

    def reference(self, prompt: list[int], answer: list[int]) -> Tensor:
        self.on = False
        with torch.no_grad():
            found = self.likelihood(prompt, answer)
        self.on = True
        return found

    def loss(self, rows: list[list[Answer]], spec: PreferenceSpec, z: float | None = None) -> Tensor:
        """The mean over the comparisons of the rows, by the formulas in the papers."""
        if spec.loss == "kto":
            z = self.z(rows) if z is None else z
            return torch.stack([self._rated(answer, spec, z) for row in rows for answer in row]).mean()
        pairs = [row[start : start + 2] for row in rows for start in range(0, len(row), 2)]
        return torch.stack([self._pair(chosen, rejected, spec) for chosen, rejected in pairs]).mean()

    def z(self, rows: list[list[Answer]]) -> float:
        """The mean log-ratio of each prompt with the next answer of its row; rows of one answer have none."""
        ratios = []
        for row in (row for row in rows if len(row) > 1):
            for (prompt, _, _), (_, answer, _) in zip(row, row[1:] + row[:1], strict=True):
                with torch.no_grad():
                    ratios.append(self.likelihood(prompt, answer) - self.reference(prompt, answer))
        return max(0.0, torch.stack(ratios).mean().item()) if ratios else 0.0

    def _rated(self, given: Answer, spec: PreferenceSpec, z: float) -> Tensor:
        prompt, answer, sign = given
        ratio = self.likelihood(prompt, answer) - self.reference(prompt, answer)
        if sign > 0:
            return spec.value("desirable_weight") * (1 - torch.sigmoid(spec.value("beta") * (ratio - z)))
        return spec.value("undesirable_weight") * (1 - torch.sigmoid(spec.value("beta") * (z - ratio)))

    def _pair(self, chosen: Answer, rejected: Answer, spec: PreferenceSpec) -> Tensor:
        beta = spec.value("beta")
        p_c, p_j = (self.likelihood(*answer[:2]) for answer in (chosen, rejected))
        n_c, n_j = len(chosen[1]), len(rejected[1])
        sft = -spec.value("sft_weight") * p_c / n_c
        if spec.loss == "orpo":
            odds = [p / n - torch.log(1 - torch.exp(p / n)) for p, n in ((p_c, n_c), (p_j, n_j))]
            return sft - beta * logsigmoid(odds[0] - odds[1])
        if spec.loss == "simpo":
            return sft + _smoothed(beta * (p_c / n_c - p_j / n_j) - spec.value("gamma"), spec)
        r_c, r_j = (self.reference(*answer[:2]) for answer in (chosen, rejected))
        if not spec.value("length_normalized"):
            n_c = n_j = 1
        margin = (p_c - r_c) / n_c - (p_j - r_j) / n_j
        return sft + ((margin - 1 / (2 * beta)) ** 2 if spec.loss == "ipo" else _smoothed(beta * margin, spec))


def _smoothed(logit: Tensor, spec: PreferenceSpec) -> Tensor:
    share = spec.value("label_smoothing")
    return -(1 - share) * logsigmoid(logit) - share * logsigmoid(-logit)


def with_loss(recipe: Recipe, **values: Any) -> Recipe:
    return replace(recipe, preference=PreferenceSpec(**values))
