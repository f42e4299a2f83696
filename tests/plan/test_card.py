"""What of a card a step may use."""

from dataclasses import replace

import pytest
import torch

from common.machine.device import GIB
from common.plan.card import Card, smallest_of
from common.recipe import UserError


def test_what_a_card_keeps_for_itself():
    card = Card.of_size(24)
    # 0.55 GiB for the context with its kernels, two cuBLAS workspaces of 32 MiB, 3 % of the card
    assert card.size - card.budget == int(0.55 * GIB) + 2 * (32 << 20) + int(0.03 * 24 * GIB)


def test_kernels_that_are_not_loaded_yet_are_set_aside_where_the_context_is_there():
    """3 % of 8 GiB is 246 MiB: less than the 150 to 350 MiB that CUDA loads at the kernels' first launches."""
    free = Card("free on a GPU", 8 * GIB, has_context=True)
    assert free.overhead()["CUDA kernels"] == 350 << 20
    assert free.size - free.budget == (350 << 20) + 2 * (32 << 20) + int(0.03 * 8 * GIB)
    assert Card.of_size(8).budget < free.budget  # which has the context to hold too


@pytest.mark.parametrize(("gib", "context"), [(12, 0.55), (24, 0.55), (32, 0.6), (48, 0.6), (80, 1), (141, 1)])
def test_a_larger_card_has_a_larger_context(gib, context):
    overhead = Card.of_size(gib).overhead()
    assert overhead["CUDA context"] + overhead["CUDA kernels"] == int(context * GIB)


def test_the_smallest_card_is_planned_for():
    large, small = Card.of_size(24), Card.of_size(16)
    bf16, fp16 = torch.bfloat16, torch.float16
    assert smallest_of([(large, bf16), (large, bf16)]) == large
    smallest = smallest_of([(large, bf16), (small, bf16)])
    assert (smallest.size, smallest.name) == (small.size, "a card of 16 GiB, the smallest of 2 cards")
    with pytest.raises(UserError, match="do not compute in one number format"):
        smallest_of([(large, bf16), (small, fp16)])


def test_what_no_step_can_use_has_names_and_adds_up():
    shared = replace(Card.of_size(16), uses_nccl=True, other_stream_bytes=GIB // 2)
    for card in (Card.of_size(16), replace(Card.of_size(16), has_context=True), shared):
        assert sum(card.overhead().values()) == card.overhead_bytes == card.size - card.budget
        assert (card.overhead()["CUDA context"] == 0) == card.has_context
