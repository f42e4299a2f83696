"""Activation checkpointing: which layers free their activations in forward and recompute them in backward.

Only the non-reentrant form is used (torch.utils.checkpoint, use_reentrant=False): the reentrant one loses gradients
when no input requires them, and cannot stop a recompute early. To *recompute* is activation checkpointing; a
*checkpoint* is a file.

The layers that keep their activations are the last ones. Backward begins with them, so it has freed what they kept
before the first layer recomputes: the two never take memory at the same time.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from common.model.activation_offload import OffloadedInputs
from common.model.attention import ATTENTION_OPERATORS
from common.model.lean_layers import can_tile, set_tiles
from common.recipe import Checkpointing

# Up to here a row that is evaluated takes little beside the weights: 1.0 GiB of Llama 3 8B, as Forecast.forward counts
# it, and 1.9 GiB with twice the tokens.
MAX_WHOLE_TOKENS = 8_192
TILE_WITHOUT_GRADIENTS = 4_096  # tokens: the first of the plan's tiles (common.plan.planner.TILES)


@dataclass(frozen=True)
class Policy:
    """Which layers of a model recompute, and what a recomputing layer keeps."""

    layers: int
    kept: int = 0  # layers that keep their activations: the last ones; the others recompute
    keep_attention: bool = False  # recomputing layers keep attention's output and log-sum-exp
    offload: bool = False  # the inputs of recomputing layers wait in host memory
    tile: int = 0  # for long rows: tokens that an MLP computes at a time; 0 is all of them
    by_head: bool = False  # of layers in tiles: attention's backward pass goes by key/value head
    qkv_again: bool = False  # of these: it computes queries, keys and values again, so that they are not kept

    def __post_init__(self) -> None:
        if not 0 <= self.kept <= self.layers:
            raise ValueError(f"{self.kept} of {self.layers} layers cannot keep their activations")
        if self.tile < 0 or (self.by_head and not self.tile) or (self.tile and self.kept):
            raise ValueError("layers in tiles all recompute, and only they go by key/value head")
        if self.qkv_again and not self.by_head:
            raise ValueError("only attention by key/value head computes queries, keys and values again")

    @classmethod
    def named(cls, name: Checkpointing, layers: int) -> "Policy":
        """The policy of a recipe's TrainSpec.checkpointing. Raises ValueError for "auto", which the plan decides."""
        if name == "auto":
            raise ValueError("the plan decides what 'auto' is")
        kept = layers if name == "none" else 0
        return cls(layers, kept, keep_attention=name == "keep attention", offload=name == "offload")

    @property
    def recomputed(self) -> int:
        return self.layers - self.kept

    def __str__(self) -> str:
        if not self.recomputed:
            return "no layer recomputes"
        which = (
            f"the first {self.recomputed} of {self.layers} layers recompute" if self.kept else "every layer recomputes"
        )
        extras = [", but attention" * self.keep_attention, ", layer inputs in host memory" * self.offload]
        if self.tile:
            extras += [f", in tiles of {self.tile:,} tokens", ", attention's backward by key/value head" * self.by_head]
            extras += [", which computes queries, keys and values again" * self.qkv_again]
        return which + "".join(extras)


# The flag of transformers' TrainingArguments that makes every layer recompute; up to 5.17 it is called "gradient".
TRAINER_FLAG = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)


def decoder_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The model's repeated layers, in order. Raises ValueError when there is none that can recompute."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer that supports activation checkpointing")
    return layers


def checkpoint_activations(model: PreTrainedModel | PeftModel, policy: Policy) -> None:
    """Makes the layers recompute in training as `policy` says, whatever they did before, and switches the cache off.

    Raises ValueError when the policy is for another number of layers, and for tiles as set_tiles. `watch_recompute`
    counts what really happens.
    The trainer's own flag, TRAINER_FLAG, must be False, or it would make every layer recompute.
    """
    layers = decoder_layers(model)
    if len(layers) != policy.layers:
        raise ValueError(f"the policy is for {policy.layers} layers, the model has {len(layers)}")
    model.config.use_cache = False  # training never reads it, and a recompute would fill it twice
    _make_first_input_need_a_gradient(model, hold=not policy.tile)
    _compute_in_tiles(model, policy.tile, by_head=policy.by_head, qkv_again=policy.qkv_again)
    # Saved for each layer, and set again where it recomputes, by the host; only dropout reads it.
    options: dict[str, Any] = {"preserve_rng_state": is_random(model)}
    if policy.keep_attention:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, list(ATTENTION_OPERATORS))
    finish_copies(model)
    offloaded = OffloadedInputs(early=not policy.by_head) if policy.offload else None
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < policy.recomputed
        layer._gradient_checkpointing_func = partial(_run_checkpointed, index, offloaded, options)
        layer.offloaded_inputs = offloaded
        if policy.by_head:  # then there is room for the next input, not earlier
            layer.self_attn.after_attention = None if offloaded is None else partial(offloaded.start_return, index - 1)


@contextmanager
def long_rows_in_tiles(model: PeftModel, longest: int) -> Iterator[None]:
    """Within it, passes without gradients compute in tiles where they have rows of more than MAX_WHOLE_TOKENS.

    For a model that is not trained, of whose memory no plan was made. longest: tokens of the longest row. Rows are
    computed as ever where the layers have no tiles, and where no row is that long.
    """
    if longest <= MAX_WHOLE_TOKENS or not can_tile(model):
        yield
        return
    _compute_in_tiles(model, TILE_WITHOUT_GRADIENTS, by_head=True)
    try:
        yield
    finally:
        _compute_in_tiles(model, 0)


def _compute_in_tiles(
    model: PreTrainedModel | PeftModel, tile: int, *, by_head: bool = False, qkv_again: bool = False
) -> None:
    """set_tiles, with the last norm inside the loss where there are tiles. Raises ValueError without the fused loss."""
    set_tiles(model, tile, by_head=by_head, qkv_again=qkv_again)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if tile and not hasattr(base, "norm_in_loss"):
        raise ValueError("layers in tiles need the fused loss")
    base.norm_in_loss = bool(tile)


class _NeedGradient(torch.autograd.Function):
    """The tensor as it is, as one that needs a gradient; nothing is held for it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, needs_gradient: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def _make_first_input_need_a_gradient(model: PreTrainedModel | PeftModel, *, hold: bool) -> None:
    """The embedding is frozen: without this the first layer's input needs no gradient.

    hold: as transformers does it, with a gradient that stays in memory beside the embedding's output to the end.
    """
    model.disable_input_require_grads()
    if (handle := getattr(model, "first_input_hook", None)) is not None:
        handle.remove()
    if hold:
        model.first_input_hook = None
        model.enable_input_require_grads()
        return

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        needs_gradient = torch.zeros((), device=output.device, requires_grad=True)
        result: Tensor = _NeedGradient.apply(output, needs_gradient)
        return result

    model.first_input_hook = model.get_input_embeddings().register_forward_hook(hook)


def finish_copies(model: PreTrainedModel | PeftModel) -> None:
    """Returns when no copy of the layers' inputs is under way, and gives their memory back.

    For the end of a run, and for a micro-batch that was left in its middle, such as one that ran out of memory.
    """
    for layer in decoder_layers(model):
        if (offloaded := getattr(layer, "offloaded_inputs", None)) is not None:
            offloaded.finish()


def is_random(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the model draws random numbers in training: it has dropout, in a module or by its config."""
    configured = (value for name, value in model.config.to_dict().items() if "drop" in name)
    modules = (module.p for module in model.modules() if isinstance(module, _DropoutNd))
    return any(isinstance(rate, int | float) and rate for rate in (*configured, *modules))


def _run_checkpointed(
    index: int,
    offloaded: OffloadedInputs | None,
    options: dict[str, Any],
    layer: Callable[..., Tensor],
    *inputs: Tensor,
) -> Tensor:
    """The layer's output. Only its inputs are saved, so the hooks that offload see nothing else."""
    hooks = saved_tensors_hooks(partial(offloaded.pack, index), offloaded.unpack) if offloaded else nullcontext()
    with hooks:
        return checkpoint(layer, *inputs, use_reentrant=False, **options)


class RecomputeWatch(TorchDispatchMode):
    """Counts the micro-batches, and how often each layer and attention ran in them, with and without gradients.

    A dispatch mode sees every operator; `watch_recompute` adds the hooks that count layers and micro-batches.
    """

    def __init__(self, layers: list[GradientCheckpointingLayer]) -> None:
        super().__init__()
        self.layers = layers
        self.micro_batches = 0
        self.attentions = 0
        self.runs: Counter[int] = Counter()
        self.runs_without_grad: Counter[int] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.attentions += operator in ATTENTION_OPERATORS
        return operator(*args, **(kwargs or {}))

    def verify(self, policy: Policy) -> None:
        """Raises RuntimeError unless each layer ran forward once per micro-batch, and once more where it recomputes."""
        for index in range(len(self.layers)):
            expected = self.micro_batches * (2 if index < policy.recomputed else 1)
            if self.runs[index] != expected:
                raise RuntimeError(
                    f"activation checkpointing is not in effect: layer {index} ran {self.runs[index]} times in "
                    f"{self.micro_batches} micro-batches, expected {expected}: {policy}"
                )
            if self.runs_without_grad[index]:
                raise RuntimeError(f"layer {index} ran without gradients: activation checkpointing is reentrant")
        attentions = policy.layers + (0 if policy.keep_attention else policy.recomputed)
        if self.attentions not in (0, self.micro_batches * attentions):  # 0: an attention of other operators
            raise RuntimeError(
                f"attention ran {self.attentions} times in {self.micro_batches} micro-batches, expected "
                f"{self.micro_batches * attentions}: {policy}"
            )


@contextmanager
def watch_recompute(model: PreTrainedModel | PeftModel) -> Iterator[RecomputeWatch]:
    """Counts what runs in the block: the embedding once a micro-batch, a layer's attention again in a recompute."""
    watch = RecomputeWatch(decoder_layers(model))

    def count_micro_batch(*_: Any) -> None:
        watch.micro_batches += 1

    def hook(index: int) -> Any:
        def count(*_: Any) -> None:
            watch.runs[index] += 1
            watch.runs_without_grad[index] += not torch.is_grad_enabled()

        return count

    handles = [
        layer.get_submodule("self_attn").register_forward_pre_hook(hook(index))
        for index, layer in enumerate(watch.layers)
    ]
    handles.append(model.get_input_embeddings().register_forward_pre_hook(count_micro_batch))
    try:
        with watch:
            yield watch
    finally:
        for handle in handles:
            handle.remove()
