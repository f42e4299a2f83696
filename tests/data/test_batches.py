from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.data.batches import PREFERENCE_ENTRIES, collate, halve, split_into_examples
from common.data.packing import pack
from common.model import attention
from common.model.attention import PACKED_ATTENTION
from common.tokens.chat_format import ChatFormat
from common.tokens.labels import IGNORED
from tests.conftest import ARCHITECTURES
from tests.data.test_packing import pair, tokens


def test_pitfall_13_an_example_never_sees_its_neighbour(small_llama):
    model = AutoModelForCausalLM.from_pretrained(small_llama, dtype=torch.float32).eval()
    model.config.use_cache = False  # as in training; with a cache transformers would not derive the mask from positions
    examples = [tokens(20, first=10), tokens(15, first=200), tokens(9, first=400)]
    batch = collate([*pack(examples, 64), *pack([tokens(30, first=500)], 64)], pad_token_id=0)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        changed = batch["input_ids"].clone()
        changed[0, :20] = 7
        moved = model(input_ids=changed, position_ids=batch["position_ids"]).logits
        alone = model(input_ids=torch.tensor([examples[1].input_ids])).logits
    assert not torch.equal(moved[0, :20], logits[0, :20])
    assert torch.equal(moved[0, 20:], logits[0, 20:])
    # The same sums in another order: fp32 rounding.
    torch.testing.assert_close(logits[0, 20:35], alone[0], rtol=1e-4, atol=1e-5)


def test_the_first_token_of_an_example_is_never_foretold_by_its_neighbour(tokenizer):
    packed = pack([ChatFormat(tokenizer).encode("Once upon a time") for _ in range(4)], 64)
    batch = collate(packed, pad_token_id=0)
    starts = batch["position_ids"] == 0
    assert (batch["labels"][starts] == IGNORED).all()


def test_a_batch_is_padded_with_tokens_that_do_not_count():
    rows = [*pack([tokens(8)], 8), *pack([tokens(3), tokens(2)], 5)]
    batch = collate(rows, pad_token_id=0)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in batch.items()} == {
        name: (torch.int64, (2, 8)) for name in ("input_ids", "labels", "position_ids")
    } | {"trained_positions": (torch.int64, (10,))}  # 7 + 2 + 1: all but the first token of each example
    assert batch["position_ids"][1].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert batch["input_ids"][1, 5:].tolist() == [0, 0, 0]
    assert batch["labels"][1, 5:].tolist() == [IGNORED] * 3


def flash_attention_in_torch(q, k, v, starts, _, longest, __, **arguments):
    """What torch's varlen_attn computes, example by example."""
    scale = arguments.pop("scale", None)
    window, right = arguments.pop("window_size", (-1, 0))
    assert right == 0 and arguments in ({"enable_gqa": True}, {"is_causal": True})
    seen = torch.ones(longest, longest, dtype=torch.bool).tril()
    if window >= 0:
        seen &= ~seen.tril(-window - 1)
    bounds = starts.tolist()
    assert longest == max(end - start for start, end in zip(bounds, bounds[1:], strict=False))
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(
            *(states[start:end].transpose(0, 1) for states in (q, k, v)),
            attn_mask=seen[: end - start, : end - start],
            enable_gqa=True,
            scale=scale,
        ).transpose(0, 1)
        for start, end in zip(bounds, bounds[1:], strict=False)
    ]
    return torch.cat(outputs)


@pytest.mark.parametrize(("architecture", "window"), [*((name, None) for name in ARCHITECTURES), ("mistral", 8)])
def test_flat_rows_and_rectangles_give_the_same_loss(small_model, architecture, window, monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", flash_attention_in_torch)
    folder = small_model(architecture, **({"sliding_window": window} if architecture == "mistral" else {}))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    rows = [*pack([tokens(20), tokens(15, 200), tokens(9, 400)], 64), *pack([tokens(30, 500)], 64)]
    losses = {}
    for name in ("sdpa", PACKED_ATTENTION):
        model.set_attn_implementation(name)
        batch = collate(rows, 0, padding_free=name == PACKED_ATTENTION)
        lengths = {key: batch[key] for key in ("cu_seq_lens_q", "max_length_q") if key in batch}
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], **lengths).logits
        targets = batch["labels"].flatten()[batch["trained_positions"] + 1]
        losses[name] = torch.nn.functional.cross_entropy(logits.flatten(0, 1)[batch["trained_positions"]], targets)
    torch.testing.assert_close(losses[PACKED_ATTENTION], losses["sdpa"], rtol=1e-5, atol=0)


def test_packed_attention_without_lengths_is_refused(small_llama):
    model = AutoModelForCausalLM.from_pretrained(small_llama, attn_implementation=PACKED_ATTENTION)
    with pytest.raises(ValueError, match="packed attention needs cu_seq_lens_q"):
        model(input_ids=torch.tensor([[5, 6, 7]]))


def test_flat_rows_hold_no_padding_and_say_where_examples_begin():
    batch = collate([*pack([tokens(8)], 8), *pack([tokens(3), tokens(2)], 5)], 0, padding_free=True)
    assert batch["input_ids"].shape == (1, 13)
    assert batch["cu_seq_lens_q"].tolist() == [0, 8, 11, 13]
    assert batch["max_length_q"] == 8
    assert batch["position_ids"][0].tolist() == [*range(8), 0, 1, 2, 0, 1]


@pytest.mark.parametrize("padding_free", [False, True])
def test_halves_hold_the_same_examples(padding_free):
    lengths = [8, 3, 2, 6, 7]
    rows = [row for n, length in enumerate(lengths) for row in pack([tokens(length, 100 * n)], length)]
    batch = collate(rows, 0, padding_free=padding_free)
    halves = halve(batch)
    assert len(halves) == 2
    for name in ("input_ids", "position_ids", "labels"):
        assert sum((half[name].flatten().tolist() for half in halves), []) == batch[name].flatten().tolist()
    targets = [half["labels"].flatten()[half["trained_positions"] + 1] for half in halves]
    assert torch.equal(torch.cat(targets), batch["labels"].flatten()[batch["trained_positions"] + 1])
    if padding_free:  # 26 tokens end at 8, 11, 13, ...: the halves meet at 13
        assert [half["cu_seq_lens_q"].tolist() for half in halves] == [[0, 8, 11, 13], [0, 6, 13]]
        assert [half["max_length_q"] for half in halves] == [8, 7]
    (single,) = halve(collate(rows[:1], 0, padding_free=padding_free))
    assert single["input_ids"].numel() == 8


def rows_of_pairs() -> list[dict]:
    rows = [*pack([pair(3, 4), pair(5, 2, 100)], 14), *pack([pair(6, 4, 200)], 10)]
    return [row | {"reference": [-float(n + 10 * i) for n in range(len(row["signs"]))]} for i, row in enumerate(rows)]


@pytest.mark.parametrize("padding_free", [False, True])
def test_a_batch_of_pairs_says_whose_each_token_is(padding_free):
    batch = collate(rows_of_pairs(), 0, padding_free=padding_free)
    ids = [[number] * length for number, length in enumerate((3, 4, 5, 2, 6, 4))]
    expected = [sum(ids, [])] if padding_free else [sum(ids[:4], []), sum(ids[4:], []) + [0] * 4]
    assert batch["example_ids"].tolist() == expected and batch["example_ids"].dtype == torch.int64
    assert batch["signs"].tolist() == [1, -1] * 3 and batch["signs"].dtype == torch.float32
    assert batch["reference"].tolist() == [0, -1, -2, -3, -10, -11] and batch["reference"].dtype == torch.float64
    trained = batch["example_ids"].flatten()[batch["trained_positions"] + 1]
    assert trained.bincount().tolist() == [1, 2, 3, 0, 4, 2]  # but the prompt's two tokens


def test_a_batch_of_conversations_has_no_entries_of_pairs():
    batch = collate(pack([tokens(8)], 8), 0)
    assert not set(batch) & set(PREFERENCE_ENTRIES)


@pytest.mark.parametrize("padding_free", [False, True])
def test_halves_hold_whole_pairs_and_count_their_answers_anew(padding_free):
    batch = collate(rows_of_pairs(), 0, padding_free=padding_free) | {"kl": torch.tensor(0.5, dtype=torch.float64)}
    halves = halve(batch)
    assert [half["signs"].tolist() for half in halves] == [[1, -1] * 2, [1, -1]]  # 24 tokens: 14 is nearer than 7
    assert [half["reference"].tolist() for half in halves] == [[0, -1, -2, -3], [-10, -11]]
    assert [half["example_ids"].max().item() for half in halves] == [3, 1]
    assert [half["kl"].item() for half in halves] == [0.5, 0.5]
    assert halves[1]["example_ids"].flatten()[:10].tolist() == [0] * 6 + [1] * 4
    for half in halves:
        assert half["example_ids"].shape == half["labels"].shape
    if padding_free:
        quarters = halve(halves[0])
        assert [quarter["cu_seq_lens_q"].tolist() for quarter in quarters] == [[0, 3, 7], [0, 5, 7]]
        assert [len(halve(quarter)) for quarter in quarters] == [1, 1]  # a pair is never split


def test_rated_answers_are_split_between_any_two():
    good, bad = (replace(tokens(5, first), lengths=(5,), signs=(sign,)) for first, sign in ((10, 1), (50, -1)))
    batch = collate(pack([good, bad], 10), 0, padding_free=True)
    assert batch["signs"].tolist() == [1, -1]
    assert [half["signs"].tolist() for half in halve(batch)] == [[1], [-1]]


def test_a_single_example_of_a_pair_has_no_entries_of_pairs():
    parts = split_into_examples(collate(rows_of_pairs(), 0, padding_free=True))
    assert [part["input_ids"].shape[1] for part in parts] == [3, 4, 5, 2, 6, 4]
    assert not any(set(part) & set(PREFERENCE_ENTRIES) for part in parts)
