"""Annotations are checked in this very run, also those of functions within functions."""

import jaxtyping
import pytest
import torch
from checking import checked
from jaxtyping import Float, Int
from torch import Tensor

from tracedensity.model import full_precision, require_finite


def test_what_is_given_is_checked():
    with pytest.raises(jaxtyping.TypeCheckError):
        full_precision("one")
    with pytest.raises(jaxtyping.TypeCheckError):
        require_finite(torch.ones(2), torch.ones(2))


def made(annotation):
    """A function of one name, defined anew."""

    @jaxtyping.jaxtyped(typechecker=checked)
    def within(value: Float[Tensor, "row column"], other: annotation) -> Float[Tensor, " row"]:
        return value.sum(0) if other is None else value.sum(1)

    return within


def test_a_function_within_a_function_is_checked_every_time_it_is_defined():
    for _ in range(2):
        assert made(int | None)(torch.ones(2, 3), 1).shape == (2,)
        with pytest.raises(jaxtyping.TypeCheckError):
            made(int | None)(torch.ones(3), 1)
        with pytest.raises(jaxtyping.TypeCheckError):
            made(int | None)(torch.ones(2, 3), 1.5)
        with pytest.raises(jaxtyping.TypeCheckError):
            made(int | None)(torch.ones(2, 3), None)  # its result has the other length


def test_annotations_of_functions_of_one_name_are_told_apart():
    assert made(Int[Tensor, ""])(torch.ones(2, 3), torch.tensor(1)).shape == (2,)
    with pytest.raises(jaxtyping.TypeCheckError):
        made(str)(torch.ones(2, 3), torch.tensor(1))
