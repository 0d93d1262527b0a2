"""Extras: libraries that a plain installation lacks, imported where they are used."""

from importlib import import_module
from typing import Any


def extra(module: str, name: str, purpose: str) -> Any:
    """A module of a library that comes with an extra.

    Args:
        module: Its name.
        name: The extra.
        purpose: What needs it, in the plural.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        library = module.split(".")[0]
        raise ValueError(f'{purpose} need {library}: pip install "tracedensity[{name}]" ({error}).') from error
