"""The lines of docs/after.md that serve a model answer as the run does."""

import contextlib
import io
import re
import shutil

import pytest

from common.adapter.find import find_adapter
from common.adapter.gguf import GgufModel
from common.adapter.load import trained_tokenizer
from common.adapter.merge import MergedWeights
from common.cli import run_command
from recipes.tiny import RECIPE, main
from tests.adapter.test_gguf import LlamaCpp
from tests.conftest import ROOT

ASKED, ANSWER = "Start a tea timer, 1 minute.", '{"tool":"timer","label":"tea","minutes":1}'
PAGE = (ROOT / "docs" / "after.md").read_text().partition("## Serving")[2].partition("\n## ")[0]
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def said(snippet: str, folders: dict[str, str]) -> str:
    for name, folder in folders.items():
        assert name not in folder
        snippet = snippet.replace(f'"{name}"', repr(folder))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(snippet, {})
    return printed.getvalue().strip()


@pytest.fixture(scope="module")
def trained(finetuned, tmp_path_factory) -> str:
    """The folder of a run of tiny, outside the repository's own outputs."""
    folder = tmp_path_factory.mktemp("served") / "mine"
    shutil.copytree(finetuned[1], folder)
    return str(folder)


def test_the_lines_of_the_page_print_the_answer_of_the_run(trained, monkeypatch):
    monkeypatch.chdir(ROOT)  # the base is models/tiny
    merged = f"{trained}-16bit"
    assert run_command("merge", "tiny", RECIPE, ["--out", trained, "--to", merged], main) == 0
    assert len(SNIPPETS) == 2
    for snippet in SNIPPETS:
        assert ASKED in snippet
        assert said(snippet, {"merged": merged, "outputs/tiny": trained}) == ANSWER
    assert ANSWER in PAGE


def test_llama_cpp_answers_the_same(trained, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    weights = MergedWeights(find_adapter(type(RECIPE)(**vars(RECIPE) | {"out": trained})))
    GgufModel(weights, trained_tokenizer(weights.adapter), "tiny", "q8_0").write(tmp_path / "tiny.gguf")
    assert LlamaCpp(tmp_path / "tiny.gguf").chat([{"role": "user", "content": ASKED}], 96) == ANSWER
