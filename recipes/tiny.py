"""QLoRA fine-tuning of the small model that ships here (2.0 M parameters), on a CPU or a GPU, in about a minute.

It teaches an assistant that chats to answer with JSON tool calls instead, through the same code as the large recipes.

Run it:   make finetune
Own it:   cp recipes/tiny.py recipes/my_bot.py, edit RECIPE, make finetune MODEL=my-bot
"""

from common.data import load_rows
from common.model import attach_lora, checkpoint_activations, load_4bit, load_tokenizer
from common.plan import plan_for_card
from common.recipe import DataSpec, LoraSpec, ModelSpec, Recipe, TrainSpec
from common.run import generate, load_prompts, print_before_after, story, train

RECIPE = Recipe(
    model=ModelSpec("models/tiny"),
    data=DataSpec(
        "data/tiny/train.jsonl",
        eval_source="data/tiny/held_out.jsonl",
        drift_source="data/tiny/general.jsonl",  # what this model could do before: it knows no other text
    ),
    lora=LoraSpec(rank=16, alpha=32),
    train=TrainSpec(
        seq_len=256,  # the examples have 25 to 75 tokens
        rows_per_step=4,
        learning_rate=4e-3,  # a small model needs a far larger one than 8B does
        epochs=2,
        eval_every=50,
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
