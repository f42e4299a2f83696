"""Llama 3 8B Instruct learns from pairs of a better and a worse answer (DPO) on one 24 GiB card.

Run it:   make finetune MODEL=llama3-8b-dpo
Own it:   cp recipes/llama3_8b_dpo.py recipes/my_bot.py, edit RECIPE, make finetune MODEL=my-bot
"""

from common.data import load_rows
from common.model import attach_lora, checkpoint_activations, load_4bit, load_tokenizer
from common.plan import plan_for_card
from common.recipe import DataSpec, LoraSpec, ModelSpec, PreferenceSpec, Recipe, TrainSpec
from common.run import story, train

RECIPE = Recipe(
    # Gated: ask for access on its page, then .venv/bin/hf auth login. Instruct: preferences come after instructions.
    model=ModelSpec("meta-llama/Meta-Llama-3-8B-Instruct"),
    # 62k pairs of answers, the better one by a judge's score (UltraFeedback, arXiv:2310.01377).
    data=DataSpec("trl-lib/ultrafeedback_binarized"),  # yours: docs/preferences.md
    # The reference is the model as the run begins. After a run of your own on the same base, with its rank and alpha:
    # LoraSpec(rank=16, alpha=32, start_from="outputs/llama3-8b")
    lora=LoraSpec(rank=16, alpha=32),
    preference=PreferenceSpec(
        "dpo",  # or "ipo", "simpo", "orpo", "kto": docs/preferences.md
        beta=0.1,  # how strongly it holds to the reference: what the paper and TRL take (arXiv:2305.18290, appendix B)
    ),
    train=TrainSpec(
        seq_len=4096,  # tokens in a packed row, which holds whole pairs: 2,048 for each answer with its prompt
        rows_per_step=16,  # about 64k tokens
        learning_rate=1e-5,  # peak, for alpha 32: a twentieth of instruction tuning's: docs/defaults.md
        epochs=1,  # with more, chosen answers become less likely too: the report shows the rewards of both
    ),
    card_gib=24.0,
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
