"""The benchmark beside other stacks: its arithmetic, and on a CPU a run of all of it, small."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.bench import describe_machine, in_teraflops, read_report, summarize, table
from benchmarks.model_flops import flops_per_token
from benchmarks.run_stack import tokens_per_s
from benchmarks.stacks import DPO_STACKS, NEEDS_GPU, STACKS, Job, ours, packed_pair, read_pairs
from common.model.config import load_config
from common.model.weight_streaming import weight_ring
from common.plan.speed import data_sheet_flops
from common.recipe import UserError
from common.tokens.labels import IGNORED
from recipes.llama3_8b import RECIPE
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
        sheet_flops=8000.0,
    )
    ours, trl, unsloth = found
    assert (ours["tokens_per_s"], trl["tokens_per_s"]) == (200.0, 100.0)
    assert (ours["flops_per_second"], ours["mfu"], ours["share_of_ceiling"]) == (2000, 2000 / 8000, 2000 / 4000)
    assert ours["loss_difference"] == 0.5
    assert "loss_difference" not in trl
    assert unsloth["failed"] == "out of memory"
    lines = table({"summary": found}).splitlines()
    assert "| ours | 200 (200 – 200) | – | 1.0 GiB | 5 s | 2e-09 | 25% | 50% | 0.5000 |" in lines[2]
    assert "| trl | 100 (100 – 100) | 2.00 × |" in lines[3]
    assert "| unsloth | out of memory |" in lines[4]
    assert len({line.count("|") for line in lines}) == 1


def test_a_card_without_a_known_data_sheet_has_no_mfu():
    (found,) = summarize([measurement("ours", [1.0], [3.0])], matmul_flops=4000.0)
    assert found["mfu"] is None
    assert "| – | 50% |" in table({"summary": [found]})
    assert [in_teraflops(flops) for flops in (4.02e14, 9.94e12, 5.67e10)] == ["402", "9.9", "0.057"]


def test_the_flops_of_a_token_are_those_without_recompute():
    """Derived: 4 for each number of a frozen matrix, 6 for one of an adapter, and causal attention's six matmuls."""
    config, tokens = load_config(RECIPE.model), 2048
    hidden, inner, keys = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    frozen = config.num_hidden_layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner)
    frozen += hidden * config.vocab_size  # the head
    adapters = 41_943_040  # rank 16, tests/model/test_lora.py
    # Causal: half of 2 FLOP * tokens * width, for two matmuls forward and four backward.
    attention = config.num_hidden_layers * 6 * tokens * hidden
    assert flops_per_token("llama3-8b", tokens) == pytest.approx(4 * frozen + 6 * adapters + attention, rel=1e-3)


def test_the_page_shows_the_model_flops_and_nvidias_figure_by_them():
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    flops = {tokens: flops_per_token("llama3-8b", tokens) for tokens in (2048, 4096, 8192)}
    assert "| Llama 3 8B | " + " | ".join(f"{count / 1e9:.1f}" for count in flops.values()) + " |" in page
    published = 12_473 * flops[4096]  # tokens per second of the page's source
    mfu = published / data_sheet_flops("NVIDIA H100 80GB HBM3")
    assert f"{published / 1e12:.0f}\nTFLOP/s, an MFU of {100 * mfu:.0f} %" in page


def test_a_bench_goes_on_only_with_results_of_its_own_settings(tmp_path):
    path = tmp_path / "bench.json"
    job = JOB | {"warmup": 5, "steps": 20, "accumulation": 1}
    path.write_text(json.dumps({"machine": describe_machine(), "measurements": [{"job": job}]}))
    asked = Namespace(warmup=5, steps=20, accumulation=1)
    assert read_report(path, asked)["measurements"][0]["job"] == job
    with pytest.raises(UserError, match="was measured with --steps 20, not 10: take another --out"):
        read_report(path, Namespace(warmup=5, steps=10, accumulation=1))
    path.write_text(json.dumps({"machine": "another", "measurements": []}))
    with pytest.raises(UserError, match="was measured on another, and this is"):
        read_report(path, asked)


def test_the_page_shows_the_committed_results():
    report = json.loads((ROOT / "benchmarks" / "results" / "bench_cpu.json").read_text())
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert table(report) in page
    assert report["command"] in page and report["machine"] in page and report["date"] in page


def test_the_page_on_preferences_shows_the_committed_results():
    report = json.loads((ROOT / "benchmarks" / "results" / "bench_dpo_cpu.json").read_text())
    page = (ROOT / "docs" / "preferences.md").read_text(encoding="utf-8")
    assert table(report) in page and report["machine"] in page and report["date"] in page
    rates = {entry["stack"]: entry["tokens_per_s"] for entry in report["summary"]}
    assert rates["ours, dpo"] >= 1.5 * rates["trl, dpo"]


@pytest.mark.slow  # three stacks, each in a process of its own
def test_the_stacks_that_train_on_pairs_are_timed_and_give_the_same_losses(tmp_path):
    command = [sys.executable, "-m", "benchmarks.bench", "--dpo", "--steps", "4", "--warmup", "2", "--rounds", "1"]
    command += ["--tokens", "128", "--out", str(tmp_path / "bench.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    entries = {entry["stack"]: entry for entry in report["summary"]}
    assert list(entries) == list(DPO_STACKS)
    assert all(entry["tokens_per_s"] > 0 for entry in entries.values())
    assert entries["ours, dpo"]["loss_difference"] < 0.02  # as in benchmarks/parity.py
    assert len(report["measurements"][0]["losses"]) == 6


def test_our_stack_has_its_weights_where_the_plan_has_them(tmp_path):
    """A longest row may be one whose weights wait in host memory."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(list(range(5, 69))) + "\n")
    job = Job(str(ROOT / "models" / "tiny"), str(rows), 64, 1, 1, 1, None, 0.0)
    trainer = ours(job, str(tmp_path / "run"), weights_on_host=3)
    assert len(weight_ring(trainer.model).blocks) == 3


@pytest.mark.parametrize("tokens", [8, 256])
def test_both_stacks_are_given_the_same_pairs(tokens, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(list(range(tokens))) + "\n")
    (pair,) = read_pairs(Job("", str(rows), tokens, 1, 1, 1, None, 0.0))
    packed = packed_pair(pair)
    assert [len(ids) for ids in pair.values()] == [tokens // 4] * 3
    assert packed["seq_lengths"] == [tokens // 2] * 2 and len(packed["input_ids"]) == len(packed["labels"]) == tokens
    assert packed["input_ids"][: tokens // 2] == pair["prompt_ids"] + pair["chosen_ids"]
    trained = [label for label in packed["labels"] if label != IGNORED]
    assert trained == pair["chosen_ids"] + pair["rejected_ids"]


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
    again = subprocess.run([*command, "--resume"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert table(report) in again.stdout
    assert "tokens/s\n" not in again.stdout, "a measurement was made twice"


@pytest.mark.slow
def test_the_gpu_check_is_rehearsed():
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu_check", "--rehearse"], cwd=ROOT, check=False)
    assert done.returncode == 0
    summary = json.loads((ROOT / "outputs" / "gpu_check" / "summary.json").read_text())
    pieces = gpu_check.pieces(ROOT, None, rehearse=True)
    assert all("done in" in summary[name] for name in pieces)
    rows = json.loads((ROOT / "outputs" / "gpu_check" / "rows_tiny.json").read_text())["tries"]
    assert all("failed" not in one for one in rows["trl"]) and len(rows["trl"]) == 2
    assert rows["unsloth"][0]["failed"]  # there is no GPU, or no unsloth


def test_the_gpu_check_has_a_piece_for_each_model_and_length(tmp_path):
    names = list(gpu_check.pieces(tmp_path, None, rehearse=False))
    assert names[0] == "kernels"  # what all else stands on
    for model in gpu_check.MODELS:
        assert f"memory-{model}" in names
        assert all(f"bench-{model}-{tokens}" in names for tokens in (2048, 4096, 8192))


def test_the_two_pieces_of_a_bench_have_all_stacks_and_the_second_adds_to_the_first(tmp_path):
    commands = gpu_check.pieces(tmp_path, "peers", rehearse=False)
    first, second = (commands[f"bench-{part}llama3-8b-4096"] for part in ("", "others-"))
    assert first[-2:] == second[-2:]  # --out
    assert ("--resume" in first, "--resume" in second) == (False, True)
    assert "--resume" in gpu_check.pieces(tmp_path, None, rehearse=False, resume=True)["bench-llama3-8b-4096"]
    assert {word for word in (*first, *second) if word in STACKS} == set(STACKS)
    assert set(gpu_check.LONGEST_STACKS) < set(STACKS)


def test_long_rows_are_compared_at_three_lengths_and_searched_for_each_stack_into_one_file(tmp_path):
    """Each search by itself, because one takes ten minutes; all but the first go on with what is there."""
    commands = gpu_check.pieces(tmp_path, "peers", rehearse=False)
    for beginning, pieces in (("rows-llama3-8b", 3), ("longest-llama3-8b-12gib", 5), ("longest-llama3-8b-24gib", 5)):
        found = [commands[name] for name in gpu_check.chosen_pieces([beginning], commands)]
        assert len(found) == pieces and len({command[-1] for command in found}) == 1
        assert ["--resume" in command for command in found] == [False] + [True] * (pieces - 1)
    searched = {word for name in commands if name.startswith("longest") for word in commands[name]} & set(STACKS)
    assert searched == set(gpu_check.LONGEST_STACKS) >= {"ours", "unsloth", "unsloth, tiled MLP", "trl, offload"}


def test_what_streams_is_measured_for_an_8b_at_four_numbers_of_layers_and_for_a_70b(tmp_path):
    commands = gpu_check.pieces(tmp_path, None, rehearse=False)
    eight, seventy = commands["streaming-llama3-8b"], commands["streaming-llama3-70b"]
    assert eight[eight.index("--on-host") + 1 :][:4] == ["0", "8", "16", "32"]
    assert seventy[seventy.index("--on-host") + 1] == "80" and "--embedding-on-host" in seventy


def test_each_kind_of_command_is_rehearsed_and_each_piece_is_within_the_limit(tmp_path):
    def modules(rehearse: bool) -> set[str]:
        return {command[2] for command in gpu_check.pieces(tmp_path, None, rehearse).values()}

    assert modules(rehearse=False) - modules(rehearse=True) == {"recipes"}  # make dryrun is that without a GPU
    names = gpu_check.pieces(tmp_path, None, rehearse=False)
    assert all(0 < gpu_check.estimated_seconds(name) <= gpu_check.LIMIT_SECONDS for name in names)


def test_pieces_that_would_end_too_late_are_left_out_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "REPOSITORY", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--rehearse", "--pieces", "rows", "--seconds", "5"])
    assert gpu_check.main() == 0
    assert "rows-tiny … left out: it takes about 590 s, by a guess" in capsys.readouterr().out


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


def test_a_piece_that_runs_too_long_is_stopped_with_all_that_it_started_and_its_log_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LIMIT_SECONDS", 1)
    script = "import subprocess; print('begun', subprocess.Popen(['sleep', '60']).pid, flush=True); input()"
    command = ["bash", "-c", f'sleep 60 | {sys.executable} -c "{script}"']
    assert gpu_check.run_piece("long", command, tmp_path / "long.log").startswith("stopped after 1 s")
    started = (tmp_path / "long.log").read_text().split("begun ")[1]
    for _ in range(100):  # a killed process ends a moment later
        if not is_running(int(started)):
            return
        time.sleep(0.05)
    os.kill(int(started), 9)
    raise AssertionError("a process that the piece started runs on")


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()
