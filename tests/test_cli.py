"""The commands as a user types them, in processes of their own."""

import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.cli import run_command
from common.commands import COMMANDS
from common.commands.dryrun import PAIRS_ON_CPU, shrink_to_dry_run
from common.recipe import PreferenceSpec
from common.run.folder import refuse_run_under_way
from common.run.metrics_file import read_metrics
from tests.conftest import ROOT
from tests.machine.test_lock import held_by_another
from tests.machine.test_processes import children_of
from tests.run_make import run_make


def recipes(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """`python -m recipes ...` without a GPU."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    command = [sys.executable, "-m", "recipes", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)


def refused(done: subprocess.CompletedProcess) -> str:
    """The one line that a refusal prints: exit status 2 and no traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the project that a test may edit."""
    ignore = shutil.ignore_patterns(".*", "outputs", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "project", ignore=ignore)
    return tmp_path / "project"


def test_an_unknown_recipe_prints_those_that_exist():
    assert refused(recipes("nope")) == (
        "error: there is no recipe 'nope'; there are: llama3-1-8b, llama3-70b, llama3-8b, llama3-8b-dpo, mistral-7b, "
        "qwen-14b, smollm2-135m, tiny, tiny-dpo"
    )
    for name in ("", "../common/cli", "__main__", "tiny.py"):
        assert "there is no recipe" in refused(recipes(name))


@pytest.mark.parametrize("words", ["", "-h", "--help", "plan --help"])
def test_help_lists_what_can_be_typed(words):
    done = recipes(*words.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert all(command in done.stdout for command in COMMANDS)
    assert (
        "recipes: llama3-1-8b, llama3-70b, llama3-8b" in done.stdout and "python -m recipes NAME [flags]" in done.stdout
    )


def test_a_copied_recipe_is_found_without_registration(project):
    shutil.copy(project / "recipes" / "llama3_8b.py", project / "recipes" / "my_bot.py")
    assert recipes("--check", "my-bot", cwd=project).returncode == 0
    done = recipes("my-bot", "--plan", "--json", "plan.json", "--card-gib", "16", "--seq-len", "1024", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "16 rows of 1,024 tokens per optimizer step" in done.stdout
    assert "peak on a card of 16 GiB" in done.stdout
    assert json.loads((project / "plan.json").read_text())["recipe"]["train"]["seq_len"] == 1024
    assert (project / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("typed", ["my-bot", "my_bot"])
def test_a_recipe_has_one_folder_however_its_name_is_typed(project, typed):
    shutil.copy(project / "recipes" / "tiny.py", project / "recipes" / "my_bot.py")
    assert "outputs/my-bot" in refused(recipes("report", typed, cwd=project))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plan", "--card-gib", "1"], "The model alone is too large: take a smaller model, or a larger card"),
        (["--plan", "--seq-len", "9000"], "TrainSpec.seq_len is 9,000; meta-llama/Meta-Llama-3-8B-Instruct has 8,192"),
        (["--plan", "--card-gib", "0"], "Recipe.card_gib is 0.0; it must be above 0"),
        (["--seq-len", "512"], "--seq-len is for a plan; for a run, edit TrainSpec.seq_len in the recipe"),
        (["--card-gib", "16"], "--card-gib is for a plan; a run uses what is free on the GPU of the machine"),
    ],
)
def test_a_plan_that_cannot_be_is_one_line(flags, message):
    assert message in refused(recipes("llama3-8b", *flags))


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("tiny --layers 2", "make finetune MODEL=tiny ARGS=...: error: unrecognized arguments: --layers 2"),
        (
            "finetune tiny --gpus 0",
            "make finetune MODEL=tiny ARGS=...: error: argument --gpus: '0' is not a whole number",
        ),
        ("tiny --plan --seq-len x", "make plan MODEL=tiny ARGS=...: error: argument --seq-len: invalid int value: 'x'"),
        (
            "plan tiny --nnodes 1.5",
            "make plan MODEL=tiny ARGS=...: error: argument --nnodes: '1.5' is not a whole number",
        ),
        ("tiny --plan --dry-run", "make plan MODEL=tiny ARGS=...: error: unrecognized arguments: --dry-run"),
        (
            "tiny --dry",
            "make finetune MODEL=tiny ARGS=...: error: unrecognized arguments: --dry",
        ),  # no real run instead
        (
            "dryrun tiny --layers 0",
            "make dryrun MODEL=tiny ARGS=...: error: argument --layers: '0' is not a whole number",
        ),
        ("chat tiny --top-p x", "make chat MODEL=tiny ARGS=...: error: argument --top-p: invalid float value: 'x'"),
        (
            "eval tiny --samples -1",
            "make eval MODEL=tiny ARGS=...: error: argument --samples: '-1' is not a whole number",
        ),
        (
            "data tiny --examples -1",
            "make data MODEL=tiny ARGS=...: error: argument --examples: '-1' is not a whole number",
        ),
        ("merge tiny --json x", "make merge MODEL=tiny ARGS=...: error: unrecognized arguments: --json x"),
        ("report tiny --data x", "make report MODEL=tiny ARGS=...: error: unrecognized arguments: --data x"),
    ],
)
def test_a_wrong_flag_is_refused_in_the_name_of_the_command_that_was_typed(typed, message):
    done = recipes(*typed.split())
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(message)


def test_a_dry_run_downloads_nothing_and_takes_a_small_model_without_a_gpu():
    llama = importlib.import_module("recipes.llama3_8b").RECIPE
    recipe = shrink_to_dry_run(replace(llama, out="outputs/llama3-8b"))
    assert (recipe.model.weights, recipe.model.layers) == ("random", 2)
    assert Path(recipe.data.source).is_file()
    assert (recipe.card_gib, recipe.out, recipe.existing_run) == (None, "outputs/llama3-8b-dry-run", "overwrite")
    assert recipe.lora == llama.lora
    assert shrink_to_dry_run(recipe, layers=5).model.layers == 5


def test_a_dry_run_on_a_gpu_takes_as_many_rows_as_the_plan_is_made_for(monkeypatch):
    """ "auto" would choose by the data set that ships, and try less memory than planned."""
    llama = importlib.import_module("recipes.llama3_8b").RECIPE
    auto = replace(llama, train=replace(llama.train, rows_per_step="auto"))
    assert shrink_to_dry_run(auto).train.rows_per_step == 2
    monkeypatch.setattr("common.machine.device.this_machine", lambda: SimpleNamespace(is_gpu=True))
    assert shrink_to_dry_run(auto).train.rows_per_step == 16


@pytest.mark.parametrize(("loss", "rows"), [("dpo", "pairs"), ("simpo", "pairs"), ("kto", "rated")])
def test_a_dry_run_of_preferences_has_data_of_their_kind(loss, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dpo = importlib.import_module("recipes.llama3_8b_dpo").RECIPE
    recipe = shrink_to_dry_run(replace(dpo, preference=PreferenceSpec(loss), out="outputs/llama3-8b-dpo"))
    assert recipe.data.kind == rows and recipe.preference == PreferenceSpec(loss)
    lines = Path(recipe.data.source).read_text(encoding="utf-8").splitlines()
    # The reference of each is computed before the first step, with a model of 8B's width.
    assert len(lines) == (2 if rows == "rated" else 1) * PAIRS_ON_CPU
    first = json.loads(lines[0])
    assert {*first} == ({"prompt", "completion", "label"} if rows == "rated" else {"prompt", "chosen", "rejected"})


@pytest.mark.slow
def test_a_plan_takes_ten_seconds_of_one_core_at_most(tmp_path):
    """In seconds of the processor, the least of up to three runs: what runs beside it on the same core slows it."""
    seconds = []
    while not seconds or (min(seconds) > 10 and len(seconds) < 3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert recipes("llama3-8b", "--plan", "--json", str(tmp_path / "plan.json")).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) <= 10


@pytest.mark.slow
def test_a_dry_run_of_llama3_8b_takes_three_minutes_and_12_gib_at_most(project):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    started = time.monotonic()
    done = recipes("llama3-8b", "--dry-run", cwd=project, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started <= 180
    assert max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) <= 12 << 20  # KiB
    assert "step 2/2" in done.stdout
    assert "peak memory: " in done.stdout


@pytest.mark.parametrize(
    ("old", "new", "at", "message"),
    [
        ("rank=16", "rnk=16", "rnk=16", "LoraSpec has no rnk; do you mean rank?"),
        ("epochs=1", "num_train_epochs=1", "num_train_epochs=1", "TrainSpec has no num_train_epochs; it is epochs"),
        ("seq_len=2048", 'seq_len="2048"', "seq_len=", "TrainSpec.seq_len is '2048', a text; give a whole number"),
        ("card_gib=24.0", "card_gib=0", "card_gib=0", "Recipe.card_gib is 0; it must be above 0"),
        ("rank=16", "rank=0", "rank=0", "LoraSpec.rank is 0; it must be at least 1"),
        ("rank=16,", "rank=16,,", "rank=16,,", "invalid syntax"),
        ("RECIPE = ", "RECIPES = ", "def main", "name 'RECIPE' is not defined"),
    ],
)
def test_a_mistake_in_a_recipe_names_its_line(project, old, new, at, message):
    text = (project / "recipes" / "llama3_8b.py").read_text().replace(old, new, 1)
    (project / "recipes" / "my_bot.py").write_text(text)
    line = next(number for number, line in enumerate(text.splitlines(), 1) if at in line)
    assert refused(recipes("my-bot", cwd=project)) == f"error: recipes/my_bot.py:{line}: {message}"


@pytest.mark.slow
def test_without_a_gpu_the_large_recipes_say_so_and_leave_no_folder(tmp_path):
    out = tmp_path / "run"
    assert "needs an NVIDIA GPU" in refused(recipes("llama3-8b", "--out", str(out)))
    assert not out.exists()


def test_a_missing_data_file_is_named(tmp_path):
    line = refused(recipes("tiny", "--data", "nowhere.jsonl", "--out", str(tmp_path / "run")))
    assert line.startswith("error: there is no data file nowhere.jsonl")


@pytest.mark.slow  # tests/data/test_bad_data.py has them all, in one process
def test_broken_lines_are_named_with_file_and_line(tmp_path):
    data = tmp_path / "chats.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
    line = refused(recipes("tiny", "--data", str(data), "--out", str(tmp_path / "run")))
    assert line.startswith(f"error: 1 of 2 rows of {data} cannot be used (50.0%, limit 1.0%)")
    assert f"invalid JSON ({data}:2)" in line


def test_a_run_in_the_output_folder_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert "already holds a run" in refused(recipes("tiny", "--out", str(tmp_path / "run")))


@contextlib.contextmanager
def run_under_way(out: Path, *flags: str) -> Iterator[subprocess.Popen]:
    """A run that holds its folder, and is killed at the end with the processes that it has started."""
    command = [sys.executable, "-m", "recipes", "tiny", "--out", str(out), *flags]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, env=env)
    try:
        deadline = time.monotonic() + 120
        while not (out / ".lock").exists() or not (out / ".lock").read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        yield process
    finally:
        processes = [*children_of(process.pid), process.pid] if process.poll() is None else []
        for pid in processes:
            os.kill(pid, signal.SIGKILL)
        process.wait()


def test_a_run_under_way_keeps_others_out_of_its_folder_until_it_is_killed(tmp_path):
    """Before anything is loaded: with a large model that takes minutes."""
    out = tmp_path / "run"
    with run_under_way(out) as process:
        for typed in ("tiny --overwrite", "tiny --resume --gpus 2", "merge tiny"):
            line = refused(recipes(*typed.split(), "--out", f"{out}/"))
            assert line.startswith(f"error: a run is under way in {out} (process {process.pid} on "), line
    assert (out / ".lock").exists()
    refuse_run_under_way(str(out))


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"plan", "chat", "data", "report"}))
def test_every_command_that_writes_or_takes_long_leaves_a_run_alone(tmp_path, capsys, command):
    out = tmp_path / ("run-dry-run" if command == "dryrun" else "run")
    out.mkdir()
    tiny = importlib.import_module("recipes.tiny")
    with held_by_another(out / ".lock"):
        assert run_command(command, "tiny", tiny.RECIPE, ["--out", str(tmp_path / "run")], tiny.main) == 2
        assert f"a run is under way in {out} (process " in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == [".lock"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--gpus", "2"]], ids=["one process", "two"])
def test_of_two_runs_in_a_folder_one_trains_and_a_killed_one_is_resumed(tmp_path, flags):
    out = tmp_path / "run"
    with run_under_way(out, *flags):
        assert "a run is under way in" in refused(recipes("tiny", *flags, "--resume", "--out", str(out)))
    done = recipes("tiny", *flags, "--resume", "--max-steps", "2", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert not (out / ".lock").exists() and (out / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_two_runs_that_start_together_do_not_mix(tmp_path):
    command = [sys.executable, "-m", "recipes", "tiny", "--out", str(tmp_path / "run"), "--max-steps", "3"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env) for _ in range(2)]
    errors = [run.communicate(timeout=300)[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2], errors
    assert [entry["step"] for entry in read_metrics(tmp_path / "run") if "loss" in entry] == [1, 2, 3]


def test_own_data_trains_the_copied_recipe_with_few_flags(tmp_path):
    data = tmp_path / "chats.csv"
    rows = "\n".join(f'"What is {n} and {n}?","It is {2 * n}"' for n in range(200))
    data.write_text(f"prompt,completion\n{rows}\n")
    done = recipes("tiny", "--data", str(data), "--out", str(tmp_path / "run"), "--max-steps", "2")
    assert done.returncode == 0, done.stderr
    assert "200 rows read (prompt/completion), 200 kept, 0 dropped" in done.stdout
    assert "step 2/2" in done.stdout
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_recipe_without_its_story_says_so(project):
    text = (project / "recipes" / "tiny.py").read_text()
    (project / "recipes" / "my_bot.py").write_text(text.replace("def main(", "def start("))
    assert refused(recipes("my-bot", cwd=project)).startswith("error: recipes/my_bot.py: it has no main; a recipe has")


@pytest.mark.slow
def test_a_base_model_that_cannot_be_had_is_one_line(project, tmp_path):
    text = (project / "recipes" / "tiny.py").read_text()
    (project / "recipes" / "my_bot.py").write_text(text.replace('ModelSpec("models/tiny")', 'ModelSpec("owner/model")'))
    line = refused(recipes("my-bot", "--out", str(tmp_path / "run"), cwd=project, HF_HOME=str(tmp_path / "cache")))
    assert "owner/model is not in the local cache and the hub cannot be reached" in line


def test_make_alone_lists_targets_and_recipes():
    out = run_make().stdout
    for word in (
        "finetune",
        "test",
        "check",
        "setup",
        "llama3-8b llama3-8b-dpo mistral-7b qwen-14b smollm2-135m tiny tiny-dpo",
    ):
        assert word in out


def test_every_command_has_a_module_and_a_target():
    targets = (ROOT / "Makefile").read_text()
    for command in COMMANDS:
        assert (ROOT / "common" / "commands" / f"{command}.py").is_file()
        assert f"\n{command}: " in targets and f" -m recipes {command} " in targets


def test_make_refuses_an_unknown_model_before_the_set_up(project):
    done = run_make("finetune", "MODEL=nope", cwd=project)
    assert done.returncode == 2
    assert "error: there is no recipe 'nope'" in done.stderr
    assert not (project / ".venv").exists()


def test_make_without_a_python_that_is_new_enough_says_so(project):
    done = run_make("setup", "PYTHON=", cwd=project)
    assert done.returncode == 2
    assert "error: Python 3.11 or newer is needed" in done.stderr


@pytest.mark.parametrize(
    ("target", "variable"),
    [
        ("finetune", "GPUS=x"),
        ("data", "SEQ_LEN=x"),
        ("plan", "SEQ_LEN=x"),
        ("dryrun", "LAYERS=x"),
        ("chat", "ARGS=--top-k x"),
        ("eval", "ARGS=--samples x"),
        ("merge", "ARGS=--kl-bound x"),
        ("export", "ARGS=--layers x"),
        ("report", "ARGS=--layers x"),
    ],
)
def test_make_names_the_target_that_was_typed(tmp_path, target, variable):
    """The Makefile's own line, with the python of these tests as a set-up that is complete."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / ".installed").touch()
    done = run_make(target, "MODEL=llama3-8b", variable, f"VENV={tmp_path}")
    assert done.returncode == 2
    assert f"make {target} MODEL=llama3-8b ARGS=...: error: " in done.stderr, done.stderr
