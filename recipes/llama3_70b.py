"""QLoRA fine-tuning of Llama 3 70B Instruct on one or two 24 GiB cards, with weights in host memory.

Run it:   make finetune MODEL=llama3-70b GPUS=2
          make finetune MODEL=llama3-70b             # one card of 9 GiB or more, with 47 GiB of free host memory
Own it:   cp recipes/llama3_70b.py recipes/my_bot.py, edit RECIPE, make finetune MODEL=my-bot GPUS=2
"""

from common.data import load_rows
from common.model import attach_lora, checkpoint_activations, load_4bit, load_tokenizer
from common.plan import plan_for_card
from common.recipe import DataSpec, LoraSpec, ModelSpec, Recipe, TrainSpec
from common.run import story, train

RECIPE = Recipe(
    # Gated: ask for access on its page, then .venv/bin/hf auth login. Instruct, because the base model's chat tokens
    # were never trained.
    model=ModelSpec("meta-llama/Meta-Llama-3-70B-Instruct"),
    data=DataSpec("trl-lib/Capybara"),  # 16k conversations of several turns; yours: docs/data.md
    lora=LoraSpec(
        rank=16,  # on all linear layers, which helps far more than a higher rank (QLoRA, arXiv:2305.14314, figure 2)
        alpha=32,  # whatever the rank: so the best learning rate hardly depends on the rank (docs/defaults.md)
    ),
    train=TrainSpec(
        seq_len=2048,  # tokens in a packed row; a longer conversation keeps the turns that fit
        rows_per_step=16,  # about 32k tokens; with more or fewer the learning rate goes with the square root
        learning_rate=1e-4,  # peak, for alpha 32: wider models take less (docs/defaults.md)
        epochs=1,  # a small set takes three and more: the held-out loss says when it is enough
    ),
    card_gib=24.0,  # of each card; the plan lets weights wait in host memory, or shards the layers over several cards
)


@story  # from Python, main(RECIPE) is the same run as with make: docs/notebook.md
def main(recipe: Recipe = RECIPE) -> None:
    plan = plan_for_card(recipe)  # before any download: a run that cannot fit ends here
    tokenizer = load_tokenizer(recipe.model)
    rows = load_rows(recipe.data, tokenizer, recipe.train.seq_len, recipe.train.seed)  # faults in the data end it here
    model = load_4bit(recipe.model, layout=plan.layout)
    model = attach_lora(model, recipe.lora, recipe.train.seed)
    checkpoint_activations(model, plan.checkpointing)
    train(model, tokenizer, rows, recipe, plan)
