"""While a model is loaded, nothing but errors is said."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


def first_line(error: Exception | None) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


@contextmanager
def no_warnings() -> Iterator[None]:
    """While open, warnings are not shown: above all tqdm's, on its first import into a notebook without widgets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
    """While open, nothing that loading a model says is shown: prints, warnings, logs, and bars unless wanted."""
    with no_warnings():
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
        from transformers.utils import logging as hugging_face_logging

    shown, hub_hidden = hugging_face_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    level = logging.root.manager.disable
    if not bars:
        hugging_face_logging.disable_progress_bar()  # the Hub's as well
    logging.disable(max(level, logging.WARNING))
    try:
        with no_warnings(), redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
        if not bars and shown:
            hugging_face_logging.enable_progress_bar()
            if hub_hidden:
                disable_progress_bars()
