"""A package's face without its weight: what a name stands for is imported when it is needed.

A recipe imports the functions of its story at its top, and torch, transformers and TRL take seconds to import. So a
function of a face imports its module when it is called, and a class when it is looked up (PEP 562).
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, module_of: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for the package. module_of: each public name, and the module in the package that defines it.

    Names with a small first letter are functions. Any other name that the package does not have is an AttributeError.
    """

    def look_up(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = f"{package}.{module_of[name]}"
        if not name[0].islower():
            return getattr(import_module(module), name)

        def call(*arguments: Any, **named: Any) -> Any:
            return getattr(import_module(module), name)(*arguments, **named)

        call.__name__ = call.__qualname__ = name
        call.__module__ = module
        return call

    return look_up
