"""Alerts: warnings that point to the line of the user's."""

import sys
import warnings


def alert(message: str) -> None:
    """Warn at the innermost line that is not of this package, nor of PyTorch, which calls it."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _inner(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level - 1)


def _inner(module: str) -> bool:
    return module.split(".")[0] in (__name__.split(".")[0], "torch", "contextlib")
