"""The rows of a large file are tokenised once, and again after a change of anything that they depend on."""

import dataclasses
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import AddedToken, normalizers

from common.data import cache as row_cache
from common.data import rows as data
from common.data.rows import load_rows
from common.model.loading import load_tokenizer
from common.recipe import DataSpec, ModelSpec
from common.run.resume import hash_rows
from common.sources.fingerprint import file_states
from tests.conftest import ROOT, TINY, TRAIN
from tests.sources.test_other_kind import data as data_of
from tests.test_structure import MODULES, imports


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(row_cache, "MIN_SOURCE_BYTES", 1)
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(Path(TRAIN).read_text().splitlines()[:100]) + "\n{broken\n")
    return str(path)


def load(spec: DataSpec, small_llama, seq_len=128, seed=0, template=None):
    tokenizer = load_tokenizer(ModelSpec(str(small_llama)))
    if template:
        tokenizer.chat_template = template(tokenizer.chat_template)
    return load_rows(spec, tokenizer, seq_len, seed)


def test_the_second_start_takes_the_same_rows_and_says_the_same(source, small_llama, capsys, monkeypatch):
    spec = DataSpec(source, eval_rows=5)
    first = load(spec, small_llama)
    *said, example = capsys.readouterr().out.splitlines()
    monkeypatch.setattr(data, "tokenise_source", lambda *_: pytest.fail("they are in the cache"))
    again = load(spec, small_llama)
    *lines, last, example_again = capsys.readouterr().out.splitlines()
    assert (lines, example_again) == (said, example)
    assert example.startswith("  for example: ")
    assert last.startswith("  taken from .cache/rows/") and last.endswith(
        ": nothing has changed since they were tokenised"
    )
    assert hash_rows(again.train) == hash_rows(first.train)
    assert hash_rows(again.evaluation) == hash_rows(first.evaluation)
    assert [r.lines() for r in again.reports] == [r.lines() for r in first.reports]
    assert again.reports[0].dropped == 1


def test_an_example_that_was_underlined_on_a_terminal_is_marked_in_a_file(source, small_llama, capsys, monkeypatch):
    with monkeypatch.context() as terminal:
        terminal.setattr("sys.stdout.isatty", lambda: True)
        load(DataSpec(source), small_llama)
    assert "\033[4m" in capsys.readouterr().out
    load(DataSpec(source), small_llama)
    out = capsys.readouterr().out
    assert "taken from" in out and "\033" not in out and "⟦" in out


def folder_of(spec: DataSpec, tokenizer) -> Path | None:
    return row_cache.cache_folder(spec, file_states(spec), tokenizer, 128, 0)


CHANGES = {
    "the file": lambda spec: Path(spec.source).write_text(Path(spec.source).read_text().replace("paint", "point")),
    "what is trained": lambda spec: replace(spec, train_on="everything"),
    "held-out rows": lambda spec: replace(spec, eval_rows=3),
    "the limit of bad rows": lambda spec: replace(spec, max_bad_share=0.5),
}


@pytest.mark.parametrize("change", [*CHANGES, "seq_len", "seed", "template", "code"])
def test_anything_that_changes_makes_them_anew(source, small_llama, change, capsys, monkeypatch, tmp_path):
    spec, values = DataSpec(source, eval_rows=5), {}
    load(spec, small_llama)
    if change in CHANGES:
        changed = CHANGES[change](spec)
        spec = changed if isinstance(changed, DataSpec) else spec
    elif change == "code":
        changed = shutil.copytree(row_cache.CODE[2], tmp_path / "code", ignore=shutil.ignore_patterns("__pycache__"))
        (changed / "labels.py").write_text((changed / "labels.py").read_text() + "# changed")
        monkeypatch.setattr(row_cache, "CODE", (*row_cache.CODE[:2], changed, *row_cache.CODE[3:]))
    else:
        values = {"seq_len": {"seq_len": 100}, "seed": {"seed": 1}, "template": {"template": lambda t: t + " "}}[change]
    capsys.readouterr()
    load(spec, small_llama, **values)
    assert "taken from" not in capsys.readouterr().out


def test_all_code_that_makes_rows_is_in_the_packages_whose_modules_are_hashed():
    needed, found = ["common.data.rows"], set()
    while needed:
        module = needed.pop()
        found.add(module)
        needed += [name for name in imports(MODULES[module]) - found if name.startswith("common.")]
    hashed = tuple(f"common.{folder.name}" for folder in row_cache.CODE)
    elsewhere = {name for name in found if not name.startswith((*hashed, "common.machine"))}
    assert elsewhere <= {
        "common",
        "common.lazy",
        "common.recipe",
        "common.recipe_fields",
        "common.rope_scaling",
        "common.process_state",
        "common.control_group",
        "common.output_stream",
    }


def test_pairs_are_kept_with_their_signs(source, small_llama, capsys):
    pairs = [{"prompt": f"Question {n}", "chosen": f"Yes {n}", "rejected": "No"} for n in range(40)]
    Path(source).write_text("\n".join(map(json.dumps, pairs)))
    first, again = (load(data_of(source, "dpo"), small_llama) for _ in range(2))
    assert "taken from .cache/rows/" in capsys.readouterr().out
    assert again.kind == "pairs" and again.train.column_names[-1] == "signs"
    assert (again.train.to_list(), again.evaluation.to_list()) == (first.train.to_list(), first.evaluation.to_list())
    assert [part.input_ids for part in again.example.conversations()] == [
        part.input_ids for part in first.example.conversations()
    ]


@pytest.mark.parametrize("named", ["{}", "{}/*.jsonl", "{0}/a.jsonl {0}/b.jsonl"])
def test_rows_of_several_files_are_kept_until_one_of_them_changes(named, source, small_llama, capsys, tmp_path):
    lines = Path(source).read_text().splitlines(keepends=True)
    (tmp_path / "shards").mkdir()
    for name, part in (("a", lines[:40]), ("b", lines[40:100])):
        (tmp_path / "shards" / f"{name}.jsonl").write_text("".join(part))
    spec = DataSpec(named.format(tmp_path / "shards"), eval_rows=5)
    load(spec, small_llama)
    first = capsys.readouterr().out.splitlines()
    load(spec, small_llama)
    *again, last, example = capsys.readouterr().out.splitlines()
    assert [*again, example] == first and "2 files, 100 rows read" in again[0] and "taken from" in last
    (tmp_path / "shards" / "b.jsonl").write_text("".join(lines[40:90]))
    load(spec, small_llama)
    assert "taken from" not in capsys.readouterr().out


def test_half_an_entry_is_made_anew(source, small_llama, capsys):
    spec = DataSpec(source, eval_rows=5)
    first = load(spec, small_llama)
    (entry,) = Path(".cache/rows").iterdir()
    (entry / row_cache.METADATA).write_text("{")
    capsys.readouterr()
    again = load(spec, small_llama)
    assert "taken from" not in capsys.readouterr().out
    assert hash_rows(again.train) == hash_rows(first.train)
    assert json.loads((entry / row_cache.METADATA).read_text())["lines"]


def test_the_newest_entries_stay(source, small_llama):
    for seed in range(row_cache.MAX_ENTRIES + 2):
        load(DataSpec(source, eval_rows=5), small_llama, seed=seed)
    assert len(list(Path(".cache/rows").iterdir())) == row_cache.MAX_ENTRIES


def test_small_files_and_data_sets_of_the_hub_are_not_kept(source, small_llama, monkeypatch):
    tokenizer = load_tokenizer(ModelSpec(str(small_llama)))
    assert folder_of(DataSpec("owner/chats"), tokenizer) is None
    monkeypatch.setattr(row_cache, "MIN_SOURCE_BYTES", 1 << 30)
    assert folder_of(DataSpec(source), tokenizer) is None


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(source, small_llama, capsys):
    Path(".cache").write_text("in the way")
    rows = load(DataSpec(source, eval_rows=5), small_llama)
    assert len(rows.train) > 0
    assert "warning: the rows are not kept for the next start: Not a directory" in capsys.readouterr().out


def test_every_setting_is_part_of_the_name(source, small_llama):
    """Fails for a new field of DataSpec that this test does not list."""
    tokenizer = load_tokenizer(ModelSpec(str(small_llama)))
    spec = DataSpec(source)
    others = {"split": "x", "eval_split": "x", "revision": "x", "config": "x", "eval_source": source, "eval_rows": 9}
    others |= {"train_on": "everything", "max_bad_share": 0.3, "max_long_share": 0.3, "columns": {"text": "x"}}
    others |= {"rendered": True, "long_texts": "drop"}
    fields = {field.name for field in dataclasses.fields(DataSpec)} - {"_", "drift_source"}  # of which no row is made
    assert others.keys() | {"source", "sources", "kind"} == fields
    names = {folder_of(replace(spec, **{name: value}), tokenizer) for name, value in others.items()}
    names |= {folder_of(data_of(source, loss), tokenizer) for loss in (None, "dpo", "kto")}  # each another kind
    assert len(names) == len(others) + 3


def test_everything_of_the_tokenizer_is_part_of_the_name(source, small_llama):
    """Its template, the date in it, its special tokens, its words, and how it splits text."""
    spec = ModelSpec(str(small_llama))
    assert load_tokenizer(spec).chat_template

    def changed(change):
        tokenizer = load_tokenizer(spec)
        change(tokenizer)
        return folder_of(DataSpec(source), tokenizer)

    changes = [
        lambda tokenizer: None,
        lambda tokenizer: setattr(tokenizer, "chat_template", tokenizer.chat_template + "{# #}"),
        lambda tokenizer: setattr(tokenizer, "eos_token", tokenizer.pad_token),
        lambda tokenizer: setattr(tokenizer, "bos_token", None),
        lambda tokenizer: tokenizer.add_tokens(["a_word"]),
        lambda tokenizer: tokenizer.add_tokens([AddedToken("a_word", special=True)]),
        lambda tokenizer: setattr(tokenizer.backend_tokenizer, "normalizer", normalizers.NFC()),
    ]
    names = [changed(change) for change in changes]
    assert None not in names and len(set(names)) == len(changes)
    assert changed(lambda tokenizer: None) == names[0]


def test_the_weights_of_a_mixture_are_part_of_the_name(source, small_llama, tmp_path):
    tokenizer = load_tokenizer(ModelSpec(str(small_llama)))
    other = str(shutil.copy(source, tmp_path / "other.jsonl"))
    mixtures = [((source, 1), (other, 1)), ((source, 1), (other, 2)), ((other, 1), (source, 1)), ((source, 1),)]
    names = [folder_of(DataSpec(sources=mixture), tokenizer) for mixture in mixtures]
    assert None not in names and len(set(names)) == len(mixtures)


def test_a_mixture_is_made_anew_when_any_of_its_files_changes(source, small_llama, tmp_path, capsys):
    other = Path(shutil.copy(source, tmp_path / "other.jsonl"))
    spec = DataSpec(sources=((source, 1), (str(other), 1)), eval_rows=5)
    first = load(spec, small_llama)
    capsys.readouterr()
    again = load(spec, small_llama)
    assert "taken from" in capsys.readouterr().out
    assert [report.record() for report in again.reports] == [report.record() for report in first.reports]
    other.write_text(other.read_text().replace("paint", "point"))
    load(spec, small_llama)
    assert "taken from" not in capsys.readouterr().out


LOAD = """
import sys, time
from pathlib import Path
from common.data.rows import load_rows
from common.model.loading import load_tokenizer
from common.recipe import DataSpec, ModelSpec
started = time.monotonic()
rows = load_rows(DataSpec(sys.argv[1]), load_tokenizer(ModelSpec(sys.argv[2])), 2048)
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20  # ru_maxrss is the parent's too
print(f"\\n{time.monotonic() - started:.1f} {peak:.2f} {rows.reports[0].kept}")
"""


@pytest.mark.slow
def test_a_million_conversations_take_minutes_and_4_GiB_and_the_second_time_seconds(tmp_path):
    dice, lines = random.Random(0), Path(TRAIN).read_text().splitlines()
    path = tmp_path / "million.jsonl"
    with path.open("w") as file:
        for number in range(1_000_000):
            row = json.loads(dice.choice(lines))
            row["messages"][0]["content"] += f" {number}"
            file.write(json.dumps(row) + "\n")
    for seconds, gib in ((600, 4.0), (20, 1.0)):
        command = [sys.executable, "-c", LOAD, str(path), str(TINY)]
        done = subprocess.run(
            command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
        )
        print(done.stdout.splitlines()[-1])
        took, peak, kept = map(float, done.stdout.splitlines()[-1].split())
        assert kept == 1_000_000
        assert took < seconds and peak < gib
