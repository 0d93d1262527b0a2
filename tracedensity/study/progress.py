"""Progress: a bar with rate and time left."""

from typing import Any

from tracedensity.loading.quiet import no_warnings


def bar_of(total: int, unit: str, shown: bool | None) -> Any:
    """A bar of so many units: in a terminal or notebook, unless something else is said."""
    with no_warnings():
        from tqdm.auto import tqdm
    return tqdm(total=total, unit=unit, disable=None if shown is None else not shown)


def skip(bar: Any, n: int) -> None:
    """Count what was there already, and took no time: rate and time left are of the rest."""
    if not bar.disable:
        bar.n += n
        bar.initial += n
        bar.last_print_n += n
        bar.unpause()
