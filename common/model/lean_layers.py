"""Lean decoder layers: the modules that were loaded, with a forward pass that saves less and launches fewer kernels.

`use_lean_layers` replaces the class of each loaded module by a subclass of it, as torch's fully_shard does. Parameters,
names, hooks and what PEFT attached stay as they are, so an adapter loads in plain peft and transformers. What the lean
pass does not cover, such as generation with a cache or a merged adapter, goes through the stock forward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from common.kernels import say_references_run
from common.kernels.grouped_attention import HAS_GROUPED_ATTENTION, AttentionParts, HeadNorms, add_attention_by_head
from common.kernels.lora_linear import lora_linear_add, rms_norm_lora_linears, swiglu_lora_linear_add
from common.kernels.rms_norm import rms_norm
from common.kernels.rope import rope
from common.kernels.tiled_mlp import MlpParts, add_tiled_mlp
from common.kernels.triton_check import why_no_triton
from common.model.architectures import ARCHITECTURES
from common.model.attention import uses_packed_attention
from common.model.held_adapters import HeldAdapters
from common.recipe import Kernels

# A decoder layer's linear modules.
LINEAR_NAMES = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
# By class: whether the activation is GELU with its tanh approximation; else it is SiLU.
IS_GELU = {type(ACT2FN["silu"]): False, type(ACT2FN["gelu_pytorch_tanh"]): True}
# Norms whose weight is what is added to one, and which round once.
ONE_PLUS_NORMS = (ARCHITECTURES["gemma3_text"].layer_class("RMSNorm"),)

# Whose attention and MLP common.kernels computes in tiles: a norm before each, attention scaled by dim ** -0.5, SwiGLU.
TILED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


class _LeanLayer(nn.Module):
    """Lets attention and MLP compute the norms around them and the residual connection after them too."""

    def forward(self: Any, hidden_states: Tensor, past_key_values: Any = None, **kwargs: Any) -> Tensor:
        if past_key_values is not None or not self._is_supported():
            output: Tensor = super().forward(hidden_states, past_key_values=past_key_values, **kwargs)
            return output
        if hasattr(self, "pre_feedforward_layernorm"):  # Gemma: a norm after each part too
            before_attention, after_attention = self.input_layernorm, self.post_attention_layernorm
            before_mlp, after_mlp = self.pre_feedforward_layernorm, self.post_feedforward_layernorm
        else:
            before_attention, after_attention = self.input_layernorm, None
            before_mlp, after_mlp = self.post_attention_layernorm, None
        hidden = self.self_attn(hidden_states, norm=before_attention, norm_after=after_attention, **kwargs)
        output = self.mlp(hidden, norm=before_mlp, norm_after=after_mlp)
        return output

    def _is_supported(self: Any) -> bool:
        """Whether all linear modules are as the lean pass knows them now. Asked once while adapters are held."""
        if self in self.held.supported:
            return True
        supported = not any(_unsupported_linear(self.get_submodule(name)) for name in LINEAR_NAMES)
        if supported and self.held.holds:
            self.held.supported.add(self)
        return supported


class _LeanAttention(nn.Module):
    """Saves for backward: its input, what attention itself saves, and the inputs of other norms (Qwen3, Gemma)."""

    held: HeldAdapters
    input_groups = ("q_proj k_proj v_proj", "o_proj")  # linear modules by their input
    tile_by_head = 0  # tokens of a tile where backward goes by key/value head (`set_tiles`)
    qkv_again = False  # as of AttentionParts
    after_attention: Callable[[], None] | None = None

    def forward(self: Any, hidden_states: Tensor, *, norm: Any = None, norm_after: Any = None, **kwargs: Any) -> Any:
        """norm: the RMS norm before attention. With it, returns the hidden states after the residual connection.
        norm_after: that of attention's output, where the architecture has one.

        Without norm, as a stock layer calls it, this is the stock forward pass. Hidden states: (rows, tokens, size).
        """
        if norm is None:
            return super().forward(hidden_states, **kwargs)
        cos, sin = (part.expand(len(hidden_states), -1, -1).flatten(0, 1) for part in kwargs.pop("position_embeddings"))
        if self.tile_by_head:
            return self._forward_by_head(hidden_states, norm, cos, sin, **kwargs)
        linears, copies = self.held.read(self, self.input_groups[0], hidden_states.dtype)
        weight, eps, one_plus = _read_norm(norm)
        query, key, value, hidden = rms_norm_lora_linears(
            hidden_states.flatten(0, 1), weight, eps, linears, copies, one_plus
        )
        if hasattr(self, "q_norm"):
            query, key = _norm_heads(query, self.q_norm), _norm_heads(key, self.k_norm)
        query, key = rope(query, key, cos, sin)
        rows, tokens, _ = hidden_states.shape
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        output, _ = attend(
            self,
            *(states.view(rows, tokens, -1, self.head_dim).transpose(1, 2) for states in (query, key, value)),
            kwargs.pop("attention_mask", None),
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=getattr(self, "sliding_window", getattr(self.config, "sliding_window", None)),
            **kwargs,
        )
        (linear,), copies = self.held.read(self, self.input_groups[1], hidden.dtype)
        residual = hidden if norm_after is None else None
        output = lora_linear_add(output.reshape(len(hidden), -1), linear, residual, copies)
        if norm_after is not None:
            output = rms_norm(output, *_read_norm(norm_after), hidden)
        return output.view_as(hidden_states)

    def _forward_by_head(
        self: Any,
        hidden_states: Tensor,
        norm: Any,
        cos: Tensor,
        sin: Tensor,
        *,
        cu_seq_lens_q: Tensor,
        max_length_q: int,
        **_: Any,
    ) -> Tensor:
        """The same by common.kernels.grouped_attention, which saves queries, keys and values too, or projects again."""
        qkv, qkv_copies = self.held.read(self, self.input_groups[0], hidden_states.dtype)
        (out,), out_copies = self.held.read(self, self.input_groups[1], hidden_states.dtype)
        head_norms = None
        if hasattr(self, "q_norm"):
            head_norms = HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.variance_epsilon)
        block = AttentionParts(
            norm.weight,
            norm.variance_epsilon,
            qkv,
            out,
            head_norms,
            self.head_dim,
            cu_seq_lens_q,
            max_length_q,
            getattr(self, "sliding_window", getattr(self.config, "sliding_window", None)),
            qkv_copies,
            out_copies,
            self.after_attention,
            self.qkv_again,
        )
        output = add_attention_by_head(hidden_states.flatten(0, 1), cos, sin, block, self.tile_by_head)
        return output.view_as(hidden_states)


class _LeanMLP(nn.Module):
    """Saves for backward: its input, the outputs of the gate and the up projection, and of the down projection where a
    norm follows (Gemma)."""

    held: HeldAdapters
    input_groups = ("gate_proj up_proj", "down_proj")
    tile = 0  # tokens that are computed at a time (`set_tiles`); 0 is all of them, and what is said above

    def forward(self: Any, hidden_states: Tensor, *, norm: Any = None, norm_after: Any = None) -> Tensor:
        """norm: the RMS norm before the MLP. With it, returns the hidden states after the residual connection.
        norm_after: that of its output, where the architecture has one.

        Without norm, as a stock layer calls it, this is the stock forward pass. Hidden states: (rows, tokens, size).
        """
        if norm is None:
            output: Tensor = super().forward(hidden_states)
            return output
        if self.tile:
            gate_up, gate_up_copies = self.held.read(self, self.input_groups[0], hidden_states.dtype)
            (down,), down_copies = self.held.read(self, self.input_groups[1], hidden_states.dtype)
            parts = MlpParts(norm.weight, norm.variance_epsilon, gate_up, down, gate_up_copies, down_copies)
            return add_tiled_mlp(hidden_states.flatten(0, 1), parts, self.tile).view_as(hidden_states)
        linears, copies = self.held.read(self, self.input_groups[0], hidden_states.dtype)
        weight, eps, one_plus = _read_norm(norm)
        gate, up, hidden = rms_norm_lora_linears(hidden_states.flatten(0, 1), weight, eps, linears, copies, one_plus)
        (linear,), copies = self.held.read(self, self.input_groups[1], hidden.dtype)
        residual = hidden if norm_after is None else None
        output = swiglu_lora_linear_add(gate, up, linear, residual, copies, IS_GELU[type(self.act_fn)])
        if norm_after is not None:
            output = rms_norm(output, *_read_norm(norm_after), hidden)
        return output.view_as(hidden_states)


def _read_norm(norm: Any) -> tuple[Tensor, float, bool]:
    """The norm's weight, eps and one_plus, as common.kernels.rms_norm takes them."""
    if isinstance(norm, ONE_PLUS_NORMS):
        return norm.weight, norm.eps, True
    return norm.weight, norm.variance_epsilon, False


def _norm_heads(states: Tensor, norm: Any) -> Tensor:
    """The RMS norm of each head of states (tokens, heads * dim)."""
    return rms_norm(states.view(-1, len(norm.weight)), *_read_norm(norm)).view_as(states)


def _define_lean_classes() -> dict[type, type]:
    """By stock class: its lean subclass, such as LeanLlamaMLP of LlamaMLP."""
    found = {}
    for architecture in ARCHITECTURES.values():
        for part, lean in (("DecoderLayer", _LeanLayer), ("Attention", _LeanAttention), ("MLP", _LeanMLP)):
            stock = architecture.layer_class(part)
            found[stock] = type(f"Lean{stock.__name__}", (lean, stock), {"__module__": __name__})
    return found


LEAN_CLASS_OF = _define_lean_classes()


def use_lean_layers(model: PeftModel, kernels: Kernels) -> None:
    """Makes the model's decoder layers lean for kernels="lean"; leaves them as they are for "stock".

    Leaves them stock, and prints why, for other architectures, and with LoRA dropout or DoRA. Where Triton cannot
    launch kernels on the model's GPU, they are lean all the same, and it says that references run.
    """
    if kernels == "stock":
        return
    if reason := unsupported_reason(model):
        if getattr(model, "why_stock", None) != reason:  # said already where a recipe's story calls it too
            print(f"layers: stock, slower and with more memory, because {reason}")
        model.why_stock = reason
        return
    swap_in_lean_classes(model)
    if model.device.type == "cuda" and (reason := why_no_triton()):
        say_references_run(reason)


def swap_in_lean_classes(model: nn.Module) -> None:
    """Gives every module that has a lean class that class. `unsupported_reason(model)` must be None."""
    held = HeldAdapters()
    for module in model.modules():
        if type(module) in LEAN_CLASS_OF:
            module.__class__ = LEAN_CLASS_OF[type(module)]
            module.held = held  # type: ignore[assignment]


def _lean_class(module: nn.Module) -> type:
    """The lean subclass of the module's class; its own class where there is none, or where it is lean already."""
    return LEAN_CLASS_OF.get(type(module), type(module))


def copy_all_adapters(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes all copies of adapters that are held (HeldAdapters.hold), as a first micro-batch does.

    dtype: of the compute. Does nothing for a model without lean layers.
    """
    for module in model.modules():
        if isinstance(module, _LeanAttention | _LeanMLP):
            for names in module.input_groups:
                module.held.read(module, names, dtype)


def set_tiles(model: nn.Module, tile: int, *, by_head: bool = False, qkv_again: bool = False) -> None:
    """Makes the lean layers compute `tile` tokens at a time, and attention's backward by key/value head; 0: as ever.

    qkv_again: as of AttentionParts. Layers that become lean later do so then. Raises ValueError where they cannot
    (`can_tile`).
    """
    if tile and not can_tile(model):
        raise ValueError("only lean layers with packed attention can compute in tiles")
    for module in model.modules():
        if issubclass(_lean_class(module), _LeanMLP):
            module.tile = tile  # type: ignore[assignment]
        elif issubclass(_lean_class(module), _LeanAttention):
            module.tile_by_head = tile if by_head else 0  # type: ignore[assignment]
            module.qkv_again = qkv_again  # type: ignore[assignment]


def can_tile(model: Any) -> bool:
    """Whether the model's layers can compute in tiles, lean as they are or will be: with attention of packed rows."""
    known = model.config.model_type in TILED_MODEL_TYPES
    return known and HAS_GROUPED_ATTENTION and uses_packed_attention(model) and unsupported_reason(model) is None


def is_lean(model: nn.Module) -> bool:
    return any(isinstance(module, _LeanLayer) for module in model.modules())


def unsupported_reason(model: Any) -> str | None:
    """Why the model's layers cannot be lean, in words for "because ..."; None if they can."""
    layers = [module for module in model.modules() if issubclass(_lean_class(module), _LeanLayer)]
    if not layers:
        return f"there are no lean layers for {model.config.model_type}"
    if (activation := type(layers[0].get_submodule("mlp").act_fn)) not in IS_GELU:
        return f"the lean layers know SiLU and GELU by tanh, not {activation.__name__}"
    return next(
        (
            reason
            for layer in layers
            for name in LINEAR_NAMES
            if (reason := _unsupported_linear(layer.get_submodule(name)))
        ),
        None,
    )


def _unsupported_linear(module: Any) -> str | None:
    """Why a LoraLinear cannot express the module, in words for "because ..."; None if it can."""
    base = module.base_layer if isinstance(module, LoraLayer) else module
    if not isinstance(base, Linear4bit) and type(base) is not nn.Linear:
        return f"they cannot read a {type(base).__name__}"
    if base is module or module.disable_adapters:
        return None
    name = next(iter(module.active_adapters), None)
    if module.merged or len(module.active_adapters) != 1 or name not in module.lora_A:
        return "they read exactly one adapter"
    if module.lora_variant or module.lora_bias[name]:
        return "they know plain LoRA only (no DoRA)"
    if not isinstance(module.lora_dropout[name], nn.Identity):
        return "they have no LoRA dropout"
    return None
