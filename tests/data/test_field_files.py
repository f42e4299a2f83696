"""Files in the shapes that people bring, from LLaMA-Factory, FastChat, GPTeacher, code-alpaca, OpenAI and others.

The shapes are theirs, the words are ours. Each goes the whole way, with Qwen2.5's tokenizer and template: what is
trained is read back from the packed rows, and what is not used is in the report.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from common.data.report import DataReport
from common.data.rows import load_rows
from common.recipe import DataSpec, UserError
from common.tokens.chat_format import Tokens
from tests.real_tokenizers import TRL_TEMPLATES, real_tokenizer
from tests.tokens.test_real_templates import trained_spans

END = "<|im_end|>"
WEATHER = {
    "name": "weather",
    "description": "The weather of a town",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Ulm"}}\n</tool_call>'


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.json") -> str:
    path = folder / name
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n" if name.endswith("l") else f"[{', '.join(lines)}]")
    return str(path)


def trained(source: str, **settings: Any) -> tuple[list[str], str, DataReport]:
    """What is trained, as sorted texts; the text of all examples; and the report."""
    tokenizer = real_tokenizer("qwen2_5", TRL_TEMPLATES["qwen2_5"])
    rows = load_rows(DataSpec(source, eval_rows=0, **settings), tokenizer, 1024)
    answers, wholes = [], []
    for row in rows.train:
        start = 0
        for length in row["seq_lengths"]:
            ids, labels = (row[name][start : start + length] for name in ("input_ids", "labels"))
            wholes.append(tokenizer.decode(ids))
            answers += [tokenizer.decode(ids[begin:end]) for begin, end in trained_spans(Tokens(ids, labels, []))]
            start += length
    return sorted(answers), "\n".join(wholes), rows.reports[0]


def test_llama_factorys_alpaca_with_system_and_history(tmp_path):
    rows = [
        {
            "instruction": "And in winter?",
            "input": "",
            "output": "Wear a coat.",
            "system": "You know about clothes.",
            "history": [["What in summer?", "Wear linen."], ["What in spring?", "Wear cotton."]],
        },
        {"instruction": "Translate.", "input": "Haus", "output": "house", "system": "", "history": []},
    ]
    answers, text, report = trained(write(tmp_path, rows))
    assert answers == sorted([f"Wear linen.{END}", f"Wear cotton.{END}", f"Wear a coat.{END}", f"house{END}"])
    assert "<|im_start|>system\nYou know about clothes.<|im_end|>\n<|im_start|>user\nWhat in summer?" in text
    assert "<|im_start|>user\nTranslate.\n\nHaus<|im_end|>" in text
    assert (report.kept, report.unread) == (2, {})


def test_llama_factorys_sharegpt_with_tools(tmp_path):
    rows = [
        {
            "conversations": [
                {"from": "human", "value": "How warm is it in Ulm?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"town": "Ulm"}}'},
                {"from": "observation", "value": '{"degrees": 12}'},
                {"from": "gpt", "value": "12 degrees."},
            ],
            "tools": json.dumps([WEATHER]),
        },
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}], "tools": "[]"},
    ]
    answers, text, report = trained(write(tmp_path, rows))
    assert answers == sorted([f"{CALL}{END}", f"12 degrees.{END}", f"Hi!{END}"])
    assert '"description": "The weather of a town"' in text
    assert '<tool_response>\n{"degrees": 12}\n</tool_response>' in text
    assert (report.kept, report.unread) == (2, {})


def test_llama_factorys_kto_is_no_data_to_learn_from_as_a_whole(tmp_path):
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
    source = write(tmp_path, [{"messages": messages, "label": True}, {"messages": messages, "label": False}])
    with pytest.raises(UserError, match="label"):
        trained(source)


def test_llama_factorys_dpo_is_refused(tmp_path):
    row = {
        "conversations": [{"from": "human", "value": "Hello"}],
        "chosen": {"from": "gpt", "value": "Hi!"},
        "rejected": {"from": "gpt", "value": "Go away."},
    }
    with pytest.raises(UserError, match="chosen.*rejected"):
        trained(write(tmp_path, [row] * 3))


def test_llama_factorys_pictures_are_refused(tmp_path):
    messages = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A cat."}]
    with pytest.raises(UserError, match="image"):
        trained(write(tmp_path, [{"messages": messages, "images": ["cat.jpg"]}] * 3))


def test_llama_factorys_plain_text(tmp_path):
    answers, text, report = trained(write(tmp_path, [{"text": "Once upon a time."}], "rows.jsonl"))
    assert text == f"Once upon a time.{END}"
    assert report.format_name == "text"


def test_fastchats_dummy_conversations(tmp_path):
    rows = [
        {
            "id": "identity_0",
            "conversations": [
                {"from": "human", "value": "Who are you?"},
                {"from": "gpt", "value": "I am Tilly.\n"},
                {"from": "human", "value": "Who made you?"},
                {"from": "gpt", "value": "Some people."},
            ],
        },
        {
            "id": "greeting_1",
            "conversations": [
                {"from": "gpt", "value": "Hi!"},
                {"from": "human", "value": "Bye"},
                {"from": "gpt", "value": "So long."},
            ],
        },
    ]
    answers, text, report = trained(write(tmp_path, rows))
    assert answers == sorted([f"I am Tilly.\n{END}", f"Some people.{END}", f"Hi!{END}", f"So long.{END}"])
    assert (report.kept, report.unread) == (2, {"id": 2})


def test_gpteachers_instructions_with_a_response(tmp_path):
    rows = [
        {"instruction": "Name a bird.", "input": "", "response": "A wren."},
        {"instruction": "Name it in German.", "input": "wren", "response": "Zaunkönig"},
    ]
    answers, text, report = trained(write(tmp_path, rows))
    assert answers == sorted([f"A wren.{END}", f"Zaunkönig{END}"])
    assert "<|im_start|>user\nName it in German.\n\nwren<|im_end|>" in text
    assert (report.kept, report.format_name) == (2, "instruction/response")


def test_code_alpacas_answers_in_code(tmp_path):
    rows = [
        {"instruction": "Add two numbers.", "input": "", "output": "def add(a, b):\n    return a + b"},
        {"instruction": "Sort it.", "input": "[2, 1]", "output": "```python\nsorted([2, 1])\n```"},
        {"instruction": "Select all.", "input": "", "output": "\nSELECT *\nFROM birds;\n"},
    ]
    answers, _, report = trained(write(tmp_path, rows))
    assert answers == sorted(f"{row['output']}{END}" for row in rows)
    assert report.kept == 3


def test_openais_chat_examples_with_weights(tmp_path):
    rows = [
        {
            "messages": [
                {"role": "system", "content": "You answer in rhyme."},
                {"role": "user", "content": "Where is the cat?"},
                {"role": "assistant", "content": "Under a chair.", "weight": 0},
                {"role": "user", "content": "Where?"},
                {"role": "assistant", "content": "On the mat.", "weight": 1},
            ]
        }
    ]
    answers, text, report = trained(write(tmp_path, rows, "rows.jsonl"))
    assert answers == [f"On the mat.{END}"]
    assert "Under a chair." in text
    assert (report.kept, report.unread) == (1, {})


def test_openais_tool_examples(tmp_path):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Ulm"}'}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "How warm is it in Ulm?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_1", "content": "12 degrees"},
                {"role": "assistant", "content": "It is 12 degrees."},
            ],
            "parallel_tool_calls": False,
            "tools": [{"type": "function", "function": WEATHER}],
        }
    ]
    answers, text, report = trained(write(tmp_path, rows, "rows.jsonl"))
    assert answers == sorted([f"{CALL}{END}", f"It is 12 degrees.{END}"])
    assert "<tool_response>\n12 degrees\n</tool_response>" in text
    assert (report.kept, report.unread) == (1, {"parallel_tool_calls": 1})


def test_dollys_context(tmp_path):
    row = {
        "instruction": "How long?",
        "context": "The Danube is long.",
        "response": "2,850 km",
        "category": "closed_qa",
    }
    answers, text, report = trained(write(tmp_path, [row], "rows.jsonl"))
    assert answers == [f"2,850 km{END}"]
    assert "The Danube is long." in text
    assert report.unread == {"category": 1}


def test_gsm8ks_questions(tmp_path):
    row = {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}
    assert trained(write(tmp_path, [row], "rows.jsonl"))[0] == [f"{row['answer']}{END}"]


def test_trls_prompts_and_completions(tmp_path):
    row = {
        "prompt": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi!"},
            {"role": "user", "content": "Bye"},
        ],
        "completion": [{"role": "assistant", "content": "So long."}],
    }
    answers, text, _ = trained(write(tmp_path, [row], "rows.jsonl"))
    assert answers == [f"So long.{END}"]
    assert "Hi!" in text


def test_columns_that_nobody_else_names_so(tmp_path):
    row = {"frage": "Wie geht's?", "antwort": "Gut.", "quelle": "ein Buch"}
    answers, _, report = trained(
        write(tmp_path, [row], "rows.jsonl"), columns={"user": "frage", "assistant": "antwort"}
    )
    assert answers == [f"Gut.{END}"]
    assert report.unread == {"quelle": 1}
    with pytest.raises(UserError, match="columns="):
        trained(write(tmp_path, [row], "rows.jsonl"))
