import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from common.adapter.find import find_adapter
from common.adapter.load import load_trained, trained_tokenizer
from common.cli import run_command
from common.data.rows import load_rows
from common.recipe import DataSpec
from common.run.evaluation import compare_with_base, exact_matches, print_before_after
from common.run.prompts import Prompt, sample_prompts
from common.run.training import train
from recipes.tiny import RECIPE
from tests.run.test_training import prepare

HELD_OUT = "data/tiny/held_out.jsonl"


def test_exact_match_counts_to_the_letter(capsys):
    prompts = [Prompt([1], text, reference) for text, reference in (("1+1?", "2"), ("2+2?", "4"))]
    assert exact_matches(prompts, ["2", "4 "]) == 1
    print_before_after(prompts, ["?", "?"], ["2", "5"])
    out = capsys.readouterr().out
    assert "held-out exact match: 0% before, 50% after (2 prompts)" in out
    assert "wanted  4" in out and "wanted  2" not in out


@pytest.fixture(scope="module")
def adapter(finetuned):
    return find_adapter(replace(RECIPE, out=str(finetuned[1])))


def test_the_losses_are_those_of_the_run(adapter, tokenizer):
    """Before: step 0, where the adapter is the identity. After: the last step. Weighted by tokens, not by rows."""
    rows = load_rows(DataSpec(HELD_OUT, eval_rows=0), tokenizer, 256).train
    prompts = sample_prompts(rows, tokenizer, 4)
    result = compare_with_base(load_trained(adapter), trained_tokenizer(adapter), rows, prompts)
    metrics = adapter.run["metrics"]
    assert result["base"]["loss"] == pytest.approx(metrics["eval_loss_before"], rel=1e-4)
    assert result["adapter"]["loss"] == pytest.approx(metrics["eval_loss"], rel=1e-3)
    assert result["adapter"]["perplexity"] == pytest.approx(math.exp(result["adapter"]["loss"]))
    assert result["trained_tokens"] == sum(label != -100 for row in rows for label in row["labels"])
    assert sum(sample["after"] == sample["wanted"] for sample in result["samples"]) >= 3
    assert not any(sample["before"] == sample["wanted"] for sample in result["samples"])


def test_make_eval_shows_a_table_and_writes_json_and_the_report(finetuned, capsys):
    folder = finetuned[1]
    assert run_command("eval", "tiny", replace(RECIPE, out=str(folder)), ["--samples", "2"]) == 0
    out = capsys.readouterr().out
    assert "data/tiny/held_out.jsonl, 2,872 trained tokens" in out
    assert re.search(r"│ base +│ 5\.5\d+ +│ 249", out)
    assert "with the adapter" in out and out.count("├") >= 1
    told = json.loads((folder / "eval.json").read_text())
    assert told["source"] == HELD_OUT and len(told["samples"]) == 2
    assert "Evaluated with make eval" in (folder / "report.html").read_text()


def test_make_eval_takes_other_rows(finetuned, tmp_path, capsys):
    path, target = tmp_path / "other.jsonl", tmp_path / "other.json"
    path.write_text("".join(Path(HELD_OUT).read_text().splitlines(keepends=True)[:7]))
    flags = ["--data", str(path), "--samples", "0", "--json", str(target)]
    assert run_command("eval", "tiny", replace(RECIPE, out=str(finetuned[1])), flags) == 0
    told = json.loads(target.read_text())
    assert told["source"] == str(path) and told["samples"] == []
    assert told["trained_tokens"] < 300


def test_make_eval_of_rows_held_out_of_the_training_data(recipe, capsys):
    train(*prepare(recipe))
    assert run_command("eval", "x", recipe, []) == 0
    told = json.loads((Path(recipe.out) / "eval.json").read_text())
    assert told["source"] == f"held out of {recipe.data.source}"
    losses = json.loads((Path(recipe.out) / "run.json").read_text())["metrics"]
    assert told["adapter"]["loss"] == pytest.approx(losses["eval_loss"], rel=1e-4)


def test_nothing_held_out_is_one_line(adapted, capsys):
    recipe = adapted("llama")
    assert run_command("eval", "x", replace(recipe, data=replace(recipe.data, eval_rows=0)), []) == 2
    assert "has no held-out rows; name a file" in capsys.readouterr().err
