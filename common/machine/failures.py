"""What a user can mend without a look at the code, in words: a file that cannot be written, memory that is used up."""

from common.machine.out_of_memory import out_of_memory
from common.machine.write_errors import write_failure

_WHO_USES = {
    "GPU": "nvidia-smi shows what else uses the card: end that, or take a card with more",
    "host": "free -h shows what is left of it: close other programs, or take a machine with more",
}


def failure_in_words(error: BaseException, folder: str) -> str | None:
    """One line about a file that cannot be written or memory that does not suffice; None for any other error.

    folder: where the work writes, named when the error names no file.
    """
    if reason := write_failure(error):
        place = getattr(error, "filename", None) or folder
        failed = "opened" if isinstance(error, PermissionError) else "written"
        return f"{place} cannot be {failed}: {reason}"
    if memory := out_of_memory(error):
        said = " ".join(str(error).split())
        return f"out of {memory} memory. {_WHO_USES[memory]}. {said}".rstrip()
    return None
