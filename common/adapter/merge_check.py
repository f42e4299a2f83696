"""Is the merged model the trained one? Both run a few prompts, a layer at a time, in the memory of one layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from common.adapter.load import TrainedAdapter, trained_tokenizer
from common.adapter.merge import MergedWeights
from common.data.chat_format import ChatFormat
from common.data.conversations import Message
from common.model.safetensors_files import SafetensorsFolder
from common.recipe import UserError

# Mean KL divergence from the trained to the merged model, in nats, both computed in fp32. Rounding to bf16 makes 5e-7
# of it in the model that ships and 2e-5 in 32 layers of noise; an adapter that is lost or added twice, 5e-3 or so.
KL_BOUND = 1e-5
SAME = 1e-8  # between the trained weights rounded here and those in the files: other sums, the same rounding
HEAD_ROWS = 1 << 14  # of the head at a time
MOST_TOKENS = 256  # of a prompt
PROMPTS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    (
        "Write a haiku about autumn.",
        "Leaves drift to the ground,\nthe cold wind carries their gold,\nautumn says goodbye.",
    ),
    ("Explain in one sentence what a hash table is.", "A hash table finds a value by its key in constant time."),
    ("Sort these numbers: 7, 3, 9, 1.", "1, 3, 7, 9"),
)


@dataclass(frozen=True)
class Agreement:
    """Of two models, over every position of the prompts."""

    kl: float  # nats, mean
    same_next: int  # positions where both hold the same next token for the most likely
    positions: int

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.1e} nats a token to the trained model, "
            f"the same next token at {self.same_next:,} of {self.positions:,} positions"
        )


def prompts_of(adapter: TrainedAdapter, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids of the run's sample prompts with the adapter's answers: what it was trained for. Else of PROMPTS."""
    pairs = [(sample["asked"], sample["after"]) for sample in adapter.run.get("samples", [])] or PROMPTS
    if not tokenizer.chat_template:
        return [tokenizer(f"{asked} {answer}")["input_ids"] for asked, answer in pairs]
    chat_format = ChatFormat(tokenizer)
    return [
        chat_format.encode((Message("user", asked), Message("assistant", after))).input_ids for asked, after in pairs
    ]


def check_merged(adapter: TrainedAdapter, folder: Path, *, bound: float | None = KL_BOUND) -> str:
    """How the merged model in `folder` agrees with the trained one on a few prompts, in words.

    Raises UserError when its KL divergence is above `bound` nats a token, and rounding alone does not explain that.
    """
    prompts = prompts_of(adapter, trained_tokenizer(adapter))
    weights = MergedWeights(adapter)
    agreement = compare(weights, folder, prompts)
    if bound is None or agreement.kl <= bound:
        return str(agreement)
    rounded = compare(weights, folder, prompts, rounded=True)
    if rounded.kl <= SAME:
        return (
            f"{agreement}. That is more than {bound:.0e}, and all of it is rounding: the files hold the trained "
            f"weights rounded to 16 bits (KL {rounded.kl:.1e} to those)"
        )
    raise UserError(
        f"the merged model is not the trained one, and nothing was kept: {agreement}. Rounding does not explain it: KL "
        f"{rounded.kl:.1e} to the trained weights rounded to 16 bits"
    )


@torch.no_grad()
def compare(
    weights: MergedWeights, folder: Path, prompts: Sequence[Sequence[int]], *, rounded: bool = False
) -> Agreement:
    """The model in `folder` beside the trained one, whose base and adapter stay apart; all in fp32.

    rounded: beside one with the weights of the trained one added up and rounded, which is what merging should make.
    """
    merged = SafetensorsFolder(folder)

    def read_merged(name: str, rows: Any = None) -> Tensor:
        return merged.read(name, rows).to(weights.device).float()

    prompts = [prompt[:MOST_TOKENS] for prompt in prompts]
    trained = _plain_model(weights) if rounded else weights.skeleton.get_base_model()
    trained_logits = _logits(trained, weights.rounded if rounded else weights.base, prompts)
    merged_logits = _logits(_plain_model(weights), read_merged, prompts)
    kl, same = 0.0, 0
    for ours, theirs in zip(trained_logits, merged_logits, strict=True):
        p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
        kl += (p.exp() * (p - q)).sum().item()
        same += int(ours.argmax() == theirs.argmax())
    return Agreement(kl / len(trained_logits), same, len(trained_logits))


def _plain_model(weights: MergedWeights) -> Any:
    """The model without an adapter, on meta."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(weights.config, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval()


def _logits(model: Any, read: Callable[..., Tensor], prompts: Sequence[Sequence[int]]) -> Tensor:
    """fp32 (tokens of all prompts, vocabulary). model: on meta; `read` gives its tensors by name, or rows of them."""
    config, inner = model.config, model.model
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    states = [read(embedding, rows=list(prompt))[None] for prompt in prompts]
    device = states[0].device
    rope = type(inner.rotary_emb)(config).to(device)
    positions = [torch.arange(len(prompt), device=device)[None] for prompt in prompts]
    angles = [rope(state, position) for state, position in zip(states, positions, strict=True)]
    for number, layer in enumerate(inner.layers):
        names = _fill(layer, f"model.layers.{number}", read)
        states = [
            layer(state, attention_mask=None, position_embeddings=angle, position_ids=position)
            for state, angle, position in zip(states, angles, positions, strict=True)
        ]
        for name in names:
            _put(layer, name, layer.get_parameter(name).to("meta"))
    _fill(inner.norm, "model.norm", read)
    hidden = torch.cat([inner.norm(state)[0] for state in states])
    name = embedding if config.tie_word_embeddings else head
    starts = range(0, config.vocab_size, HEAD_ROWS)
    return torch.cat([hidden @ read(name, rows=slice(start, start + HEAD_ROWS)).t() for start in starts], dim=1)


def _fill(module: nn.Module, prefix: str, read: Callable[..., Tensor]) -> list[str]:
    """Gives each parameter on meta its tensor; their names."""
    names = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    for name in names:
        _put(module, name, read(f"{prefix}.{name.replace('.base_layer', '')}"))
    return names


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, nn.Parameter(tensor, requires_grad=False))
