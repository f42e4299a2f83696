"""What goes wrong with the hub's cache on this machine's disk, in words."""

import os
import re

from filelock import Timeout
from huggingface_hub import constants

from common.recipe import UserError

_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE")  # where set, HF_HOME does not count


def cache_error(cause: BaseException, name: str, folders: tuple[str, ...]) -> UserError | None:
    """The words for an error of the disk, of a lock or of a missing home folder; None for any other error.

    name: of what should be kept there. folders: those beside the hub's cache that it is put in.
    """
    text = str(cause)
    if isinstance(cause, RuntimeError) and "home directory" in text:
        return UserError(f"there is no home folder to keep {name} in; name a folder for it: HF_HOME=/folder")
    if isinstance(cause, Timeout):
        return UserError(
            f"{name} waits for another process, which holds {cause.lock_file}: try again when that has ended; remove "
            "the file if there is none"
        )
    if isinstance(cause, OSError) and cause.errno is not None:
        reason = os.strerror(cause.errno)
    elif found := re.search(r"\(os error (\d+)\)", text):  # of hf_xet, which is written in Rust
        reason = os.strerror(int(found[1]))
    elif "Not enough disk space" in text:
        reason = text
    else:
        return None
    place = getattr(cause, "filename", None) or " or ".join((constants.HF_HUB_CACHE, *folders))
    variables = [variable for variable in _VARIABLES if variable in os.environ] or ["HF_HOME"]
    return UserError(
        f"{name} cannot be kept in the cache: {reason} ({place}). Mend that, or name another folder: "
        f"{' and '.join(variables)}"
    )
