"""The date that a run's chat template writes: one, however long the run takes and however often it is resumed."""

from dataclasses import replace
from datetime import date
from pathlib import Path

from common.machine.collectives import broadcast_from_main
from common.recipe import Recipe
from common.run.checkpoints import list_checkpoints, read_run_identity
from common.run.folder import CHECKPOINTS

FIELD = "ModelSpec.template_date"  # its name in run_identity


def with_run_date(recipe: Recipe) -> Recipe:
    """Returns the recipe with a template_date: its own, that of the run to resume, or today's. The same everywhere."""
    if recipe.model.template_date is not None:
        return recipe
    today = date.today().isoformat()
    day = _kept_date(Path(recipe.out) / CHECKPOINTS, today) if recipe.existing_run == "resume" else today
    day = broadcast_from_main(day)  # midnight may fall between two processes
    return replace(recipe, model=replace(recipe.model, template_date=day))


def _kept_date(folder: Path, today: str) -> str | None:
    """The date of the run whose checkpoints these are: None of a run without one, `today` where none can be read."""
    for checkpoint in list_checkpoints(folder):
        try:
            kept: str | None = read_run_identity(checkpoint)["recipe"].get(FIELD)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # resume says what is wrong with it
            continue
        return kept
    return today
