"""Curves so small that they stand in a line of text or beside a table, for terminals and for notebooks."""

from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH, _HEIGHT, _EDGE = 220, 44, 4  # px


def spark_text(values: Sequence[float]) -> str:
    """Numbers from 0 to 1 as bars, one character each; what lies outside is cut off."""
    return "".join(_BARS[round(min(max(value, 0.0), 1.0) * (len(_BARS) - 1))] for value in values)


def spark_svg(x: Sequence[float], y: Sequence[float], title: str, *, steps: bool = False) -> str:
    """A curve as an image in HTML, in the colour of the text around it; `y` from 0 to 1.

    Args:
        x: Where the points are, ascending.
        y: How high they are.
        title: What the image shows, for who cannot see it or rests the mouse on it; must be escaped already.
        steps: Whether the curve keeps its height up to the next point.
    """
    low, span = x[0], (x[-1] - x[0]) or 1.0
    places = [
        (_EDGE + (at - low) / span * (_WIDTH - 2 * _EDGE), _HEIGHT - _EDGE - min(max(h, 0), 1) * (_HEIGHT - 2 * _EDGE))
        for at, h in zip(x, y, strict=True)
    ]
    path = f"M{places[0][0]:.1f} {places[0][1]:.1f}"
    path += "".join(f"H{across:.1f}V{up:.1f}" if steps else f"L{across:.1f} {up:.1f}" for across, up in places[1:])
    return (
        f'<svg role="img" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"><title>{title}</title>'
        f'<path d="M{_EDGE} {_HEIGHT - _EDGE}H{_WIDTH - _EDGE}" stroke="currentColor" stroke-opacity="0.3"/>'
        f'<path d="{path}" fill="none" stroke="currentColor" stroke-width="1.5" stroke-linejoin="round"/></svg>'
    )
