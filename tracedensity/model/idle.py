"""Rows and queries to which heads bring nothing, on which attention of TransformerLens need not run."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tracedensity.model.place import Detach, Point, Visit, detach_all, watched

_WORTHWHILE = 2**17
"""Numbers in a stream from which on it takes less time to leave out rows than to find out which."""


@dataclass(frozen=True, eq=False)
class Attended:
    """Where attention runs: on rows to which heads bring something, and on one that stands for all others.

    Attributes:
        rows: These rows.
        spread: Where each row, or the one that stands for it, is among them.
        start: The first query; it stands for those before it, to which heads bring nothing in any row.
    """

    rows: Int[Tensor, " attended"]
    spread: Int[Tensor, " row"]
    start: int

    @classmethod
    def of(cls, idle: Bool[Tensor, "row pos"]) -> "Attended":
        """What is attended, given to which row and query heads bring nothing."""
        nothing = idle.all(1)
        attended = ~nothing | (nothing.cumsum(0) == 1)
        number = attended.cumsum(0) - 1
        spread = torch.where(nothing, number[nothing.long().argmax(0, keepdim=True)], number)
        n_idle = int(idle.all(0).long().cumprod(0).sum())
        return cls(attended.nonzero()[:, 0], spread, max(0, n_idle - 1))

    def picked(self, value: Tensor) -> Tensor:
        """What attention is given of a value of each row."""
        return _picked(value, self.rows)

    def whole(self, output: Float[Tensor, "attended query d_model"]) -> Float[Tensor, "row pos d_model"]:
        """What attention makes, in every row and at every query."""
        if len(output) < len(self.spread):
            output = output.index_select(0, self.spread)
        return torch.cat([output[:, :1].expand(-1, self.start, -1), output], dim=1) if self.start else output


def _picked(value: Tensor, rows: Int[Tensor, " some"]) -> Tensor:
    return value if len(rows) == len(value) else value.index_select(0, rows)


@dataclass(frozen=True, eq=False)
class IdleAttention:
    """Attention of TransformerLens, which need not run where heads bring nothing: it adds the same there, a bias.

    A visit is given what its norm reads, and says where that is; it is not asked where gradients are recorded. Of rows
    that read the same, one behind the other, queries, keys and values are made once, and the norm runs once for these.

    Attributes:
        norm: What is called with the stream, the same one, for queries, for keys and for values.
        module: What is called with what comes of it.
    """

    norm: torch.nn.Module
    module: Any

    @classmethod
    def of(cls, norm: torch.nn.Module, module: torch.nn.Module) -> "IdleAttention | None":
        """The two, unless there are hooks in them, which would see some of the rows only."""
        return None if watched(norm) or watched(module) else cls(norm, module)

    def attach(self, visit: Visit, *, first: bool = False) -> Detach:
        packed: list[_Packed] = []
        normal: list[Tensor] = []

        def pack(module: object, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if packed:
                return (args[0][:1, :1],)  # what comes of all is known
            if args[0].numel() < _WORTHWHILE or torch.is_grad_enabled():  # each row has a gradient of its own
                return None
            idle = visit(args[0])
            assert idle is not None
            packed.append(_Packed.of(args[0], Attended.of(idle)))
            return (packed[0].few,)

        def repeat(module: object, args: object, output: Tensor) -> Tensor | None:
            if packed and not normal:
                normal.append(output)
            return normal[0] if normal else None

        def begin(module: object, args: object, kwargs: dict[str, Any]) -> Any:
            if not packed or not (start := packed[0].attended.start):
                return None
            query = kwargs["query_input"][:, start:]
            return args, {**kwargs, "query_input": query, "past_kv_cache_entry": _Before(start)}

        def widened(value: Tensor) -> Tensor:
            return _picked(value, packed[0].widen) if packed and packed[0].is_alike else value

        def whole(module: object, args: object, output: Tensor) -> Tensor | None:
            normal.clear()
            return packed.pop().attended.whole(output) if packed else None

        points = [Point(point).attach(widened, first=True) for point in (self.module.hook_v, self.module.hook_pattern)]
        hooks = [
            self.norm.register_forward_pre_hook(pack),
            self.norm.register_forward_hook(repeat),
            self.module.register_forward_pre_hook(begin, with_kwargs=True),
            self.module.register_forward_hook(whole),
        ]
        return partial(detach_all, [*points, *(hook.remove for hook in hooks)])


@dataclass(frozen=True, eq=False)
class _Packed:
    """What of a batch is read, and what becomes of it.

    Attributes:
        few: Rows that are read: of equal ones, the first.
        widen: Where each row that is attended is among them.
        attended: Which these are.
    """

    few: Float[Tensor, "read pos *d_model"]
    widen: Int[Tensor, " attended"]
    attended: Attended

    @classmethod
    def of(cls, stream: Float[Tensor, "row pos *d_model"], attended: Attended) -> "_Packed":
        place, widen = _alike(stream)[attended.rows].unique_consecutive(return_inverse=True)
        first = torch.zeros(len(place), dtype=torch.long, device=stream.device)
        first = first.scatter_reduce(0, widen, attended.rows, "amin", include_self=False)
        return cls(_picked(stream, first), widen, attended)

    @property
    def is_alike(self) -> bool:
        """Whether some rows that are attended read the same."""
        return len(self.few) < len(self.widen)


def _alike(stream: Float[Tensor, "row pos *d_model"]) -> Int[Tensor, " row"]:
    """A number for each row, the same for rows that are equal and stand one behind the other."""
    other = (stream[1:, -1] != stream[:-1, -1]).flatten(1).any(1)
    maybe = (~other).nonzero()[:, 0]
    if len(maybe):
        other[maybe] = (stream[maybe + 1] != stream[maybe]).flatten(1).any(1)
    return pad(other.long().cumsum(0), (1, 0))


class _Before:
    """What tells attention of TransformerLens that queries begin at a later token than keys do."""

    def __init__(self, start: int) -> None:
        self.past_keys = torch.empty(1, start, device="meta")

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values
