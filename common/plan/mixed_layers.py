"""What it adds to a plan that some decoder layers of a 4-bit checkpoint have linear layers in 16 bits.

A plan counts a few layers that are alike and repeats them (common.plan.splice). Here a linear layer counts in 4 bits if
any decoder layer has it in 4 bits; where others have it in 16, `MixedLayers.add_to` adds the difference.
"""

from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from common.model.activation_checkpointing import decoder_layers
from common.model.config import load_config
from common.model.nf4 import names_of_4bit_linears, quantization_config
from common.plan.fake_model import fake_4bit_weight
from common.plan.ledger import round_up
from common.plan.resident import weight_tensors
from common.plan.step import GATHERED, WEIGHTS, Step
from common.recipe import ModelSpec


@dataclass(frozen=True)
class MixedLayers:
    """Which linear layers count in 4 bits, and what the decoder layers have beyond that. Bytes on one card."""

    in_4bit: frozenset[str]  # names in a decoder layer, such as "mlp.up_proj"
    weights: int = 0  # per decoder layer, the mean of all
    sharded: int = 0  # of `weights`, this card's shards
    gathered: int = 0  # of the decoder layer with the most

    def add_to(self, step: Step) -> Step:
        """The step with the bytes that stay, and, of sharded layers, with those of the largest ones gathered.

        Up to three layers are gathered at once, and they count as if those were the largest. Layers whose shards wait
        on the host are spread over the model, and count as the mean.
        """
        if not self.gathered:
            return step
        per_layer, outside = dict(step.resident_per_layer), dict(step.resident_outside_layers)
        per_layer[WEIGHTS] += self.weights
        sharded, on_host = dict(step.sharded_per_layer), step.shard_on_host
        streams = bool(step.streamed_per_layer)
        if any(sharded.values()):
            sharded[WEIGHTS] += self.sharded
            on_host += self.sharded
            outside[GATHERED] += 3 * self.gathered
        return replace(
            step,
            resident_per_layer=per_layer,
            resident_outside_layers=outside,
            sharded_per_layer=sharded,
            shard_on_host=on_host,
            streamed_per_layer=step.streamed_per_layer + streams * self.weights,
            streamed_at_most=step.streamed_at_most + streams * self.gathered,
        )


def find_mixed_layers(spec: ModelSpec, dtype: torch.dtype, shards: int = 1) -> MixedLayers:
    """Reads the config for it. dtype: of the compute. shards: cards that share a decoder layer; 1 where each has all.

    Raises UserError as load_config.
    """
    if spec.bits != 4:
        return MixedLayers(frozenset())
    config = load_config(spec)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    double_quant = quantization_config(config, dtype).bnb_4bit_use_double_quant
    names = set(names_of_4bit_linears(model))
    name_of = {module: name for name, module in model.named_modules()}
    layers = [name_of[layer] for layer in decoder_layers(model)]
    in_4bit = [{name.removeprefix(f"{layer}.") for name in names if name.startswith(f"{layer}.")} for layer in layers]
    union = frozenset[str]().union(*in_4bit)
    in_16bit = [union - those for those in in_4bit]
    whole, packed, scales = dict[str, int](), dict[str, int](), dict[str, int]()  # in 16 bits, and what 4 would take
    with FakeTensorMode():
        for name in frozenset[str]().union(*in_16bit):
            linear = model.get_submodule(f"{layers[0]}.{name}")
            whole[name] = round_up(linear.weight.nbytes)
            linear.weight = fake_4bit_weight(linear, dtype, double_quant=double_quant)
            packed[name], *rest = (round_up(tensor.nbytes) for tensor in weight_tensors(linear))
            scales[name] = sum(rest)
    gathered = [sum(whole[name] - packed[name] for name in those) for those in in_16bit]
    sharded = -(-sum(gathered) // (len(layers) * shards))
    unsharded = sum(scales[name] for those in in_16bit for name in those) // len(layers)
    return MixedLayers(union, sharded - unsharded, sharded, max(gathered))
