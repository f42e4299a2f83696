"""Values of a recipe that are typed: make finetune SET="train.seed=2 lora.rank=64"."""

from dataclasses import replace

import pytest

from common.commands.set_fields import set_fields
from common.recipe import PreferenceSpec, UserError
from recipes.tiny import RECIPE


def lora(**values):
    return replace(RECIPE, lora=replace(RECIPE.lora, **values))


def train(**values):
    return replace(RECIPE, train=replace(RECIPE.train, **values))


def data(**values):
    return replace(RECIPE, data=replace(RECIPE.data, **values))


MIXTURE = (("a.jsonl", 0.8), ("owner/b", 0.2))


@pytest.mark.parametrize(
    ("text", "recipe"),
    [
        ("", RECIPE),
        ("train.learning_rate=1e-4", train(learning_rate=1e-4)),
        ("train.seed=2 train.epochs=3", train(seed=2, epochs=3)),
        ("train.rows_per_step=auto", train(rows_per_step="auto")),
        ("train.rows_per_step=8 train.max_steps=None", train(rows_per_step=8)),
        ("train.deterministic=false train.keep=best", train(deterministic=False, keep="best")),
        ("lora.rank=64 lora.target_modules=q_proj,v_proj", lora(rank=64, target_modules=("q_proj", "v_proj"))),
        ("card_gib=16", replace(RECIPE, card_gib=16.0)),
        ("card_gib=None", replace(RECIPE, card_gib=None)),
        ("data.source='my file.jsonl' data.eval_source=None", data(source="my file.jsonl", eval_source=None)),
        ("data.columns=user:frage,assistant:antwort", data(columns={"user": "frage", "assistant": "antwort"})),
        ("data.source= data.sources=a.jsonl:0.8,owner/b:0.2", data(source="", sources=MIXTURE)),
        ("preference.beta=0.2", replace(RECIPE, preference=PreferenceSpec(beta=0.2))),
        ("preference.loss=kto preference.beta=0.2", replace(RECIPE, preference=PreferenceSpec("kto", beta=0.2))),
        ("model.name=C:D", replace(RECIPE, model=replace(RECIPE.model, name="C:D"))),
    ],
)
def test_every_field_can_be_typed_as_its_type(text, recipe):
    assert set_fields(RECIPE, text) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.seed=1.5", "TrainSpec.seed is '1.5', a text; give a whole number"),
        ("train.deterministic=0", "TrainSpec.deterministic is '0', a text; give True or False"),
        ("train.rows_per_step=many", "TrainSpec.rows_per_step is 'many'; give a whole number"),
        ("train.keep=worst", "TrainSpec.keep is 'worst'; choose one of 'last', 'best'"),
        ("train.learning_rate=-1", "TrainSpec.learning_rate is -1.0; it must be above 0"),
        ("data.sources=a.jsonl", "DataSpec.sources is a tuple of pairs"),
        ("train.lr=3", "SET: TrainSpec has no lr; it is learning_rate"),
        ("lora.seq_len=3", "SET: LoraSpec has no seq_len; it is a field of TrainSpec"),
        ("data.kind=pairs", "SET: DataSpec has no kind"),  # the recipe sets it
        ("seed=3", "SET: Recipe has no seed; it is a field of TrainSpec"),
        ("training.seed=3", "SET has 'training.seed=3'; write a field and its value"),
        ("train.seed", "SET has 'train.seed'; write a field and its value"),
        ("train=3", "SET has train, which is given as a field of it"),
        ("out=here", "SET has out, which is given as OUT=..."),
        ("existing_run=overwrite", "SET has existing_run, which is given as ARGS=--resume or ARGS=--overwrite"),
        ("train.seed=1 train.seed=2", "SET has train.seed twice"),
        ("model.name='my model", "which has a quotation mark without its end"),
    ],
)
def test_what_cannot_be_set_is_one_line(text, message):
    with pytest.raises(UserError) as error:
        set_fields(RECIPE, text)
    assert message in str(error.value) and "\n" not in str(error.value)
