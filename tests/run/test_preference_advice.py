"""What is said of a learning rate and of answers that are unlearnt."""

import pytest

from common.recipe import DataSpec, LoraSpec, ModelSpec, PreferenceSpec, Recipe, TrainSpec
from common.run.preference_advice import CollapseWatch, first_sign_of_collapse, rise_of_chosen, warn_of_learning_rate
from tests.conftest import TINY

LLAMA = ModelSpec("meta-llama/Meta-Llama-3-8B-Instruct")


def recipe(model=LLAMA, rate=1e-5, **lora) -> Recipe:
    values = LoraSpec(**{"rank": 16, "alpha": 32, **lora})
    return Recipe(model, DataSpec("x.jsonl"), values, TrainSpec(2048, 16, rate), preference=PreferenceSpec())


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (recipe(rate=1e-4), None),
        (recipe(rate=2e-4), '"train.learning_rate=1e-05"'),
        (recipe(rate=2e-4, alpha=8), None),  # moves as 5e-5 does
        (recipe(rate=1e-4, alpha=64), '"train.learning_rate=5e-06"'),
        (recipe(rate=1e-4, rslora=True), '"train.learning_rate=2.5e-06"'),  # as alpha 128
        (recipe(ModelSpec(str(TINY)), rate=1e-3), None),  # small models take larger rates
    ],
)
def test_a_rate_of_instruction_tuning_is_pointed_out(made, says):
    line = warn_of_learning_rate(made)
    assert (line is None) == (says is None)
    assert says is None or says in line


def test_a_likelihood_that_falls_and_falls_is_a_sign_of_collapse():
    steady = [1.0] * 50
    assert rise_of_chosen(steady) is None
    assert rise_of_chosen([1.0] * 10 + [1.4] * 40) is None  # less likely, and within half a nat
    assert rise_of_chosen([1.0] * 10 + [2.0] * 40) is None  # has stopped falling
    assert rise_of_chosen([1.0] * 19) is None
    assert rise_of_chosen([1.0 + 0.04 * step for step in range(20)]) is None  # 0.4
    assert rise_of_chosen([1.0 + 0.1 * step for step in range(20)]) == pytest.approx(1.0)
    assert rise_of_chosen([3.0 - 0.1 * step for step in range(20)]) is None


class State:
    def __init__(self) -> None:
        self.log_history: list[dict] = []


def test_it_is_said_once_also_over_a_resume(capsys):
    state, watch = State(), CollapseWatch(PreferenceSpec("dpo"))
    watch.on_train_begin(None, state, None)
    for step in range(1, 41):
        state.log_history.append({"step": step, "nll/chosen": 0.1 * step})
        if step == 30:
            watch = CollapseWatch(PreferenceSpec("dpo"))
            watch.on_train_begin(None, state, None)
        watch.on_log(None, state, None)
    out = capsys.readouterr().out
    assert out.count("early sign of collapse") == 1
    assert "step 20: the better answers have become less likely themselves, by 1.00 nats a token" in out
    assert "raise PreferenceSpec.beta, or raise PreferenceSpec.sft_weight" in out
    assert first_sign_of_collapse(state.log_history) == (20, pytest.approx(1.0))


def test_the_advice_is_that_of_the_loss(capsys):
    for spec in (PreferenceSpec("kto"), PreferenceSpec("simpo")):
        watch, state = CollapseWatch(spec), State()
        state.log_history = [{"step": step, "nll/chosen": 0.1 * step} for step in range(25)]
        watch.on_log(None, state, None)
    kto, simpo = capsys.readouterr().out.strip().split("\n\n")
    assert "sft_weight" not in kto and "beta" in kto
    assert "sft_weight" in simpo and "beta" not in simpo


class ReadLog(list):
    """Counts the entries that are read."""

    read = 0

    def __iter__(self):
        self.read += len(self)
        return super().__iter__()

    def __getitem__(self, index):
        found = super().__getitem__(index)
        self.read += len(found) if isinstance(index, slice) else 1
        return found


def test_a_step_does_not_read_the_whole_log_again():
    watch, state = CollapseWatch(PreferenceSpec("dpo")), State()
    state.log_history = ReadLog()
    for step in range(1000):
        state.log_history.append({"step": step, "nll/chosen": 1.0})
        watch.on_log(None, state, None)
    assert state.log_history.read == 1000
