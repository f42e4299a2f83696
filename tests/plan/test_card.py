"""What of a card a step may use."""

from dataclasses import replace

import pytest
import torch

from common.machine.device import GIB
from common.plan.card import Card, smallest_of
from common.recipe import UserError


def test_what_a_card_keeps_for_itself():
    card = Card.of_size(24)
    # 0.5 GiB context, three cuBLAS workspaces of 32 MiB, 3 % of the card
    assert card.size - card.budget == GIB // 2 + 3 * (32 << 20) + int(0.03 * 24 * GIB)
    assert Card("free on a GPU", 24 * GIB, has_context=True).budget == card.budget + GIB // 2


def test_the_smallest_card_is_planned_for():
    large, small = Card.of_size(24), Card.of_size(16)
    bf16, fp16 = torch.bfloat16, torch.float16
    assert smallest_of([(large, bf16), (large, bf16)]) == large
    smallest = smallest_of([(large, bf16), (small, bf16)])
    assert (smallest.size, smallest.name) == (small.size, "a card of 16 GiB, the smallest of 2 cards")
    with pytest.raises(UserError, match="do not compute in one number format"):
        smallest_of([(large, bf16), (small, fp16)])


def test_what_no_step_can_use_has_names_and_adds_up():
    for card in (Card.of_size(16), replace(Card.of_size(16), has_context=True)):
        assert sum(card.overhead().values()) == card.overhead_bytes == card.size - card.budget
        assert (card.overhead()["CUDA context"] == 0) == card.has_context
