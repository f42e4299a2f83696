import pytest
import torch

from common.model.loading import load_4bit, load_tokenizer
from common.recipe import ModelSpec
from common.run.generation import generate
from common.run.prompts import load_prompts
from tests.conftest import FP32, TINY

HELD_OUT = "data/tiny/held_out.jsonl"


@pytest.fixture(scope="module")
def model():
    return load_4bit(ModelSpec(str(TINY)), FP32)


def test_completions_do_not_depend_on_the_batch_that_they_are_generated_in(model, tokenizer):
    prompts = load_prompts(HELD_OUT, tokenizer, limit=5)
    together = generate(model, tokenizer, prompts, max_new_tokens=24)
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=24)[0] for prompt in prompts]
    assert together == alone
    assert all("<|end|>" not in text for text in together)


def test_generating_leaves_the_model_as_it_was(model):
    tokenizer = load_tokenizer(ModelSpec(str(TINY)))
    side = tokenizer.padding_side
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generate(model, tokenizer, load_prompts(HELD_OUT, tokenizer, limit=1), max_new_tokens=4)
    assert model.training and tokenizer.padding_side == side
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
