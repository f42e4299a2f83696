"""Checks that the merged model is the trained one: both read a few prompts, and their next-token distributions agree.

Each model runs a layer at a time, so that the check needs the memory of one layer. The trained model's base comes
through the loader of a run (common.model.layer_loader), which shares no code that reads weights with the merge.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from common.adapter.find import TrainedAdapter
from common.adapter.load import trained_tokenizer
from common.adapter.merge import MergedWeights, merge_into
from common.conversations.conversation import Conversation, Message
from common.machine.device import this_machine
from common.machine.slow_work import WorkDone, report_slow_work
from common.model.layer_loader import LayerLoader
from common.model.safetensors_files import SafetensorsFolder
from common.recipe import UserError
from common.tokens.chat_format import ChatFormat

# The check measures the mean KL divergence from the trained to the merged model, in nats per token. Both run in fp32:
# the only difference there may be is that the merged weights were rounded to 16 bits. Measured: rounding to bf16 gives
# 5e-7 in the model that ships, 2e-5 in 32 layers of random weights, and 4e-4 in SmolLM2-135M; an adapter that is
# missing, or was added twice, gives about 5e-3. A model above the bound is compared once more, with the trained weights
# rounded here.
KL_BOUND = 1e-5
# That comparison has the same rounded weights on both sides, apart from the order of sums before they were rounded.
ROUNDED_KL_BOUND = 1e-8
HEAD_ROWS = 1 << 14  # rows of the head that are multiplied at a time
MAX_CHECKED_TOKENS = 256  # tokens of a prompt; the rest is left out
CHECK_PROMPTS = (
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
    """How two models agree, over all positions of the prompts."""

    kl: float  # mean, nats per token
    same_next: int  # positions where both have the same most likely next token
    positions: int

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.1e} nats a token to the trained model, "
            f"the same next token at {self.same_next:,} of {self.positions:,} positions"
        )


def encode_check_prompts(adapter: TrainedAdapter, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Encodes the conversations that the models read: token ids of each.

    They are the run's sample prompts with the adapter's answers, which show what it was trained for; CHECK_PROMPTS
    where the run kept none.
    """
    pairs = [(sample["asked"], sample["after"]) for sample in adapter.run.get("samples", [])] or CHECK_PROMPTS
    if not tokenizer.chat_template:
        return [tokenizer(f"{asked} {answer}")["input_ids"] for asked, answer in pairs]
    chat_format = ChatFormat(tokenizer)
    return [
        chat_format.encode(Conversation((Message("user", asked), Message("assistant", answer)))).input_ids
        for asked, answer in pairs
    ]


def check_merged(adapter: TrainedAdapter, folder: Path, *, bound: float | None = KL_BOUND) -> str:
    """Compares the merged model in `folder` with the trained one on a few prompts. Returns how they agree, in words.

    bound: nats per token; None accepts any divergence. Raises UserError when the KL divergence is above it, and
    rounding to 16 bits does not explain that.
    """
    prompts = encode_check_prompts(adapter, trained_tokenizer(adapter))
    weights = MergedWeights(adapter)
    agreement = compare(weights, folder, prompts)
    if bound is None or agreement.kl <= bound:
        return str(agreement)
    print(f"  KL {agreement.kl:.1e}: comparing once more, with the trained weights rounded to 16 bits", flush=True)
    rounded = compare(weights, folder, prompts, rounded=True)
    if rounded.kl <= ROUNDED_KL_BOUND:
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
    """Runs the trained model, whose base and adapter stay apart, and the merged model in `folder`; both in fp32.

    rounded: instead of the trained model, runs one whose weights are base and adapter added up and rounded to 16 bits,
    which is what the merged files should hold. prompts: token ids.
    """
    merged = SafetensorsFolder(folder)

    def read_merged(name: str, rows: Any = None) -> Tensor:
        return merged.read(name, rows).to(weights.device).float()

    prompts = [prompt[:MAX_CHECKED_TOKENS] for prompt in prompts]
    machine = replace(this_machine(), device=weights.device, dtype=weights.dtype)
    base = LayerLoader(weights.adapter.recipe.model, weights.config, weights.folder, machine)
    trained = _plain_model(weights) if rounded else weights.skeleton.get_base_model()
    read_trained = partial(_round, weights, base) if rounded else base.read
    with report_slow_work("self-check", 2 * weights.config.num_hidden_layers, "layers") as work:
        trained_logits = _logits(trained, read_trained, prompts, work)
        merged_logits = _logits(_plain_model(weights), read_merged, prompts, work)
    kl, same = 0.0, 0
    for ours, theirs in zip(trained_logits, merged_logits, strict=True):
        p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
        kl += (p.exp() * (p - q)).sum().item()
        same += int(ours.argmax() == theirs.argmax())
    return Agreement(kl / len(trained_logits), same, len(trained_logits))


def _round(weights: MergedWeights, base: LayerLoader, name: str, rows: slice | list[int] | None = None) -> Tensor:
    """Computes what a tensor of the merged model should be: rounded to the files' dtype, then fp32.

    It uses LoRA's formula, W + scale * B A, not PEFT's merge that it is compared with; for DoRA, PEFT's merge too.
    rows: only these rows, of a tensor outside the layers.
    """
    module = weights.adapted(name)
    if module is None:
        tensor = base.read(name, rows) if base.is_4bit(name) else base.read_stored(name, rows)
    elif weights.adapter.config.use_dora:
        tensor = merge_into(module, base.read(name))
    else:
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        tensor = base.read(name) + module.scaling["default"] * (b @ a)
    return tensor.to(weights.dtype_of[name]).float()


def _plain_model(weights: MergedWeights) -> Any:
    """Builds the model without an adapter, on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(weights.config, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval()


def _logits(model: Any, read: Callable[..., Tensor], prompts: Sequence[Sequence[int]], work: WorkDone) -> Tensor:
    """Runs the prompts through a model, a layer at a time. Returns logits, fp32 (tokens of all prompts, vocabulary).

    model: on the meta device. read: gives a tensor by its name; with rows=... only these rows of it. work:
    counts the layers.
    """
    config, inner = model.config, model.model
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    tokens = sorted({token for prompt in prompts for token in prompt})
    rows = read(embedding, rows=tokens) * getattr(inner.embed_tokens, "scalar_embed_scale", 1.0)  # Gemma's
    row_of = {token: row for row, token in enumerate(tokens)}
    # What fills a prompt up comes after it, so no token of it sees that.
    rows_of_prompts = [torch.tensor([row_of[token] for token in prompt]) for prompt in prompts]
    states = rows[nn.utils.rnn.pad_sequence(rows_of_prompts, batch_first=True)]
    inner.rotary_emb = type(inner.rotary_emb)(config).to(states.device)
    _fill(inner.norm, "model.norm", read)
    with _filled_while_they_run(inner.layers, read, work):
        output = inner(inputs_embeds=states, use_cache=False).last_hidden_state
    hidden = torch.cat([states[: len(prompt)] for states, prompt in zip(output, prompts, strict=True)])
    name = embedding if config.tie_word_embeddings else head
    starts = range(0, config.vocab_size, HEAD_ROWS)
    return torch.cat([hidden @ read(name, rows=slice(start, start + HEAD_ROWS)).t() for start in starts], dim=1)


@contextmanager
def _filled_while_they_run(layers: nn.ModuleList, read: Callable[..., Tensor], work: WorkDone) -> Iterator[None]:
    """Gives each layer its tensors before it runs, and frees them after it."""
    filled: list[str] = []

    def fill(number: int, layer: nn.Module, _: Any) -> None:
        filled[:] = _fill(layer, f"model.layers.{number}", read)

    def free(layer: nn.Module, *_: Any) -> None:
        for name in filled:
            _put(layer, name, layer.get_parameter(name).to("meta"))
        work.done += 1

    hooks = [layer.register_forward_pre_hook(partial(fill, number)) for number, layer in enumerate(layers)]
    hooks += [layer.register_forward_hook(free) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _fill(module: nn.Module, prefix: str, read: Callable[..., Tensor]) -> list[str]:
    """Gives each parameter on the meta device its tensor. Returns the names of these parameters."""
    names = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    for name in names:
        _put(module, name, read(f"{prefix}.{name.replace('.base_layer', '')}"))
    return names


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, nn.Parameter(tensor, requires_grad=False))
