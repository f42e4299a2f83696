"""Lets a package export names without importing the modules that define them.

A recipe imports the functions that it calls at its top, and torch, transformers and TRL take seconds to import. So a
function of a package's face imports its module when it is called, and a class when it is looked up (PEP 562).
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, module_of: Mapping[str, str]) -> Callable[[str], Any]:
    """Makes the package's `__getattr__`. module_of: from each exported name to the module that defines it.

    A name that begins with a small letter is a function; any other is a class.
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
