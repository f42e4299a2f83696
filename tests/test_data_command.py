"""`make data`: what the run would say, examples, and all of it in JSON; without a model, also where it is refused."""

import importlib
import json
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from common.cli import run_command
from common.data.rows import load_rows
from common.model.loading import TINY, load_tokenizer
from common.recipe import DataSpec, ModelSpec, PreferenceSpec, Recipe
from tests.conftest import ROOT
from tests.data.test_rows import conversation, write
from tests.test_cli import recipes, refused


@pytest.fixture
def weightless(tmp_path) -> Recipe:
    """The small recipe, of a model folder that has no weights, with a source of its own."""
    shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    source = write(tmp_path, *[conversation(f"Question number {n}", f"Answer {n}") for n in range(40)])
    recipe = importlib.import_module("recipes.tiny").RECIPE
    train = replace(recipe.train, seq_len=128)
    return replace(recipe, model=ModelSpec(str(tmp_path / "model")), data=DataSpec(source), train=train)


def look(recipe: Recipe, *flags: str) -> int:
    return run_command("data", "tiny", recipe, flags)


def values(recipe: Recipe, folder: Path, *flags: str) -> dict:
    look(recipe, "--json", str(folder / "data.json"), *flags)
    return json.loads((folder / "data.json").read_text())


def test_it_says_what_the_run_says(weightless, capsys):
    load_rows(weightless.data, load_tokenizer(weightless.model), 128, weightless.train.seed)
    said, _, example = capsys.readouterr().out.partition("  for example: ")
    assert example  # here three others stand below
    assert look(weightless) == 0
    assert said in capsys.readouterr().out and "40 rows read (messages), 40 kept, 0 dropped" in said


def test_no_model_is_loaded_and_nothing_is_asked_of_the_network(weightless, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a model is loaded, or the network is asked")

    monkeypatch.setattr(transformers.PreTrainedModel, "__init__", never)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", never)
    monkeypatch.setattr(socket.socket, "connect", never)
    assert look(weightless) == 0


def test_it_shows_three_examples_with_the_trained_part_marked(weightless, capsys):
    look(weightless)
    out = capsys.readouterr().out.split("\n\nexample ")[1:]
    assert len(out) == 3
    for number, text in enumerate(out, 1):
        head, prompt, answer, *_ = text.splitlines()
        place = head.removeprefix(f"{number}, {weightless.data.source}:").partition(":")[0]
        n = int(place) - 1
        assert prompt == f"    <s><|user|>Question number {n}<|end|><|assistant|>"
        assert answer == f"  ↳ ⟦Answer {n}<|end|>⟧"


def test_so_many_examples_as_are_asked_for(weightless, capsys):
    for count in (0, 1, 7):
        look(weightless, "--examples", str(count))
        assert capsys.readouterr().out.count("\nexample ") == count


def test_it_tells_lengths_and_steps(weightless, capsys):
    look(weightless)
    out = capsys.readouterr().out
    assert "\nlengths in tokens, of all examples: 50% up to " in out
    assert "\noptimizer steps: " in out and ", 4 a step); the run takes " in out


def test_another_length_of_rows_is_tried_without_an_edit(weightless, tmp_path, capsys):
    assert values(weightless, tmp_path, "--seq-len", "64")["packing"]["seq_len"] == 64
    assert " rows of 64 tokens" in capsys.readouterr().out
    assert look(weightless, "--seq-len", "99999") == 2
    assert "TrainSpec.seq_len is 99,999" in capsys.readouterr().err


def test_few_steps_are_warned_of_as_the_run_does(weightless, capsys):
    look(replace(weightless, train=replace(weightless.train, rows_per_step=999)))
    assert "warning: the run takes 2 optimizer steps, and below 100 a model learns little" in capsys.readouterr().out


def test_the_number_that_auto_would_choose_is_shown(weightless, tmp_path, capsys):
    weightless = replace(weightless, train=replace(weightless.train, rows_per_step="auto"))
    assert values(weightless, tmp_path)["packing"]["rows_per_step"] == 1
    assert 'chosen by rows_per_step="auto"' in capsys.readouterr().out


def test_an_adapter_that_is_too_small_is_pointed_out_before_any_run(weightless, capsys):
    look(weightless)
    assert "LoraSpec(rank=" not in capsys.readouterr().out
    source = write(Path(weightless.data.source).parent, *[conversation(f"{n}", f"Number {n}" * 9) for n in range(400)])
    small = replace(weightless.lora, rank=1, target_modules=("k_proj",))
    look(replace(weightless, lora=small, data=DataSpec(source)))
    assert "million different tokens, and an adapter of" in capsys.readouterr().out


def test_other_data_takes_the_place_of_the_recipes_own_and_of_its_held_out_rows(weightless, tmp_path):
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other", *[conversation(f"Other {n}") for n in range(20)])
    recipe = replace(weightless, data=replace(weightless.data, eval_source=weightless.data.source, revision="x"))
    told = values(recipe, tmp_path, "--data", other)
    assert [report["source"] for report in told["reports"]] == [other]
    assert (told["data"]["eval_source"], told["data"]["revision"]) == (None, None)
    assert [report["source"] for report in values(recipe, tmp_path)["reports"]] == [weightless.data.source] * 2


def test_the_json_has_all_of_it(weightless, tmp_path):
    lines = Path(weightless.data.source).read_text().splitlines()
    lines[6] = "{"
    write(tmp_path, *lines)
    told = values(replace(weightless, data=replace(weightless.data, max_bad_share=0.1, eval_rows=5)), tmp_path)
    report = told["reports"][0]
    assert (report["read"], report["kept"], report["dropped"]) == (40, 39, 1)
    places = {"invalid JSON": [f"{weightless.data.source}:7"]}
    assert report["faults"] == {"counts": {"invalid JSON": 1}, "places": places}
    assert told["refused"] is None and told["seq_len"] == 128
    assert told["packing"]["examples"] + told["packing"]["held_out_examples"] == 39
    assert sum(bar["examples"] for bar in told["lengths"]["histogram"]) == 39
    assert len(told["examples"]) == 3
    for example in told["examples"]:
        assert "".join(piece["text"] for piece in example["pieces"]) == example["text"]
        assert [piece["trained"] for piece in example["pieces"]] == [False, True]
        assert 0 < example["trained_tokens"] < example["tokens"]
        assert example["place"].startswith(f"{weightless.data.source}:")


def test_the_numbers_are_those_of_the_rows_that_the_run_trains_on(weightless, tmp_path):
    rows = load_rows(weightless.data, load_tokenizer(weightless.model), 128, weightless.train.seed)
    packing = values(weightless, tmp_path)["packing"]
    assert (packing["rows"], packing["tokens"]) == (len(rows.train), rows.train_tokens)
    assert packing["trained_tokens"] == sum(label != -100 for labels in rows.train["labels"] for label in labels)


def test_data_that_the_run_refuses_is_shown_all_the_same(weightless, tmp_path, capsys):
    lines = Path(weightless.data.source).read_text().splitlines()
    lines[3] = lines[8] = "{"
    write(tmp_path, *lines)
    file = tmp_path / "data.json"
    assert look(weightless, "--json", str(file)) == 2
    out, err = capsys.readouterr()
    assert f"dropped 2: invalid JSON ({weightless.data.source}:4; {weightless.data.source}:9)" in out
    assert out.count("\nexample ") == 3 and "⟦Answer " in out
    assert err.startswith("\nerror: 2 of 40 rows of ")
    told = json.loads(file.read_text())
    assert told["refused"] in err and told["reports"][0]["faults"]["counts"] == {"invalid JSON": 2}
    assert len(told["examples"]) == 3 and told["packing"] is None and told["lengths"] is None


@pytest.mark.parametrize("lines", [["{"] * 5, ['{"a": 1}'] * 5, [""]], ids=["no JSON", "other keys", "no rows"])
def test_data_of_which_nothing_can_be_used_has_its_faults_in_the_json(weightless, tmp_path, capsys, lines):
    write(tmp_path, *lines)
    told = values(weightless, tmp_path)
    assert told["examples"] == [] and told["refused"]
    assert sum(told["reports"][0]["faults"]["counts"].values()) == (5 if lines[0] else 0)


def test_rows_that_are_too_long_are_shown_with_the_lengths_that_would_do(weightless, tmp_path, capsys):
    lines = Path(weightless.data.source).read_text().splitlines()
    lines[:8] = [conversation("word " * 300)] * 8
    write(tmp_path, *lines)
    told = values(weightless, tmp_path)
    out, err = capsys.readouterr()
    assert "8 too long" in out and "whole at TrainSpec.seq_len = 128: 32 of 40 rows" in out
    assert "8 of 40 rows of " in err and told["refused"] in err
    assert sum(told["reports"][0]["too_long"]["counts"].values()) == 8 and len(told["examples"]) == 3
    assert look(weightless, "--seq-len", "1024") == 0


def test_a_mixture_is_shown(weightless, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other", *[conversation(f"Other {n}") for n in range(40)])
    sources = ((weightless.data.source, 3.0), (other, 1.0))
    told = values(replace(weightless, data=DataSpec(sources=sources)), tmp_path)
    assert [report["mixed"] for report in told["reports"]] == [40, 13]
    assert sum(report["mixed_share"] for report in told["reports"]) == pytest.approx(1)
    assert "  mixed by weight: 40 of 40 rows of " in capsys.readouterr().out


def test_a_held_out_source_that_the_run_refuses_is_named(weightless, tmp_path, capsys):
    (tmp_path / "held").mkdir()
    held = write(tmp_path / "held", "{")
    told = values(replace(weightless, data=replace(weightless.data, eval_source=held)), tmp_path)
    assert held in told["refused"] and [report["source"] for report in told["reports"]] == [held]
    assert len(told["examples"]) == 3


@pytest.mark.parametrize("source", ["nowhere.jsonl", "preferences"])
def test_data_that_is_refused_as_a_whole_has_its_reason_in_the_json(weightless, tmp_path, capsys, source):
    if source == "preferences":
        source = write(tmp_path, *['{"prompt": "a", "completion": "b", "label": true}'] * 3)
    told = values(weightless, tmp_path, "--data", source)
    assert told["refused"] in capsys.readouterr().err
    assert (told["reports"], told["examples"], told["packing"], told["lengths"]) == ([], [], None, None)


def test_pairs_are_shown_with_both_answers_and_counted_as_one(weightless, tmp_path, capsys):
    pairs = [{"prompt": f"Question {n}", "chosen": f"Yes {n}", "rejected": f"No, no {n}"} for n in range(40)]
    source = write(tmp_path, *map(json.dumps, pairs))
    told = values(replace(weightless, preference=PreferenceSpec(), data=DataSpec(source)), tmp_path)
    assert (told["packing"]["examples"], told["packing"]["held_out_examples"]) == (36, 4)
    assert told["answers"]["better"] == told["answers"]["worse"] == 36
    assert told["lengths"]["longest"] == told["reports"][0]["longest"]  # of both answers, each with the prompt
    example = told["examples"][0]
    assert [answer["is"] for answer in example["answers"]] == ["chosen", "rejected"]
    assert "".join(answer["text"] for answer in example["answers"]) == example["text"]
    out = capsys.readouterr().out
    assert "\n  chosen:\n    <s><|user|>Question " in out and "\n  rejected:\n    <s><|user|>Question " in out


@pytest.mark.parametrize("preference", [None, PreferenceSpec(), PreferenceSpec("kto")])
def test_data_of_another_kind_is_refused_before_there_are_weights(weightless, tmp_path, capsys, preference):
    row = {"prompt": "a", "completion": "b"} if preference else {"prompt": "a", "chosen": "b", "rejected": "c"}
    source = write(tmp_path, *[json.dumps(row)] * 3)
    assert look(replace(weightless, preference=preference), "--data", source) == 2
    assert "PreferenceSpec(" in capsys.readouterr().err
    assert not list(Path(weightless.model.name).glob("*.safetensors"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nowhere.jsonl"], "error: there is no data file nowhere.jsonl"),
        (["--data", str(ROOT)], f"error: the folder {ROOT} has .txt files beside others ("),
        (["--json", "/dev/null/data.json"], "error: /dev/null/data.json cannot be written: "),
        (["--seq-len", "0"], "error: TrainSpec.seq_len is 0; it must be above 0"),
    ],
)
def test_what_is_typed_wrongly_is_one_line(weightless, capsys, flags, message):
    assert look(weightless, *flags) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith(message) and "\n" not in err


def test_the_json_goes_where_it_was_named(weightless, tmp_path, capsys):
    assert look(weightless, "--json", str(tmp_path / "a new folder" / "data.json")) == 0
    assert json.loads((tmp_path / "a new folder" / "data.json").read_text())["refused"] is None
    recipe = replace(weightless, out=str(tmp_path / "run"))
    assert look(recipe, "--json", str(tmp_path / "run" / "data.json")) == 2
    assert "lies in the folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["tokenizer.json", "config.json"])
def test_a_model_without_a_tokenizer_is_one_line(weightless, capsys, missing):
    (Path(weightless.model.name) / missing).unlink()
    for name in ("tokenizer.model", "vocab.json"):
        assert not (Path(weightless.model.name) / name).exists()
    assert look(weightless) == 2
    assert capsys.readouterr().err.strip().count("\n") == 0


def test_as_it_is_typed_it_prints_what_the_page_shows():
    done = recipes("data", "tiny")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```\n(example 1, .*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert f"\n{shown}" in done.stdout
    assert "the run takes 194\n" in done.stdout  # the README's run ends with step 194


def test_an_unknown_model_is_refused_and_names_those_that_exist():
    assert refused(recipes("data", "nope")).startswith(
        "error: there is no recipe 'nope'; there are: llama3-1-8b, llama3-70b"
    )
