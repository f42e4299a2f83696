"""What the pages and cards about runs share: how a template becomes text, and how a run's JSON is read."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.recipe import UserError


def render(template: str, values: dict[str, Any]) -> str:
    """The text that a template becomes. template: the name of a file beside this one.

    Raises what jinja raises where a value is missing.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=not template.endswith(".md.jinja"),  # an answer may hold HTML
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": lambda n: f"{n:,}", "gib": lambda n: f"{n / (1 << 30):.2f}"}
    return environment.get_template(template).render(values)


def read_object(path: Path) -> dict[str, Any]:
    """What a file of JSON holds. Raises UserError unless it is an object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    return values
