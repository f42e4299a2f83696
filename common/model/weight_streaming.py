"""Weight streaming: the frozen weights of decoder layers wait in host memory, and come to the device for their layer.

Frozen weights are only read, in an order that is known: layer after layer in forward, and the other way in backward. So
the weights of the layers that stream need room for two of them on the device, a ring of two slots that is allocated
once. A layer always has the same slot, and its parameters lie there for good: only what is in it changes. While one
layer computes, the next one's weights are copied beside it, on a CUDA stream of their own (common.machine.copy_stream).

In backward a layer's weights come once, for its recompute and its gradients together. At the turn from forward to
backward, and from there to the next micro-batch, the two layers that come first are those that lie in the ring already:
of n layers n - 2 are copied in each direction.

What trains stays on the device, and so does what is small: norms, biases, code books.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.machine.copy_stream import CopyStream
from common.machine.layout import RING_SLOTS, spread_layers
from common.machine.shared_memory import fill_once_per_machine
from common.model.activation_checkpointing import decoder_layers
from common.recipe import ALL_LINEAR, UserError

# A tensor begins at a multiple of this in its layer's block, as torch's allocator would place it.
ALIGNMENT_BYTES = 512


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor of a layer that streams, as an attribute of its owner, and where it lies in the layer's block."""

    owner: Any  # a frozen parameter, or bitsandbytes' QuantState of one
    name: str  # "data" or "absmax"
    start: int  # bytes
    shape: torch.Size
    dtype: torch.dtype

    def view_in(self, block: Tensor) -> Tensor:
        """block: uint8, one dimension. The view counts changes for itself: autograd takes the block's for its own."""
        size = self.shape.numel() * self.dtype.itemsize
        return block[self.start : self.start + size].view(self.dtype).view(self.shape).data

    def lie_in(self, block: Tensor) -> None:
        setattr(self.owner, self.name, self.view_in(block))


def streamed_tensors(layer: nn.Module) -> tuple[list[StreamedTensor], int]:
    """The tensors of a decoder layer that stream, and the bytes of its block.

    They are the frozen weights of its linear modules in any form, with the scales of 4-bit ones.
    """
    found: list[StreamedTensor] = []
    size = 0
    for owner, name in _owners(layer):
        tensor = getattr(owner, name)
        found.append(StreamedTensor(owner, name, size, tensor.shape, tensor.dtype))
        size += -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return found, size


def _owners(layer: nn.Module) -> Iterator[tuple[Any, str]]:
    for path, module in layer.named_modules():
        is_linear = path.removesuffix(".base_layer").rpartition(".")[2] in ALL_LINEAR  # PEFT's name
        if not is_linear or not isinstance(module, nn.Linear):
            continue
        yield module.weight, "data"
        state = getattr(module.weight, "quant_state", None)
        while state is not None:  # with double quantization the scales have scales
            yield state, "absmax"
            state = state.state2


class WeightRing:
    """The weights of the layers that stream: a block of host memory for each, and the slots on the device.

    Layers are numbered from 0 among those that stream. `enter` must be called before a layer computes, in any order.
    """

    def __init__(self, layers: Sequence[nn.Module], blocks: Sequence[Tensor], device: torch.device) -> None:
        """blocks: of each layer's weights, which lie there (move_to_host). device: that computes."""
        self.layers, self.blocks = layers, blocks
        largest = max(block.nbytes for block in blocks)
        self.slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(RING_SLOTS)]
        self.held: list[int | None] = [None] * RING_SLOTS  # the layer in each slot, or on its way there
        self.copies = CopyStream(device)
        if self.copies.stream is not None:
            for slot in self.slots:  # a model may be dropped while a copy is under way
                slot.record_stream(self.copies.stream)
        self.tensors = [streamed_tensors(layer)[0] for layer in layers]
        for number, layer in enumerate(layers):
            self._lie_in_slot(number)
            layer.weight_ring = self  # type: ignore[assignment]
            layer.register_forward_pre_hook(partial(self._before_forward, number), prepend=True)
            layer.register_forward_hook(partial(self._after_forward, number))

    def enter(self, number: int, following: int) -> None:
        """What the computation is given from here on finds the layer's weights in its slot.

        Then the copy of the layer that follows begins. It waits for what was computed so far: the layer that had its
        slot before is done by then. A number that no layer has is none.
        """
        self._lie_in_slot(number)
        self._load(number)
        self.copies.wait()
        if 0 <= following < len(self.blocks) and following % RING_SLOTS != number % RING_SLOTS:
            self._load(following)

    def _lie_in_slot(self, number: int) -> None:
        """Makes the layer's weights be those in its slot, where they are not: at first, and after a model.to(device).

        accelerate calls that before it wraps the model, and on a CPU it copies, because cpu:0 is not cpu.
        """
        tensors, slot = self.tensors[number], self.slots[number % RING_SLOTS]
        if getattr(tensors[0].owner, tensors[0].name).data_ptr() != slot.data_ptr():
            for tensor in tensors:
                tensor.lie_in(slot)

    def _load(self, number: int) -> None:
        place = number % RING_SLOTS
        if self.held[place] != number:
            self.held[place] = None
            block = self.blocks[number]
            self.copies.copy(self.slots[place][: block.nbytes], block)
            self.held[place] = number

    def _before_forward(self, number: int, *_: Any) -> None:
        """A forward hook of the layer. Without gradients no backward pass follows, but perhaps the next forward."""
        is_last = number == len(self.blocks) - 1
        self.enter(number, 0 if is_last and not torch.is_grad_enabled() else number + 1)

    def _after_forward(self, number: int, _: Any, __: Any, output: Any) -> None:
        """A forward hook of the layer, for its backward pass: it begins when the output's gradient is complete."""
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self.enter(number, number - 1))

    def finish(self) -> None:
        """Returns when no copy is under way."""
        self.copies.synchronize()


def weight_ring(model: nn.Module) -> WeightRing | None:
    """The ring of a model whose weights stream; None for any other."""
    found = (ring for module in model.modules() if isinstance(ring := getattr(module, "weight_ring", None), WeightRing))
    return next(found, None)


@torch.no_grad()
def move_to_host(layer: nn.Module, like: Tensor) -> Tensor:
    """Moves the layer's frozen weights to a block of host memory, and returns it: uint8. The layer cannot compute then.

    The processes of a machine share the block, and all must call this. like: a tensor on the device that computes.
    Raises MemoryError, or torch's RuntimeError, when there is no memory.
    """
    tensors, size = streamed_tensors(layer)

    def fill(block: Tensor) -> None:
        for tensor in tensors:
            tensor.view_in(block).copy_(getattr(tensor.owner, tensor.name))

    block = fill_once_per_machine(size, fill, like)
    for tensor in tensors:
        tensor.lie_in(block)  # gives the memory where it was back
    return block


def stream_weights(model: PreTrainedModel | PeftModel, on_host: int) -> None:
    """Makes the weights of `on_host` decoder layers wait in host memory, spread evenly over the model.

    Moves them there from the device. 0 leaves them. Losses and gradients stay what they are, to the bit. Does nothing
    where so many stream already. Raises UserError where another number does, and as move_to_host.
    """
    ring = weight_ring(model)
    if ring is not None or not on_host:
        there = 0 if ring is None else len(ring.blocks)
        if there != on_host:
            raise UserError(
                f"the plan says that the weights of {on_host} layers wait in host memory, and those of {there} do: "
                "write load_4bit(recipe.model, layout=plan.layout) in the recipe"
            )
        return
    layers, head = decoder_layers(model), model.get_output_embeddings().weight
    chosen = [layers[index] for index in spread_layers(on_host, len(layers))]
    WeightRing(chosen, [move_to_host(layer, head) for layer in chosen], head.device)


def leave_ring_to_processes(model: nn.Module) -> None:
    """Keeps DistributedDataParallel from sending what lies in the ring: there each process may have another layer."""
    ring = weight_ring(model)
    if ring is not None:
        owners = {id(tensor.owner) for layer in ring.layers for tensor in streamed_tensors(layer)[0]}
        names = [name for name, parameter in model.named_parameters() if id(parameter) in owners]
        model._ddp_params_and_buffers_to_ignore = names  # type: ignore[assignment]


@torch.no_grad()
def compute_magnitudes(model: PeftModel) -> None:
    """DoRA's vectors of magnitudes of the layers that stream, made again: PEFT reads weights where none may lie yet.

    Does nothing for any other model, and for adapters without such vectors.
    """
    ring = weight_ring(model)
    for number, layer in enumerate(ring.layers if ring else ()):
        vectors = [module for module in layer.modules() if isinstance(module, LoraLayer)]
        for module in vectors:
            for name, vector in module.lora_magnitude_vector.items():
                assert ring is not None
                ring.enter(number, number + 1)
                dtype = vector.weight.dtype
                a, b = module.lora_A[name].weight, module.lora_B[name].weight
                base, scale = module.get_base_layer(), module.scaling[name]
                vector.update_layer(base_layer=base, lora_A=a, lora_B=b, scaling=scale)
                vector.weight = nn.Parameter(vector.weight.to(dtype))
