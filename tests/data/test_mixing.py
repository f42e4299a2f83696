"""A mixture has its sources' rows in the shares that their weights say, and no row twice."""

import json
from collections import Counter

import pytest

from common.data.mixing import mix
from common.data.rows import find_examples, load_rows
from common.recipe import DataSpec, UserError
from tests.data.test_rows import conversation


def write(folder, name: str, count: int, words: int = 1) -> str:
    path = folder / name
    path.write_text("\n".join(conversation(f"{name} {n}", "word " * words) for n in range(count)) + "\n")
    return str(path)


def questions(packed, tokenizer) -> Counter[str]:
    """The name of the source that each example of packed rows comes from, counted."""
    found = Counter[str]()
    for row in packed:
        start = 0
        for length in row["seq_lengths"]:
            text = tokenizer.decode(row["input_ids"][start : start + length])
            found[text.split("<|user|>")[1].split()[0]] += 1
            start += length
    return found


@pytest.mark.parametrize(
    "rows, weights, expected",
    [
        ((100, 100), (0.8, 0.2), (100, 25)),
        ((100, 100), (4, 1), (100, 25)),
        ((1000, 10), (0.5, 0.5), (10, 10)),
        ((70, 20, 500), (7, 2, 1), (70, 20, 10)),
        ((100,), (0.3,), (100,)),
        ((1000, 2), (1, 1000), (1, 2)),  # at least one of each
    ],
)
def test_the_first_source_that_is_used_up_ends_the_mixture(rows, weights, expected):
    assert tuple(int(mask.sum()) for mask in mix(rows, weights, 0)) == expected
    assert tuple(map(len, mix(rows, weights, 0))) == rows


def test_the_seed_decides_which_rows_are_taken():
    first, again, other = (mix((1000, 50), (1, 1), seed)[0].tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_a_mixture_of_files_is_trained_in_the_shares_of_its_weights(tmp_path, tokenizer, capsys):
    sources = ((write(tmp_path, "a.jsonl", 80), 0.8), (write(tmp_path, "b.jsonl", 90, words=12), 0.2))
    rows = load_rows(DataSpec(sources=sources, eval_rows=0), tokenizer, 64)
    assert questions(rows.train, tokenizer) == {"a.jsonl": 80, "b.jsonl": 20}
    line = next(line for line in capsys.readouterr().out.splitlines() if "mixed by weight" in line)
    assert f"80 of 80 rows of {sources[0][0]}, " in line and f"20 of 90 rows of {sources[1][0]}, " in line
    trained = [sum(label != -100 for row in rows.train for label in row["labels"])]
    assert [report.mixed for report in rows.reports] == [80, 20]
    share = rows.reports[0].trained_tokens / sum(trained)  # of the first source all rows are taken
    assert rows.reports[0].mixed_share == pytest.approx(share) and f"{share:.0%} of the trained tokens;" in line
    assert sum(report.mixed_share for report in rows.reports) == pytest.approx(1)


def test_held_out_rows_are_of_the_mixture_in_its_shares(tmp_path, tokenizer):
    sources = ((write(tmp_path, "a.jsonl", 300), 3), (write(tmp_path, "b.jsonl", 900), 1))
    spec = DataSpec(sources=sources, eval_rows=40)
    rows = load_rows(spec, tokenizer, 64)
    assert questions(rows.evaluation, tokenizer) == {"a.jsonl": 30, "b.jsonl": 10}
    assert questions(rows.train, tokenizer) == {"a.jsonl": 270, "b.jsonl": 90}


def test_a_mixture_may_have_held_out_rows_of_its_own(tmp_path, tokenizer, capsys):
    sources = ((write(tmp_path, "a.jsonl", 30), 1), (write(tmp_path, "b.jsonl", 30), 2))
    shared = tmp_path / "held.jsonl"
    shared.write_text((tmp_path / "a.jsonl").read_text() + conversation("c.jsonl 0", "word") + "\n")
    rows = load_rows(DataSpec(sources=sources, eval_source=str(shared)), tokenizer, 64)
    assert questions(rows.train, tokenizer) == {"a.jsonl": 15, "b.jsonl": 30}
    assert questions(rows.evaluation, tokenizer) == {"a.jsonl": 30, "c.jsonl": 1}
    assert [report.mixed for report in rows.reports] == [15, 30, None]
    assert "15 of the 31 held-out examples are also among the training ones" in capsys.readouterr().out


def test_sources_may_have_other_formats(tmp_path, tokenizer):
    other = tmp_path / "b.jsonl"
    other.write_text("\n".join(json.dumps({"text": f"A text of its own, {n}"}) for n in range(20)))
    spec = DataSpec(sources=((write(tmp_path, "a.jsonl", 20), 1), (str(other), 1)), eval_rows=0)
    assert [report.format_name for report in load_rows(spec, tokenizer, 64).reports] == ["messages", "text"]


def test_a_fault_in_any_source_stops_the_run(tmp_path, tokenizer):
    bad = tmp_path / "b.jsonl"
    bad.write_text("{\n" * 3)
    with pytest.raises(UserError, match=f"3 of 3 rows of {bad} cannot be used"):
        load_rows(DataSpec(sources=((write(tmp_path, "a.jsonl", 20), 1), (str(bad), 1))), tokenizer, 64)


def test_rows_of_a_bad_step_are_found_in_every_source(tmp_path, tokenizer):
    sources = tuple((write(tmp_path, name, 10), 1) for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    spec = DataSpec(sources=sources, eval_rows=0)
    wanted = []
    for row in load_rows(spec, tokenizer, 64).train:
        start = 0
        for length in row["seq_lengths"]:
            ids = row["input_ids"][start : start + length]
            if any(f"{name} 3<" in tokenizer.decode(ids) for name in ("a.jsonl", "c.jsonl")):
                wanted.append(ids)
            start += length
    assert len(wanted) == 2
    places = find_examples(spec, tokenizer, 64, wanted)
    assert places == [f"{sources[0][0]}:4", f"{sources[2][0]}:4"]


@pytest.mark.parametrize("again", ["{0}/./a.jsonl", "{0}/b.jsonl {0}/a.jsonl", "{0}/a*.jsonl", "{0}/link.jsonl"])
def test_a_file_in_two_sources_is_refused_however_it_is_spelt(tmp_path, tokenizer, again):
    first, other = write(tmp_path, "a.jsonl", 20), write(tmp_path, "b.jsonl", 20)
    (tmp_path / "link.jsonl").symlink_to(first)
    sources = ((first, 1), (again.format(tmp_path), 1))
    with pytest.raises(UserError, match=f"{first} is in two of DataSpec.sources, "):
        load_rows(DataSpec(sources=sources), tokenizer, 64)
    load_rows(DataSpec(sources=((first, 1), (other, 1))), tokenizer, 64)


@pytest.mark.parametrize("field", ["sources", "eval_source"])
def test_a_missing_file_is_named_before_another_one_is_read(tmp_path, tokenizer, capsys, field):
    there, missing = write(tmp_path, "a.jsonl", 20), str(tmp_path / "b.jsonl")
    values = {"sources": ((there, 1), (missing, 1))} if field == "sources" else {"source": there, field: missing}
    with pytest.raises(UserError, match=f"there is no data file {missing}"):
        load_rows(DataSpec(**values), tokenizer, 64)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("shared", "line"),
    [
        (0, None),
        (1, "1 example is in two of the sources, token for token"),
        (7, "7 examples are in two of the sources, token for token"),
    ],
)
def test_copies_between_two_sources_are_counted(tmp_path, tokenizer, capsys, shared, line):
    first = write(tmp_path, "a.jsonl", 20)
    other = tmp_path / "b.jsonl"
    own = [conversation(f"b {n}", "word") for n in range(20 - shared)]
    other.write_text("\n".join([*(tmp_path / "a.jsonl").read_text().splitlines()[:shared], *own]) + "\n")
    rows = load_rows(DataSpec(sources=((first, 1), (str(other), 1))), tokenizer, 64)
    assert [report.mixed_copies for report in rows.reports] == [0, shared]
    found = [text.strip() for text in capsys.readouterr().out.splitlines() if "two of the sources" in text]
    assert found == ([line] if line else [])
