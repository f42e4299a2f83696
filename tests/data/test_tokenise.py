"""Rows are tokenised over several processes into what one process makes of them."""

import json
import os
import random
import subprocess
import sys
from copy import copy
from pathlib import Path

import pytest

from common.data import tokenise
from common.data.tokenise import chunked, tokenise_source
from common.recipe import DataSpec, UserError
from common.tokens.chat_format import ChatFormat
from tests.conftest import ROOT, TRAIN
from tests.data.test_rows import conversation, write


@pytest.fixture
def many_processes(monkeypatch):
    """many_processes(count): so many take part, with chunks of 7 rows, after the first two chunks."""

    def use(count: int) -> None:
        monkeypatch.setattr(tokenise, "available_cpus", lambda: count)
        monkeypatch.setattr(tokenise, "CHUNK_ROWS", 7)
        monkeypatch.setattr(tokenise, "CHUNKS_HERE", 2)

    return use


def found_in(source: str, tokenizer, seq_len: int = 128):
    spec = DataSpec(source, max_bad_share=1, max_long_share=1)
    examples, report = tokenise_source(spec, source, "train", ChatFormat(tokenizer), seq_len)
    return [(e.input_ids, e.labels) for e in (examples[i] for i in range(len(examples)))], examples, report


def of_every_kind(folder: Path) -> str:
    lines = Path(TRAIN).read_text().splitlines()[:150]
    lines += [conversation(f"Copy {n % 3}") for n in range(10)]
    lines += ["{", conversation(assistant=""), conversation(assistant="word " * 300), '{"text": "another format"}'] * 9
    long = [{"role": role, "content": f"{role} says a few words"} for _ in range(12) for role in ("user", "assistant")]
    lines += [json.dumps({"messages": long, "id": n}) for n in range(8)]
    random.Random(0).shuffle(lines)
    return write(folder, *lines)


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_find_what_one_finds(tmp_path, tokenizer, many_processes, processes, capsys):
    source = of_every_kind(tmp_path)
    one, one_examples, one_report = found_in(source, tokenizer)
    said = capsys.readouterr().out
    many_processes(processes)
    several, examples, report = found_in(source, tokenizer)
    assert several == one
    assert examples.documents == one_examples.documents and examples.hashes == one_examples.hashes
    assert report == one_report
    assert capsys.readouterr().out == said
    assert (report.dropped, report.too_long.total, report.truncated, report.copies >= 7) == (27, 9, 8, True)


THREADED = """
import torch, torch.distributed
from common.data import tokenise
from common.data.tokenise import tokenise_source
from common.model.loading import TINY, load_tokenizer
from common.recipe import DataSpec, ModelSpec
from common.tokens.chat_format import ChatFormat
tokenise.available_cpus, tokenise.CHUNKS_HERE, tokenise.CHUNK_ROWS = lambda: 3, 2, 7
torch.set_num_threads(2)
torch.ones(512, 512) @ torch.ones(512, 512)
torch.distributed.init_process_group("gloo", init_method="file://SOURCE.group", rank=0, world_size=1)
tokenizer = load_tokenizer(ModelSpec(str(TINY)))
tokenizer(["some words"] * 100)
tokenise_source(DataSpec("SOURCE"), "SOURCE", "train", ChatFormat(tokenizer), 128)
"""


def test_the_threads_of_the_first_process_hold_up_no_other(tmp_path):
    """torch's, a process group's and those of tokenizers, which a forked process does not have."""
    source = write(tmp_path, *[conversation(f"{n}") for n in range(500)])
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", THREADED.replace("SOURCE", source)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "500 rows read" in done.stdout and not done.stderr


def test_the_format_is_decided_before_others_take_part(tmp_path, tokenizer, many_processes):
    """Otherwise each process would take the format of its own first row."""
    source = write(tmp_path, *["{"] * 40, conversation(), *['{"text": "some"}', conversation("Other")] * 30)
    many_processes(3)
    _, _, report = found_in(source, tokenizer)
    assert report.format_name == "messages"
    assert report.kept == 31


def test_a_small_source_starts_no_process(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenise, "map_in_order", lambda do, items, processes: pytest.fail() if list(items) else [])
    found_in(write(tmp_path, *[conversation(f"{n}") for n in range(2000)]), tokenizer)


def test_a_template_that_cannot_be_trained_with_is_refused_from_another_process(tmp_path, tokenizer, many_processes):
    tokenizer = copy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':' + m.content }}"
        "{% if m.role == 'assistant' and messages[0].content != 'bad' %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    source = write(tmp_path, *[conversation(f"{n}") for n in range(60)], conversation("bad"))
    many_processes(2)
    with pytest.raises(UserError, match="the chat template"):
        tokenise_source(DataSpec(source), source, "train", ChatFormat(tokenizer), 128)


def test_chunks_of_long_rows_have_fewer_rows():
    rows = [("place", {"messages": [{"role": "user", "content": "a" * 300_000}]})] * 10
    assert [len(chunk) for chunk in chunked(rows)] == [4, 4, 2]
    assert [len(chunk) for chunk in chunked([("place", {"text": "a"})] * 600)] == [256, 256, 88]
