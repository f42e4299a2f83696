import copy
import importlib
import inspect
import pickle
import re
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest

import common.recipe
from common.model.config import load_config
from common.recipe import ALL_LINEAR, DataSpec, LoraSpec, ModelSpec, PreferenceSpec, Recipe, TrainSpec, UserError
from common.recipe_fields import BROUGHT
from tests.conftest import ROOT

LARGE = ["llama3_8b", "llama3_1_8b", "mistral_7b", "qwen_14b"]
NAMES = [*LARGE, "llama3_70b", "smollm2_135m", "tiny", "llama3_8b_dpo", "tiny_dpo"]


def train_spec(**values) -> TrainSpec:
    return TrainSpec(**{"seq_len": 256, "rows_per_step": 4, "learning_rate": 1e-4} | values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraSpec(rank=16, alfa=32), "LoraSpec has no alfa; do you mean alpha?"),
        (lambda: LoraSpec(r=16, alpha=32), "LoraSpec has no r; it is rank"),
        (lambda: LoraSpec(rank=16, lora_alpha=32), "LoraSpec has no lora_alpha; it is alpha"),
        (lambda: LoraSpec(rank=16), "LoraSpec needs alpha"),
        (lambda: LoraSpec(16, 32, 0.1), "LoraSpec takes 2 values without a name; write the others with theirs"),
        (lambda: train_spec(lr=1e-4), "TrainSpec has no lr; it is learning_rate"),
        (
            lambda: train_spec(per_device_train_batch_size=2),
            "TrainSpec has no per_device_train_batch_size; it is rows_",
        ),
        (lambda: train_spec(bf16=True), "TrainSpec has no bf16; leave it out, because the GPU decides"),
        (lambda: train_spec(rank=16), "TrainSpec has no rank; it is a field of LoraSpec"),
        (lambda: train_spec(x9=4), "TrainSpec has no x9; it has seq_len, rows_per_step, learning_rate, "),
        (lambda: DataSpec("d", lr=1e-4), "DataSpec has no lr; it is learning_rate of TrainSpec"),
        (lambda: Recipe(out="x"), "Recipe needs model and data and lora and train"),
    ],
)
def test_a_name_that_a_spec_does_not_have_is_answered_with_the_one_it_has(make, message):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        make()


@pytest.mark.parametrize("spec", BROUGHT)
def test_names_of_other_libraries_are_none_of_ours_and_what_is_named_instead_is_there(spec):
    ours = {entry.name for entry in fields(getattr(common.recipe, spec))}
    names = [name for names in BROUGHT[spec].values() for name in names]
    assert len(names) == len(set(names))
    assert not ours & set(names)
    for answer in BROUGHT[spec]:
        assert re.match(r"\w+", answer)[0] in ours | {"nothing", "TrainSpec", "Recipe"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraSpec(rank="16", alpha=32), "LoraSpec.rank is '16', a text; give a whole number"),
        (
            lambda: LoraSpec(16, 32, target_modules="all-linear"),
            "'all-linear', a text; give a tuple of texts: ('q_proj'",
        ),
        (lambda: LoraSpec(16, 32, target_modules=["q_proj", 1]), "LoraSpec.target_modules is ('q_proj', 1); give"),
        (lambda: train_spec(seed=None), "TrainSpec.seed is None; give a whole number"),
        (lambda: train_spec(seq_len=256.0), "seq_len is 256.0, which has a decimal point; give a whole number"),
        (lambda: train_spec(max_steps=2.5), "which has a decimal point; give a whole number or None"),
        (lambda: train_spec(epochs=True), "TrainSpec.epochs is True; give a number"),
        (lambda: train_spec(learning_rate="2e-4"), "TrainSpec.learning_rate is '2e-4', a text; give a number"),
        (lambda: train_spec(deterministic="no"), "TrainSpec.deterministic is 'no', a text; give True or False"),
        (lambda: train_spec(keep=3), "TrainSpec.keep is 3; give 'last' or 'best'"),
        (lambda: train_spec(rows_per_step=None), "give a whole number or 'auto'"),
        (lambda: ModelSpec(["a"]), "ModelSpec.name is ['a']; give a text"),
        (lambda: DataSpec(["a.jsonl", "b.jsonl"]), "give a text; several files stand in one text: 'a.jsonl b.jsonl'"),
        (lambda: DataSpec("d", eval_rows=0.1), "give a whole number, of examples to hold out"),
        (
            lambda: Recipe("m", DataSpec("d"), LoraSpec(1, 2), train_spec()),
            "Recipe.model is 'm', a text; give a ModelSpec",
        ),
    ],
)
def test_a_value_of_another_type_is_one_line(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_list_of_modules_a_path_and_a_whole_number_for_any_are_taken():
    assert LoraSpec(16, 32, target_modules=["q_proj"]) == LoraSpec(16, 32.0, target_modules=("q_proj",))
    assert ModelSpec(Path("models") / "mine") == ModelSpec("models/mine")


def test_a_spec_is_copied_pickled_and_replaced():
    spec = train_spec(max_steps=3)
    assert spec == copy.deepcopy(spec) == pickle.loads(pickle.dumps(spec)) == replace(spec, max_steps=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelSpec(" "), "ModelSpec.name is empty"),
        (lambda: ModelSpec("m", bits=8), "bits is 8; choose 4 or 16"),
        (lambda: ModelSpec("m", weights="rnd"), "choose one of 'pretrained', 'random'"),
        (lambda: ModelSpec("m", layers=2), "only with weights='random'"),
        (lambda: DataSpec(""), "DataSpec.source is empty"),
        (lambda: DataSpec(), "DataSpec.source is empty"),
        (lambda: DataSpec(sources=((" ", 1),)), "DataSpec.source is empty"),
        (lambda: DataSpec("d", sources=(("a", 1),)), "DataSpec has a source and sources; give one of the two"),
        (lambda: DataSpec(sources=("a", 1)), "DataSpec.sources is a tuple of pairs"),
        (lambda: DataSpec(sources=(("a", "b"), ("c", "d"))), "DataSpec.sources is a tuple of pairs"),
        (lambda: DataSpec(sources="ab"), "DataSpec.sources is a tuple of pairs"),
        (lambda: DataSpec(sources=(("a", 1), ("b", 0))), "the weight of b is 0; it must be above 0"),
        (lambda: DataSpec(sources=(("a", 1), ("b", float("inf")))), "the weight of b is inf; it must be above 0"),
        (lambda: DataSpec(sources=(("a", 1), ("a", 2))), "DataSpec.sources has the same source twice"),
        (
            lambda: DataSpec(sources=(("a", 1), ("b", 2)), revision="x"),
            "DataSpec.revision and config are one data set's",
        ),
        (lambda: DataSpec("d", max_long_share=-0.1), "DataSpec.max_long_share is -0.1; it is a share, 0 to 1"),
        (lambda: DataSpec("d", eval_rows=-1), "0 skips evaluation"),
        (lambda: DataSpec("d", drift_source=" "), "DataSpec.drift_source is empty; None measures no drift"),
        (lambda: DataSpec("d", max_bad_share=2), "a share, 0 to 1"),
        (lambda: DataSpec("d", train_on="user"), "choose one of 'assistant', 'everything'"),
        (lambda: DataSpec("d", columns=("a", "b")), "DataSpec.columns is ('a', 'b'); write {'user'"),
        (
            lambda: DataSpec("d", columns={"human": "a", "gpt": "b"}),
            "DataSpec.columns has 'human'; choose among 'user'",
        ),
        (lambda: DataSpec("d", columns={"user": "a", "assistant": ""}), "DataSpec.columns['assistant'] is ''"),
        (lambda: DataSpec("d", columns={"user": "a", "assistant": "a"}), "DataSpec.columns names a column twice"),
        (lambda: DataSpec("d", columns={"user": "a"}), "name user and assistant, or messages"),
        (lambda: DataSpec("d", columns={"messages": "a", "assistant": "b"}), "name user and assistant, or messages"),
        (lambda: DataSpec("d", columns={"text": "a", "system": "b"}), "or text alone"),
        (lambda: DataSpec("d", columns={}), "DataSpec.columns has no key"),
        (lambda: LoraSpec(rank=0, alpha=16), "rank is 0"),
        (lambda: LoraSpec(rank=8, alpha=0), "alpha is 0"),
        (lambda: LoraSpec(rank=8, alpha=8, dropout=1.0), "dropout is 1.0"),
        (lambda: LoraSpec(rank=8, alpha=8, target_modules=()), "nothing would be trained"),
        (lambda: TrainSpec(seq_len=0, rows_per_step=1, learning_rate=1e-4), "seq_len is 0"),
        (lambda: TrainSpec(seq_len=8, rows_per_step=1, learning_rate=1e-4, max_steps=0), "max_steps is 0"),
        (lambda: TrainSpec(seq_len=8, rows_per_step=1, learning_rate=1e-4, warmup_ratio=1), "warmup_ratio is 1"),
        (lambda: TrainSpec(seq_len=8, rows_per_step=1, learning_rate=1e-4, lr_schedule="cos"), "'cosine', 'linear'"),
        (
            lambda: TrainSpec(seq_len=8, rows_per_step=1, learning_rate=1e-4, checkpointing="some"),
            "'auto', 'none', 'every layer', 'keep attention', 'offload'",
        ),
        (lambda: replace(importlib.import_module("recipes.tiny").RECIPE, card_gib=-1), "card_gib is -1"),
    ],
)
def test_a_value_out_of_range_names_the_field(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_each_shipped_recipe_is_a_recipe_with_a_story(name):
    module = importlib.import_module(f"recipes.{name}")
    assert isinstance(module.RECIPE, Recipe)
    assert callable(module.main)
    assert module.RECIPE.lora.dropout == 0
    assert len(module.RECIPE.lora.target_modules) == 7  # all linear layers


@pytest.mark.parametrize("name", ["llama3_8b", "mistral_7b", "qwen_14b"])
def test_the_large_recipes_are_for_a_24_gib_card(name):
    recipe = importlib.import_module(f"recipes.{name}").RECIPE
    assert (recipe.card_gib, recipe.model.bits, recipe.lora.rank) == (24.0, 4, 16)
    assert (recipe.train.seq_len, recipe.train.rows_per_step, recipe.train.lr_schedule) == (2048, 16, "cosine")


def test_the_recipe_of_long_rows_is_the_other_one_with_fewer_rows_of_as_many_tokens():
    short, long = (importlib.import_module(f"recipes.{name}") for name in ("llama3_8b", "llama3_1_8b"))
    assert inspect.getsource(short.main) == inspect.getsource(long.main)  # the same story
    assert (long.RECIPE.data, long.RECIPE.lora) == (short.RECIPE.data, short.RECIPE.lora)
    assert long.RECIPE.train == replace(short.RECIPE.train, seq_len=8 * 2048, rows_per_step=16 // 8)
    configs = [load_config(module.RECIPE.model).to_dict() for module in (short, long)]
    differ = {name for name in configs[0] if configs[0][name] != configs[1][name]}
    assert differ == {"max_position_embeddings", "rope_parameters", "eos_token_id"}  # of the same size: the same plan


def test_the_recipe_of_preferences_is_the_other_one_with_pairs_and_a_small_learning_rate():
    sft, dpo = (importlib.import_module(f"recipes.{name}") for name in ("llama3_8b", "llama3_8b_dpo"))
    assert inspect.getsource(sft.main) == inspect.getsource(dpo.main)  # the same story
    assert (dpo.RECIPE.model, dpo.RECIPE.lora) == (sft.RECIPE.model, sft.RECIPE.lora)
    # A pair of conversations, each as long as a row there.
    assert dpo.RECIPE.train == replace(sft.RECIPE.train, seq_len=2 * sft.RECIPE.train.seq_len, learning_rate=1e-5)
    assert (dpo.RECIPE.preference, dpo.RECIPE.data.kind) == (PreferenceSpec("dpo", beta=0.1), "pairs")
    assert dpo.RECIPE.data.eval_rows > 0


@pytest.mark.parametrize("name", [*LARGE, "llama3_70b"])
def test_alpha_and_learning_rate_are_those_of_the_public_sweep(name):
    # tinker-cookbook's rule for alpha 32 and 128 conversations a step: 5e-4 * (2000 / hidden) ** p, with p 0.781 for
    # Llama and 0.0775 for Qwen. A step of 32k tokens is about 0.36 of theirs, whose square root is 0.6. Rounded to one
    # digit, as nobody knows the second: 1.7e-4 for Llama 8B, 2.8e-4 for Qwen 14B, 1.0e-4 for Llama 70B.
    recipe = importlib.import_module(f"recipes.{name}").RECIPE
    power = 0.0775 if "qwen" in name else 0.781
    rate = 0.6 * 5e-4 * (2000 / load_config(recipe.model).hidden_size) ** power
    assert recipe.train.learning_rate == float(f"{rate:.0e}")
    assert recipe.lora.alpha == 32


def test_alpha_is_the_same_in_every_recipe_that_ships():
    """The learning rates of recipes can be compared, and none follows the rank."""
    assert {importlib.import_module(f"recipes.{name}").RECIPE.lora.alpha for name in NAMES} == {32}


def test_the_page_of_defaults_has_each_field_of_the_training_with_its_value():
    page = (ROOT / "docs" / "defaults.md").read_text().split("## Every default")[1].split("\n## ")[0]
    said: dict[str, str] = {}
    for spec, names, values in re.findall(r"^\| `(\w+)\((.*?)\)` \| (.*?) \|", page, re.MULTILINE):
        told = [value.strip('`"') for value in values.split(", ")]
        said |= {f"{spec}.{name}": value for name, value in zip(names.split(", "), told, strict=False)}
    for spec in (LoraSpec, TrainSpec):
        for entry in fields(spec):
            name, default = f"{spec.__name__}.{entry.name}", entry.default
            if name in ("LoraSpec.start_from", "TrainSpec.max_steps"):  # of one run
                continue
            words = {ALL_LINEAR: "all linear layers"}.get(default, "off" if default is False else str(default))
            assert default is MISSING or said[name] == words or float(said[name]) == default, name
            assert said.pop(name), name
    assert not [name for name in said if name.startswith(("LoraSpec", "TrainSpec"))]


@pytest.mark.parametrize(
    ("loss", "columns", "message"),
    [
        (None, {"user": "a", "chosen": "b", "rejected": "c"}, "names chosen and rejected, which are of pairs"),
        (None, {"user": "a", "assistant": "b", "label": "c"}, "names a label, which is of rated answers"),
        ("dpo", {"user": "a", "assistant": "b"}, "names no chosen and rejected, and the recipe has a PreferenceSpec"),
        ("kto", {"text": "a"}, "names no user and assistant, or messages, and the recipe has a PreferenceSpec"),
        ("kto", {"user": "a", "chosen": "b", "rejected": "c"}, "names chosen and rejected, which are of pairs"),
        ("dpo", {"chosen": "b"}, "of pairs chosen and rejected"),
        ("dpo", {"user": "a", "messages": "m", "chosen": "b", "rejected": "c"}, "of pairs chosen and rejected"),
        ("dpo", {"chosen": "b", "rejected": "c", "label": "d"}, "of pairs chosen and rejected"),
    ],
)
def test_columns_are_those_of_the_data_that_a_recipe_learns_from(loss, columns, message):
    with pytest.raises(UserError, match=message):
        with_preference(loss, DataSpec("a.jsonl", columns=columns))


@pytest.mark.parametrize(
    ("loss", "columns"),
    [
        ("dpo", {"user": "a", "chosen": "b", "rejected": "c", "system": "s"}),
        ("dpo", {"messages": "a", "chosen": "b", "rejected": "c", "tools": "t"}),
        ("dpo", {"chosen": "b", "rejected": "c"}),
        ("kto", {"user": "a", "assistant": "b", "label": "c"}),
        ("kto", {"messages": "a", "label": "c"}),
        ("kto", {"messages": "a"}),
    ],
)
def test_columns_of_better_and_worse_answers(loss, columns):
    assert with_preference(loss, DataSpec("a.jsonl", columns=columns)).data.columns == columns


@pytest.mark.parametrize("values", [{"train_on": "everything"}, {"rendered": True}])
def test_better_and_worse_answers_are_compared_as_the_template_writes_them(values):
    with pytest.raises(UserError, match="are not for a PreferenceSpec"):
        with_preference("dpo", DataSpec("a.jsonl", **values))


def with_preference(loss: str | None, data: DataSpec) -> Recipe:
    preference = None if loss is None else PreferenceSpec(loss)
    return Recipe(ModelSpec("m"), data, LoraSpec(8, 16), TrainSpec(64, 1, 1e-3), preference=preference)
