"""What is set for the whole process is set before torch is imported, and leaves alone what a user has set."""

import json
import os
import pty
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig
from transformers.trainer_utils import align_special_tokens

from common import process_state
from common.control_group import available_cpus
from common.process_state import full_precision_sums, quiet_libraries
from tests.conftest import ROOT

SHOW = "import json, os, sys, common; print(json.dumps([dict(os.environ), 'torch' in sys.modules]))"
SET_HERE = {"CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "HF_HUB_DISABLE_TELEMETRY", "LOCAL_RANK"}
SET_HERE |= {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
SET_HERE |= {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"}


def environment_after_import(**variables: str) -> tuple[dict[str, str], bool]:
    clean = {name: value for name, value in os.environ.items() if name not in SET_HERE}
    done = subprocess.run(
        [sys.executable, "-c", SHOW], env=clean | variables, cwd=ROOT, capture_output=True, text=True, check=True
    )
    environment, has_torch = json.loads(done.stdout)
    return environment, has_torch


def test_importing_common_sets_the_environment_and_does_not_import_torch():
    environment, has_torch = environment_after_import()
    assert not has_torch
    assert environment["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


# As torch 2.13 writes them, in attention_backward.cu, CublasHandlePool.cpp and Context.cpp.
OF_EVERY_RUN = (
    "Flash Attention defaults to a non-deterministic algorithm. To explicitly enable determinism call "
    "torch.use_deterministic_algorithms(True, warn_only=False).",
    "Memory Efficient attention defaults to a non-deterministic algorithm. To explicitly enable determinism call "
    "torch.use_deterministic_algorithms(True, warn_only=False).",
    "Attempting to run cuBLAS, but there was no current CUDA context! Attempting to set the primary context...",
)
OF_A_FAULT = "cumsum_cuda_kernel does not have a deterministic implementation, but you set ..."


def test_what_torch_says_in_every_run_on_a_gpu_is_silent_and_what_tells_of_a_fault_is_not():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        quiet_libraries()
        for text in (*OF_EVERY_RUN, OF_A_FAULT):
            warnings.warn(text, UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in heard] == [OF_A_FAULT]


def test_a_variable_that_is_set_stays_as_it_is():
    environment, _ = environment_after_import(CUBLAS_WORKSPACE_CONFIG=":16:8", CUDA_VISIBLE_DEVICES="3")
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"


def test_importing_common_hides_no_gpu():
    """The process may start those of a run on several GPUs; machine/gpus.py hides them where one computes."""
    assert "CUDA_VISIBLE_DEVICES" not in environment_after_import()[0]


@pytest.mark.parametrize(
    ("variables", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_wait_as_the_user_says_or_without_blocking_a_core(variables, spins):
    assert environment_after_import(**variables)[0].get("GOMP_SPINCOUNT") == spins


@pytest.mark.parametrize(
    ("told", "each"),
    [({}, str(max(1, available_cpus() // 2))), ({"OMP_NUM_THREADS": "7"}, "7")],
    ids=["not told", "told"],
)
def test_the_processes_of_a_run_share_the_cpus_unless_told(told, each):
    code = "import common, os; from common.process_state import prepare_launcher; prepare_launcher(2); "
    done = subprocess.run(
        [sys.executable, "-c", code + "print(os.environ['OMP_NUM_THREADS'])"],
        env={name: value for name, value in os.environ.items() if name not in SET_HERE} | told,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == each, done.stderr


PRINT = """
import os, sys, time
from common.process_state import protect_output
protect_output(outlives_reader=sys.argv[1] == "goes on")
for number in range(3):
    print("line", number, flush=True)
    sys.stderr.write("")
    os.write(done := os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND), b".")
    os.close(done)
"""


def print_into(stdout: int, stderr: int, kind: str, folder: Path) -> tuple[int, str]:
    """The exit status of a process that prints three lines into these, and a dot for each that it went on after."""
    done = subprocess.run([sys.executable, "-c", PRINT, kind, folder / "done"], stdout=stdout, stderr=stderr, cwd=ROOT)
    return done.returncode, (folder / "done").read_text() if (folder / "done").exists() else ""


def without_reader() -> int:
    reads, writes = os.pipe()
    os.close(reads)
    return writes


def closed_terminal() -> int:
    terminal, window = pty.openpty()
    os.close(terminal)
    return window


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


GONE = (without_reader, closed_terminal)


@pytest.mark.parametrize("lost", [*GONE, full_disk])
def test_work_that_makes_files_goes_on_without_its_output(tmp_path, lost):
    with (tmp_path / "errors").open("w") as errors:
        assert print_into(lost(), errors.fileno(), "goes on", tmp_path) == (0, "...")
    said = (tmp_path / "errors").read_text()
    assert said.count("warning: standard output is lost (") == (lost in GONE) == len(said.splitlines()), said


@pytest.mark.parametrize("lost", [*GONE, full_disk])
def test_it_goes_on_when_both_streams_are_lost(tmp_path, lost):
    assert print_into(lost(), lost(), "goes on", tmp_path) == (0, "...")


@pytest.mark.parametrize("lost", GONE)
def test_work_that_makes_words_ends_quietly_with_its_reader(tmp_path, lost):
    with (tmp_path / "errors").open("w") as errors:
        assert print_into(lost(), errors.fileno(), "ends", tmp_path) == (128 + signal.SIGPIPE, "")
    assert (tmp_path / "errors").read_text() == ""


def test_words_that_do_not_fit_on_the_disk_are_an_error(tmp_path):
    with (tmp_path / "errors").open("w") as errors:
        assert print_into(full_disk(), errors.fileno(), "ends", tmp_path) == (2, "")
    assert (tmp_path / "errors").read_text() == "error: standard output cannot be written: No space left on device\n"


def test_a_log_goes_on_when_the_disk_has_room_again(tmp_path):
    """A quota on the file's size, lifted after the second line."""
    program = PRINT.replace(
        "for number", "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (8, -1))\nfor number"
    )
    program = program.replace(
        "    sys.stderr", "    if number: resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))\n    sys.stderr"
    )
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run([sys.executable, "-c", program, "goes on", tmp_path / "done"], stdout=log, cwd=ROOT)
    assert done.returncode == 0
    assert (tmp_path / "log").read_text() == "line 0\nlline 2\n"


def test_a_process_whose_output_was_closed_at_its_start_prints_nowhere(tmp_path):
    command = f"exec {sys.executable} -c '{PRINT}' 'goes on' {tmp_path}/done >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], cwd=ROOT).returncode == 0
    assert (tmp_path / "done").read_text() == "..."


@pytest.mark.parametrize("words", ["plan tiny", "data tiny", "", "--help", "plan tiny --help", "tiny --help"])
def test_a_command_that_only_prints_ends_quietly_when_its_reader_leaves(words):
    command = [sys.executable, "-m", "recipes", *words.split()]
    done = subprocess.run(command, stdout=without_reader(), stderr=subprocess.PIPE, cwd=ROOT)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_the_first_line_of_a_plan_is_all_that_head_shows():
    command = f"set -o pipefail; {sys.executable} -m recipes plan tiny | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode in (0, 128 + signal.SIGPIPE)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_a_pad_token_of_ours_is_no_warning_of_the_trainer(tokenizer, caplog):
    config = LlamaConfig(pad_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id)
    model = SimpleNamespace(config=config, generation_config=None)
    quiet_libraries()
    align_special_tokens(model, tokenizer)
    assert config.pad_token_id == tokenizer.pad_token_id  # it had something to say
    assert not caplog.records


def test_sums_of_matmuls_have_full_precision_in_the_block_alone_and_the_users_choice_comes_back():
    import torch

    matmul = torch.backends.cuda.matmul

    def allowed() -> list[bool]:
        return [
            getattr(matmul, f"allow_{n}_reduced_precision_reduction{k}")
            for n in ("bf16", "fp16")
            for k in ("", "_split_k")
        ]

    matmul.allow_fp16_reduced_precision_reduction = (False, False)
    try:
        with pytest.raises(ValueError), full_precision_sums():
            assert allowed() == [False, True, False, False]
            raise ValueError
        assert allowed() == [True, True, False, False]
    finally:
        matmul.allow_fp16_reduced_precision_reduction = True


def test_half_of_what_a_launcher_sets_is_no_process_of_a_run():
    whole = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    environment, _ = environment_after_import(**whole)
    assert environment["RANK"] == "1"
    for missing in whole:
        environment, _ = environment_after_import(**{name: whole[name] for name in whole if name != missing})
        assert not environment.keys() & {"RANK", "LOCAL_RANK", "WORLD_SIZE"}


def test_a_tracker_is_told_of_each_run_of_a_process_and_never_in_the_place_of_the_user(monkeypatch):
    """A notebook has several runs in one process."""
    monkeypatch.setattr(process_state, "_told_trackers", {})
    monkeypatch.setenv("WANDB_DIR", "")  # so that it is as it was after the test
    monkeypatch.delenv("WANDB_DIR")
    for place in ("outputs/a", "outputs/b"):
        process_state.set_tracker_variable("WANDB_DIR", place)
        assert os.environ["WANDB_DIR"] == place
    os.environ["WANDB_DIR"] = "mine"
    process_state.set_tracker_variable("WANDB_DIR", "outputs/c")
    assert os.environ["WANDB_DIR"] == "mine"
