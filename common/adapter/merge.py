"""The adapter inside the weights: 16-bit safetensors that vLLM and transformers load.

It is added to what the adapter was trained against, the 4-bit base as NF4 gives it back: the result is the trained
model up to rounding to 16 bits. Added to the original weights instead, the base's own rounding error comes back as a
difference from what was trained, some hundred times larger.
"""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from common.adapter.load import TrainedAdapter, attach_adapter
from common.machine.device import this_machine
from common.machine.disk import MADE_FROM, sha256_of
from common.model.config import load_config
from common.model.download import model_folder
from common.model.nf4 import STORED_SETTINGS, dequantize, names_of_4bit_linears, quantize, read_4bit
from common.model.safetensors_files import (
    Entry,
    SafetensorsFile,
    SafetensorsFolder,
    narrow_to_16_bits,
    split_into_files,
    write_files,
)
from common.recipe import UserError
from common.run.folder import ADAPTER_WEIGHTS

PEFT_PREFIX = "base_model.model."  # of a module's name in a PeftModel
FINITE_CHECK_ROWS = 1 << 13  # of a tensor, looked at together


class MergedWeights:
    """The tensors of base and merged model, one at a time, fp32.

    Linear layers are quantised as `load_4bit` does when the run's model had 4 bits, unless `original`.
    """

    def __init__(self, adapter: TrainedAdapter, *, original: bool = False) -> None:
        spec = adapter.recipe.model
        if spec.weights == "random":
            raise UserError(
                f"the run in {adapter.folder} had random weights, a dry run: there is no base to go with it"
            )
        machine = this_machine()
        self.adapter, self.device = adapter, machine.device
        self.dtype = adapter.dtype or machine.dtype  # of the base when it was quantised, and of the compute
        self.folder = model_folder(spec, weights=True)
        self.config = load_config(spec, self.folder)
        self.config.dtype = torch.float32
        self.stored = SafetensorsFolder(self.folder)
        base = self._base_skeleton()
        linears = {f"{name}.weight" for name in names_of_4bit_linears(base)}
        self.skeleton = attach_adapter(base, adapter, self.device).eval()
        self.packed = {
            name.removesuffix(STORED_SETTINGS) for name in self.stored.entries if name.endswith(STORED_SETTINGS)
        }
        if original and self.packed:
            raise UserError(f"{spec.name} is a 4-bit checkpoint: it has no original weights to merge into")
        self.quantised = self.packed
        if spec.bits == 4 and not original and not self.packed:
            self.quantised = linears
        self.shards = self._layout()
        self.dtype_of = {entry.name: entry.dtype for shard in self.shards for entry in shard.entries}

    def _base_skeleton(self) -> PreTrainedModel:
        """The base model on meta; attach_adapter gives it the adapter's own weights."""
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config, dtype=torch.float32, attn_implementation="sdpa")

    def _layout(self) -> list[SafetensorsFile]:
        """The files of the merged model: as in the base, where that holds whole weights of at most 16 bits."""
        dtype = self.dtype if self.dtype.itemsize == 2 else torch.bfloat16
        if not self.packed:
            return narrow_to_16_bits(self.stored.files, dtype)
        entries = []
        for entry in self.stored.entries.values():
            if entry.name in self.packed:
                shape = read_4bit(self.stored, entry.name, self.device)[1].shape
                entries.append(Entry(entry.name, dtype, tuple(shape)))
            elif not any(entry.name.startswith(f"{name}.") for name in self.packed):
                entries.append(entry)
        return narrow_to_16_bits(split_into_files(entries), dtype)

    def base(self, name: str, rows: slice | list[int] | None = None) -> Tensor:
        """A tensor of the base as the run had it: fp32, on the machine's device. rows: of one that is not 4-bit."""
        if name in self.packed:
            weight, state = read_4bit(self.stored, name, self.device)
            return dequantize(weight, state).to(self.dtype).float()
        tensor = self.stored.read(name, rows).to(self.device, self.dtype)
        if name in self.quantised:
            tensor = dequantize(*quantize(tensor))
        return tensor.float()

    def merged(self, name: str) -> Tensor:
        """A tensor of the merged model: fp32, or as it is stored where nothing changes it.

        Raises UserError when it is not finite.
        """
        module = self._adapted(name)
        tensor = self.base(name) if module is not None or name in self.quantised else self.stored.read(name)
        if module is not None:
            module.base_layer.weight = nn.Parameter(tensor, requires_grad=False)
            module.merge()
            tensor = module.base_layer.weight.data
            module.base_layer.weight = nn.Parameter(tensor.to("meta"), requires_grad=False)
            module.merged_adapters = []
        if not all(part.isfinite().all() for part in tensor.split(FINITE_CHECK_ROWS)):
            raise UserError(f"{name} of the merged model is not finite: the adapter or the base is damaged")
        return tensor

    def rounded(self, name: str, rows: slice | list[int] | None = None) -> Tensor:
        """What a tensor of the merged model should be, by LoRA's formula and not by PEFT's merge: rounded as it is in
        the files, then fp32. rows: of one that no adapter changes. For DoRA the merge itself."""
        module = self._adapted(name)
        if module is None:
            tensor = self.base(name, rows) if name in self.quantised else self.stored.read(name, rows).to(self.device)
        elif self.adapter.config.use_dora:
            tensor = self.merged(name)
        else:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            tensor = self.base(name) + module.scaling["default"] * (b @ a)
        return tensor.to(self.dtype_of[name]).float()

    def _adapted(self, name: str) -> Any:
        """The module whose weight has this name, if the adapter changes it."""
        owner, _, kind = name.rpartition(".")
        with contextlib.suppress(AttributeError):  # a tensor that no module has, such as rotary frequencies
            module = self.skeleton.get_submodule(PEFT_PREFIX + owner)
            if kind == "weight" and isinstance(module, LoraLayer):
                return module
        return None

    def into(self) -> str:
        return "the 4-bit base, dequantised" if self.quantised else "the original weights"

    def generation_config(self) -> GenerationConfig:
        """The run's, which stops at the end of a turn; the base's for an adapter that came without one."""
        folders = [f for f in (self.adapter.folder, self.folder) if (f / "generation_config.json").exists()]
        return GenerationConfig.from_pretrained(folders[0]) if folders else GenerationConfig()

    def write_note(self, path: Path) -> None:
        """What the model beside it was made from."""
        note = {
            "base": self.adapter.recipe.model.name,
            "revision": self.adapter.recipe.model.revision,
            "adapter_sha256": sha256_of(self.adapter.folder / ADAPTER_WEIGHTS),
            "merged_into": self.into(),
        }
        path.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def write_merged(weights: MergedWeights, folder: Path) -> None:
    """The merged model in `folder`, which is there: weights, configs, tokenizer, template, and where it came from."""
    write_files(folder, weights.shards, lambda entry: weights.merged(entry.name))
    config = json.loads((weights.folder / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)  # what `dtype` was called
    largest = max((entry for shard in weights.shards for entry in shard.entries), key=lambda entry: entry.size)
    config["dtype"] = str(largest.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_tokenizer(weights, folder)
    weights.write_note(folder / MADE_FROM)


def copy_tokenizer(weights: MergedWeights, folder: Path) -> None:
    """The base's tokenizer files, which every tool knows; the run's template and generation config, where it has them.

    What the run saved serves where the base has no tokenizer.json.
    """
    ours = weights.adapter.folder
    source = weights.folder if (weights.folder / "tokenizer.json").exists() else ours
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    for name in ("chat_template.jinja", "generation_config.json"):
        found = next((place / name for place in (ours, weights.folder) if (place / name).exists()), None)
        if found:
            shutil.copyfile(found, folder / name)
