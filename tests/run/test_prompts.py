import json

import pytest

from common.conversations.conversation import Conversation, Message
from common.data.rows import load_rows
from common.recipe import DataSpec, UserError
from common.run.prompts import Prompt, load_prompts, sample_prompts
from common.tokens.chat_format import ChatFormat
from tests.sources.test_other_kind import data
from tests.tokens.test_chat_format import QWEN3, TEMPLATES, qwen

HELD_OUT = "data/tiny/held_out.jsonl"


def test_the_last_turn_of_a_conversation_is_the_reference(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "1+1?", "completion": "2"}\n{"prompt": "2+2?", "completion": "4"}\n')
    ids = ChatFormat(tokenizer).prompt_ids(Conversation((Message("user", "1+1?"),)))
    assert load_prompts(str(path), tokenizer, limit=1) == [Prompt(ids, "1+1?", "2")]
    assert load_prompts(None, tokenizer) == []
    path.write_text('{"text": "no questions here"}\n')
    with pytest.raises(UserError, match="holds no conversations to ask"):
        load_prompts(str(path), tokenizer)


@pytest.mark.parametrize(
    ("turns", "text", "reference"),
    [
        ([("user", "One?"), ("assistant", "1"), ("user", "Bye")], "One?", "1"),
        ([("assistant", "Ask!"), ("user", "One?"), ("assistant", "1")], "One?", "1"),
        ([("user", "One?"), ("assistant", "1"), ("assistant", "!")], "1", "!"),
        ([("system", "Greet."), ("assistant", "Hello")], "Greet.", "Hello"),
    ],
)
def test_the_last_answer_is_the_reference_wherever_it_stands(turns, text, reference, tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": role, "content": said} for role, said in turns]}))
    (prompt,) = load_prompts(str(path), tokenizer)
    assert (prompt.text, prompt.reference) == (text, reference)


@pytest.mark.parametrize(
    "last",
    [
        {"role": "assistant", "content": "2", "weight": 0},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "count", "arguments": {}}]},
    ],
    ids=["not to be learnt", "a call"],
)
def test_an_answer_without_a_text_to_learn_is_no_reference(last, tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}]
    path.write_text(json.dumps({"messages": [*turns, {"role": "user", "content": "Two?"}, last]}))
    (prompt,) = load_prompts(str(path), tokenizer)
    assert (prompt.text, prompt.reference) == ("One?", "1")


@pytest.mark.parametrize("template", ["qwen3", "qwen3_5_think", "nemotron_3_nano", None])
@pytest.mark.parametrize("thoughts", ["", "easy"])
def test_a_file_is_asked_and_answered_as_it_would_be_trained(template, thoughts, tmp_path):
    path, qwen3 = tmp_path / "a.jsonl", QWEN3 if template is None else (TEMPLATES / f"{template}.jinja").read_text()
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2", "thinking": thoughts}]
    path.write_text(json.dumps({"messages": turns}))
    tokenizer = qwen(qwen3)
    rows = load_rows(DataSpec(str(path), eval_rows=0), tokenizer, 256).train
    assert load_prompts(str(path), tokenizer) == sample_prompts(rows, tokenizer, 1)


def test_a_conversation_that_is_an_answer_alone_asks_nothing(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [{"role": "assistant", "content": "Hello"}]}')
    with pytest.raises(UserError, match="holds no conversations to ask"):
        load_prompts(str(path), tokenizer)


def test_samples_of_packed_rows_are_prompts_and_the_answers_of_the_data(tokenizer):
    rows = load_rows(DataSpec(HELD_OUT, eval_rows=0), tokenizer, 256).train
    samples = sample_prompts(rows, tokenizer, 30, seed=3)
    expected = {prompt.text: prompt for prompt in load_prompts(HELD_OUT, tokenizer)}
    assert len({sample.text for sample in samples}) == 30
    assert all(expected[sample.text] == sample for sample in samples)
    assert sample_prompts(rows, tokenizer, 30, seed=3) == samples
    assert sample_prompts(rows, tokenizer, 0) == []


def test_a_sample_of_several_turns_asks_for_the_last(tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    turns = [("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
    path.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    rows = load_rows(DataSpec(str(path), eval_rows=0), tokenizer, 64).train
    (sample,) = sample_prompts(rows, tokenizer, 5)
    assert (sample.text, sample.reference) == ("Two?", "2")
    assert tokenizer.decode(sample.input_ids).startswith("<s><|user|>One?<|end|><|assistant|>1<|end|>")


def test_a_sample_of_plain_text_goes_on_from_its_first_quarter(tokenizer, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "The timer for the tea is set to five minutes, and then the tea is ready."}))
    rows = load_rows(DataSpec(str(path), eval_rows=0), tokenizer, 64).train
    (sample,) = sample_prompts(rows, tokenizer, 5)
    assert len(sample.input_ids) == len(rows[0]["input_ids"]) // 4
    assert sample.reference.endswith("the tea is ready.")


def write_rows(folder, rows: list[dict]) -> str:
    path = folder / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_the_chosen_answer_of_a_pair_is_the_reference_and_a_prompt_is_asked_once(tokenizer, tmp_path):
    pairs = [{"prompt": f"{n % 3}?", "chosen": f"yes {n}", "rejected": "no"} for n in range(6)]
    prompts = load_prompts(write_rows(tmp_path, pairs), tokenizer)
    assert [(prompt.text, prompt.reference) for prompt in prompts] == [(f"{n}?", f"yes {n}") for n in range(3)]
    assert prompts[0].input_ids == ChatFormat(tokenizer).prompt_ids(Conversation((Message("user", "0?"),)))


def test_a_good_answer_is_the_reference_and_a_bad_one_never(tokenizer, tmp_path):
    rated = [{"prompt": f"{n % 3}?", "completion": f"said {n}", "label": n > 3} for n in range(6)]
    prompts = load_prompts(write_rows(tmp_path, rated), tokenizer)
    assert [(prompt.text, prompt.reference) for prompt in prompts] == [("1?", "said 4"), ("2?", "said 5")]


def test_packed_pairs_are_asked_for_the_chosen_answer_and_each_prompt_once(tokenizer, tmp_path):
    pairs = [{"prompt": f"{n % 5}?", "chosen": f"yes {n}", "rejected": "no"} for n in range(20)]
    rows = load_rows(data(write_rows(tmp_path, pairs), "dpo", eval_rows=0), tokenizer, 64).train
    prompts = sample_prompts(rows, tokenizer, 20)
    assert sorted(prompt.text for prompt in prompts) == [f"{n}?" for n in range(5)]
    assert all(prompt.reference.startswith("yes ") for prompt in prompts)


def test_packed_rated_answers_are_asked_for_the_good_ones(tokenizer, tmp_path):
    rated = [{"prompt": f"{n}?", "completion": f"said {n}", "label": n > 3} for n in range(6)]
    rows = load_rows(data(write_rows(tmp_path, rated), "kto", eval_rows=0), tokenizer, 64).train
    assert {prompt.text for prompt in sample_prompts(rows, tokenizer, 20)} == {"4?", "5?"}


def test_long_prompts_are_not_asked_and_that_is_said(tokenizer, tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    prompts = ["1+1?", "Tea? " * 600, "Pie? " * 600]
    path.write_text("".join(json.dumps({"prompt": prompt, "completion": "2"}) + "\n" for prompt in prompts))
    rows = load_rows(DataSpec(str(path), eval_rows=0), tokenizer, 8192).train
    capsys.readouterr()
    (sample,) = sample_prompts(rows, tokenizer, 2)
    assert sample.text == "1+1?"
    assert "to 1 held-out prompts of 2 that are wanted; 2 are longer than 1,024 tokens" in capsys.readouterr().out
