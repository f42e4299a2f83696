import resource
import signal

import pytest

from common.run.metrics_file import MetricsFile, read_metrics


@pytest.fixture
def file_limit():
    """file_limit(bytes): no file may grow beyond it; the write that crosses it is taken in part."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_line_that_fits_only_in_part_waits_whole_and_no_half_of_it_stays(tmp_path, file_limit, capsys):
    metrics = MetricsFile(tmp_path)
    file_limit(100)
    for step in range(1, 9):  # lines of 26 bytes
        metrics.entries.append({"step": step, "loss": 1.25})
        metrics.write()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.endswith("}\n") and 50 < len(text) <= 100
    assert capsys.readouterr().out.count("the lines wait in memory") == 1
    file_limit(1 << 20)
    metrics.write()
    assert [entry["step"] for entry in read_metrics(tmp_path)] == list(range(1, 9))


def test_a_resumed_run_forgets_the_later_steps_and_half_a_line(tmp_path):
    lines = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo'
    (tmp_path / "metrics.jsonl").write_text(lines)
    metrics = MetricsFile(tmp_path)
    metrics.keep_until(1)
    metrics.write()
    assert (tmp_path / "metrics.jsonl").read_text() == lines[: lines.index("\n") + 1]
    metrics.entries.append({"step": 2, "loss": 0.5})
    metrics.write()
    assert [entry["loss"] for entry in read_metrics(tmp_path)] == [2.0, 0.5]
