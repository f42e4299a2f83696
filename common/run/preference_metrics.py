"""What a run with preferences measures: rewards, how many comparisons come out right, likelihoods; and their names.

Without torch. The sums that these are made of come from the device: metric_sums of common.run.preference_evaluation.
"""

from collections.abc import Sequence
from typing import Any

# Names in metrics.jsonl and in trackers; those of rewards are TRL's. Of the held-out rows they begin with "eval_".
ACCURACY, MARGIN = "rewards/accuracies", "rewards/margins"
REWARDS = {1: "rewards/chosen", -1: "rewards/rejected"}
NLLS = {1: "nll/chosen", -1: "nll/rejected"}  # nats a token
HELD_OUT = "eval_"


def metrics_of(sums: Sequence[float]) -> dict[str, float]:
    """Means by their names. sums: metric_sums of some micro-batches, added up.

    A mean over nothing has no entry: KTO's answers of a step may all be good.
    """
    _, comparisons, right, *of_answers = sums
    found: dict[str, float] = {}
    for sign, (answers, rewards, nll, tokens) in ((1, of_answers[:4]), (-1, of_answers[4:])):
        if answers:
            found |= {REWARDS[sign]: rewards / answers, NLLS[sign]: nll / max(tokens, 1)}
    if len(found) == 4:
        found[MARGIN] = found[REWARDS[1]] - found[REWARDS[-1]]
    if comparisons:
        found[ACCURACY] = right / comparisons
    return found


def mean_loss(sums: Sequence[float]) -> float:
    return sums[0] / max(sums[1], 1)


def held_out_results(entries: Sequence[dict[str, Any]], kept_step: int | None = None) -> dict[str, dict[str, float]]:
    """The metrics of the held-out rows "before" the first step and "after" the step that is kept; empty without any.

    entries: of metrics.jsonl. kept_step: None keeps the last.
    """
    measured = [entry for entry in entries if HELD_OUT + ACCURACY in entry]
    if not measured:
        return {}
    kept = [entry for entry in measured if entry["step"] == kept_step] or measured
    return {
        when: {name.removeprefix(HELD_OUT): value for name, value in taken_from(entry).items()}
        for when, entry in (("before", measured[0]), ("after", kept[-1]))
    }


def is_metric(name: str) -> bool:
    """Whether it is the name of one of these metrics, of training or of the held-out rows."""
    return name.removeprefix(HELD_OUT).startswith(("rewards/", "nll/", "kl"))


def taken_from(logs: dict[str, Any]) -> dict[str, float]:
    """These metrics of what a trainer logs."""
    return {name: value for name, value in logs.items() if is_metric(name)}


def in_words(metrics: dict[str, Any], prefix: str = "") -> str:
    """Accuracy and margin for a line, with " | " before them; an empty text where there are none."""
    accuracy, margin = metrics.get(prefix + ACCURACY), metrics.get(prefix + MARGIN)
    parts = [] if accuracy is None else [f"accuracy {accuracy:.0%}"]
    parts += [] if margin is None else [f"margin {margin:.3f}"]
    return "".join(f" | {part}" for part in parts)
