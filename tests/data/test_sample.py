"""The examples that are shown: drawn by the seed, readable, and with what is rare among them."""

import json

import pytest

from common.data import sample
from common.data.sample import draw_examples
from common.recipe import DataSpec, UserError
from common.tokens.chat_format import ChatFormat
from tests.data.test_rows import conversation, write


def chat(*contents: str, system: str = "") -> str:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
    return json.dumps({"messages": [{"role": "system", "content": system}] * bool(system) + messages})


def draw(source: str, tokenizer, count: int = 3, seed: int = 0, seq_len: int = 128, **spec):
    return draw_examples(DataSpec(source, **spec), ChatFormat(tokenizer), seq_len, seed, count)


def places(examples) -> list[int]:
    return [int(example.place.rpartition(":")[2]) for example in examples]


def test_the_seed_draws_and_the_order_is_that_of_the_source(tmp_path, tokenizer):
    source = write(tmp_path, *[conversation(f"Question {n}") for n in range(500)])
    first, again, other = (places(draw(source, tokenizer, 5, seed)) for seed in (0, 0, 1))
    assert first == again == sorted(first) and first != other == sorted(other)
    assert len(set(first)) == 5


def test_late_rows_are_drawn_as_well(tmp_path, tokenizer):
    source = write(tmp_path, *[conversation(f"Question {n}") for n in range(1000)])
    drawn = [place for seed in range(8) for place in places(draw(source, tokenizer, 10, seed))]
    assert 350 < sum(place > 500 for place in drawn) / len(drawn) * 1000 < 650


RARE = {
    "several answers": chat("a", "b", "c", "d"),
    "a system message": chat("a", "b", system="Be brief."),
}


@pytest.mark.parametrize("what", RARE)
def test_one_example_shows_what_is_rare(tmp_path, tokenizer, what):
    lines = [conversation(f"Question {n}") for n in range(100)]
    lines[41] = RARE[what]
    for seed in range(3):
        drawn = {example.place: example for example in draw(write(tmp_path, *lines), tokenizer, 3, seed)}
        (shown,) = [example for place, example in drawn.items() if place.endswith(":42")]
        assert what in shown.peculiarities


def test_the_one_with_the_most_to_show_is_taken_also_where_it_is_long(tmp_path, tokenizer):
    lines = [*[conversation(f"Question {n}") for n in range(50)], chat("a", "word " * 400, "b", "c", system="d")]
    shown = draw(write(tmp_path, *lines), tokenizer, 1, seq_len=2048)
    assert places(shown) == [51]


def test_short_examples_go_before_long_ones(tmp_path, tokenizer):
    lines = [conversation(f"Question {n}", "word " * (400 if n % 10 else 1)) for n in range(100)]
    for seed in range(5):
        assert all(place % 10 == 1 for place in places(draw(write(tmp_path, *lines), tokenizer, 3, seed, 2048)))


def test_where_all_are_long_the_shortest_are_shown(tmp_path, tokenizer):
    lines = [conversation("Hello", "word " * (400 + 10 * n)) for n in range(20)]
    assert places(draw(write(tmp_path, *lines), tokenizer, 2, seq_len=8192)) == [1, 2]


def test_equal_rows_are_shown_once_and_bad_ones_not_at_all(tmp_path, tokenizer):
    lines = [conversation("Hello")] * 20 + ["{", conversation(assistant=""), conversation("word " * 500)]
    assert places(draw(write(tmp_path, *lines), tokenizer)) in [[n] for n in range(1, 21)]


def test_what_is_shown_is_what_is_trained_also_where_it_is_cut(tmp_path, tokenizer):
    source = write(tmp_path, chat("a", "b", "word " * 500, "c"))
    (shown,) = draw(source, tokenizer, seq_len=64)
    assert tokenizer.decode(shown.tokens.input_ids) == "<s><|user|>a<|end|><|assistant|>b<|end|>"


def test_plain_text_is_shown(tmp_path, tokenizer):
    source = write(tmp_path, *[json.dumps({"text": f"A text, number {n}."}) for n in range(9)])
    assert [len(example.peculiarities) for example in draw(source, tokenizer)] == [0, 0, 0]


def test_fewer_rows_than_examples(tmp_path, tokenizer):
    assert places(draw(write(tmp_path, conversation()), tokenizer)) == [1]
    assert draw(write(tmp_path, "{"), tokenizer) == []


def test_of_a_huge_source_only_the_first_rows_are_read(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(sample, "MAX_ROWS", 10)
    source = write(tmp_path, *[conversation(f"Question {n}") for n in range(50)])
    assert max(places(draw(source, tokenizer, 10))) == 10


def test_every_source_of_a_mixture_is_drawn_from(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(sample, "MAX_ROWS", 20)
    names = ("first", "second")
    for name in names:
        (tmp_path / name).mkdir()
    sources = [write(tmp_path / name, *[conversation(f"{name} {n}") for n in range(50)]) for name in names]
    mixture = DataSpec(sources=tuple((source, 1.0) for source in sources))
    drawn = draw_examples(mixture, ChatFormat(tokenizer), 128, 0, 8)
    assert [sum(example.place.startswith(source) for example in drawn) > 0 for source in sources] == [True, True]
    assert max(places(drawn)) <= 10


def test_none_are_drawn_where_none_are_wanted(tokenizer):
    assert draw("nowhere.jsonl", tokenizer, 0) == []
    with pytest.raises(UserError, match="there is no data file"):
        draw("nowhere.jsonl", tokenizer, 1)
