"""QLoRA fine-tuning of SmolLM2 135M Instruct, a small real model, on a laptop: a few minutes on two CPU cores.

It teaches the tool calls of recipes/tiny.py, and asks for them in wordings that no training example has.

Run it:   make finetune MODEL=smollm2-135m
Own it:   cp recipes/smollm2_135m.py recipes/my_bot.py, edit RECIPE, make finetune MODEL=my-bot
"""

from common.data import load_rows
from common.model import attach_lora, checkpoint_activations, load_4bit, load_tokenizer
from common.plan import plan_for_card
from common.recipe import DataSpec, LoraSpec, ModelSpec, Recipe, TrainSpec
from common.run import generate, load_prompts, print_before_after, story, train

RECIPE = Recipe(
    # 270 MB from the hub, no account needed. A folder with its files does as well: ModelSpec("my_models/smollm2").
    model=ModelSpec("HuggingFaceTB/SmolLM2-135M-Instruct"),
    # Held out are other requests than the training data's generator can make, with the same tools.
    data=DataSpec("data/tiny/train.jsonl", eval_source="data/tiny/paraphrases.jsonl"),
    lora=LoraSpec(rank=16, alpha=32),
    train=TrainSpec(
        seq_len=256,  # the examples have 50 to 100 tokens, the template's system message included
        rows_per_step=1,  # about 250 tokens: many small steps are what a few minutes on a CPU allow
        learning_rate=1.5e-3,  # a small model needs a larger one than 8B does
        max_steps=100,  # 23,000 tokens, a sixth of the data, is what ten minutes allow; max_steps=None takes all of it
        eval_every=100,
        save_every=100,
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
    # the longest answer wanted has 31 tokens
    before = generate(model, tokenizer, prompts, max_new_tokens=40, at_a_time=126)
    train(model, tokenizer, rows, recipe, plan)
    after = generate(model, tokenizer, prompts, max_new_tokens=40, at_a_time=126)
    print_before_after(prompts, before, after)
