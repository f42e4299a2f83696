"""What is typed behind `make TARGET`: a name that nobody reads is an error, before anything is set up."""

import re

import pytest

from common.commands import COMMANDS
from common.commands.make_variables import ANYWHERE, MAKE_NEW, TAKES, explain_variables
from tests.conftest import ROOT
from tests.run_make import run_make

MAKEFILE = (ROOT / "Makefile").read_text()


def variables_of(text: str) -> set[str]:
    """The Makefile's variables in a text, those within its own abbreviations too."""
    found = set(re.findall(r"call (?:flag,[^,]+,|quoted,)(\w+)|value (\w+)", text))
    for name in re.findall(r"\$\((RECIPE|MERGED|\w+_FLAGS?)\)", text):
        found |= {(inner, "") for inner in variables_of(re.search(rf"^{name} = (.*)$", MAKEFILE, re.M)[1])}
        if name == "MERGED":
            found |= {("MODEL", ""), ("OUT", ""), ("TO", "")}
    return {first or second for first, second in found}


@pytest.mark.parametrize("target", TAKES)
def test_the_table_is_what_the_targets_read(target):
    recipe = re.search(rf"^{target}: .*\n((?:\t.*\n)+)", MAKEFILE, re.M)[1]
    assert set(TAKES[target]) == variables_of(recipe)


def test_every_target_is_checked_and_every_command_is_in_the_table():
    targets = dict(re.findall(r"^([a-z-]+):(.*)## ", MAKEFILE, re.M))
    checked = {"_typed", "_recipe", "_merged"}
    assert all(checked & set(prerequisites.split()) for prerequisites in targets.values())
    assert set(COMMANDS) <= set(TAKES) <= set(targets)
    assert set(MAKE_NEW) <= set(COMMANDS)
    assert {name for names in TAKES.values() for name in names} - set(ANYWHERE) <= set(
        re.findall(r"^(\w+) \?=", MAKEFILE, re.M)
    )


FIELD = "it is a field of the recipe"


@pytest.mark.parametrize(
    ("targets", "name", "line"),
    [
        (
            "finetune",
            "LR",
            'make finetune has no variable LR; it is a field of the recipe: SET="train.learning_rate=..."',
        ),
        ("finetune", "RANK", 'make finetune has no variable RANK; it is a field of the recipe: SET="lora.rank=..."'),
        (
            "finetune",
            "SEQ_LEN",
            'make finetune has no variable SEQ_LEN; it is a field of the recipe: SET="train.seq_len',
        ),
        ("finetune", "model", "make finetune has no variable model; do you mean MODEL=...?"),
        ("finetune", "PROMPT", "make finetune has no variable PROMPT; it belongs to make chat"),
        ("finetune", "WHEELS", "make finetune has no variable WHEELS; it takes MODEL, SET, DATA, GPU"),
        ("chat", "LR", "make chat has no variable LR; it takes MODEL"),  # a run keeps its own
        ("test", "DATA", "make test has no variable DATA; it belongs to make finetune, data, eval"),
        ("check test", "X", "make check test has no variable X; it takes ARGS"),
    ],
)
def test_a_name_that_a_target_does_not_take_is_answered(targets, name, line):
    (found,) = explain_variables(targets.split(), [name, *ANYWHERE])
    assert found.startswith(line)


@pytest.mark.parametrize("typed", ["LR=1e-4", "model=llama3-8b", "SEED=1"])
def test_make_ends_before_anything_is_set_up(tmp_path, typed):
    done = run_make("finetune", typed, f"VENV={tmp_path / 'venv'}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: make finetune has no variable {typed.partition('=')[0]};")
    assert not (tmp_path / "venv").exists()
