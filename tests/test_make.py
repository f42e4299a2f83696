"""The Makefile: what is typed arrives as it was typed, also in a make inside of make."""

import json
import os
import sys

import pytest

from tests.run_make import OF_MAKE, VARIABLES, run_make


@pytest.fixture
def words(tmp_path):
    """words(target, variables...): what make hands to `python -m recipes`, which here only writes it down."""
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    python, heard = folder / "bin" / "python", tmp_path / "heard.json"
    python.write_text(f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open({str(heard)!r}, 'w'))\n")
    python.chmod(0o755)
    for name in (".installed", ".installed-dev", ".installed-eval"):
        (folder / name).touch()
    (folder / "bin" / "lm_eval").symlink_to(python)

    def call(target: str, *variables: str) -> list[str]:
        done = run_make(target, *variables, f"VENV={folder}", f"PYTHON={python}")
        assert done.returncode == 0, done.stderr
        return json.loads(heard.read_text())

    return call


ODD = [
    "two words",
    'it\'s "quoted" and `quoted`',
    "v$HOME and $(HOME) and ${HOME} and $$",
    "-x",
    "--help",
    "two\nlines\n\nand more",
    "back\\slash \\",
    "# no comment; no command && none | either > nowhere",
    "試験 🙂 (v2) [3]*?",
    "a=b,c",
]


@pytest.mark.parametrize("word", ODD)
def test_every_word_arrives_as_it_was_typed(words, word):
    variables = {"--prompt": "PROMPT", "--out": "OUT"}
    heard = words("chat", *(f"{name}={word}" for name in variables.values()))
    assert heard == ["-m", "recipes", "chat", "tiny", f"--out={word}", f"--prompt={word}"]


FLAGS = {
    "finetune": {
        "DATA": "--data",
        "OUT": "--out",
        "GPU": "--gpu",
        "GPUS": "--gpus",
        "NNODES": "--nnodes",
        "RDZV_ENDPOINT": "--rdzv-endpoint",
    },
    "data": {"DATA": "--data", "SEQ_LEN": "--seq-len", "JSON": "--json"},
    "plan": {"CARD_GIB": "--card-gib", "SEQ_LEN": "--seq-len", "JSON": "--json", "GPU": "--gpu", "GPUS": "--gpus"},
    "dryrun": {"LAYERS": "--layers", "GPU": "--gpu", "GPUS": "--gpus"},
    "chat": {"OUT": "--out", "PROMPT": "--prompt", "GPU": "--gpu"},
    "eval": {"GPU": "--gpu", "DATA": "--data", "OUT": "--out", "JSON": "--json"},
    "merge": {"GPU": "--gpu", "OUT": "--out", "BASE": "--base", "TO": "--to"},
    "export": {
        "GPU": "--gpu",
        "OUT": "--out",
        "BASE": "--base",
        "TO": "--to",
        "FORMAT": "--format",
        "QUANT": "--quant",
    },
    "report": {"OUT": "--out"},
    "push": {"OUT": "--out", "REPO": "--repo"},
}


@pytest.mark.parametrize("target", FLAGS)
def test_each_variable_of_a_target_becomes_its_flag(words, target):
    heard = words(target, "MODEL=my-bot", "ARGS=--last 'two words'", *(f"{name}=$5 'x'" for name in FLAGS[target]))
    assert heard[:4] == ["-m", "recipes", target, "my-bot"] and heard[-2:] == ["--last", "two words"]
    assert sorted(heard[4:-2]) == sorted(f"{flag}=$5 'x'" for flag in FLAGS[target].values())
    assert words(target) == ["-m", "recipes", target, "tiny"]


def test_compare_takes_folders_and_no_recipe(words):
    heard = words("compare", "RUNS=a 'b c'", "TO=$5.html", "ARGS=--last")
    assert heard == ["-m", "recipes", "compare", "--runs=a 'b c'", "--to=$5.html", "--last"]


def test_lm_eval_takes_the_folder_that_was_typed(words, tmp_path):
    for name in ("my $run (v2)-merged", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    heard = words("lm-eval", f"OUT={tmp_path}/my $run (v2)", "TASKS=gsm8k")
    assert heard[heard.index("--model_args") + 1] == f"pretrained={tmp_path}/my $run (v2)-merged"
    heard = words("lm-eval", f"TO={tmp_path}/elsewhere", "TASKS=gsm8k")
    assert heard[heard.index("--model_args") + 1] == f"pretrained={tmp_path}/elsewhere"


def test_the_flags_and_variables_of_an_outer_make_stay_outside(monkeypatch):
    shown = run_make("-n", "chat", "VENV=/nowhere").stdout
    assert "recipes chat" in shown
    for name in VARIABLES - {"PYTHON"}:
        monkeypatch.setenv(name, "from-outside")
    monkeypatch.setenv("MAKEFLAGS", "s -- ARGS=from-outside MODEL=from-outside")
    monkeypatch.setenv("MAKEOVERRIDES", "${-*-command-variables-*-}")
    monkeypatch.setenv("MAKELEVEL", "1")
    assert run_make("-n", "chat", "VENV=/nowhere").stdout == shown
    assert {"ARGS", "MODEL", "PROMPT"} <= VARIABLES and "MAKEFLAGS" in OF_MAKE


@pytest.mark.parametrize(
    ("typed", "folder"),
    [
        (("MODEL=my_bot",), "outputs/my-bot-merged"),
        (("OUT=outputs/x/",), "outputs/x-merged"),
        (("OUT=~/my runs/x/",), "{home}/my runs/x-merged"),
        (("OUT=outputs/x/", "TO=~/merged"), "{home}/merged"),
    ],
)
def test_lm_eval_looks_where_a_merge_writes(tmp_path, typed, folder):
    for name in ("python", ".installed", ".installed-eval"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / ("bin/python" if name == "python" else name)).touch()
    done = run_make("lm-eval", f"VENV={tmp_path}", "PYTHON=true", "TASKS=gsm8k", *typed)
    assert done.returncode == 2
    assert f"error: there is no merged model in {folder.format(home=os.environ['HOME'])}: make merge" in done.stderr


def test_no_other_test_starts_make_by_itself():
    from tests.conftest import ROOT

    found = [p.name for p in (ROOT / "tests").rglob("*.py") if '["make"' in p.read_text() and p.name != "test_make.py"]
    assert found == ["run_make.py"]
