import time

from transformers import TrainerControl, TrainerState, TrainingArguments

from common.run.metrics_file import read_metrics
from common.run.progress import ProgressReport
from common.run.training import train
from tests.run.test_training import prepare


def test_the_progress_line(recipe, capsys):
    train(*prepare(recipe))
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("step 3/3"))
    parts = [part.strip() for part in line.split("|")]
    assert [part.split()[0] for part in parts[1:]] == ["loss", "lr", parts[3].split()[0], "peak", "0:00"]
    assert parts[3].endswith("tokens/s") and parts[4].endswith("GiB") and parts[5] == "0:00 left"
    assert "step 3: held-out loss" in out


def wait_for(line: str, capsys) -> list[str]:
    """What was printed until the line was."""
    deadline, out = time.monotonic() + 60, ""
    while line not in out.splitlines():
        assert time.monotonic() < deadline, out
        time.sleep(0.01)
        out += capsys.readouterr().out
    return out.splitlines()


def test_a_slow_step_says_where_it_is(tmp_path, capsys):
    """As the trainer calls it: the first step of two micro-batches takes longer than `every`."""
    report = ProgressReport(tmp_path, every=0.1)
    arguments = TrainingArguments(output_dir=str(tmp_path), gradient_accumulation_steps=2, use_cpu=True)
    state, control = TrainerState(max_steps=3), TrainerControl()
    with report.without_silence():
        report.on_train_begin(arguments, state, control)
        time.sleep(0.2)
        assert capsys.readouterr().out == ""  # no step is under way
        report.on_step_begin(arguments, state, control)
        wait_for("step 1/3 under way, micro-batch 1 of 2", capsys)
        report.on_substep_end(arguments, state, control)
        wait_for("step 1/3 under way, micro-batch 2 of 2", capsys)
        report.on_step_end(arguments, state, control)


def test_half_a_line_that_a_killed_run_left_is_ignored(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_silence_after_quick_steps_ends_with_the_line_of_the_last_one(tmp_path, capsys):
    report = ProgressReport(tmp_path, every=0.5)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    state, control = TrainerState(max_steps=9), TrainerControl()
    with report.without_silence():
        report.on_train_begin(arguments, state, control)
        for step in (1, 2):
            state.global_step = step
            report.on_log(arguments, state, control, {"loss": 1.0 / step, "grad_norm": 1.0, "learning_rate": 1e-4})
        report.on_step_begin(arguments, state, control)
        lines = wait_for("step 3/9 under way", capsys)
    assert [line.split(" | ")[:2] for line in lines[:2]] == [["step 1/9", "loss 1.0000"], ["step 2/9", "loss 0.5000"]]
