"""The benchmark beside other stacks: its arithmetic, and on a CPU a run of all of it, small."""

import json
import subprocess
import sys

import pytest

from benchmarks import gpu_check
from benchmarks.bench import describe_failure, flops_per_token, summarize, table, tokens_per_s
from benchmarks.stacks import NEEDS_GPU, STACKS
from tests.conftest import ROOT

JOB = {"tokens": 100, "accumulation": 2}


def measurement(stack: str, seconds: list[float], losses: list[float], **values: object) -> dict:
    sizes = {"allocated_bytes": None, "reserved_bytes": None, "resident_bytes": 1 << 30}
    common = {"model": "tiny", "job": JOB, "flops_per_token": 10.0, "policy": None, "first_step_seconds": 5.0}
    return common | sizes | {"stack": stack, "seconds": seconds, "losses": losses} | values


def test_the_rate_is_that_of_the_median_step_of_the_median_round():
    steps = [[1.0, 2.0, 9.0], [4.0], [1.0]]
    rounds = [measurement("ours", seconds, [3.0]) for seconds in steps]
    assert [tokens_per_s(one) for one in rounds] == [100.0, 50.0, 200.0]
    (found,) = summarize(rounds, 4000.0)
    assert (found["tokens_per_s"], found["slowest_and_fastest_round"]) == (100.0, [50.0, 200.0])


def test_the_summary_compares_rate_losses_and_ceiling():
    found = summarize(
        [
            measurement("ours", [1.0], [3.0, 2.5]),
            measurement("trl", [2.0], [3.0, 2.0]),
            {"model": "tiny", "job": JOB, "flops_per_token": 10.0, "stack": "unsloth", "failed": "out of memory"},
        ],
        matmul_flops=4000.0,
    )
    ours, trl, unsloth = found
    assert (ours["tokens_per_s"], trl["tokens_per_s"]) == (200.0, 100.0)
    assert ours["share_of_ceiling"] == 200 * 10 / 4000
    assert ours["loss_difference"] == 0.5
    assert "loss_difference" not in trl
    assert unsloth["failed"] == "out of memory"
    lines = table({"summary": found}).splitlines()
    assert "| ours | 200 (200 – 200) | – | 1.0 GiB | 5 s | 50% | 0.5000 |" in lines[2]
    assert "| trl | 100 (100 – 100) | 2.00 × |" in lines[3]
    assert "| unsloth | out of memory |" in lines[4]


def test_a_process_that_failed_says_why_in_a_few_words():
    assert describe_failure("Traceback\n  File x\ntorch.OutOfMemoryError: CUDA out of memory. Tried") == "out of memory"
    assert describe_failure("Traceback\ntorch.AcceleratorError: CUDA error: out of memory") == "out of memory"
    assert describe_failure("Traceback\nValueError: no such thing\nwarning: more") == "ValueError: no such thing"
    assert describe_failure("") == "no message"


def test_the_flops_of_a_token_are_those_without_recompute():
    # Derived, at 2k tokens with causal attention: 32.1 GFLOP for Llama 3 8B
    assert flops_per_token("llama3-8b", 2048) == pytest.approx(32.1e9, rel=0.02)


def test_the_page_shows_the_committed_results():
    report = json.loads((ROOT / "benchmarks" / "results" / "bench_cpu.json").read_text())
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert table(report) in page
    assert report["command"] in page and report["machine"] in page and report["date"] in page


@pytest.mark.slow
def test_every_stack_that_runs_on_a_cpu_is_timed(tmp_path):
    command = [sys.executable, "-m", "benchmarks.bench", "--steps", "4", "--warmup", "2", "--rounds", "1"]
    command += ["--tokens", "128", "--out", str(tmp_path / "bench.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    entries = {entry["stack"]: entry for entry in report["summary"]}
    assert list(entries) == [stack for stack in STACKS if stack not in NEEDS_GPU]
    # TRL 1.16 wraps the method that transformers 5.23 renamed; when it no longer fails, so much the better.
    working = [entry for entry in entries.values() if entry["stack"] != "trl, selective"]
    for entry in working:
        assert entry["tokens_per_s"] > 0, entry
        assert entry.get("loss_difference", 0.0) < 0.02  # as in benchmarks/parity.py
    assert len(report["measurements"][0]["seconds"]) == 4
    assert len(report["measurements"][0]["losses"]) == 6
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    assert table(report) in done.stdout


@pytest.mark.slow
def test_the_gpu_check_is_rehearsed():
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu_check", "--rehearse"], cwd=ROOT, check=False)
    assert done.returncode == 0
    summary = json.loads((ROOT / "outputs" / "gpu_check" / "summary.json").read_text())
    assert all("done in" in summary[name] for name in ("kernels", "forms", "bench-tiny-128", "profile"))


def test_the_gpu_check_has_a_piece_for_each_model_and_length(tmp_path):
    names = list(gpu_check.pieces(tmp_path, None, rehearse=False))
    assert names[0] == "kernels"  # what all else stands on
    for model in gpu_check.MODELS:
        assert f"memory-{model}" in names
        assert all(f"bench-{model}-{tokens}" in names for tokens in (2048, 4096, 8192))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "error: torch sees no GPU here"),
        (["--rehearse", "--pieces", "kernel"], "error: there is no piece 'kernel'; there are: kernels, forms"),
    ],
)
def test_the_gpu_check_says_what_it_cannot_do(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check", *flags])
    assert gpu_check.main() == 2
    assert message in capsys.readouterr().err


def test_a_piece_that_runs_too_long_is_stopped_and_its_log_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LIMIT_SECONDS", 1)
    command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    assert gpu_check.run_piece("long", command, tmp_path / "long.log").startswith("stopped after 1 s")
    assert "begun" in (tmp_path / "long.log").read_text()
