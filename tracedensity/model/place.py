"""Places in a running model at which a value is seen, and replaced."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor
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
        return None if watched(module) else cls(module)

    def attach(self, visit: Visit, *, first: bool = False) -> Detach:
        packed: list[tuple[torch.Size, Tensor]] = []  # tokens there are, and which of them are wanted

        def pack(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if len(args) != 1 or kwargs:  # such as BLOOM's, whose MLP adds the stream that it is given as well
                return None
            idle = visit(args[0])
            assert idle is not None
            wanted = (~idle).flatten().nonzero()[:, 0]
            if len(wanted) == idle.numel():
                return None
            if not len(wanted):  # a module may not know what to do with nothing
                wanted = wanted.new_zeros(1)
            packed.append((idle.shape, wanted))
            return (args[0].flatten(0, 1).index_select(0, wanted)[None],), kwargs

        def spread(module: object, args: object, output: Tensor) -> Tensor | None:
            if not packed:
                return None
            shape, wanted = packed.pop()
            whole = output.new_zeros(shape.numel(), output.shape[-1])
            return whole.index_copy_(0, wanted, output[0]).unflatten(0, shape)

        before = self.module.register_forward_pre_hook(pack, with_kwargs=True)
        after = self.module.register_forward_hook(spread)
        return partial(detach_all, [before.remove, after.remove])


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

        return partial(detach_all, [self.one.attach(seen.append, first=first), self.other.attach(add, first=first)])


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

        return partial(
            detach_all, [self.stream.attach(seen.append, first=first), self.normal.attach(replace, first=first)]
        )


def watched(module: torch.nn.Module) -> bool:
    """Whether there are hooks in a module."""
    parts = [*module.modules()]
    hooked = any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in parts)
    return hooked or bool(torch.nn.modules.module._has_any_global_hook())


def detach_all(detach: Sequence[Detach]) -> None:
    """End several visits."""
    for one in detach:
        one()
