"""Makes the small model that ships with the repository, and its data set: tokenizer, pretraining, conversations.

    .venv/bin/python -m models.make_tiny --bf16     # writes models/tiny and data/tiny; 16 minutes on 2 CPU cores

All random numbers come from fixed seeds. The same machine and thread count give the same files; another machine gives a
model that differs in rounding and is as good.
"""

import argparse
import json
import math
import time
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from models.tiny_world import base_document, other_document, style_pair, tool_call_pair

ROOT = Path(__file__).parent.parent
BOS, PAD, END, USER, ASSISTANT, SYSTEM = "<s>", "<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
# Each message: role token, text, end token. The {% generation %} marks tell TRL which tokens are the assistant's.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- '<|assistant|>' -}}{%- generation -%}{{- message.content + '<|end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- '<|' + message.role + '|>' + message.content + '<|end|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
ROW_TOKENS = 256  # of one pretraining row
ROWS_PER_STEP = 16  # of pretraining
TRAIN_ROWS, HELD_OUT_ROWS, GENERAL_ROWS, TRAIN_PAIRS = 2000, 100, 100, 2000


def render(document: list[tuple[str, str]] | str) -> str:
    """The text that the model reads: of a conversation, as (user, assistant) pairs, or of a plain text."""
    if isinstance(document, str):
        return BOS + document + END
    return BOS + "".join(f"{USER}{user}{END}{ASSISTANT}{reply}{END}" for user, reply in document)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE with 1,024 tokens; each digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, BOS, END, USER, ASSISTANT, SYSTEM]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def make_rows(tokenizer: PreTrainedTokenizerFast, rng: Random, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lays documents end to end. Returns token ids and positions, both int64 (count, ROW_TOKENS).

    Positions begin at 0 in each document.
    """
    ids: list[int] = []
    positions: list[int] = []
    while len(ids) < count * ROW_TOKENS:
        document = tokenizer(render(base_document(rng)), add_special_tokens=False)["input_ids"]
        ids += document
        positions += range(len(document))
    shape = (count, ROW_TOKENS)
    return torch.tensor(ids[: count * ROW_TOKENS]).view(shape), torch.tensor(positions[: count * ROW_TOKENS]).view(
        shape
    )


def pretrain(tokenizer: PreTrainedTokenizerFast, steps: int, peak_lr: float, bf16: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters():,} parameters, {steps} steps of {ROWS_PER_STEP * ROW_TOKENS} tokens", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    warmup = 100

    def lr_factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps) + 0.01)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    rng, started = Random(1), time.perf_counter()
    for step in range(steps):
        ids, positions = make_rows(tokenizer, rng, ROWS_PER_STEP)
        labels = ids.masked_fill(positions == 0, -100)  # nothing before it predicts a document's start
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, position_ids=positions, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.3f} {time.perf_counter() - started:.0f} s", flush=True)
    return model


def write_conversations(folder: Path) -> None:
    """Writes train.jsonl and held_out.jsonl; no prompt is in both."""
    rng = Random(2)
    pairs: dict[str, str] = {}
    while len(pairs) < TRAIN_ROWS + HELD_OUT_ROWS:
        request, call = tool_call_pair(rng)
        pairs[request] = call
    lines = [as_row([pair]) for pair in pairs.items()]
    Random(3).shuffle(lines)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "held_out.jsonl").write_text("\n".join(lines[:HELD_OUT_ROWS]) + "\n")
    (folder / "train.jsonl").write_text("\n".join(lines[HELD_OUT_ROWS:]) + "\n")


def write_general(folder: Path) -> None:
    """Writes general.jsonl: what the model can do beside its task, on which a run measures drift."""
    rng = Random(4)
    (folder / "general.jsonl").write_text("".join(as_row(other_document(rng)) + "\n" for _ in range(GENERAL_ROWS)))


def write_preferences(folder: Path) -> None:
    """Writes preferences.jsonl and held_out_preferences.jsonl, better and worse answers; no prompt is in both."""
    rng = Random(8)
    pairs: dict[str, dict[str, str]] = {}
    while len(pairs) < TRAIN_PAIRS + HELD_OUT_ROWS:
        request, chosen, rejected = style_pair(rng)
        pairs[request] = {"prompt": request, "chosen": chosen, "rejected": rejected}
    lines = [json.dumps(pair) for pair in pairs.values()]
    Random(9).shuffle(lines)
    (folder / "held_out_preferences.jsonl").write_text("\n".join(lines[:HELD_OUT_ROWS]) + "\n")
    (folder / "preferences.jsonl").write_text("\n".join(lines[HELD_OUT_ROWS:]) + "\n")


def as_row(document: list[tuple[str, str]] | str) -> str:
    """The line of a .jsonl file that holds a document."""
    if isinstance(document, str):
        return json.dumps({"text": document})
    turns = [({"role": "user", "content": q}, {"role": "assistant", "content": a}) for q, a in document]
    return json.dumps({"messages": [message for turn in turns for message in turn]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--bf16", action="store_true", help="autocast: 1.5 times as fast on a CPU with AVX512-BF16")
    parser.add_argument("--model-out", type=Path, default=ROOT / "models" / "tiny")
    parser.add_argument("--data-out", type=Path, default=ROOT / "data" / "tiny")
    args = parser.parse_args()
    write_conversations(args.data_out)
    write_general(args.data_out)
    write_preferences(args.data_out)
    rng = Random(0)
    tokenizer = make_tokenizer([render(base_document(rng)) for _ in range(20_000)])
    model = pretrain(tokenizer, args.steps, args.lr, args.bf16).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(args.model_out)
    tokenizer.save_pretrained(args.model_out)


if __name__ == "__main__":
    main()
