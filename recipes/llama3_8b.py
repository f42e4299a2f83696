"""QLoRA fine-tuning of Llama 3 8B Instruct on one 24 GiB card.

Run it:   make finetune MODEL=llama3-8b
Own it:   cp recipes/llama3_8b.py recipes/my_bot.py, edit RECIPE, make finetune MODEL=my-bot
"""

from common.data import load_rows
from common.model import attach_lora, checkpoint_activations, load_4bit, load_tokenizer, shard_layers, use_lean_layers
from common.plan import plan_for_card
from common.recipe import DataSpec, LoraSpec, ModelSpec, Recipe, TrainSpec
from common.run import train

RECIPE = Recipe(
    # Gated: ask for access on its page, then .venv/bin/hf auth login. Instruct, because the base model's chat tokens
    # were never trained.
    model=ModelSpec("meta-llama/Meta-Llama-3-8B-Instruct"),
    data=DataSpec("trl-lib/Capybara"),  # 16k conversations of several turns; yours: docs/data.md
    lora=LoraSpec(
        rank=16,  # on all linear layers, which helps far more than a higher rank (QLoRA, arXiv:2305.14314, figure 2)
        alpha=16,  # alpha = rank: scale 1, so that the learning rate alone sets the size of a step
    ),
    train=TrainSpec(
        seq_len=2048,  # tokens in a packed row; a longer conversation keeps the turns that fit
        rows_per_step=16,  # about 32k tokens: a step size at which 2e-4 is stable
        learning_rate=2e-4,  # peak, as QLoRA's for 7B and 13B (arXiv:2305.14314, table 9); cosine after 3 % warm-up
        epochs=1,  # a second one mostly memorises
    ),
    card_gib=24.0,
)


def main(recipe: Recipe = RECIPE) -> None:
    plan = plan_for_card(recipe)  # before any download: a run that cannot fit ends here
    tokenizer = load_tokenizer(recipe.model)
    rows = load_rows(recipe.data, tokenizer, recipe.train.seq_len, recipe.train.seed)  # faults in the data end it here
    model = load_4bit(recipe.model, layout=plan.layout)
    model = attach_lora(model, recipe.lora, recipe.train.seed)
    use_lean_layers(model, recipe.train.kernels)
    checkpoint_activations(model, plan.checkpointing)
    shard_layers(model, plan.layout)  # FSDP2, where the plan shards it; else nothing
    train(model, tokenizer, rows, recipe, plan)
