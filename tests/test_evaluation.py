import pytest
import torch

from common.conversations import Message
from common.evaluation import Question, answer, exact_matches, load_questions, print_before_after
from common.loading import load_4bit, load_tokenizer
from common.recipe import ModelSpec, UserError
from tests.conftest import FP32, TINY

HELD_OUT = "data/tiny/held_out.jsonl"


@pytest.fixture(scope="module")
def model():
    return load_4bit(ModelSpec(str(TINY)), FP32)


def test_questions_are_the_last_turns(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "1+1?", "completion": "2"}\n{"prompt": "2+2?", "completion": "4"}\n')
    assert load_questions(str(path), limit=1) == [Question((Message("user", "1+1?"),), "2")]
    assert load_questions(None) == []
    path.write_text('{"text": "no questions here"}\n')
    with pytest.raises(UserError, match="holds no conversations to ask"):
        load_questions(str(path))


def test_answers_do_not_depend_on_the_batch_they_are_asked_in(model, tokenizer):
    questions = load_questions(HELD_OUT, limit=5)
    together = answer(model, tokenizer, questions, max_new_tokens=24)
    alone = [answer(model, tokenizer, [question], max_new_tokens=24)[0] for question in questions]
    assert together == alone
    assert all("<|end|>" not in text for text in together)


def test_answering_leaves_the_model_as_it_was(model):
    tokenizer = load_tokenizer(ModelSpec(str(TINY)))
    side = tokenizer.padding_side
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    answer(model, tokenizer, load_questions(HELD_OUT, limit=1), max_new_tokens=4)
    assert model.training and tokenizer.padding_side == side
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_exact_match_counts_to_the_letter(capsys):
    questions = [Question((Message("user", q),), a) for q, a in (("1+1?", "2"), ("2+2?", "4"))]
    assert exact_matches(questions, ["2", "4 "]) == 1
    print_before_after(questions, ["?", "?"], ["2", "5"])
    out = capsys.readouterr().out
    assert "held-out exact match: 0% before, 50% after (2 prompts)" in out
    assert "wanted  4" in out and "wanted  2" not in out
