"""Precision: in what numbers are computed, and that none of them is NaN or infinite."""

from torch import Tensor, float64

CHECKED = {
    "resid_pre": "the stream entering the block",
    "q": "the queries",
    "k": "the keys",
    "v": "the values",
    "pattern": "the attention pattern",
    "attn_out": "the attention output",
    "mlp_out": "the MLP output",
}
"""The sites at which a value that is not finite is looked for, and what to call them."""


def full_precision(tensor: Tensor) -> Tensor:
    """In float64 if it already is, else in float32."""
    return tensor if tensor.dtype == float64 else tensor.float()


def require_finite(values: Tensor, quantity: str, layer: int | None = None) -> None:
    """Raise a ValueError that names the layer if a value is NaN or infinite.

    The sum is tested first: it is finite only if all summands are, and is one cheap pass.
    """
    if values.sum().isfinite() or values.isfinite().all():
        return
    where = "the model" if layer is None else f"layer {layer}"
    bad = int((~values.isfinite()).sum())
    raise ValueError(
        f"`model` must give finite values, got {bad} NaN or infinite in {quantity} of {where}. "
        "Look at its weights, or load it in float32."
    )


def require_sound(value: Tensor, name: str, layer: int) -> None:
    """Raise a ValueError that names the layer if the value at a site shows that something is NaN or infinite."""
    if name == "pattern":
        # TransformerLens makes zeros of a softmax that is NaN: a token that attends to nothing gives it away
        if not (value.sum(-1) > 0).all():
            raise ValueError(
                f"`model` must give finite values, got NaN or infinite in the attention scores of layer {layer} "
                "(queries times keys). Look at its weights, or load it in float32."
            )
    elif name in CHECKED:
        require_finite(value, CHECKED[name], layer)
