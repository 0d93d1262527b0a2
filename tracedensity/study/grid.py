"""The density papers' grid: curves of prompts of any length at the same shares of their edges."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from tracedensity.evaluation import RELATIVE_SIZES, paper_sizes


def on_grid(sizes: Any, faithfulness: Any) -> Float[np.ndarray, " point"]:
    """Faithfulness at the density papers' shares, interpolated over log10 of size; below one edge that of none."""
    known, heights = np.asarray(sizes, float), np.asarray(faithfulness, float)
    asked = np.array(RELATIVE_SIZES) * known[-1]
    found = np.interp(np.log10(np.maximum(asked, 1)), np.log10(np.maximum(known, 1)), heights)
    return np.where(asked < 1, heights[0], found)


def grid_area(sizes: Any, faithfulness: Any) -> float:
    """Area under 1 - faithfulness over log10 of the share of edges, from 1e-5 to 1, whatever the number of edges."""
    return float(np.trapezoid(1 - on_grid(sizes, faithfulness), np.log10(RELATIVE_SIZES)))


def half_areas(sizes: Any, faithfulness: Any) -> tuple[float, float]:
    """The same from every other of the papers' sizes, and from the rest, at circuits that were run."""
    known = torch.as_tensor(np.array(sizes))
    heights = torch.as_tensor(np.array(faithfulness))
    asked = paper_sizes(int(known[-1]))
    lost = 1 - heights[(torch.searchsorted(known, asked, right=True) - 1).clamp(min=0)].double()
    share = torch.tensor(RELATIVE_SIZES, dtype=torch.float64).log10()
    first, second = (float(torch.trapezoid(lost[half::2], share[half::2])) for half in (0, 1))
    return first, second
