"""The longest row: the search for it, its report, and on a CPU a search with a small model in little memory."""

import json
import sys

import pytest

from benchmarks.longest_row import longest, main, next_tokens, read_report, speed_table, stopped_by, table, too_early
from common.recipe import UserError


def search(limit: int, first: int, step: int, most: int) -> list[int]:
    """The lengths that are tried where rows of up to `limit` tokens train."""
    trained: dict[int, bool] = {}
    while (tokens := next_tokens(trained, first, step, most)) is not None:
        assert tokens % step == 0 and 0 < tokens <= most and tokens not in trained
        trained[tokens] = tokens <= limit
    return list(trained)


@pytest.mark.parametrize(
    "limit", [0, 1, 1023, 1024, 1025, 5000, 16_384, 16_385, 78_475, 113_000, 262_143, 262_144, 10**6]
)
@pytest.mark.parametrize("first", [1024, 3072, 16_384, 262_144])
def test_the_search_ends_at_the_longest_multiple_that_trains(limit, first):
    tried = search(limit, first, 1024, 262_144)
    longest_trained = max((tokens for tokens in tried if tokens <= limit), default=0)
    assert longest_trained == min(limit // 1024 * 1024, 262_144)
    assert len(tried) <= 17  # eight doublings and as many halvings


def test_a_row_is_doubled_until_it_fails_and_then_halved_in_between():
    assert search(78_475, 16_384, 4096, 524_288) == [16_384, 32_768, 65_536, 131_072, 98_304, 81_920, 73_728, 77_824]


def one(tokens: int, failed: str | None = None, seconds: float = 2.0) -> dict:
    job = {"tokens": tokens, "accumulation": 1}
    if failed:
        return {"job": job, "failed": failed, "try_seconds": 60.0}
    sizes = {"allocated_bytes": 22 << 30, "reserved_bytes": 23 << 30}
    return {"job": job, "seconds": [seconds], "try_seconds": 60.0} | sizes


TRIES = [one(1024), one(2048), one(4096, "out of memory"), one(3072, "took longer than 60 s")]


def test_the_report_says_how_fast_the_longest_is_and_what_stopped_a_longer_one():
    assert longest(TRIES)["job"]["tokens"] == 2048
    assert stopped_by(TRIES) == "3,072 tokens: took longer than 60 s"
    assert stopped_by(TRIES[:2]) == "nothing: no longer row was tried"
    report = {
        "data_sheet_flops": 100e12,
        "flops_per_token": {"2048": 3e10},
        "tries": {"ours": TRIES, "trl": [one(1024, "out of memory")]},
    }
    lines = table(report).splitlines()
    # 2,048 tokens in 2 s are 1,024 a second, and 30.7 TFLOP/s
    assert lines[2] == "| ours | 2,048 | 1,024 | 31 | 31% | 22.0 / 23.0 GiB | 3,072 tokens: took longer than 60 s |"
    assert lines[3] == "| trl | none | – | – | – | – | 1,024 tokens: out of memory |"
    assert len({line.count("|") for line in lines}) == 1


def test_a_try_that_took_too_long_is_made_again_with_more_time_and_no_other():
    assert [too_early(made, 60.0) for made in TRIES] == [False] * 4
    assert [too_early(made, 120.0) for made in TRIES] == [False, False, False, True]


def test_a_search_goes_on_only_with_tries_of_its_own_setting(tmp_path):
    path = tmp_path / "longest.json"
    report = {"machine": "a card", "model": "tiny", "card_gib": 24.0, "step": 1024, "tries": {}}
    path.write_text(json.dumps(report))
    assert read_report(path, report) == report
    with pytest.raises(UserError, match="has the card_gib 24.0, and this is 16.0: take another --out"):
        read_report(path, report | {"card_gib": 16.0})


def test_speeds_at_given_lengths_stand_beside_each_other():
    tries = {"ours": [one(1024), one(2048)], "trl": [one(1024, "out of memory")]}
    lines = speed_table({"tries": tries}).splitlines()
    assert lines[0] == "| stack | 1,024 tokens | 2,048 tokens |"
    assert lines[2:] == ["| ours | 512 tokens/s | 1,024 tokens/s |", "| trl | out of memory | not tried |"]
    assert len({line.count("|") for line in lines}) == 1


def test_where_the_time_is_over_it_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    flags = ["--model", "tiny", "--stacks", "trl", "--seconds", "30", "--out", str(tmp_path / "longest.json")]
    monkeypatch.setattr(sys, "argv", ["longest_row", *flags])
    assert main() == 0
    assert "the time was over before all was tried: the same command with --resume goes on" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--first", "2048", "--most", "8192"], ["--lengths", "64", "128"]])
def test_a_stack_that_is_not_installed_is_tried_once_and_said(tmp_path, monkeypatch, capsys, flags):
    (tmp_path / "unsloth.py").write_text("import no_such_library")
    out = tmp_path / "longest.json"
    flags = [*flags, "--model", "tiny", "--stacks", "unsloth", "--peers", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["longest_row", *flags])
    assert main() == 0
    (tried,) = json.loads(out.read_text())["tries"]["unsloth"]
    assert tried["failed"] == stopped_by([tried]) == "not installed: no_such_library"
    assert too_early(tried, 1.0)  # so another run tries again
    assert "| not installed: no_such_library |" in capsys.readouterr().out


@pytest.mark.slow  # each try imports torch, transformers and trl
def test_the_longest_row_in_little_memory_is_found_once(tmp_path, monkeypatch, capsys):
    """The limit is the system's, on the data of each process: about 1,000 tokens fit, and 6,000 do not."""
    out = tmp_path / "longest.json"
    flags = ["--model", "tiny", "--stacks", "trl", "--card-gib", "2.25", "--first", "2048", "--step", "2048"]
    monkeypatch.setattr(sys, "argv", ["longest_row", *flags, "--most", "8192", "--out", str(out)])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # each thread's stack counts
    assert main() == 0
    tries = json.loads(out.read_text())["tries"]["trl"]
    assert longest(tries)["job"]["tokens"] in (2048, 4096)
    assert stopped_by(tries).endswith("tokens: out of memory")
    shown = table(json.loads(out.read_text()))
    assert shown in capsys.readouterr().out
    sys.argv.append("--resume")
    assert main() == 0
    again = capsys.readouterr().out
    assert shown in again
    assert "tokens/s\n" not in again, "a row was tried twice"
