"""What can be typed behind `make TARGET`. Standard library only: it runs before the set-up.

make itself takes any NAME=value and ignores the names that it does not know.
"""

from collections.abc import Iterator, Sequence

from common.recipe import SPECS, fields_of_specs
from common.recipe_fields import BROUGHT

ANYWHERE = ("PYTHON", "VENV", "ARGS")
_RUN = ("MODEL", "SET", "DATA", "GPU", "GPUS", "NNODES", "RDZV_ENDPOINT")
_TARGET = ("MODEL", "SET", "GPU", "OUT", "BASE", "TO")
TAKES = {
    "finetune": (*_RUN, "OUT"),
    "data": ("MODEL", "SET", "DATA", "SEQ_LEN", "JSON"),
    "plan": ("MODEL", "SET", "GPU", "GPUS", "NNODES", "RDZV_ENDPOINT", "CARD_GIB", "SEQ_LEN", "JSON"),
    "dryrun": ("MODEL", "SET", "GPU", "GPUS", "NNODES", "RDZV_ENDPOINT", "LAYERS"),
    "chat": ("MODEL", "SET", "GPU", "OUT", "PROMPT"),
    "eval": ("MODEL", "SET", "GPU", "OUT", "DATA", "JSON"),
    "merge": _TARGET,
    "export": (*_TARGET, "FORMAT", "QUANT"),
    "report": ("MODEL", "SET", "OUT"),
    "compare": ("RUNS", "TO"),
    "push": ("MODEL", "SET", "OUT", "REPO"),
    "lm-eval": ("MODEL", "OUT", "TO", "TASKS"),
}
MAKE_NEW = ("finetune", "data", "plan", "dryrun")  # look at the recipe; other commands take what a run recorded


def explain_variables(targets: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    """Yields a line for each name that none of the targets takes. names: those that were typed as NAME=value."""
    taken = [name for target in targets for name in TAKES.get(target, ())]
    for name in names:
        if name not in (*taken, *ANYWHERE):
            yield f"make {' '.join(targets)} has no variable {name}; {_instead(name, targets, taken)}"


def _instead(name: str, targets: Sequence[str], taken: Sequence[str]) -> str:
    if name.upper() in taken:
        return f"do you mean {name.upper()}=...?"
    field = _field(name.lower())
    if field and (set(targets) & {*MAKE_NEW} or ("SET" in taken and field.startswith("model."))):
        return f'it is a field of the recipe: SET="{field}=..."'
    others = [target for target in TAKES if name in TAKES[target]]
    if others:
        return f"it belongs to make {', '.join(others)}"
    return f"it takes {', '.join(dict.fromkeys((*taken, 'ARGS')))}"


def _field(name: str) -> str | None:
    """The field that is meant by a name of ours or of another library, as SET has it."""
    for part, spec in SPECS.items():
        ours = fields_of_specs()[spec.__name__]
        for field, names in {field: (field,) for field in ours}.items() | BROUGHT.get(spec.__name__, {}).items():
            written = field.split(",")[0]
            if name in names and written in ours and (part or written == "card_gib"):
                return f"{part}.{written}".lstrip(".")
    return None
