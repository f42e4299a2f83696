"""Where the weights of a trained model lie while it answers: on the card, as far as it has room for them."""

from dataclasses import replace

from common.machine.device import GIB, Machine
from common.machine.layout import ONE_PROCESS, Layout
from common.model.activation_checkpointing import MAX_WHOLE_TOKENS, Policy
from common.plan.card import Card
from common.plan.forecast import Setting
from common.plan.machine_plan import setting_of
from common.plan.planner import Planner
from common.plan.step import ADAPTERS, EMBEDDINGS, WEIGHTS
from common.recipe import Recipe, UserError

# Of the card beside weights, adapter and what no count sees: keys and values, logits, a layer's working set. Assumed;
# eight answers of Llama 3 8B at a time have 1.2 GiB of keys and values.
ANSWER_BYTES = int(1.5 * GIB)


def layout_to_answer(
    recipe: Recipe, card: Card, setting: Setting | None = None, *, evaluates_rows: bool = False
) -> Layout:
    """How many layers' weights wait in host memory, and whether the embedding, so that the model answers on a card.

    None where all of them fit. Otherwise as many as in training, which takes more memory. The recipe's own settings
    count for training alone. None too where not even that would fit: loading then says so. evaluates_rows: the loss
    of rows of the recipe's length is computed too; where they are long, they decide, as in training.
    """
    train = replace(recipe.train, weights_on_host="auto", embedding_on_host="auto", rows_per_step=1)
    try:
        planner = Planner(replace(recipe, train=train), card, setting)
        there = planner.forecast.step(planner.seq_len, Policy(planner.layers)).resident
        is_long = evaluates_rows and planner.seq_len > MAX_WHOLE_TOKENS
        if not is_long and there[WEIGHTS] + there[EMBEDDINGS] + there[ADAPTERS] + ANSWER_BYTES <= card.budget:
            return ONE_PROCESS
        option = planner.choose()
    except UserError:
        return ONE_PROCESS
    if option is None:
        return ONE_PROCESS
    return Layout(on_host=option.on_host, embedding_on_host=option.embedding_on_host)


def layout_on(recipe: Recipe, machine: Machine, *, evaluates_rows: bool = False) -> Layout:
    """layout_to_answer on this machine. On a CPU weights are in host memory already."""
    if not machine.is_gpu:
        return ONE_PROCESS
    setting = setting_of(machine, recipe.model)
    return layout_to_answer(recipe, Card.of_machine(machine), setting, evaluates_rows=evaluates_rows)
