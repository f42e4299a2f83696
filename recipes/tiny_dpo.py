"""The small model that ships here learns from pairs of a better and a worse answer (DPO), on a CPU, in about a minute.

Both answers of a pair say the same; the better one says it "With pleasure." The model begins without a preference.

Run it:   make finetune MODEL=tiny-dpo
Own it:   cp recipes/tiny_dpo.py recipes/my_bot.py, edit RECIPE, make finetune MODEL=my-bot
"""

from common.data import load_rows
from common.model import attach_lora, checkpoint_activations, load_4bit, load_tokenizer
from common.plan import plan_for_card
from common.recipe import DataSpec, LoraSpec, ModelSpec, PreferenceSpec, Recipe, TrainSpec
from common.run import generate, load_prompts, print_before_after, story, train

RECIPE = Recipe(
    model=ModelSpec("models/tiny"),
    data=DataSpec(
        "data/tiny/preferences.jsonl",
        eval_source="data/tiny/held_out_preferences.jsonl",
        drift_source="data/tiny/general.jsonl",
    ),
    lora=LoraSpec(rank=16, alpha=32),
    preference=PreferenceSpec(
        "dpo",
        # This model would never write the better answers itself, and DPO alone leaves it with neither of the two:
        # docs/preferences.md. Answers that a model writes itself need no such term.
        sft_weight=1.0,
    ),
    train=TrainSpec(
        seq_len=256,  # a pair has 60 to 130 tokens
        rows_per_step=2,
        learning_rate=2e-3,  # half of recipes/tiny.py's: a small model needs a far larger one than 8B does
        epochs=1,
        eval_every=100,
    ),
    card_gib=None,  # runs on any machine, also without a GPU
)


@story  # from Python, main(RECIPE) is the same run as with make: docs/notebook.md
def main(recipe: Recipe = RECIPE) -> None:
    plan = plan_for_card(recipe)
    tokenizer = load_tokenizer(recipe.model)
    rows = load_rows(recipe.data, tokenizer, recipe.train.seq_len, recipe.train.seed)
    model = load_4bit(recipe.model, layout=plan.layout)
    model = attach_lora(model, recipe.lora, recipe.train.seed)
    checkpoint_activations(model, plan.checkpointing)
    prompts = load_prompts(recipe.data.eval_source, tokenizer)
    before = generate(model, tokenizer, prompts)
    train(model, tokenizer, rows, recipe, plan)
    after = generate(model, tokenizer, prompts)
    print_before_after(prompts, before, after)
