"""Finds the base that an adapter was trained on, and refuses one that has changed since."""

from pathlib import Path

from common.adapter.find import TrainedAdapter
from common.model.base_hash import base_hash
from common.model.download import model_folder
from common.recipe import UserError
from common.run.folder import RUN_JSON


def find_trained_base(adapter: TrainedAdapter) -> Path:
    """The folder of the adapter's base, whose files are complete, and those that run.json names by their sha256.

    Raises UserError as model_folder, and when a file is another than it was. Nothing is compared for an adapter that
    was trained elsewhere, or by a version that did not record the base.
    """
    folder = model_folder(adapter.recipe.model, weights=True)
    trained = (adapter.run.get("base") or {}).get("sha256")
    if not trained:
        return folder
    now = base_hash(folder)
    changed = sorted(name for name in trained.keys() | now.keys() if trained.get(name) != now.get(name))
    if changed:
        raise UserError(
            f"{adapter.recipe.model.name} is not what the run in {adapter.folder} was trained on: {', '.join(changed)} "
            f'changed since. Bring it back, or train again (to use it all the same, remove "base" from '
            f"{adapter.folder / RUN_JSON})"
        )
    return folder
