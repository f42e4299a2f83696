"""Whether an adapter is large enough for what a run teaches it."""

from common.data.rows import Rows
from common.data.steps import count_steps
from common.model.config import load_config, lora_parameters
from common.recipe import LoraSpec, Recipe, TrainSpec

# LoRA learns as full fine-tuning does while its parameters hold what the data says: about a bit for each trained token
# and two bits for each parameter (Schulman et al., "LoRA Without Regret", 2025).
TOKENS_PER_PARAMETER = 2
MAX_RANK = 512  # a higher one is no longer a small adapter


def warn_of_capacity(rows: Rows, recipe: Recipe) -> str | None:
    """capacity_warning for a run of this recipe, whose rows_per_step is settled. Loads the model's config alone."""
    parameters = lora_parameters(load_config(recipe.model), recipe.lora)
    return capacity_warning(tokens_to_learn(rows, recipe.train), parameters, recipe.lora)


def tokens_to_learn(rows: Rows, train: TrainSpec) -> float:
    """Different trained tokens that the run sees: those of its rows, or of the share that it has time for."""
    seen = count_steps(len(rows.train), train) * train.most_rows_per_step / len(rows.train)
    return rows.trained_tokens * min(1.0, seen)


def capacity_warning(trained_tokens: float, parameters: int, lora: LoraSpec) -> str | None:
    """A line that says so where there are more different trained tokens than the adapter can hold, with the rank that
    holds them; None where there are not.

    trained_tokens: what the run trains, each token of the data once, however many epochs there are. parameters: of the
    adapter's matrices A and B, which are proportional to its rank; DoRA's magnitudes are not among them.
    """
    if trained_tokens <= TOKENS_PER_PARAMETER * parameters:
        return None
    rank = lora.rank
    while rank < MAX_RANK and TOKENS_PER_PARAMETER * parameters * rank / lora.rank < trained_tokens:
        rank = min(MAX_RANK, 2 ** rank.bit_length())
    holds = TOKENS_PER_PARAMETER * parameters * rank / lora.rank
    found = (
        f"warning: the run teaches {trained_tokens / 1e6:,.1f} million different tokens, and an adapter of "
        f"{parameters / 1e6:,.1f} million parameters (rank {lora.rank}) holds about "
        f"{TOKENS_PER_PARAMETER * parameters / 1e6:,.1f} million; LoraSpec(rank={rank})"
    )
    alpha = f", with alpha left at {lora.alpha:g}" if not lora.rslora else ""
    if holds >= trained_tokens:
        return f"{found} holds them{alpha}"
    return f"{found} holds {holds / 1e6:,.1f} million{alpha}; with so much data full fine-tuning learns more"
