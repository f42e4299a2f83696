"""The FLOPs that a step must compute, whichever stack computes it, and an MFU from them.

Model FLOPs are those of forward and backward without any recompute: no activation checkpointing, no attention scores
computed again, no LoRA bottleneck computed again. A frozen weight has no gradient of its own, so a token costs four
FLOPs for each of its numbers and not six; attention is causal. MFU (model FLOPs utilisation, arXiv:2204.02311, appendix
B) is their rate as a share of what the card's data sheet promises.
"""

from dataclasses import replace

from benchmarks.models import recipe_of
from common.model.activation_checkpointing import Policy
from common.model.config import load_config
from common.plan.forecast import Forecast


def flops_per_token(name: str, tokens: int) -> float:
    """Model FLOPs of each token of the recipe's model in a row of `tokens`, one example long.

    Counted from the step as it runs on a GPU with the libraries' own layers and every activation kept. That computes
    nothing twice but the scores in flash attention's backward pass: five matmuls, of which four are the gradient.
    """
    recipe = recipe_of(name)
    forecast = Forecast(replace(recipe, train=replace(recipe.train, seq_len=tokens, kernels="stock")))
    step = forecast.step(tokens, Policy(forecast.layers, forecast.layers))
    config = load_config(recipe.model)
    scores_again = config.num_hidden_layers * tokens * config.num_attention_heads * config.head_dim
    return sum(segment.work.flops for segment in step.segments) / tokens - scores_again
