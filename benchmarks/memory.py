"""Plans against what is measured: `python -m benchmarks.memory [--json] [--tokens 64,160] [MODEL ...]`.

Memory is that of the tensors that a call makes, beside the weights. To be run as a program: checks of annotations, as
tests have them, keep arguments alive. `--dtype bfloat16` takes weights in half precision. With `--offload`, what
backward passes need is kept in arrays, which do not count, as on a device what is in main memory does not.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

import tracedensity as td
from benchmarks.lens import HAS_HOOKED
from benchmarks.measure import allocated_bytes
from tracedensity.model import as_transformer

ON_TOKENS = ("norm", "norm-ratio", "flow", "cosine", "eap", "eap-ig", "eap-ig-layers")
ON_COMPONENTS = [
    ("eap", "zero"), ("eap", "resample"), ("eap-ig", "resample"), ("eap-ig", "mean"), ("eap-ig-midpoint", "zero"),
    ("eap-ig-activations", "mean"), ("clean-corrupted", "resample"), ("relp", "mean"), ("flow", "mean"),
    ("magnitude", "resample"), ("eap-qk", "mean"),
]  # fmt: skip
JOBS: list[dict[str, Any]] = [
    *({"graph": "token", "method": method} for method in ON_TOKENS),
    {"graph": "token", "method": "eap", "neurons": True},
    {"graph": "token", "method": "eap", "ablation": "mean"},
    *({"graph": "component", "method": method, "ablation": ablation} for method, ablation in ON_COMPONENTS),
    {"graph": "component", "method": "eap", "ablation": "mean", "ungroup": True},
    {"graph": "component", "method": "eap", "ablation": "mean", "positions": True},
]
N_CIRCUITS = 12
WITH_GRADIENTS = [job for job in JOBS if job["method"].startswith(("eap", "relp", "clean"))]


class Rows:
    """Counts tokens through a block; with a backward pass they count three times."""

    def __init__(self, model: Any) -> None:
        self.model, self.block, self.tokens = model, model.blocks[0], 0

    def __enter__(self) -> "Rows":
        def count(module: object, args: Any, kwargs: Any) -> None:
            stream = args[0] if args else kwargs["hidden_states"]
            self.tokens += stream.shape[0] * stream.shape[1] * (3 if torch.is_grad_enabled() else 1)

        self.handle = self.block.register_forward_pre_hook(count, with_kwargs=True)
        td.check_model(self.model)  # once more because of the hook, and so that it is no part of what is measured
        self.tokens = 0
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


def in_an_array(value: torch.Tensor) -> Callable[[], torch.Tensor]:
    """As `offload.away`, from a device that is the CPU's memory to arrays."""
    half = value.dtype in (torch.bfloat16, torch.float16)  # which numpy does not know, or not well
    kept, dtype = (value.float() if half else value).detach().numpy().copy(), value.dtype
    return lambda: torch.tensor(kept).to(dtype)


@contextmanager
def offloading() -> Iterator[None]:
    with mock.patch("tracedensity.model.offload.away", in_an_array), td.offload_activations():
        yield


def made_up(model: Any, n_tokens: int) -> list[int]:
    return [(7 * token) % (min(403, model.cfg.d_vocab) - 3) + 3 for token in range(n_tokens)]


def scoring(model: Any, n_tokens: int, jobs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """For every job, what its plan says and what is measured."""
    prompt = made_up(model, n_tokens)
    for job in jobs:
        try:
            plan = td.plan(model, n_tokens, **job)
        except ValueError:  # neurons of experts, the token graph of parallel blocks
            continue
        with Rows(model) as rows:
            measured = allocated_bytes(lambda job=job: td.attribute(model, prompt, **job))
        passes = {"planned": plan.forward_passes, "measured": rows.tokens / n_tokens}
        planned = plan.activations + plan.ranks + plan.workspace
        yield {"job": " ".join(map(str, job.values())), "memory": _pair(planned, measured), "passes": passes}


def running(model: Any, n_tokens: int) -> Iterator[dict[str, Any]]:
    """The same of circuits."""
    prompt = made_up(model, n_tokens)
    for graph in ("token", "component"):
        if graph == "token" and as_transformer(model).parallel:
            continue
        ranking = td.attribute(model, prompt, graph=graph, method="random", ablation="zero").rank()
        sizes = [ranking.n_edges * size // N_CIRCUITS for size in range(N_CIRCUITS)]
        if graph == "token":  # MLPs are run only at tokens where a circuit has their edge: a plan is of those that do
            sizes = [ranking.n_edges - number for number in range(N_CIRCUITS)]
        plan = td.plan(model, n_tokens, graph=graph, method="random", ablation="zero", n_circuits=N_CIRCUITS)
        measured = allocated_bytes(lambda ranking=ranking, sizes=sizes: td.evaluate(model, prompt, ranking, sizes))
        yield {"job": f"{graph} {N_CIRCUITS} circuits", "memory": _pair(plan.activations + plan.workspace, measured)}


def _pair(planned: int, measured: int) -> dict[str, float]:
    return {"planned": planned, "measured": measured, "ratio": planned / measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["books-gpt2", "books-llama"])
    parser.add_argument("--tokens", default="64,160")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--backend", choices=["hooked", "bridge"], help="one class only")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="gradients are taken where the stream is zero")
    if not given.json:
        print(
            f"{'model':<12}{'class':<8}{'tokens':>6}  {'job':<38}{'planned':>10}{'measured':>10}{'ratio':>7}   passes"
        )
    for name in given.models:
        for backend in [given.backend] if given.backend else [*(["hooked"] if HAS_HOOKED else []), "bridge"]:
            try:
                model = td.load_model(name, backend=backend, dtype=getattr(torch, given.dtype))
            except ValueError as error:
                print(error, file=sys.stderr)
                continue
            for n_tokens in map(int, given.tokens.split(",")):
                if given.offload:
                    with offloading():
                        rows = [*scoring(model, n_tokens, WITH_GRADIENTS)]
                else:
                    rows = [*scoring(model, n_tokens, JOBS), *running(model, n_tokens)]
                for row in rows:
                    if given.json:
                        print(json.dumps({"model": name, "class": backend, "tokens": n_tokens, **row}), flush=True)
                        continue
                    memory, passes = row["memory"], row.get("passes")
                    said = f"{passes['planned']:g} ({passes['measured']:g})" if passes else ""
                    megabytes = "".join(f"{memory[key] / 1e6:>10.2f}" for key in ("planned", "measured"))
                    print(
                        f"{model.cfg.model_name:<12}{backend:<8}{n_tokens:>6}  {row['job']:<38}{megabytes}"
                        f"{memory['ratio']:>7.2f}   {said}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
