"""Runs side by side: what is shown of them, and what is said not to compare."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from common.commands.compare import run_compare
from common.run.compare import RUN_COLOURS, as_text, compare_runs, held_out_digest
from tests.machine.test_lock import held_by_another
from tests.run.test_report import LOOK, Links, browse, needs_chromium, words


@pytest.fixture
def run_of(finetuned, tmp_path):
    """run_of(name, recipe=..., **entries): a copy of the small model's run, with other values in run.json."""

    def make(name: str, recipe: dict[str, dict[str, Any]] | None = None, **entries: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(finetuned[1], folder, ignore=shutil.ignore_patterns("checkpoints", "eval.json"))
        run = json.loads((folder / "run.json").read_text()) | entries
        for part, values in (recipe or {}).items():
            run["recipe"][part] |= values
        (folder / "run.json").write_text(json.dumps(run))
        return folder

    return make


def rewrite_held_out(folder: Path, change) -> None:
    path = folder / "held_out.parquet"
    rows = change(pyarrow.parquet.read_table(path).to_pylist())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_what_differs_is_shown_and_nothing_else(run_of, capsys):
    a, b = run_of("a"), run_of("b", {"lora": {"rank": 64}, "train": {"learning_rate": 1e-4}})
    assert run_compare(["--runs", f"{a} {b}"]) == 0
    shown = capsys.readouterr().out
    assert re.search(
        r"^ +a +b\n +lora\.rank +16 +64\n +train\.learning_rate +0\.004 +0\.0001\n\nwhat came", shown, re.M
    )
    assert re.search(r"held-out loss before +5\.5\d\d\d +5\.5\d\d\d\n +held-out loss +0\.0\d\d\d ", shown)
    assert re.search(r"optimizer steps +194 +194\n", shown) and "drift: KL, nats a token" in shown
    assert re.search(r"tokens/s .*\n +peak of RAM, GiB .*\n +trained parameters .*\n\n +asked ", shown)  # no note
    assert shown.count("asked ") == 4 and "in the data" in shown
    assert f"side by side on a page: {a.parent / 'compare.html'}\n" in shown


def test_runs_of_the_same_recipe_differ_in_nothing(run_of):
    old = run_of("old")
    run = json.loads((old / "run.json").read_text())
    del run["recipe"]["train"]["keep"], run["recipe"]["lora"]["dora"]  # an earlier version had no such fields
    (old / "run.json").write_text(json.dumps(run))
    text = as_text(compare_runs([run_of("new"), old]), 100)
    assert text.startswith("what differs in the recipes\n  nothing\n")


def test_losses_over_other_held_out_rows_are_said_not_to_compare(run_of):
    a, b = run_of("a"), run_of("b")
    rewrite_held_out(b, lambda rows: rows[1:])
    (note,) = compare_runs([a, b]).notes
    assert note.startswith("Held-out losses are over other rows or other tokens, so they do not compare")
    (b / "held_out.parquet").unlink()
    assert compare_runs([a, b]).notes == ["Held-out losses: b held no rows out."]


def test_the_same_examples_in_other_rows_are_the_same(run_of):
    a, b = run_of("a"), run_of("b")

    def repack(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        names = ("input_ids", "labels", "seq_lengths")
        return [{name: rows[1][name] + rows[0][name] for name in names}, *({n: r[n] for n in names} for r in rows[2:])]

    rewrite_held_out(b, repack)
    assert held_out_digest(a) == held_out_digest(b)
    rewrite_held_out(b, lambda rows: [{**rows[0], "labels": [-100] * len(rows[0]["labels"])}, *rows[1:]])
    assert held_out_digest(a) != held_out_digest(b)


def test_other_machines_data_bases_and_versions_are_said(run_of):
    a, b = run_of("a"), run_of("b", {"model": {"name": "other/model"}}, machine="NVIDIA X, computing in bfloat16")
    run = json.loads((b / "run.json").read_text())
    run["data"][0]["sha256"], run["versions"]["torch"] = "0" * 64, "9.9"
    gib = 1 << 30
    run["metrics"] |= {"allocated_bytes": 18 * gib}
    (b / "run.json").write_text(json.dumps(run))
    text = as_text(compare_runs([a, b]), 100)
    assert "Training losses are over other data or tokens" in text
    assert "Drift does not compare: it is of other texts or another base." in text
    assert "different machines. a: CPU" in text and "b: NVIDIA X, computing in bfloat16." in text
    assert "Versions differ: torch." in text
    assert re.search(r"peak of the GPU, GiB +- +18\.00\n +peak of RAM, GiB +[\d.]+ +-\n", text)


def test_answers_are_shown_to_prompts_that_all_were_asked(run_of):
    def sample(asked: str, **said: str) -> dict[str, str]:
        return {"asked": asked, "wanted": "w", "before": "the base's", "after": "an answer"} | said

    a = run_of("a", samples=[sample("one"), sample("two")])
    b = run_of("b", samples=[sample("two", after="another", after_cut="after 60 s"), sample("three")])
    (answer,) = compare_runs([a, b]).answers
    after = ["an answer", "another … (cut after 60 s)"]
    assert answer == {"asked": "two", "wanted": "w", "before": "the base's", "after": after}
    c = run_of("c", samples=[sample("two", before="of another base")])
    (answer,) = compare_runs([a, c]).answers
    assert answer["before"] is None
    assert "no prompt was answered by all of them" in as_text(compare_runs([a, run_of("d", samples=[])]), 100)


def test_an_evaluation_takes_the_place_of_the_runs_own_answers(run_of):
    a, b = run_of("a"), run_of("b")
    told = {"source": "rows.jsonl", "trained_tokens": 12, "base": {"loss": 2.0}, "adapter": {"loss": 1.25}}
    told["samples"] = [{"asked": "A?", "wanted": "B.", "before": "C.", "after": "D."}]
    for folder in (a, b):
        (folder / "eval.json").write_text(json.dumps(told))
    comparison = compare_runs([a, b])
    assert ("loss by make eval", ["1.2500", "1.2500"]) in comparison.results
    assert "A?" in [answer["asked"] for answer in comparison.answers]
    (b / "eval.json").write_text(json.dumps(told | {"source": "others.jsonl"}))
    assert "Losses by make eval are of other rows, so they do not compare." in compare_runs([a, b]).notes


@pytest.mark.parametrize("width", [60, 100])
def test_many_runs_fit_the_terminal(run_of, width):
    runs = [run_of(f"rate-{number}", {"train": {"learning_rate": number * 1e-4}}) for number in range(1, 7)]
    text = as_text(compare_runs(runs), width).partition("\n\n  asked")[0]
    assert max(map(len, text.splitlines())) <= width
    assert all(text.count(f"rate-{number}") == 2 for number in range(1, 7))


def test_runs_of_one_name_are_told_apart_by_their_folders(run_of):
    runs = [run_of("first/tiny"), run_of("second/tiny")]
    assert [run.name for run in compare_runs(runs).runs] == ["first/tiny", "second/tiny"]


def test_a_pattern_finds_the_runs_of_a_folder(run_of, tmp_path, capsys):
    for name in ("sweep/a", "sweep/b c"):
        run_of(name)
    (tmp_path / "sweep" / "notes").mkdir()
    assert run_compare(["--runs", f"{tmp_path}/sweep/*"]) == 0
    assert re.search(r"^ +a +b c$", capsys.readouterr().out, re.M)
    assert (tmp_path / "sweep" / "compare.html").exists()


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("", 'RUNS names 0 of the runs; two are compared at least: RUNS="outputs/a outputs/b"'),
        ("{0}/a", "RUNS names 1 of the runs"),
        ("{0}/a {0}/a/", "RUNS has one run twice: {0}/a and {0}/a"),
        ("{0}/a {0}/none", "{0}/none has no run.json: there is no run there, or it has not ended"),
        ("{0}/z*", "RUNS has {0}/z*, which finds no folder of a run that has ended"),
        ("'{0}/a", "which has a quotation mark without its end"),
        ("{0}/a {0}/damaged", "{0}/damaged/run.json is damaged"),
        ("{0}/a {0}/other", "run.json of a, other: one is of another version, or damaged: KeyError("),
    ],
)
def test_what_cannot_be_compared_at_all_is_one_line(run_of, tmp_path, capsys, typed, message):
    run_of("a")
    for name, text in (("damaged", "{"), ("other", '{"recipe": {}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    assert run_compare(["--runs", typed.format(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and message.format(tmp_path) in said.err and len(said.err.strip().splitlines()) == 1


def test_a_run_under_way_and_a_page_in_a_run_are_refused(run_of, capsys):
    a, b = run_of("a"), run_of("b")
    with held_by_another(b / ".lock", "alone"):
        assert run_compare(["--runs", f"{a} {b}"]) == 2
    assert f"a run is under way in {b}" in capsys.readouterr().err
    assert run_compare(["--runs", f"{a} {b}", "--to", f"{b}/page.html"]) == 2
    assert f"{b}/page.html lies in the folder of a run" in capsys.readouterr().err


@pytest.fixture
def page(run_of, tmp_path) -> Path:
    evil = "<script>alert(1)</script><img src=x>"
    sample = {"asked": evil, "wanted": "x" * 400, "before": "b", "after": evil}
    runs = [run_of(f"run-{n}", {"train": {"learning_rate": n * 1e-4}}, samples=[sample]) for n in range(1, 4)]
    assert run_compare(["--runs", " ".join(map(str, runs)), "--to", f"{tmp_path}/page.html"]) == 0
    return tmp_path / "page.html"


def test_the_page_shows_the_runs_and_fetches_nothing(page):
    html = page.read_text()
    links = Links()
    links.feed(html)
    assert links.found == [] and "url(" not in html and "http" not in html
    text = words(html)
    assert "3 runs side by side" in text and "train.learning_rate 0.0001 0.0002 0.0003" in text
    assert "<script" not in html and "&lt;script&gt;" in html
    assert len(re.findall(r'<polyline class="run[012]"', html)) == 6 and "optimizer step</text>" in html


@needs_chromium
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_is_no_wider_than_the_screen(page, width):
    (page.parent / "look.html").write_text(LOOK.format(url="page.html", width=width))
    dom = browse(f"file://{page.parent}/look.html", "--allow-file-access-from-files", "--dump-dom", folder=page.parent)
    assert f"<title>w{width} s6</title>" in dom


def test_steps_of_other_sizes_are_drawn_over_tokens(run_of, tmp_path):
    runs = [run_of("a"), run_of("b", {"train": {"rows_per_step": 8}})]
    assert run_compare(["--runs", " ".join(map(str, runs))]) == 0
    html = (tmp_path / "compare.html").read_text()
    assert html.count("tokens</text>") == 2 and "optimizer step</text>" not in html


def test_every_curve_has_a_colour_of_the_page(run_of, tmp_path):
    runs = [run_of(f"r{number}") for number in range(RUN_COLOURS + 1)]
    assert run_compare(["--runs", " ".join(map(str, runs))]) == 0
    html = (tmp_path / "compare.html").read_text()
    used = set(re.findall(r'<polyline class="(run\d)', html))
    assert used == set(re.findall(r"\.(run\d) \{", html)) and 'class="run0 dashed"' in html
