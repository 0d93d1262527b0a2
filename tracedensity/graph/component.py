"""The component graph of edge attribution patching: which head or MLP reads what which other one wrote."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tracedensity.ablate import Written
from tracedensity.graph import Dropped, EdgeList, Rows
from tracedensity.model import Edit, Site, Transformer, full_precision

_WRITER = r"input|a\d+\.h\d+|m\d+(?:\.n\d+)?"
_READER = r"a\d+\.(?:h\d+<[qkv]>|kv\d+<[kv]>)|m\d+|logits"
_NAME = re.compile(rf"({_WRITER})->({_READER})(?:@(\d+))?")

WORKSPACE = 2**25
"""Bytes that the separate inputs of readers may take at a time."""


@dataclass(frozen=True)
class ComponentGraph:
    """Who reads what whom wrote to the residual stream.

    Writers are the token embedding (``input``; positions are no writer), every head (``a1.h2``) and every MLP (``m1``,
    or its neurons ``m1.n7``). Readers are the queries of every head (``a1.h2<q>``), keys and values of every head or
    of every group of heads that share them (``a1.h2<k>`` or ``a1.kv0<k>``), every MLP (``m1``) and the unembedding
    (``logits``). An edge goes from each writer to each reader that comes after it. What a reader reads is the stream
    before its norm. Biases of attention outputs, and learned positions, belong to no writer and are in every circuit.

    There is one kind, ``edge`` ``[writer, reader]``, or ``[writer, reader, pos]`` with positions.

    Attributes:
        n_layers: Number of blocks.
        n_heads: Query heads per block.
        n_kv_heads: Readers of keys (and of values) per block: key/value heads, or query heads if they are ungrouped.
        has_mlp: Whether blocks have an MLP.
        parallel: Whether attention and MLP of a block read the same stream.
        n_pos: Tokens, where edges are told apart by position; None where positions are summed.
        d_mlp: Neurons per MLP, where they are writers one by one; None where MLPs are.

    References:
        Syed, Rager, Conmy: Attribution Patching Outperforms Automated Circuit Discovery (arXiv 2310.10348);
        Hanna, Pezzelle, Belinkov: Have Faith in Faithfulness (arXiv 2403.17806), whose names these are.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    has_mlp: bool = True
    parallel: bool = False
    n_pos: int | None = None
    d_mlp: int | None = None

    @classmethod
    def of(
        cls, model: Transformer, *, n_pos: int | None = None, ungroup: bool = False, neurons: bool = False
    ) -> "ComponentGraph":
        """The graph of a model.

        Args:
            model: The model.
            n_pos: Number of tokens, to tell edges apart by position.
            ungroup: Give every query head readers of keys and values of its own.
            neurons: Take every neuron of an MLP for a writer.

        Raises:
            ValueError: If positions are added to what queries and keys read, which then is more than the stream.
        """
        if model.positions == "shortformer":
            raise ValueError(
                f"`model` must add positions to the stream or rotate by them, got {model.name}, whose queries and keys "
                "read positions beside the stream: the component graph does not describe that."
            )
        n_kv_heads = model.n_heads if ungroup else model.n_kv_heads
        d_mlp = model.d_mlp if neurons and model.has_mlp else None
        return cls(model.n_layers, model.n_heads, n_kv_heads, model.has_mlp, model.parallel, n_pos, d_mlp)

    # -- nodes -----------------------------------------------------------------------------------

    @property
    def per_mlp(self) -> int:
        """Writers per MLP."""
        return (self.d_mlp or 1) if self.has_mlp else 0

    @property
    def n_writers(self) -> int:
        return 1 + self.n_layers * (self.n_heads + self.per_mlp)

    @property
    def per_layer(self) -> int:
        """Readers per layer."""
        return self.n_heads + 2 * self.n_kv_heads + self.has_mlp

    @property
    def n_readers(self) -> int:
        return self.n_layers * self.per_layer + 1

    @property
    def grouped(self) -> bool:
        """Whether query heads share readers of keys and values."""
        return self.n_kv_heads < self.n_heads

    @property
    def n_held(self) -> int:
        return self.n_writers

    @property
    def ungrouped(self) -> bool:
        """Whether every query head has readers of keys and values of its own."""
        return not self.grouped

    def heads_of(self, layer: int) -> slice:
        """The heads of a layer among the writers."""
        start = 1 + layer * (self.n_heads + self.per_mlp)
        return slice(start, start + self.n_heads)

    def mlp_of(self, layer: int) -> slice:
        """The MLP of a layer, or its neurons, among the writers."""
        start = self.heads_of(layer).stop
        return slice(start, start + self.per_mlp)

    def readers_of(self, name: str, layer: int) -> slice:
        """Readers of a layer: ``"q"``, ``"k"``, ``"v"``, ``"mlp"``; or ``"logits"``."""
        if name == "logits":
            return slice(self.n_readers - 1, self.n_readers)
        counts = {"q": self.n_heads, "k": self.n_kv_heads, "v": self.n_kv_heads, "mlp": int(self.has_mlp)}
        start = layer * self.per_layer
        for each, count in counts.items():
            if each == name:
                return slice(start, start + count)
            start += count
        raise KeyError(name)

    def n_read(self, name: str, layer: int) -> int:
        """How many writers come before a reader: it reads the first so many."""
        if name == "logits":
            return self.n_writers
        return self.heads_of(layer).stop if name == "mlp" and not self.parallel else self.heads_of(layer).start

    @cached_property
    def writers(self) -> list[str]:
        """Names of the writers, in order."""
        names = ["input"]
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}" for head in range(self.n_heads)]
            if self.d_mlp:
                names += [f"m{layer}.n{neuron}" for neuron in range(self.d_mlp)]
            elif self.has_mlp:
                names.append(f"m{layer}")
        return names

    @cached_property
    def readers(self) -> list[str]:
        """Names of the readers, in order."""
        unit = "kv" if self.grouped else "h"
        names = []
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}<q>" for head in range(self.n_heads)]
            names += [f"a{layer}.{unit}{head}<{kind}>" for kind in "kv" for head in range(self.n_kv_heads)]
            names += [f"m{layer}"] * self.has_mlp
        return [*names, "logits"]

    # -- edges -----------------------------------------------------------------------------------

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        shape = (self.n_writers, self.n_readers)
        return {"edge": shape if self.n_pos is None else (*shape, self.n_pos)}

    @property
    def n_edges(self) -> int:
        """Closed form: readers of each layer times what comes before them, and all writers into the logits.

        With one writer per MLP, ``(H + 2 H_kv + 1) (L + (H + 1) L (L - 1) / 2) + L H + 1 + L (H + 1)``, without ``L
        H`` in parallel blocks. With positions each counts once per token, but for what the last layer does not
        need: there all but keys and values are read at the last token only.
        """
        slots, written = self.per_layer, self.n_heads + self.per_mlp
        into_layers = slots * (self.n_layers + written * self.n_layers * (self.n_layers - 1) // 2)
        same_layer = self.n_layers * self.n_heads if self.has_mlp and not self.parallel else 0
        if self.n_pos is None:
            return into_layers + same_layer + self.n_writers
        last = self.n_layers - 1
        once = self.n_writers + self.n_heads * self.n_read("q", last) + self.has_mlp * self.n_read("mlp", last)
        return (into_layers + same_layer + self.n_writers - once) * self.n_pos + once

    @cached_property
    def exists(self) -> dict[str, Bool[Tensor, "..."]]:
        edge = torch.zeros(self.shapes["edge"], dtype=torch.bool)
        for layer in range(self.n_layers):
            for name in ("q", "k", "v", "mlp"):
                edge[: self.n_read(name, layer), self.readers_of(name, layer)] = True
        edge[:, -1] = True
        if self.n_pos is not None:  # what reaches the prediction from the last layer does so at the last token
            for name in ("q", "mlp", "logits"):
                edge[:, self.readers_of(name, self.n_layers - 1), :-1] = False
        return {"edge": edge}

    @cached_property
    def edges(self) -> EdgeList:
        """Sorted by target, then source, then query, key, value.

        The target of an edge into queries is the head, of one into an MLP the MLP. What several heads share is a node
        of its own, from which links that are no edges lead to these heads: keys and values of a group; with
        positions, keys and values of a token, which reach the heads at this token and all later ones. So are
        an MLP and its neurons.
        """
        nodes = _Nodes.of(self)
        writer, reader, pos = self.exists["edge"].view(self.n_writers, self.n_readers, -1).numpy().nonzero()
        n_links = nodes.links.shape[1]
        source = np.append(nodes.writers[writer, pos], nodes.links[0])
        target = np.append(nodes.readers[reader, pos], nodes.links[1])
        by = np.lexsort((np.append(reader, np.zeros(n_links, dtype=reader.dtype)), source, target))
        is_edge = by < len(reader)
        place = (writer * self.n_readers + reader) * (self.n_pos or 1) + pos
        starts = np.flatnonzero(np.diff(nodes.block[target[by]], prepend=-1))
        blocks = tuple(slice(*ends) for ends in zip(starts.tolist(), [*starts[1:].tolist(), len(by)], strict=True))
        return EdgeList(
            torch.from_numpy(place[by[is_edge]]),
            torch.from_numpy(source[by]),
            torch.from_numpy(target[by]),
            blocks,
            n_nodes=len(nodes.block),
            output=len(nodes.block) - 1,
            is_edge=torch.from_numpy(is_edge),
        )

    def edge_name(self, kind: str, index: tuple[int, ...]) -> str:
        """``a1.h2->m3``, ``input->a0.h1<q>``, ``m0.n5->logits``; with positions ``a1.h2->m3@4``."""
        writer, reader, *pos = index
        return f"{self.writers[writer]}->{self.readers[reader]}" + "".join(f"@{each}" for each in pos)

    def edge_index(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Kind and index of the edge with a name.

        Raises:
            ValueError: If the graph has no such edge.
        """
        if found := _NAME.fullmatch(name):
            writer, reader, pos = found.groups()
            if (pos is None) == (self.n_pos is None) and writer in self._writer_index and reader in self._reader_index:
                index = (self._writer_index[writer], self._reader_index[reader], *([int(pos)] if pos else []))
                if (not pos or index[2] < (self.n_pos or 0)) and self.exists["edge"][index]:
                    return "edge", index
        last = () if self.n_pos is None else (self.n_pos - 1,)
        example = self.edge_name("edge", (1, self.n_readers - 1, *last))
        raise ValueError(f"`name` must be an edge of this graph, like {example!r}, got {name!r}.")

    def ends(self, kind: str, index: tuple[int, ...]) -> tuple[str, str, str]:
        """A writer, a head or an MLP or the logits, and ``q``, ``k``, ``v``, ``mlp`` or ``logits``.

        Keys and values of a group of heads are a node of their own, ``a1.kv0``; with positions those of every head are,
        ``a1.h2.kv@4``, since heads at later tokens have them as well. `links` says of what they are part.
        """
        writer, reader, *pos = index
        at = "".join(f"@{each}" for each in pos)
        name, _, read_as = self.readers[reader].partition("<")
        read_as = read_as.removesuffix(">") or ("mlp" if name.startswith("m") else "logits")
        if pos and read_as in ("k", "v") and not self.grouped:
            name += ".kv"
        return self.writers[writer] + at, name + at, read_as

    def links(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """Of nodes by the names of `ends`, pairs of which one is part of the other, in the order of the computation.

        Keys and values come before the heads that have them, at their own token and all later ones; an MLP comes before
        its neurons.
        """
        some = dict.fromkeys(names)
        found = []
        for name in some:
            stem, _, pos = name.partition("@")
            heads: list[str] = []
            if shared := re.fullmatch(r"(a\d+)\.kv(\d+)", stem):
                size = self.n_heads // self.n_kv_heads
                heads = [f"{shared[1]}.h{int(shared[2]) * size + number}" for number in range(size)]
            elif stem.endswith(".kv"):
                heads = [stem.removesuffix(".kv")]
            elif neuron := re.fullmatch(r"(m\d+)\.n\d+", stem):
                mlp = name.replace(stem, neuron[1])
                found += [(mlp, name)] if mlp in some else []
            at = [f"@{each}" for each in range(int(pos), self.n_pos or 0)] if pos else [""]
            found += [(name, head + each) for each in at for head in heads if head + each in some]
        return found

    @cached_property
    def _writer_index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.writers)}

    @cached_property
    def _reader_index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.readers)}

    def select(self, *, layers: Sequence[int] | None = None, heads: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Which edges have both ends in some layers, or an end at some heads.

        Args:
            layers: Layers, counted from 0; `input` and `logits` are in any.
            heads: Names of heads, such as ``"a1.h2"``.

        Raises:
            ValueError: If there is no such layer or head.
        """
        chosen = self.exists["edge"].clone()
        places = chosen.view(self.n_writers, self.n_readers, -1)
        if layers is not None:
            if bad := [layer for layer in layers if not 0 <= layer < self.n_layers]:
                raise ValueError(f"`layers` must be from 0 to {self.n_layers - 1}, got {bad}.")
            of_writer = [int(m[1]) if (m := re.match(r"[am](\d+)", name)) else -1 for name in self.writers]
            of_reader = [int(m[1]) if (m := re.match(r"[am](\d+)", name)) else -1 for name in self.readers]
            wanted = {-1, *layers}
            places[[layer not in wanted for layer in of_writer]] = False
            places[:, [layer not in wanted for layer in of_reader]] = False
        if heads is not None:
            if bad := [head for head in heads if not head.startswith("a") or head not in self._writer_index]:
                raise ValueError(f"`heads` must be heads of this graph, like {self.writers[1]!r}, got {bad}.")
            share = self.n_heads // self.n_kv_heads
            names = set(heads)
            for head in heads:
                layer, number = head.split(".h")
                names |= {f"{head}<{kind}>" for kind in "qkv"}
                names |= {f"{layer}.kv{int(number) // share}<{kind}>" for kind in "kv"}
            writes = torch.tensor([name in names for name in self.writers])
            reads = torch.tensor([name in names for name in self.readers])
            places &= (writes[:, None] | reads)[..., None]
        return {"edge": chosen}

    def first_entry(self, place: Int[Tensor, " writer"]) -> Int[Tensor, " reader"]:
        """For each reader, the first place that a writer of its node has: a head of its group, its MLP or a neuron."""
        first = place.new_zeros(self.n_readers)
        for layer in range(self.n_layers):
            heads = place[self.heads_of(layer)]
            first[self.readers_of("q", layer)] = heads
            for name in "kv":
                first[self.readers_of(name, layer)] = heads.view(self.n_kv_heads, -1).amin(1)
            if self.has_mlp:
                first[self.readers_of("mlp", layer)] = place[self.mlp_of(layer)].amin()
        return first

    def to_dict(self) -> dict[str, Any]:
        return {"graph": "component", **asdict(self)}

    # -- circuits --------------------------------------------------------------------------------

    def edits(self, dropped: Dropped, rows: Rows) -> Mapping[Site, Edit]:
        """Each reader gets what the circuit leaves of the stream, and for absent edges what ablated writers would
        write.

        The input of reader v is the stream of this very run, plus, for each absent edge from a writer u, the ablated
        output of u minus its output in this run, in which all patches upstream are in effect. Readers
        of one layer go through the norm and their own projections by themselves.

        Raises:
            ValueError: If MLPs are told apart by neuron.
        """
        if self.d_mlp:
            raise ValueError(
                "`graph` must have whole MLPs as writers to be run, got one of neurons: these are for scores."
            )
        return _PatchedRun(self, dropped, rows).edits()

    def fed(self, kept: Bool[Tensor, "*circuit edge"]) -> Bool[Tensor, "*circuit edge"]:
        """As they are: an ablated writer writes what it would write elsewhere, which readers can do with."""
        return kept


@dataclass(frozen=True, eq=False)
class _Nodes:
    """Nodes of a component graph, numbered in the order of the computation.

    Attributes:
        writers: Node of each writer at each position (one where positions are summed).
        readers: Node that an edge into each reader enters.
        links: Nodes that come with others without an edge, as source and target.
        block: For each node a number that grows along every edge and every link.
    """

    writers: Int[np.ndarray, "writer pos"]
    readers: Int[np.ndarray, "reader pos"]
    links: Int[np.ndarray, "2 link"]
    block: Int[np.ndarray, " node"]

    @classmethod
    def of(cls, graph: ComponentGraph) -> "_Nodes":
        n_pos = graph.n_pos or 1
        blocks: list[np.ndarray] = []
        count = n_blocks = 0

        def new(units: int, one_block: bool = True) -> np.ndarray:
            """Numbers ``[unit, pos]`` of new nodes, in one block or in one for each position."""
            nonlocal count, n_blocks
            numbers = count + np.arange(units * n_pos).reshape(n_pos, units).T
            blocks.append(n_blocks + np.repeat(np.arange(n_pos) * (not one_block), units))
            count, n_blocks = count + units * n_pos, n_blocks + (1 if one_block else n_pos)
            return numbers

        shared = graph.grouped or graph.n_pos is not None
        writers, readers, links = [new(1)], [], []
        for _ in range(graph.n_layers):
            kv = new(graph.n_kv_heads, one_block=False) if shared else None
            heads = new(graph.n_heads)
            writers.append(heads)
            readers += [heads, *([heads, heads] if kv is None else [kv, kv])]
            if kv is not None:
                links += [(kv[:, :-1], kv[:, 1:]), (kv.repeat(graph.n_heads // graph.n_kv_heads, axis=0), heads)]
            if graph.has_mlp:
                mlp = new(1)
                readers.append(mlp)
                writers.append(new(graph.d_mlp) if graph.d_mlp else mlp)
                if graph.d_mlp:
                    links.append((mlp.repeat(graph.d_mlp, axis=0), writers[-1]))
        readers.append(new(1))
        pairs = [np.stack([before.ravel(), after.ravel()]) for before, after in links]
        none = np.empty((2, 0), dtype=np.int64)
        return cls(
            np.concatenate(writers),
            np.concatenate(readers),
            np.concatenate([none, *pairs], axis=1),
            np.concatenate(blocks),
        )


class _PatchedRun:
    """One forward pass of a batch of circuits: each row is an example in a circuit.

    What absent edges are to add, ``ablated - written``, is kept for all writers so far in one tensor
    ``[group, writer, token, d_model]``. With positions summed a group is a circuit and its tokens are all of its
    examples'; with positions a group is a circuit and a position, whose tokens are the examples. Either way the
    patches of all readers of a layer are one batched matrix product with the mask ``[group, writer, reader]``.
    """

    def __init__(self, graph: ComponentGraph, dropped: Dropped, rows: Rows) -> None:
        assert isinstance(rows.ablated, Written)
        self.graph, self.dropped, self.rows, self.ablated = graph, dropped, rows, rows.ablated
        self.changes: Tensor | None = None
        self.stream: Tensor | None = None  # entering the block
        self.z: Tensor | None = None  # of the layer under way
        self.scale: Tensor | None = None
        self.made: dict[str, tuple[Tensor, Tensor]] = {}  # queries, keys and values of the layer under way

    def edits(self) -> dict[Site, Edit]:
        edits: dict[Site, Edit] = {("embed", 0): self._after_embedding}
        for layer in range(self.graph.n_layers):
            edits["resid_pre", layer] = self._entering
            for name in "qkv":
                edits[name, layer] = partial(self._read_by_heads, name=name, layer=layer)
            edits["z", layer] = self._attended
            if self.rows.model.has_attn_scale:
                edits["attn_scale", layer] = self._scaled
            edits["attn_out", layer] = partial(self._after_attention, layer=layer)
            if self.graph.has_mlp:
                edits["mlp_in", layer] = partial(self._read_by_mlp, layer=layer)
                edits["mlp_out", layer] = partial(self._after_mlp, layer=layer)
        return {**edits, ("final_in", 0): self._read_by_logits}

    # -- rows and groups ---------------------------------------------------------------------------

    def _grouped(self, values: Shaped[Tensor, "row pos *rest"]) -> Shaped[Tensor, "group token *rest"]:
        split = values.unflatten(0, (self.rows.n_circuits, -1))
        if self.graph.n_pos is None:
            return split.flatten(1, 2)
        return split.transpose(1, 2).flatten(0, 1)

    def _by_row(self, values: Shaped[Tensor, "group token *rest"], n_pos: int) -> Shaped[Tensor, "row pos *rest"]:
        if self.graph.n_pos is None:
            return values.unflatten(1, (-1, n_pos)).flatten(0, 1)
        return values.unflatten(0, (-1, n_pos)).transpose(1, 2).flatten(0, 1)

    # -- writers -----------------------------------------------------------------------------------

    def _change(self, ablated: Float[Tensor, "..."], written: Float[Tensor, "row pos *rest"]) -> Tensor:
        """``ablated - written`` in groups; what is ablated is the same in all circuits, perhaps in all examples."""
        by_circuit = written.unflatten(0, (self.rows.n_circuits, -1))
        return self._grouped((ablated - by_circuit).flatten(0, 1))

    def _after_embedding(self, value: Tensor) -> Tensor:
        change = self._change(self.ablated.embed, full_precision(value))
        if (
            not torch.is_grad_enabled()
        ):  # room for all of them at once; what is to be differentiated cannot be overwritten
            n_groups, n_tokens, d_model = change.shape
            self.changes = change.new_zeros(n_groups, self.graph.n_writers, n_tokens, d_model)
        self._keep(slice(0, 1), change[:, None])
        return value

    def _keep(self, writers: slice, changes: Float[Tensor, "group writer token d_model"]) -> None:
        if not torch.is_grad_enabled():
            assert self.changes is not None
            self.changes[:, writers] = changes
        else:
            self.changes = changes if self.changes is None else torch.cat([self.changes, changes], dim=1)

    def _entering(self, value: Tensor) -> Tensor:
        self.stream = full_precision(value)
        return value

    def _attended(self, value: Tensor) -> Tensor:
        self.z = full_precision(value)
        return value

    def _scaled(self, value: Tensor) -> Tensor:
        self.scale = full_precision(value)[..., None]
        return value

    def _after_attention(self, value: Tensor, layer: int) -> Tensor:
        assert self.z is not None
        z = self.z if self.scale is None else self.z / self.scale
        change = self._change(self.ablated.z[layer], z)
        written = torch.einsum("gthk,hkd->ghtd", change, self.rows.model.head_weights(layer).to(change.dtype))
        self._keep(self.graph.heads_of(layer), written)
        return value

    def _after_mlp(self, value: Tensor, layer: int) -> Tensor:
        change = self._change(self.ablated.mlp_out[layer], full_precision(value))
        self._keep(self.graph.mlp_of(layer), change[:, None])
        return value

    # -- readers -----------------------------------------------------------------------------------

    def _mask(self, name: str, layer: int) -> Shaped[Tensor, "group writer reader"] | None:
        """Absent edges into the readers of a name and layer, or their shares; None if all are kept."""
        where = (slice(self.graph.n_read(name, layer)), self.graph.readers_of(name, layer))
        mask = self.dropped("edge", where)
        if mask is None or (mask.dtype == torch.bool and not mask.any()):
            return None
        return mask if self.graph.n_pos is None else mask.permute(0, 3, 1, 2).flatten(0, 1)

    def _read_by_heads(self, value: Tensor, name: str, layer: int) -> Tensor:
        """Queries, keys or values of the heads that have an absent edge, made of their own inputs."""
        if name == "q":  # the first of the three to be asked for
            self.made = self._made_by_heads(layer)
        found = self.made.pop(name, None)
        if found is None:
            return value
        touched, made = found
        edited = value.clone()
        edited[:, :, touched] = made.to(value.dtype)
        return edited

    def _made_by_heads(self, layer: int) -> dict[str, tuple[Tensor, Float[Tensor, "row pos head d_head"]]]:
        """For queries, keys and values which heads have an absent edge, and what they make of their own inputs.

        All readers of the layer get their patches from one matrix product, some tokens at a time.
        """
        masks = {name: mask for name in "qkv" if (mask := self._mask(name, layer)) is not None}
        touched = {
            name: mask.any(1).any(0).nonzero()[:, 0]
            if mask.dtype == torch.bool
            else torch.arange(mask.shape[2], device=mask.device)
            for name, mask in masks.items()
        }
        if not masks:
            return {}
        assert self.changes is not None and self.stream is not None
        norm, dtype = self.rows.model.attn_reader(layer), self.changes.dtype
        weights, biases = zip(*(self._projection(name, layer, touched[name]) for name in masks), strict=True)
        weight, bias = torch.cat(weights).to(dtype), torch.cat(biases).to(dtype)
        mask = torch.cat([masks[name][..., touched[name]] for name in masks], dim=-1).transpose(1, 2).to(dtype)
        stream = self._grouped(self.stream)
        n_groups, n_tokens, d_model = stream.shape
        changes = self.changes[:, : mask.shape[2]]
        made = stream.new_empty(n_groups, n_tokens, len(weight), weight.shape[-1])
        step = max(1, WORKSPACE // (n_groups * len(weight) * d_model * stream.element_size()))
        for start in range(0, n_tokens, step):
            some = slice(start, start + step)
            patch = (mask @ changes[:, :, some].flatten(2)).unflatten(2, (-1, d_model))
            read = (patch + stream[:, None, some]).transpose(0, 1).flatten(1, 2)  # [reader, group token, d_model]
            read = read if norm is None else norm(read)
            heads = torch.baddbmm(bias[:, None], read, weight)
            made[:, some] = heads.unflatten(1, (n_groups, -1)).permute(1, 2, 0, 3)
        parts = made.split([len(touched[name]) for name in masks], dim=2)
        n_pos = self.stream.shape[1]
        return {name: (touched[name], self._by_row(part, n_pos)) for name, part in zip(masks, parts, strict=True)}

    def _projection(self, name: str, layer: int, heads: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = self.rows.model.reading_weights(name, layer)
        shared = (self.graph.n_heads if name == "q" else self.graph.n_kv_heads) // len(weight)
        return weight[heads // shared], bias[heads // shared]

    def _read_by_mlp(self, value: Tensor, layer: int) -> Tensor:
        if (mask := self._mask("mlp", layer)) is None:
            return value
        assert self.changes is not None
        changes = self.changes[:, : mask.shape[1]]
        patch = mask.transpose(1, 2).to(changes.dtype) @ changes.flatten(2)
        patch = patch[:, 0].unflatten(1, changes.shape[2:])
        return (full_precision(value) + self._by_row(patch, value.shape[1])).to(value.dtype)

    def _read_by_logits(self, value: Tensor) -> Tensor:
        if (mask := self._mask("logits", 0)) is None:
            return value
        assert self.changes is not None and self.stream is not None
        n_pos, last, n_circuits = self.stream.shape[1], self.rows.last, self.rows.n_circuits
        if self.graph.n_pos is None:
            by_token = self.changes.unflatten(2, (-1, n_pos))  # [circuit, writer, example, pos, d_model]
            changes = by_token[:, :, torch.arange(len(last), device=last.device), last]
        else:
            changes = self.changes.unflatten(0, (n_circuits, n_pos))[:, -1]
            mask = mask.unflatten(0, (n_circuits, n_pos))[:, -1]
        patch = mask.transpose(1, 2).to(changes.dtype) @ changes.flatten(2)
        patch = patch.view(n_circuits * len(last), 1, -1)
        return (full_precision(value) + patch).to(value.dtype)
