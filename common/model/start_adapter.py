"""The adapter that a run starts from instead of a new one (LoraSpec.start_from): found, checked, loaded, recorded.

The run takes its weights and nothing else: its steps, its learning rate and the optimizer's states begin anew. The
adapter's own folder is only read. What the run is compared with is chosen where that is done: the held-out loss before
the first step is that of this adapter, and comparisons with the base (evaluation, drift, sample answers) stay with the
base.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from common.machine.disk import sha256_of
from common.machine.paths import hide_home, is_same_place, local_path
from common.model.adapter_config import read_adapter_config, stored_rope_scaling
from common.model.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_JSON, read_run_json, require_adapter_files
from common.model.adapter_weights import read_adapter_weights
from common.model.base_hash import base_record
from common.model.integrity import check_complete
from common.recipe import ALL_LINEAR, LoraSpec, ModelSpec, UserError


@dataclass(frozen=True)
class StartRecord:
    """The adapter that a run started from, as run.json holds it."""

    start_from: str  # its folder, as the recipe names it
    sha256: str  # of its adapter_model.safetensors
    earlier: dict[str, Any] | None  # the record of the adapter that it was started from itself


@dataclass(frozen=True)
class StartedFrom:
    """What a model keeps of the adapter that it starts from."""

    record: StartRecord
    digests: dict[str, str]  # of each of its tensors, by the parameter's name


def find_start_adapter(lora: LoraSpec, model: ModelSpec, out: str = "") -> Path | None:
    """The folder of the adapter that the recipe starts from, whole and of the recipe's kind; None for a new adapter.

    Nothing is downloaded. out: the folder of the run. Raises UserError when the adapter is missing or damaged, is more
    than LoRA, has another base, or other values than the recipe's LoraSpec.
    """
    if lora.start_from is None:
        return None
    folder = local_path(lora.start_from)
    if out and folder.resolve().is_relative_to(local_path(out).resolve()):
        raise UserError(
            f"LoraSpec.start_from is {lora.start_from}, in the folder that this run writes into: choose another one "
            "for the run (OUT=...), or leave start_from out and go on with the run that is there (ARGS=--resume)"
        )
    if not folder.is_dir():
        raise UserError(
            f"LoraSpec.start_from is {lora.start_from}, and there is no such folder: name that of an earlier run, or "
            "of an adapter that PEFT saved (one of the hub is downloaded first: .venv/bin/hf download owner/name "
            "--local-dir my_adapter)"
        )
    require_adapter_files(folder)
    config = read_adapter_config(folder / ADAPTER_CONFIG)
    names = check_complete(folder / ADAPTER_WEIGHTS)
    run = read_run_json(folder / RUN_JSON)
    _refuse_another_base(folder, config, run, model)
    _refuse_other_values(folder, config, names, lora)
    if run.get("adapter_sha256") not in (None, sha256_of(folder / ADAPTER_WEIGHTS)):
        raise UserError(
            f"{folder / ADAPTER_WEIGHTS} is damaged: it is not what the run there wrote. Copy it again (if you "
            f"replaced it on purpose, remove {folder / RUN_JSON})"
        )
    return folder


def _refuse_another_base(folder: Path, config: LoraConfig, run: dict[str, Any], model: ModelSpec) -> None:
    trained = run["recipe"]["model"] if run else {}
    for name in (config.base_model_name_or_path, trained.get("name")):
        if name and not is_same_place(name, model.name):
            raise UserError(
                f"LoraSpec.start_from: the adapter in {folder} was trained on {name}, and the recipe says "
                f"{model.name}: take a recipe of that base, or start from another adapter"
            )
    if trained.get("weights") == "random" and model.weights != "random":
        raise UserError(
            f"LoraSpec.start_from: the adapter in {folder} was trained on random weights, in a dry run: start from "
            "another one"
        )
    scaling = stored_rope_scaling(config)
    if scaling is not None and model.rope_scaling is None:
        raise UserError(
            f"LoraSpec.start_from: the adapter in {folder} was trained with rope_scaling, and the recipe has none: "
            f"write ModelSpec(rope_scaling={scaling})"
        )
    if not run and config.revision not in (None, model.revision or "main"):
        raise UserError(
            f"LoraSpec.start_from: the adapter in {folder} was trained on the revision {config.revision} of "
            f"{model.name}, and the recipe says {model.revision or 'main'}: set ModelSpec.revision"
        )


def _refuse_other_values(folder: Path, config: LoraConfig, names: list[str], lora: LoraSpec) -> None:
    """Raises UserError unless the recipe's LoraSpec says what the adapter is. names: of the tensors in its file."""
    for field in ("rank_pattern", "alpha_pattern"):
        if getattr(config, field):
            raise UserError(
                f"LoraSpec.start_from: the adapter in {folder} has values of their own for some layers ({field}), "
                "which LoraSpec cannot say: start from another adapter"
            )
    targets = {name.split(".lora_")[0].rpartition(".")[2] for name in names if ".lora_" in name}
    alpha = int(config.lora_alpha) if config.lora_alpha == int(config.lora_alpha) else config.lora_alpha
    adapter = {"rank": config.r, "alpha": alpha, "rslora": config.use_rslora, "dora": config.use_dora}
    wanted: dict[str, Any] = {name: value for name, value in adapter.items() if value != getattr(lora, name)}
    if targets != set(lora.target_modules):
        wanted["target_modules"] = (
            *(name for name in ALL_LINEAR if name in targets),
            *sorted(targets - {*ALL_LINEAR}),
        )
    if wanted:
        has, says = (
            ", ".join(f"{name}={value!r}" for name, value in values.items())
            for values in (wanted, {name: getattr(lora, name) for name in wanted})
        )
        raise UserError(
            f"LoraSpec.start_from: the adapter in {folder} has {has}, and the recipe says {says}. It goes on as it is: "
            f"write LoraSpec({has}, start_from={lora.start_from!r})"
        )


@torch.no_grad()
def load_start_adapter(model: PeftModel, lora: LoraSpec) -> None:
    """Gives the model's new adapter the weights of the one that the recipe starts from; says so, and keeps the record.

    model: with adapters of the recipe's kind in fp32. Layers that are to be sharded are not sharded yet. Does nothing
    where the recipe starts anew, and for a model without memory, whose steps are only counted. Raises UserError when
    the weights do not fit or are not finite, and when the base is another one than the adapter's.
    """
    if lora.start_from is None or model.device.type == "meta":
        return
    folder, base = local_path(lora.start_from), model.name_or_path
    run = read_run_json(folder / RUN_JSON)
    _refuse_changed_base(folder, run, model, base)
    weights = read_adapter_weights(model, folder, base, torch.device("cpu"))
    odd = next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None)
    if odd:
        raise UserError(
            f"the adapter in {folder} holds numbers that are not finite, first in {odd}: start from another"
        )
    for name, tensor in weights.items():
        model.get_parameter(name).copy_(tensor)
    record = StartRecord(hide_home(lora.start_from), sha256_of(folder / ADAPTER_WEIGHTS), run.get("start"))
    model.started_from = StartedFrom(record, {name: digest_of(tensor) for name, tensor in weights.items()})
    before, now = stored_rope_scaling(read_adapter_config(folder / ADAPTER_CONFIG)), getattr(model, "scaled_rope", None)
    if before != now:
        was = "no rope_scaling" if before is None else f"rope_scaling {before}"
        print(f"adapter: the one in {folder} was trained with {was}, and goes on with {now}")
    steps = f", which {run['metrics']['kept_step']:,} steps trained" if run.get("metrics", {}).get("kept_step") else ""
    print(f"adapter: starts from the one in {folder}{steps}; steps, learning rate and optimizer begin anew")


def _refuse_changed_base(folder: Path, run: dict[str, Any], model: PeftModel, base: str) -> None:
    """Raises UserError where run.json names the files of the adapter's base by their sha256, and they are others."""
    now, trained = base_record(model.get_base_model()), (run.get("base") or {}).get("sha256")
    if now is None or not trained or trained == now.sha256:
        return
    changed = sorted(name for name in trained.keys() | now.sha256.keys() if trained.get(name) != now.sha256.get(name))
    commit = run["base"].get("commit")
    again = f"set ModelSpec.revision={commit!r}" if commit else "bring it back"
    raise UserError(
        f"LoraSpec.start_from: {base} is not what the adapter in {folder} was trained on: {', '.join(changed)} changed "
        f'since. {again[0].upper()}{again[1:]} (to start from it all the same, remove "base" from {folder / RUN_JSON})'
    )


def started_from(model: nn.Module) -> StartedFrom | None:
    """What load_start_adapter left on the model; None for a run that starts with a new adapter."""
    found = getattr(model, "started_from", None)
    assert found is None or isinstance(found, StartedFrom)
    return found


def start_record(model: nn.Module) -> StartRecord | None:
    found = started_from(model)
    return None if found is None else found.record


def digest_of(tensor: Tensor) -> str:
    """sha256 of the tensor's bytes. tensor: fp32, on the CPU."""
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
