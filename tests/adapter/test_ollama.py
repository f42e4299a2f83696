"""Chat templates in ollama's words, rendered by Go's own template engine where Go is installed (in CI)."""

import json
import shlex
import shutil
import subprocess
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from common.adapter.ollama import build_modelfile, ollama_name, parse_template
from common.cli import run_command
from common.model.chat_template import fix_date
from common.recipe import UserError
from recipes.tiny import RECIPE
from tests.conftest import ROOT, TINY
from tests.real_tokenizers import real_tokenizer
from tests.tokens.test_chat_format import MISTRAL, QWEN3, TEMPLATES, llama3, make_tokenizer, qwen

# Renders a list of {Template, System, Messages} with what ollama gives a template (its template/template.go).
GO = """package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

func main() {
	var cases []struct {
		Template, System string
		Messages         []struct{ Role, Content string }
	}
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	var rendered []string
	for _, c := range cases {
		var text strings.Builder
		values := map[string]any{"System": c.System, "Messages": c.Messages, "Response": ""}
		if err := template.Must(template.New("").Parse(c.Template)).Execute(&text, values); err != nil {
			panic(err)
		}
		rendered = append(rendered, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(rendered)
}
"""
CHATS = ("u", "su", "uau", "suau", "uauau", "suauauau")
ROLES = {"s": "system", "u": "user", "a": "assistant"}


def llama(template: str) -> PreTrainedTokenizerFast:
    tokenizer = llama3()
    tokenizer.chat_template = fix_date((TEMPLATES / template).read_text(), date(2026, 11, 27))
    return tokenizer


def our_mistral(name: str) -> PreTrainedTokenizerFast:
    template = (ROOT / "models" / "chat_templates" / f"{name}.jinja").read_text()
    return make_tokenizer(template, "<s>", "</s>", "[INST]", "[/INST]", bos="<s>", eos="</s>")


def mistral(where: str) -> PreTrainedTokenizerFast:
    """The system message goes into the user's turn: the last one (Mistral 7B v0.3), or the first."""
    template = MISTRAL.replace("loop.index0 == messages | length - 2", where)
    return make_tokenizer(template, "<s>", "</s>", "[INST]", "[/INST]", bos="<s>", eos="</s>")


TOKENIZERS = {
    "tiny": lambda: AutoTokenizer.from_pretrained(TINY),
    "Llama 3": lambda: llama("llama3.jinja"),
    "Llama 3.1": lambda: llama("llama3_1.jinja"),
    "Qwen2.5": lambda: qwen((TEMPLATES / "qwen2_5.jinja").read_text()),
    "Qwen3": lambda: qwen((TEMPLATES / "qwen3.jinja").read_text()),
    "Qwen3 (ours)": lambda: qwen(QWEN3),
    "Mistral v0.3": lambda: mistral("loop.last"),
    "Mistral v0.1": lambda: mistral("loop.first"),
    "Mistral v0.3 (ours)": lambda: our_mistral("mistral_v3"),
    "Mistral Nemo (ours)": lambda: our_mistral("mistral_tekken"),
    "Llama 3.2 of one date": lambda: llama("llama3_2.jinja"),
    "SmolLM2": lambda: real_tokenizer("smollm2"),  # its BOS begins each turn
}


def conversations() -> list[list[dict[str, str]]]:
    return [
        [{"role": ROLES[role], "content": f"{role}{number} says\n “{{so}}”"} for number, role in enumerate(roles)]
        for roles in CHATS
    ]


def wanted(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What the model was trained to see, without the BOS that ollama adds."""
    texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in conversations()]
    return [text.removeprefix(tokenizer.bos_token or "") for text in texts]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_template_taken_apart_gives_the_same_text(name):
    tokenizer = TOKENIZERS[name]()
    turns = parse_template(tokenizer)
    assert [turns.render(chat) for chat in conversations()] == wanted(tokenizer)


@pytest.fixture(scope="session")
def go(tmp_path_factory) -> Path:
    if shutil.which("go") is None:
        pytest.skip("Go is not installed (apt-get install golang-go); .ci/run installs it")
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(GO)
    subprocess.run(["go", "build", "-o", "render", "main.go"], cwd=folder, check=True)
    return folder / "render"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_go_renders_the_template_as_jinja_does(go, name):
    tokenizer = TOKENIZERS[name]()
    template = parse_template(tokenizer).go_template()
    cases = [
        {
            "Template": template,
            "System": next((message["content"] for message in chat if message["role"] == "system"), ""),
            "Messages": [{"Role": message["role"], "Content": message["content"]} for message in chat],
        }
        for chat in conversations()
    ]
    done = subprocess.run([go], input=json.dumps(cases), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == wanted(tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }} messages",
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | upper }}<|end|>{% endfor %}",
        "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}",
        "{{ raise_exception('never') }}",
        "{{ messages[-1].content }}",
    ],
)
def test_a_template_that_is_more_than_turns_is_refused(template):
    tokenizer = llama3()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="cannot be put in ollama's words: it is more than turns; take FORMAT=gguf"):
        parse_template(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template, and ollama needs one"):
        parse_template(tokenizer)


def test_a_modelfile_names_what_ends_an_answer_and_how_it_is_drawn():
    tokenizer = llama3()
    eos = [tokenizer.convert_tokens_to_ids(token) for token in ("<|end_of_text|>", "<|eot_id|>")]
    drawn = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=eos)
    lines = build_modelfile("x-q8_0.gguf", tokenizer, drawn.to_dict(), 8192).splitlines()
    assert lines[0] == "FROM ./x-q8_0.gguf"
    assert lines[1].startswith('TEMPLATE """{{ if .System }}<|start_header_id|>system<|end_header_id|>')
    for line in ('PARAMETER stop "<|end_of_text|>"', 'PARAMETER stop "<|eot_id|>"', "PARAMETER num_ctx 8192"):
        assert line in lines
    drawn_lines = ["temperature 0.6", "top_k 50", "top_p 0.9", "min_p 0.0"]  # of transformers where nothing is said
    assert lines[-5:] == ["PARAMETER repeat_penalty 1.0", *(f"PARAMETER {line}" for line in drawn_lines)]
    greedy = build_modelfile("x", tokenizer, {"eos_token_id": eos}, 10).splitlines()
    assert greedy[-1] == "PARAMETER temperature 0"


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("tiny", "tiny"),
        ("Llama-3.1_8b", "Llama-3.1_8b"),
        ("My Run (v2)", "My-Run-v2"),
        ('it\'s $5 "run"', "it-s-5-run"),
        ("../..x", "x"),
        ("a..b", "a-b"),
        ("試験", "model"),
        ("x" * 245, "x" * 80),
    ],
)
def test_a_run_of_any_name_gets_a_name_that_ollama_accepts(name, accepted):
    assert ollama_name(name) == accepted


def test_the_command_for_ollama_can_be_pasted(finetuned, tmp_path, capsys):
    target = tmp_path / "it's (v2)"
    flags = ["--format", "ollama", "--quant", "f16", "--to", str(target)]
    assert run_command("export", "tiny", replace(RECIPE, out=str(finetuned[1])), flags) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ollama create"))
    assert shlex.split(line)[4:7] == [str(target / "Modelfile"), "&&", "ollama"]


def test_the_folder_is_ready_for_ollama(finetuned, tmp_path, capsys):
    target = tmp_path / "bot"
    flags = ["--format", "ollama", "--quant", "f16", "--to", str(target)]
    assert run_command("export", "tiny", replace(RECIPE, out=str(finetuned[1])), flags) == 0
    assert f"ollama create {finetuned[1].name} -f {target}/Modelfile" in capsys.readouterr().out
    gguf_name = f"{finetuned[1].name}-f16.gguf"
    assert sorted(path.name for path in target.iterdir()) == ["Modelfile", "made_from.json", gguf_name]
    text = (target / "Modelfile").read_text()
    assert text.startswith(f"FROM ./{gguf_name}\n") and 'PARAMETER stop "<|end|>"' in text
