"""Merges the adapter into the base's weights: 16-bit safetensors that vLLM and transformers load.

The adapter was trained on the 4-bit base. So it is added to the weights that NF4 dequantises to, and the merged model
is the trained one, up to rounding to 16 bits. Added to the original weights instead, it would differ from the trained
model by the quantisation error of the base, which is some hundred times larger.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.adapter.find import TrainedAdapter
from common.adapter.load import attach_adapter, trained_tokenizer
from common.adapter.tokenizer_files import write_tokenizer
from common.adapter.trained_base import find_trained_base
from common.machine.device import this_machine, warn_of_unused_gpu
from common.machine.disk import MADE_FROM, sha256_of
from common.machine.slow_work import report_slow_work, show_status
from common.model.config import load_config
from common.model.integrity import refuse_other_names
from common.model.nf4 import STORED_SETTINGS, dequantize, names_of_4bit_linears, quantize, read_4bit
from common.model.quantization import config_as_stored
from common.model.rope_scaling import with_rope_scaling
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
FINITE_CHECK_ROWS = 1 << 13  # rows of a tensor that one check looks at, to keep its temporary tensors small


class MergedWeights:
    """Gives the tensors of the base and of the merged model, one at a time, in fp32.

    Where the run's model had 4 bits, its linear layers are quantised and dequantised as `load_4bit` does; with
    `original`, the original weights are taken instead. `packed` has the names of the weights that the base's files hold
    in 4 bits, `quantised` of those that were 4-bit when the adapter was trained. Raises UserError for a dry run's
    adapter, which has no base; for `original` of a checkpoint that holds only 4-bit weights; and as find_trained_base,
    load_config, refuse_other_names and attach_adapter.
    """

    def __init__(self, adapter: TrainedAdapter, *, original: bool = False) -> None:
        spec = adapter.recipe.model
        if spec.weights == "random":
            raise UserError(
                f"the run in {adapter.folder} had random weights, a dry run: there is no base to go with it"
            )
        machine = this_machine()
        warn_of_unused_gpu("merging")
        self.adapter, self.device = adapter, machine.device
        self.dtype = adapter.dtype or machine.dtype  # of the weights that were quantised, and of the compute
        self.folder = find_trained_base(adapter)
        self.config = load_config(spec, self.folder)
        self.config.dtype = torch.float32
        self.stored = SafetensorsFolder(self.folder)
        config_as_stored(spec, self.config, self.stored)
        base = self._base_skeleton()
        refuse_other_names(spec, self.folder, (name for name, _ in base.named_parameters()))
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
        """Lays out the files of the merged model: those of the base, in 16 bits.

        The files of a 4-bit base hold packed weights of other shapes, so its tensors are laid out anew.
        """
        dtype = self.dtype if self.dtype.itemsize == 2 else torch.bfloat16
        if not self.packed:
            return narrow_to_16_bits(self.stored.files, dtype)
        entries = []
        for entry in _report_reading(list(self.stored.entries.values())):
            if entry.name in self.packed:
                shape = read_4bit(self.stored, entry.name, self.device, self.dtype)[1].shape
                entries.append(Entry(entry.name, dtype, tuple(shape)))
            elif not any(entry.name.startswith(f"{name}.") for name in self.packed):  # no part of an NF4 state
                entries.append(entry)
        return narrow_to_16_bits(split_into_files(entries), dtype)

    def base(self, name: str) -> Tensor:
        """Reads a tensor of the base, as the run computed with it: fp32, on the machine's device."""
        if name in self.packed:
            return dequantize(*read_4bit(self.stored, name, self.device, self.dtype)).float()
        tensor = self.stored.read(name).to(self.device, self.dtype)
        if name in self.quantised:
            tensor = dequantize(*quantize(tensor))
        return tensor.float()

    def merged(self, name: str) -> Tensor:
        """Merges one tensor: fp32; in the stored dtype where neither the adapter nor NF4 changes it.

        Raises UserError when it has values that are not finite.
        """
        module = self.adapted(name)
        tensor = self.base(name) if module is not None or name in self.quantised else self.stored.read(name)
        if module is not None:
            tensor = merge_into(module, tensor)
        if not all(part.isfinite().all() for part in tensor.split(FINITE_CHECK_ROWS)):
            raise UserError(f"{name} of the merged model is not finite: the adapter or the base is damaged")
        return tensor

    def adapted(self, name: str) -> Any:
        """Finds the module whose weight has this name; None where the adapter does not change it."""
        owner, _, kind = name.rpartition(".")
        with contextlib.suppress(AttributeError):  # no module has the tensor: older files hold rotary frequencies
            module = self.skeleton.get_submodule(PEFT_PREFIX + owner)
            if kind == "weight" and isinstance(module, LoraLayer):
                return module
        return None

    def describe_base(self) -> str:
        return "the 4-bit base, dequantised" if self.quantised else "the original weights"

    def write_made_from(self, path: Path) -> None:
        """Writes down what the merged model was made from."""
        made_from = {
            "base": self.adapter.recipe.model.name,
            "revision": self.adapter.recipe.model.revision,
            "adapter_sha256": sha256_of(self.adapter.folder / ADAPTER_WEIGHTS),
            "merged_into": self.describe_base(),
        }
        path.write_text(json.dumps(made_from, indent=2) + "\n", encoding="utf-8")


def merge_into(module: Any, weight: Tensor) -> Tensor:
    """The sum of a weight and the adapter that the module of a skeleton holds for it, as PEFT merges them."""
    module.base_layer.weight = nn.Parameter(weight, requires_grad=False)
    module.merge()
    merged: Tensor = module.base_layer.weight.data
    module.base_layer.weight = nn.Parameter(merged.to("meta"), requires_grad=False)  # frees the memory
    module.merged_adapters = []  # so that the module can merge again
    return merged


def _report_reading(entries: Sequence[Entry]) -> Iterator[Entry]:
    """Yields the entries, and prints how far their reader is when it is slow."""
    with report_slow_work("reading the 4-bit base", len(entries), "tensors") as work:
        for entry in entries:
            yield entry
            work.done += 1


def write_merged(weights: MergedWeights, folder: Path) -> None:
    """Writes the merged model into `folder`, which exists: weights, configs, tokenizer, template and made_from.json."""
    with report_slow_work("merging", sum(len(shard.entries) for shard in weights.shards), "tensors") as work:

        def merge_entry(entry: Entry) -> Tensor:
            work.done += 1
            return weights.merged(entry.name)

        write_files(folder, weights.shards, merge_entry, say=partial(show_status, keep=True))
    config = json.loads((weights.folder / "config.json").read_text(encoding="utf-8"))
    config = with_rope_scaling(config, weights.adapter.recipe.model)
    config.pop("quantization_config", None)
    config.pop("transformers_weights", None)  # the name of the base's file or index
    config.pop("torch_dtype", None)  # the older name of `dtype`
    largest = max((entry for shard in weights.shards for entry in shard.entries), key=lambda entry: entry.size)
    config["dtype"] = str(largest.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(weights.adapter, weights.folder, trained_tokenizer(weights.adapter), folder)
    weights.write_made_from(folder / MADE_FROM)
