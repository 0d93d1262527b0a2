"""Files: one safetensors file per result, its metadata as JSON inside; none is ever half written."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tracedensity.curve import DensityCurve, Points
from tracedensity.extract import Ranking
from tracedensity.graph import graph_from_dict
from tracedensity.graph.circuit import Certificate, Circuit
from tracedensity.provenance import Provenance
from tracedensity.run import Conditions
from tracedensity.tight import TightCurve

_FORMAT = 2


def circuit_file(circuit: Circuit) -> bytes:
    """The file of a circuit: its masks, and all that `Circuit` says of it."""
    return _file("circuit", *_circuit_parts(circuit))


def curve_file(curve: DensityCurve) -> bytes:
    """The file of a curve: its ranking, from which its circuits are made again, or all that it is the envelope of."""
    if type(curve) is DensityCurve and curve.robust is None:
        return _file("density", *_curve_parts(curve))
    parts = _parts(curve, "")
    tensors = {f"{part}:{name}": value for part, (values, _) in parts.items() for name, value in values.items()}
    return _file("curves", tensors, {"parts": {part: about for part, (_, about) in parts.items()}})


def _parts(curve: DensityCurve, prefix: str) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """Curves of rankings and circuits that a curve is made of, then those of the robust one."""
    tight = isinstance(curve, TightCurve)
    families = (curve.published, *curve.families) if tight else (curve,)
    parts = {f"{prefix}{'tight' if tight else 'plain'}{i}": _curve_parts(each) for i, each in enumerate(families)}
    if tight:
        parts |= {f"{prefix}circuit{i}": _circuit_parts(circuit) for i, circuit in enumerate(curve.refined)}
    return parts if curve.robust is None else parts | _parts(curve.robust, "robust/")


def _circuit_parts(circuit: Circuit) -> tuple[dict[str, Tensor], dict[str, Any]]:
    about: dict[str, Any] = {
        "graph": circuit.graph.to_dict(),
        "provenance": circuit.provenance.to_dict(),
        "ablation": circuit.ablation,
        "keep_residual": circuit.keep_residual,
        "attention": circuit.attention,
        "metric": circuit.metric,
        "faithfulness": circuit.faithfulness,
    }
    tensors = dict(circuit.kept)
    if (certificate := circuit.certificate) is not None:
        tensors |= {f"needed/{kind}": mask for kind, mask in certificate.needed.items()}
        about["certificate"] = {name: value for name, value in vars(certificate).items() if name != "needed"}
    return tensors, about


def _curve_parts(curve: DensityCurve) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f"rank/{kind}": rank for kind, rank in curve.ranking.rank.items()}
    tensors |= {"sizes": curve.sizes, "faithfulness": curve.faithfulness}
    for name, points in (("random", curve.random), ("inverse", curve.inverse)):
        if points is not None:
            tensors |= {f"{name}/sizes": points.sizes, f"{name}/faithfulness": points.faithfulness}
    for name in ("values", "full", "empty", "pruned_sizes"):
        if (value := getattr(curve, name)) is not None:
            tensors[name] = value
    tensors |= {f"also/{name}": values for name, values in curve.also.items()}
    if curve.ranking.natural_sizes is not None:
        tensors["natural_sizes"] = curve.ranking.natural_sizes
    about = {
        "graph": curve.ranking.graph.to_dict(),
        "provenance": curve.provenance.to_dict(),
        "family": curve.ranking.family,
        "conditions": asdict(curve.conditions),
        "thresholds": curve.thresholds,
        "metric": curve.metric,
        "entropy": curve.entropy,
        "top_token": curve.top_token,
        "top_text": curve.top_text,
        "top_probability": curve.top_probability,
        "situations": curve.situations,
    }
    return tensors, about


def replace_file(path: str | PathLike[str], content: str | bytes) -> None:
    """Write a file beside, then rename it: an interrupted write leaves the old one as it was.

    Raises:
        ValueError: If there is no such folder, or `path` is one.
    """
    path = require_folder(path)
    beside = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def require_folder(path: str | PathLike[str]) -> Path:
    """The path of a file that can be written.

    Raises:
        ValueError: If there is no such folder, or `path` is one.
    """
    path = Path(path)
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"`path` must be a file in a folder that exists, got {str(path)!r}.")
    return path


def load(path: str | PathLike[str]) -> Circuit | DensityCurve:
    """Read what `save` of a circuit or a curve has written.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or none of ours.
    """
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "does not exist"
        raise FileNotFoundError(f"`path` must be a file saved by tracedensity, got {str(path)!r}, which {what}.")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["tracedensity"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["format"] != _FORMAT:
            raise ValueError(f"it has format {about['format']}, and this version reads {_FORMAT}")
        if about.pop("sha256") != _checksum(tensors, about):
            raise ValueError("its checksum does not fit its content")
        return _READERS[about["kind"]](tensors, about)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`path` must be a file saved by tracedensity, got {str(path)!r}, "
            f"which is damaged or something else ({error})."
        ) from error


def _file(kind: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    about = {"kind": kind, "format": _FORMAT, "versions": versions(), **about}
    own = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    # as bytes: a file that safetensors makes itself can be read by its owner only. Under one key: safetensors writes
    # several in any order, and the same result is to make the same file.
    return save(own, {"tracedensity": json.dumps({"sha256": _checksum(own, about), **about})})


def _checksum(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about).encode())
    for name in sorted(tensors):
        array = tensors[name].numpy()
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


@cache
def versions() -> dict[str, str]:
    """Versions of this package and of those that numbers depend on."""
    found = {"torch": str(torch.__version__)}
    for package in ("tracedensity", "transformer-lens"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _read_circuit(tensors: dict[str, Tensor], about: dict[str, Any]) -> Circuit:
    needed = {kind: tensors.pop(f"needed/{kind}") for kind in [*tensors] if f"needed/{kind}" in tensors}
    known = about.get("certificate")
    return Circuit(
        graph_from_dict(about["graph"]),
        tensors,
        Provenance.from_dict(about["provenance"]),
        ablation=about["ablation"],
        keep_residual=about["keep_residual"],
        attention=about["attention"],
        metric=about["metric"],
        faithfulness=about["faithfulness"],
        certificate=None
        if known is None
        else Certificate(**{**known, "situations": tuple(known["situations"])}, needed=needed),
    )


def _read_curve(tensors: dict[str, Tensor], about: dict[str, Any]) -> DensityCurve:
    rank = {name.removeprefix("rank/"): value for name, value in tensors.items() if name.startswith("rank/")}
    ranking = Ranking(
        graph_from_dict(about["graph"]),
        rank,
        about["family"],
        Provenance.from_dict(about["provenance"]),
        tensors.get("natural_sizes"),
    )

    def points(name: str) -> Points | None:
        return Points(tensors[f"{name}/sizes"], tensors[f"{name}/faithfulness"]) if f"{name}/sizes" in tensors else None

    return DensityCurve(
        tensors["sizes"],
        tensors["faithfulness"],
        ranking,
        tuple(about["thresholds"]),
        about["metric"],
        Conditions(**about["conditions"]),
        entropy=about["entropy"],
        top_token=about["top_token"],
        top_text=about["top_text"],
        top_probability=about["top_probability"],
        random=points("random"),
        inverse=points("inverse"),
        values=tensors.get("values"),
        full=tensors.get("full"),
        empty=tensors.get("empty"),
        pruned_sizes=tensors.get("pruned_sizes"),
        also={name.removeprefix("also/"): value for name, value in tensors.items() if name.startswith("also/")},
        situations=tuple(about.get("situations", ())),
    )


def _read_curves(tensors: dict[str, Tensor], about: dict[str, Any]) -> DensityCurve:
    def curve(prefix: str) -> DensityCurve | None:
        families: list[DensityCurve] = []
        circuits: list[Circuit] = []
        tight = False
        for part, values in about["parts"].items():
            if not (kind := part.rstrip("0123456789")).startswith(prefix) or "/" in kind.removeprefix(prefix):
                continue
            own = {name.removeprefix(f"{part}:"): each for name, each in tensors.items() if name.startswith(f"{part}:")}
            if kind.endswith("circuit"):
                circuits.append(_read_circuit(own, values))
            else:
                families.append(_read_curve(own, values))
            tight |= kind.endswith("tight")
        if not families:
            return None
        return TightCurve.of(families[0], families[1:], circuits) if tight else families[0]

    own = curve("")
    assert own is not None
    return replace(own, robust=curve("robust/"))


_READERS: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], Circuit | DensityCurve]] = {
    "circuit": _read_circuit,
    "density": _read_curve,
    "curves": _read_curves,
}
