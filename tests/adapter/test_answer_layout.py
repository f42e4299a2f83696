"""A model whose weights do not fit the card answers with some of them in host memory, and answers the same."""

from dataclasses import replace

import pytest
import torch

from common.adapter.answer_layout import layout_on, layout_to_answer
from common.adapter.find import find_adapter
from common.adapter.load import load_trained
from common.machine.layout import ONE_PROCESS, Layout
from common.model.host_embedding import has_host_embedding
from common.model.weight_streaming import weight_ring
from common.plan.card import Card
from common.recipe import LoraSpec
from recipes.mistral_7b import RECIPE as MISTRAL
from tests.conftest import FP32
from tests.plan.planners import RECIPE, edited

IDS = torch.arange(5, 45)[None]


@pytest.mark.slow  # plans for three cards
def test_weights_wait_in_host_memory_only_where_the_card_has_no_room_for_them():
    assert layout_to_answer(RECIPE, Card.of_size(8)) == ONE_PROCESS
    tight = layout_to_answer(RECIPE, Card.of_size(6))
    assert tight.streamed > 2
    assert layout_to_answer(edited(weights_on_host=0), Card.of_size(6)) == tight
    assert layout_to_answer(RECIPE, Card.of_size(2)) == ONE_PROCESS  # nothing would fit: loading says so
    assert layout_on(edited(weights_on_host=8), FP32) == ONE_PROCESS


@pytest.mark.slow  # plans for 32,768 tokens on a small card
def test_weights_make_room_for_long_rows_that_are_evaluated_as_they_did_in_training():
    """Mistral's 32,768 positions on 6.5 GiB: the weights alone would fit, beside a short row or an answer."""
    recipe = replace(MISTRAL, train=replace(MISTRAL.train, seq_len=32_768, rows_per_step=1))
    assert layout_to_answer(recipe, Card.of_size(6.5)) == ONE_PROCESS
    assert layout_to_answer(recipe, Card.of_size(6.5), evaluates_rows=True).streamed > 2


@pytest.mark.parametrize(
    "lora", [LoraSpec(rank=4, alpha=8), LoraSpec(rank=4, alpha=8, dora=True)], ids=["lora", "dora"]
)
def test_an_adapter_on_weights_that_stream_gives_the_same_logits(adapted, lora):
    adapter = find_adapter(adapted("llama", lora, num_hidden_layers=4))
    whole, streaming = (
        load_trained(adapter, layout=layout) for layout in (ONE_PROCESS, Layout(on_host=4, embedding_on_host=True))
    )
    assert weight_ring(whole) is None and len(weight_ring(streaming).blocks) == 4
    assert has_host_embedding(streaming) and not has_host_embedding(whole)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(streaming(IDS).logits, whole(IDS).logits)
        with streaming.disable_adapter(), whole.disable_adapter():
            assert torch.equal(streaming(IDS).logits, whole(IDS).logits)
    answers = [model.generate(IDS, max_new_tokens=5, do_sample=False) for model in (whole, streaming)]
    assert torch.equal(*answers)
