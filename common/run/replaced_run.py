"""An old run that --overwrite replaces: set aside in its folder until the new run has something to go on with.

How far that is, one folder in the run's folder says by its name. Each name comes by a single rename, so that a process
that is killed at any moment leaves a state that `settle` understands:

.replaced-moving  files of the old run on their way out or back; what stands beside it is the old run's too
.replaced         the whole old run; what stands beside it is the new run's
.replaced-done    an old run that has a successor, being removed
"""

from pathlib import Path

from common.machine.disk import remove

MOVING, REPLACED, DONE = ".replaced-moving", ".replaced", ".replaced-done"


def set_aside(folder: Path, names: set[str]) -> None:
    """Moves the old run's files and folders out of the way. names: theirs, in the folder."""
    moving = folder / MOVING
    moving.mkdir()
    for name in sorted(names):
        (folder / name).rename(moving / name)
    moving.rename(folder / REPLACED)


def remove_replaced(folder: Path) -> None:
    """Removes an old run that was set aside; its successor has a checkpoint, or has ended well."""
    if (folder / REPLACED).is_dir():
        (folder / REPLACED).rename(folder / DONE)
    remove(folder / DONE)


def settle(folder: Path, names: set[str], *, has_successor: bool) -> bool:
    """Ends what a run has begun that is over now. Returns whether that brought the old run back.

    names: what a run may leave in the folder; such files of the new run are removed where the old one comes back.
    has_successor: whether the new run, if the whole old one is set aside, has left something to go on with.
    """
    replaced, moving = folder / REPLACED, folder / MOVING
    if replaced.is_dir() and not has_successor:
        for name in names:
            remove(folder / name)
        replaced.rename(moving)
    if not moving.is_dir():
        remove_replaced(folder)
        return False
    for path in moving.iterdir():
        path.rename(folder / path.name)
    moving.rmdir()
    return True
