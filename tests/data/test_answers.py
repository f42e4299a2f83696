"""Better and worse answers as tokens: those of TRL's own trainers, and whole in every row."""

import json
from types import SimpleNamespace

import pytest
from datasets import Dataset
from trl import DPOTrainer, KTOTrainer

from common.conversations.row_reader import RowReader
from common.data.answers import join_answers, parts_to_encode, require_room
from common.data.packing import TooLong
from common.data.rows import load_rows
from common.sources.source_row import BadRow
from common.tokens.chat_format import ChatFormat, Tokens
from common.tokens.labels import IGNORED
from tests.sources.test_other_kind import data
from tests.tokens.test_chat_format import QWEN3, TEMPLATES, make_tokenizer, qwen


def turn(role: str, content: str, **more: str) -> dict[str, str]:
    return {"role": role, "content": content, **more}


PAIRS = [
    {"prompt": [turn("user", "Hello")], "chosen": [turn("assistant", "Hi!")], "rejected": [turn("assistant", "No")]},
    {
        "prompt": [turn("system", "Be brief."), turn("user", "1?"), turn("assistant", "2"), turn("user", "3?")],
        "chosen": [turn("assistant", "4")],
        "rejected": [turn("assistant", "four, I would think")],
    },
]


def tokens_of(row: dict, tokenizer, kind: str = "pairs") -> Tokens:
    example = RowReader(kind=kind).read(row)
    return join_answers(example, ChatFormat(tokenizer).encode_batch(list(parts_to_encode(example))))


def of_trl(trainer, rows: list[dict], tokenizer) -> list[dict]:
    """What a trainer of TRL makes of rows: its own method, with what it reads of itself."""
    own = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False, desirable_weight=1.0, undesirable_weight=1.0)
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    return list(trainer._prepare_dataset(own, Dataset.from_list(rows), tokenizer, arguments, "eval"))


@pytest.mark.parametrize("without_prompt", [False, True])
def test_a_pair_has_the_tokens_of_trls_trainer(tokenizer, without_prompt):
    rows = PAIRS
    if without_prompt:
        rows = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in PAIRS]
    for row, theirs in zip(rows, of_trl(DPOTrainer, rows, tokenizer), strict=True):
        ours = tokens_of(row, tokenizer)
        assert ours.signs == (1, -1)
        for part, answer in zip(ours.conversations(), (theirs["chosen_ids"], theirs["rejected_ids"]), strict=True):
            assert part.input_ids == theirs["prompt_ids"] + answer
            assert part.labels == [IGNORED] * len(theirs["prompt_ids"]) + answer
            assert part.prompt() == theirs["prompt_ids"]


def test_a_rated_answer_has_the_tokens_of_trls_trainer(tokenizer):
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in PAIRS
        for side in ("chosen", "rejected")
    ]
    for row, theirs in zip(rows, of_trl(KTOTrainer, rows, tokenizer), strict=True):
        ours = tokens_of(row, tokenizer, "rated")
        assert ours.signs == ((1,) if theirs["label"] else (-1,))
        assert ours.input_ids == theirs["prompt_ids"] + theirs["completion_ids"]
        assert ours.labels == [IGNORED] * len(theirs["prompt_ids"]) + theirs["completion_ids"]


def test_control_tokens_in_an_answer_are_plain_text(tokenizer):
    row = {"prompt": "Hello", "chosen": "Hi<|end|><|user|>", "rejected": "No"}
    chosen, rejected = tokens_of(row, tokenizer).conversations()
    assert chosen.input_ids.count(tokenizer.eos_token_id) == rejected.input_ids.count(tokenizer.eos_token_id)


def test_answers_that_the_template_asks_for_with_different_prompts_are_a_fault():
    prompt = [turn("user", "2 + 2?")]
    row = {
        "prompt": prompt,
        "chosen": [turn("assistant", "4", reasoning_content="Easy.")],
        "rejected": [turn("assistant", "5")],
    }
    with pytest.raises(BadRow, match="asks for its two answers with different prompts"):
        tokens_of(row, qwen(QWEN3))
    row["rejected"][0]["reasoning_content"] = "Hard."
    assert tokens_of(row, qwen(QWEN3)).signs == (1, -1)


def test_an_answer_that_cannot_be_trained_whole_is_a_fault():
    """Qwen3's own template drops the thoughts of all answers but the last one."""
    more = [turn("assistant", "4", reasoning_content="Easy."), turn("user", "3 + 3?"), turn("assistant", "6")]
    row = {"chosen": [turn("user", "2 + 2?"), *more], "rejected": [turn("user", "2 + 2?"), turn("assistant", "5")]}
    with pytest.raises(BadRow, match="an answer cannot be trained, and it counts whole"):
        tokens_of(row, qwen((TEMPLATES / "qwen3.jinja").read_text()))


def test_answers_that_the_template_writes_the_same_are_a_fault():
    template = (TEMPLATES / "llama3.jinja").read_text()  # strips the texts
    llama = make_tokenizer(
        template,
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    )
    with pytest.raises(BadRow, match="the same, as the chat template writes them"):
        tokens_of({"prompt": "a", "chosen": "b", "rejected": "b "}, llama)


def test_a_pair_longer_than_a_row_is_left_out_whole(tokenizer):
    pair = tokens_of(PAIRS[0], tokenizer)
    assert require_room(pair, len(pair.input_ids)) == [pair]
    with pytest.raises(TooLong, match="its two answers, each with the prompt, have more than 20 tokens"):
        require_room(pair, 20)


def test_pairs_that_do_not_fit_are_counted_and_no_answer_is_cut(tmp_path, tokenizer, capsys):
    rows = [{"prompt": f"Question {n}", "chosen": "word " * (60 if n == 7 else 5), "rejected": "No"} for n in range(30)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    loaded = load_rows(data(str(path), "dpo", eval_rows=0), tokenizer, 64)
    assert (loaded.reports[0].kept, loaded.reports[0].too_long.total, loaded.reports[0].truncated) == (29, 1, 0)
    assert "too long 1: its two answers, each with the prompt, have more than 64 tokens" in capsys.readouterr().out
    for row in loaded.train:
        assert row["signs"] == [1, -1] * (len(row["signs"]) // 2)
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) <= 64
        start = 0
        for length in row["seq_lengths"]:
            assert row["input_ids"][start + length - 1] == row["labels"][start + length - 1] == tokenizer.eos_token_id
            start += length
