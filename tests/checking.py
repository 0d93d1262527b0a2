"""How annotations are checked in every test run."""

from collections.abc import Callable
from typing import Any

from beartype import beartype

_known: dict[Any, Any] = {}


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """What beartype makes of a function, once of all that have its name and its annotations.

    It is given functions that do nothing, which jaxtyping makes of the signatures of ours: each time that a function
    within a function is defined anew. Writing their checks anew, too, took nine tenths of the time of many a test.
    """
    code = function.__code__
    signature = (code.co_varnames, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    key = (function.__module__, function.__qualname__, signature, tuple(function.__annotations__.items()))
    try:
        hash(key)
    except TypeError:  # an annotation that is no type
        return beartype(function)
    if key not in _known:
        _known[key] = beartype(function)
    return _known[key]
