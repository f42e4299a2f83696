import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.adapter.find import find_adapter
from common.adapter.load import load_trained, trained_tokenizer
from common.cli import run_command
from common.data.chat_format import ChatFormat
from common.data.conversations import Message
from common.data.rows import load_rows
from common.model.loading import load_4bit, load_tokenizer
from common.recipe import DataSpec, ModelSpec, UserError
from common.run.evaluation import (
    Question,
    answer,
    evaluate,
    exact_matches,
    held_out_samples,
    load_questions,
    print_before_after,
)
from common.run.training import train
from recipes.tiny import RECIPE
from tests.conftest import FP32, TINY
from tests.run.test_training import prepare

HELD_OUT = "data/tiny/held_out.jsonl"


@pytest.fixture(scope="module")
def model():
    return load_4bit(ModelSpec(str(TINY)), FP32)


def test_questions_are_the_last_turns(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "1+1?", "completion": "2"}\n{"prompt": "2+2?", "completion": "4"}\n')
    assert load_questions(str(path), limit=1) == [Question((Message("user", "1+1?"),), "2")]
    assert load_questions(None) == []
    path.write_text('{"text": "no questions here"}\n')
    with pytest.raises(UserError, match="holds no conversations to ask"):
        load_questions(str(path))


def test_answers_do_not_depend_on_the_batch_they_are_asked_in(model, tokenizer):
    questions = load_questions(HELD_OUT, limit=5)
    together = answer(model, tokenizer, questions, max_new_tokens=24)
    alone = [answer(model, tokenizer, [question], max_new_tokens=24)[0] for question in questions]
    assert together == alone
    assert all("<|end|>" not in text for text in together)


def test_answering_leaves_the_model_as_it_was(model):
    tokenizer = load_tokenizer(ModelSpec(str(TINY)))
    side = tokenizer.padding_side
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    answer(model, tokenizer, load_questions(HELD_OUT, limit=1), max_new_tokens=4)
    assert model.training and tokenizer.padding_side == side
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_exact_match_counts_to_the_letter(capsys):
    questions = [Question((Message("user", q),), a) for q, a in (("1+1?", "2"), ("2+2?", "4"))]
    assert exact_matches(questions, ["2", "4 "]) == 1
    print_before_after(questions, ["?", "?"], ["2", "5"])
    out = capsys.readouterr().out
    assert "held-out exact match: 0% before, 50% after (2 prompts)" in out
    assert "wanted  4" in out and "wanted  2" not in out


def test_held_out_samples_are_prompts_and_the_answers_of_the_data(tokenizer):
    rows = load_rows(DataSpec(HELD_OUT, eval_rows=0), tokenizer, 256).train
    samples = held_out_samples(rows, tokenizer, 30, seed=3)
    expected = {q.prompt[-1].content: q.expected for q in load_questions(HELD_OUT)}
    assert len({sample.asked for sample in samples}) == 30
    assert all(expected[sample.asked] == sample.wanted for sample in samples)
    chat_format = ChatFormat(tokenizer)
    assert samples[0].prompt_ids == chat_format.prompt_ids((Message("user", samples[0].asked),))
    assert held_out_samples(rows, tokenizer, 30, seed=3) == samples
    assert held_out_samples(rows, tokenizer, 0) == []


def test_a_sample_of_several_turns_asks_for_the_last(tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    turns = [("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
    path.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    rows = load_rows(DataSpec(str(path), eval_rows=0), tokenizer, 64).train
    (sample,) = held_out_samples(rows, tokenizer, 5)
    assert (sample.asked, sample.wanted) == ("Two?", "2")
    assert tokenizer.decode(sample.prompt_ids).startswith("<s><|user|>One?<|end|><|assistant|>1<|end|>")


def test_a_sample_of_plain_text_goes_on_from_its_first_quarter(tokenizer, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "The timer for the tea is set to five minutes, and then the tea is ready."}))
    rows = load_rows(DataSpec(str(path), eval_rows=0), tokenizer, 64).train
    (sample,) = held_out_samples(rows, tokenizer, 5)
    assert len(sample.prompt_ids) == len(rows[0]["input_ids"]) // 4
    assert sample.wanted.endswith("the tea is ready.")


@pytest.fixture(scope="module")
def adapter(finetuned):
    return find_adapter(replace(RECIPE, out=str(finetuned[1])))


def test_the_losses_are_those_of_the_run(adapter, tokenizer):
    """Before: step 0, where the adapter is the identity. After: the last step. Weighted by tokens, not by rows."""
    rows = load_rows(DataSpec(HELD_OUT, eval_rows=0), tokenizer, 256).train
    samples = held_out_samples(rows, tokenizer, 4)
    result = evaluate(load_trained(adapter), trained_tokenizer(adapter), rows, samples)
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
    assert "the run held no rows out; name a file" in capsys.readouterr().err
