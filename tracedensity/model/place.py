"""Places in a running model at which a value is seen, and replaced."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

from tracedensity.model.norm import NormLayer

Visit: TypeAlias = Callable[[Tensor], Tensor | None]
"""What is done with a value; what it returns, if anything, takes its place."""

Detach: TypeAlias = Callable[[], None]


@runtime_checkable  # so that test runs can check annotations
class Place(Protocol):
    """Where a value is."""

    def attach(self, visit: Visit, *, first: bool = False) -> Detach:
        """Visit the value in every run, after others' visits or before them, until the result is called."""
        ...


_WORTHWHILE = 2**17
"""Numbers in a stream from which on it takes less time to leave out rows than to find out which."""

_OWN: set[int] = set()
"""Handles of visits that are attached to hook points at this moment, by their `id`."""


def has_guests(point: Any) -> bool:
    """Whether somebody else's hooks are on a HookPoint, and are called."""
    return any(id(handle) not in _OWN and handle.hook.id in point._forward_hooks for handle in point.fwd_hooks)


@dataclass(frozen=True, eq=False)
class Point:
    """A HookPoint of TransformerLens."""

    point: Any

    def attach(self, visit: Visit, *, first: bool = False) -> Detach:
        def hook(value: Tensor, hook: object) -> Tensor | None:
            found = visit(value)
            # a tensor that is handed back is taken for an edit, which some norms are computed in another way for
            return None if found is value else found

        # By the HookPoint itself: found by name, a bridge in compatibility mode would call it once for every alias.
        self.point.add_hook(hook, prepend=first)
        handle = self.point.fwd_hooks[0 if first else -1]
        _OWN.add(id(handle))

        def detach() -> None:
            _OWN.discard(id(handle))
            handle.hook.remove()
            self.point.fwd_hooks = [other for other in self.point.fwd_hooks if other is not handle]

        return detach


@dataclass(frozen=True, eq=False)
class Input:
    """What a module is given: its first argument, or the one called ``hidden_states``."""

    module: torch.nn.Module

    def attach(self, visit: Visit, *, first: bool = False) -> Detach:
        def hook(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            found = visit(args[0] if args else kwargs["hidden_states"])
            if found is None:
                return None
            return ((found, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": found})

        return self.module.register_forward_pre_hook(hook, prepend=first, with_kwargs=True).remove


@dataclass(frozen=True, eq=False)
class Softmax:
    """What the softmax within a module makes, for modules that show it only when it has been used."""

    module: torch.nn.Module

    def attach(self, visit: Visit, *, first: bool = False) -> Detach:
        modes: list[_Watch] = []

        def enter(module: object, args: object) -> None:
            modes.append(_Watch(visit))
            modes[-1].__enter__()

        def leave(module: object, args: object, output: object) -> None:
            modes.pop().__exit__(None, None, None)

        before = self.module.register_forward_pre_hook(enter, prepend=first)
        after = self.module.register_forward_hook(leave, prepend=not first, always_call=True)

        def detach() -> None:
            before.remove()
            after.remove()
            while modes:  # Ctrl-C within the module, after which hooks are not called
                modes.pop().__exit__(None, None, None)

        return detach


class _Watch(TorchFunctionMode):
    def __init__(self, visit: Visit) -> None:
        super().__init__()
        self.visit = visit

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function not in (torch.nn.functional.softmax, torch.softmax, Tensor.softmax):
            return made
        found = self.visit(made)
        return made if found is None else found


@dataclass(frozen=True, eq=False)
class Spared:
    """A module that works on each token by itself, and need not run on some: what it makes of them is zero.

    A visit is given what the module is, and says of which tokens nothing is wanted.
    """

    module: torch.nn.Module

    @classmethod
    def of(cls, module: torch.nn.Module) -> "Spared | None":
        """The module, unless there are hooks in it, which would see some of the tokens only."""
        return None if _watched(module) else cls(module)

    def attach(self, visit: Visit, *, first: bool = False) -> Detach:
        wanted: list[Tensor] = []

        def pack(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if len(args) != 1 or kwargs:  # such as BLOOM's, whose MLP adds the stream that it is given as well
                return None
            idle = visit(args[0])
            if idle is None or not idle.any():
                return None
            kept = ~idle
            kept[0, 0] |= not kept.any()  # a module may not know what to do with nothing
            wanted.append(kept)
            return (args[0][kept][None],), kwargs

        def spread(module: object, args: object, output: Tensor) -> Tensor | None:
            if not wanted:
                return None
            kept = wanted.pop()
            whole = output.new_zeros(*kept.shape, output.shape[-1])
            whole[kept] = output[0]
            return whole

        before = self.module.register_forward_pre_hook(pack, with_kwargs=True)
        after = self.module.register_forward_hook(spread)
        return partial(_each, [before.remove, after.remove])


def attended(idle: Bool[Tensor, "row pos"]) -> tuple[Int[Tensor, " some"], int]:
    """Rows, and the first query, to which heads bring something, and before each one that stands for what is left."""
    idle_row = idle.all(1)
    stands = idle_row & (idle_row.cumsum(0) == 1)
    n_idle = int(idle.all(0).long().cumprod(0).sum())
    return (~idle_row | stands).nonzero()[:, 0], max(0, n_idle - 1)


def picked(value: Tensor, rows: Int[Tensor, " some"]) -> Tensor:
    """Some rows; the tensor itself if they are all."""
    return value if len(rows) == len(value) else value.index_select(0, rows)


@dataclass(frozen=True, eq=False)
class Idle:
    """Attention of TransformerLens, which need not run where heads bring nothing: it adds the same there, a bias.

    A visit is given what its norm reads, and says where that is. Of rows that read the same, one behind the other,
    queries, keys and values are made once.

    Attributes:
        norm: What is called with the stream for queries, for keys and for values.
        module: What is called with what comes of it.
    """

    norm: torch.nn.Module
    module: Any

    @classmethod
    def of(cls, norm: torch.nn.Module, module: torch.nn.Module) -> "Idle | None":
        """The two, unless there are hooks in them, which would see some of the rows only."""
        return None if _watched(norm) or _watched(module) else cls(norm, module)

    def attach(self, visit: Visit, *, first: bool = False) -> Detach:
        packed: list[_Packed] = []

        def pack(module: object, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not packed and args[0].numel() < _WORTHWHILE:
                return None
            if not packed:
                packed.append(_Packed.of(args[0], visit(args[0])))
            return (packed[0].of_stream(args[0]), *args[1:])

        def begin(module: object, args: object, kwargs: dict[str, Any]) -> Any:
            if not packed or not (start := packed[0].start):
                return None
            return args, {
                **kwargs,
                "query_input": kwargs["query_input"][:, start:],
                "past_kv_cache_entry": _Before(start),
            }

        def widened(value: Tensor) -> Tensor:
            return packed[0].widened(value) if packed else value

        def whole(module: object, args: object, output: Tensor) -> Tensor | None:
            return packed.pop().whole(output) if packed else None

        points = [Point(point).attach(widened, first=True) for point in (self.module.hook_v, self.module.hook_pattern)]
        hooks = [
            self.norm.register_forward_pre_hook(pack),
            self.module.register_forward_pre_hook(begin, with_kwargs=True),
            self.module.register_forward_hook(whole),
        ]
        return partial(_each, [*points, *(hook.remove for hook in hooks)])


@dataclass(frozen=True, eq=False)
class _Packed:
    """Which rows of a batch are read, and what becomes of them.

    Attributes:
        stream: What was read of all.
        few: What is read.
        read: Which rows these are.
        widen: Where each row that is attended is among them.
        spread: Where each row is among those that are attended.
        start: The first query that is attended.
    """

    stream: Tensor
    few: Tensor
    read: Int[Tensor, " read"]
    widen: Int[Tensor, " some"]
    spread: Int[Tensor, " row"]
    start: int

    @classmethod
    def of(cls, stream: Tensor, idle: Tensor | None) -> "_Packed":
        if idle is None:
            idle = torch.zeros(stream.shape[:2], dtype=torch.bool, device=stream.device)
        rows, start = attended(idle)
        # rows that are idle have the number of the one that stands for them
        idle_row, number = idle.all(1), torch.zeros(len(idle), dtype=torch.long, device=idle.device)
        number[rows] = torch.arange(len(rows), device=idle.device)
        spread = torch.where(idle_row, number[idle_row.long().argmax()], number)
        place, widen = _alike(stream)[rows].unique_consecutive(return_inverse=True)
        first = torch.zeros(len(place), dtype=torch.long, device=idle.device)
        first = first.scatter_reduce(0, widen, rows, "amin", include_self=False)
        return cls(stream, picked(stream, first), first, widen, spread, start)

    def of_stream(self, stream: Tensor) -> Tensor:
        """The rows that are read, of what is given for queries, for keys or for values."""
        return self.few if stream is self.stream else picked(stream, self.read)

    def widened(self, value: Tensor) -> Tensor:
        return value if len(self.read) == len(self.widen) else value.index_select(0, self.widen)

    def whole(self, output: Tensor) -> Tensor:
        if len(output) < len(self.spread):
            output = output.index_select(0, self.spread)
        return torch.cat([output[:, :1].expand(-1, self.start, -1), output], dim=1) if self.start else output


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
        self.past_keys = torch.empty(1, start)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values


@dataclass(frozen=True, eq=False)
class Sum:
    """The sum of the values at two places, of which the first comes first; it can be seen but not replaced."""

    one: Place
    other: Place

    def attach(self, visit: Visit, *, first: bool = False) -> Detach:
        seen: list[Tensor] = []

        def add(value: Tensor) -> None:
            if visit(seen.pop().to(value.device) + value) is not None:
                raise AssertionError("a sum cannot be replaced")

        return partial(_each, [self.one.attach(seen.append, first=first), self.other.attach(add, first=first)])


@dataclass(frozen=True, eq=False)
class BehindNorm:
    """What a module reads of the stream, where it is given only what a norm that it shares has made of it.

    If the value is replaced, the module gets what the norm makes of the new one.

    Attributes:
        stream: What the norm is given.
        normal: What the module is given.
        norm: The norm; None where the module is given the stream as it is.
        relevant: Whether the norm's scale takes no gradient.
    """

    stream: Place
    normal: Place
    norm: NormLayer | None
    relevant: bool = False

    def attach(self, visit: Visit, *, first: bool = False) -> Detach:
        seen: list[Tensor] = []

        def replace(value: Tensor) -> Tensor | None:
            stream = seen.pop().to(value.device)
            found = visit(stream)
            if found is None or found is stream:
                return None
            if self.norm is None:
                return found
            found = found.to(self.norm.weight.dtype)
            norm = self.norm.to(value.device)
            return (norm.relevant(found) if self.relevant else norm(found)).to(value.dtype)

        return partial(_each, [self.stream.attach(seen.append, first=first), self.normal.attach(replace, first=first)])


def _watched(module: torch.nn.Module) -> bool:
    """Whether there are hooks in a module."""
    parts = [*module.modules()]
    hooked = any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in parts)
    return hooked or bool(torch.nn.modules.module._has_any_global_hook())


def _each(detach: Sequence[Detach]) -> None:
    for one in detach:
        one()
