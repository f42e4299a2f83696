"""Which process of the run this one is. torchrun, or common.machine.launch, says so in environment variables.

A run has one process a GPU. All of them load, train and decide the same; the main process, of rank 0, also prints, and
writes the files that are written once. Standard library only: what they tell each other is in collectives.py.
"""

import os


def rank() -> int:
    """This process's number among all processes of the run."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number among those on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Processes of the run, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main_process() -> bool:
    return rank() == 0
