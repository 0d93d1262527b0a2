"""The command line: a command for each thing that the library does; nothing heavy is imported for `--help`."""

import io
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import tracedensity as td
from tracedensity.choices import (
    Attention,
    Backend,
    ComponentMethod,
    DensityMethod,
    FaithfulnessMetric,
    Question,
)
from tracedensity.cli.options import (
    AblationOption,
    BudgetOption,
    CircuitArgument,
    CountOption,
    DeviceOption,
    DtypeOption,
    FamilyOption,
    GraphOption,
    HtmlOption,
    JsonOption,
    LengthOption,
    MethodOption,
    ModelOption,
    NeuronsOption,
    NodesOption,
    OwnModelOption,
    PairsOption,
    PositionOption,
    PositionsOption,
    PromptArgument,
    QuestionOption,
    RobustOption,
    SeedOption,
    SignedOption,
    SolvedOption,
    StepsOption,
    TaskOption,
    UngroupOption,
    as_numbers,
    load,
    only_given,
    prompt_of,
    quiet,
    require_folders,
    wanted,
)
from tracedensity.cli.study import study, sweep

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from tracedensity.graph.circuit import Circuit

SHORTFALL = 1e-4
"""A circuit is verified if it is at most this much less faithful than its file says."""

_CIRCUIT_AT = 0.9

# Of the command that is run; typer's own context is of a class that its annotation does not name.
_words: list[str] = []

_during = ExitStack()  # what options before the command open, closed when it is done

app = typer.Typer(
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"tracedensity {td.__version__}")
        raise typer.Exit
    return wanted


def _dtype_of(name: str | None) -> Any:
    import torch

    return None if name is None else getattr(torch, name)


def _map_of(given: str | None) -> Any:
    """Where layers go, as `load_model` takes it."""
    if given is None or not given.lstrip().startswith("{"):
        return given
    try:
        return json.loads(given)
    except ValueError as error:
        raise ValueError(f"`--device-map` must be a name or a JSON object, got {given!r}: {error}.") from error


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
    offload: Annotated[
        bool,
        typer.Option(
            "--offload",
            help="Keep what gradients need of each layer in main memory, for a model that fills its device.",
        ),
    ] = False,
    dtype: DtypeOption = None,
    backend: Annotated[
        Backend | None,
        typer.Option(help="The class of TransformerLens that is made of a model.", show_default="whichever there is"),
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(
            metavar="MAP",
            help='How layers are spread: auto, or a JSON object of modules and devices, {"model.layers.0": 0, ...}.',
            show_default=False,
        ),
    ] = None,
) -> None:
    """How much of a language model does one prediction need, which part, and why?"""
    if offload:
        _during.enter_context(td.offload_activations())
    wanted.clear()
    wanted.update(only_given(backend=backend, device_map=_map_of(device_map)))
    if dtype is not None:
        wanted["dtype"] = _dtype_of(dtype)


@app.command()
def density(
    prompt: PromptArgument = None,
    model: ModelOption = None,
    graph: GraphOption = None,
    task: TaskOption = None,
    pairs: PairsOption = None,
    n: CountOption = None,
    solved: SolvedOption = False,
    same_length: LengthOption = False,
    method: Annotated[
        DensityMethod | None,
        typer.Option(
            help="How edges are scored; the best of several methods; or all circuits of a small graph are run.",
            show_default="norm; as for `circuit` on the component graph",
        ),
    ] = None,
    family: FamilyOption = None,
    refine: Annotated[
        bool | None,
        typer.Option("--refine", help="Search for smaller circuits at every threshold.", show_default=False),
    ] = None,
    budget: BudgetOption = None,
    robust: RobustOption = None,
    thresholds: Annotated[
        str | None,
        typer.Option(
            metavar="F,F,...",
            help="Faithfulnesses above 0 and at most 1 to find the smallest circuits for.",
            show_default="0.5,0.8,0.9,0.95,0.99",
        ),
    ] = None,
    signed: SignedOption = None,
    metric: Annotated[
        Literal[FaithfulnessMetric, Question] | None,
        typer.Option(help="What faithfulness means.", show_default="tv; logit_diff for tasks"),
    ] = None,
    ablation: AblationOption = None,
    steps: StepsOption = None,
    ungroup: UngroupOption = None,
    positions: PositionsOption = None,
    keep_residual: Annotated[
        bool | None, typer.Option("--keep-residual", help="Keep all skip connections.", show_default=False)
    ] = None,
    attention: Annotated[
        Attention | None,
        typer.Option(help="Whether absent attention edges are ablated or only counted.", show_default="masked"),
    ] = None,
    per_example: Annotated[
        bool | None,
        typer.Option("--per-example", help="Refine the curve of every example as well.", show_default=False),
    ] = None,
    no_baselines: Annotated[
        bool, typer.Option("--no-baselines", help="Leave out random and inverse circuits.")
    ] = False,
    position: PositionOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    html: HtmlOption = None,
    save: Annotated[Path | None, typer.Option(metavar="OUT", help="Write the curve to this safetensors file.")] = None,
    circuit: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write a circuit to this safetensors file.")
    ] = None,
    faithfulness: Annotated[
        float | None,
        typer.Option(
            metavar="F",
            help="Which circuit to write and draw: the smallest this faithful, exact if F is one of the thresholds.",
            show_default=str(_CIRCUIT_AT),
        ),
    ] = None,
) -> None:
    """How small a circuit can be and still predict the same."""
    if faithfulness is not None and circuit is None and html is None:
        raise ValueError("`--faithfulness` must come with `--circuit` or `--html`, for which it chooses the circuit.")
    at = _CIRCUIT_AT if faithfulness is None else faithfulness
    if not 0 < at <= 1:
        raise ValueError(f"`--faithfulness` must be above 0 and at most 1, got {at:g}.")
    require_folders(html, save, circuit)
    _require_own(save, circuit)
    given = only_given(
        graph=_graph(graph, task, pairs),
        method=method,
        family=family,
        signed=signed,
        refine=refine,
        budget=budget,
        robust=robust,
        ablation=ablation,
        steps=steps,
        ungroup=ungroup,
        positions=positions,
        thresholds=None if thresholds is None else as_numbers(thresholds),
        metric=metric,
        keep_residual=keep_residual,
        attention=attention,
        per_example=per_example,
        baselines=False if no_baselines else None,
        position=position,
        seed=seed,
    )
    with quiet():
        loaded = load(model, device)
        curve = td.density(loaded, _subject(loaded, prompt, task, pairs, n, solved, same_length, seed), **given)
        if save is not None:
            curve.save(save)
        if circuit is not None:
            curve.circuit(faithfulness=at).save(circuit)
        if html is not None:
            from tracedensity.plot import density_page, write_html

            write_html(density_page(curve, faithfulness=at), html)
    typer.echo(json.dumps(curve.to_dict(), allow_nan=False) if as_json else repr(curve))


@app.command()
def attribute(
    prompt: PromptArgument = None,
    model: ModelOption = None,
    graph: GraphOption = None,
    task: TaskOption = None,
    pairs: PairsOption = None,
    n: CountOption = None,
    solved: SolvedOption = False,
    same_length: LengthOption = False,
    method: MethodOption = None,
    metric: QuestionOption = None,
    ablation: AblationOption = None,
    steps: StepsOption = None,
    ungroup: UngroupOption = None,
    positions: PositionsOption = None,
    neurons: NeuronsOption = None,
    target: Annotated[
        str | None, typer.Option(help="The token whose probability is asked for.", show_default="the most probable one")
    ] = None,
    position: PositionOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    top: Annotated[int, typer.Option(metavar="K", help="How many edges or nodes to print.")] = 20,
    nodes: NodesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score every edge, and print those that matter most."""
    if top < 1:
        raise ValueError(f"`--top` must be at least 1, got {top}.")
    options = only_given(
        graph=_graph(graph, task, pairs), method=method, metric=metric, ablation=ablation, steps=steps,
        ungroup=ungroup, positions=positions, neurons=neurons, target=target, position=position, seed=seed,
    )  # fmt: skip
    with quiet():
        loaded = load(model, device)
        scores = td.attribute(loaded, _subject(loaded, prompt, task, pairs, n, solved, same_length, seed), **options)
        if nodes is None:
            table = scores.top(top)
        else:
            table = scores.of_nodes(nodes).head(top).rename_axis("node").rename("importance").reset_index()
    if as_json:
        rows = table.to_dict(orient="records")
        typer.echo(json.dumps({**_about(scores), "edges" if nodes is None else "nodes": rows}, allow_nan=False))
        return
    typer.echo(f"{scores}\n\n{table.to_string(index=False)}")


@app.command()
def circuit(
    prompt: PromptArgument = None,
    model: ModelOption = None,
    task: TaskOption = None,
    pairs: PairsOption = None,
    n: CountOption = None,
    solved: SolvedOption = False,
    same_length: LengthOption = False,
    method: Annotated[
        ComponentMethod | None,
        typer.Option(help="How edges are scored.", show_default="eap-ig; eap-ig-midpoint under zero ablation"),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(metavar="N", help="Number of edges, with --nodes of nodes.", show_default="5% of all edges"),
    ] = None,
    family: FamilyOption = None,
    signed: SignedOption = None,
    metric: QuestionOption = None,
    ablation: AblationOption = None,
    steps: StepsOption = None,
    ungroup: UngroupOption = None,
    positions: PositionsOption = None,
    nodes: NodesOption = None,
    position: PositionOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    html: HtmlOption = None,
    out: Annotated[Path | None, typer.Option(metavar="OUT", help="Write the circuit to this safetensors file.")] = None,
    benchmark: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Write it and all scores in the MIB benchmark's JSON (--ungroup)."),
    ] = None,
) -> None:
    """Score the edges between heads and MLPs, cut a circuit of a size and run it."""
    from tracedensity.model import as_transformer

    require_folders(html, out, benchmark)
    _require_own(out)
    options = only_given(
        method=method, metric=metric, ablation=ablation, steps=steps, ungroup=ungroup, positions=positions,
        position=position, seed=seed,
    )  # fmt: skip
    with quiet():
        loaded = load(model, device)
        if benchmark is not None and (
            positions or (not ungroup and td.ComponentGraph.of(as_transformer(loaded)).grouped)
        ):
            raise ValueError("`--benchmark` must come without `--positions`, and with `--ungroup` for this model.")
        subject = _subject(loaded, prompt, task, pairs, n, solved, same_length, seed)
        scores = td.attribute(loaded, subject, graph="component", **options)
        ranking = scores.rank(**only_given(family=family, signed=signed, nodes=nodes))
        cut = ranking.circuit(_size(ranking, size)).verify(loaded)
        if out is not None:
            cut.save(out)
        if benchmark is not None:
            td.write_benchmark(cut, benchmark, scores)
        if html is not None:
            from tracedensity.plot import plot_component, write_html

            write_html(plot_component(cut, scores=scores), html)
        solves = subject.solved(loaded) if isinstance(subject, td.Task) and subject.answer is not None else None
    strongest = scores.top(10)
    if as_json:
        typer.echo(json.dumps(_circuit_json(cut, scores, solves), allow_nan=False))
        return
    if solves is not None:
        typer.echo(f"{subject}\n{solves}")
    typer.echo(
        f"{cut}\n{cut.pruned_size:,} of its edges are on a path from the input to the logits; absent edges: "
        f"{cut.ablation}; faithfulness is {cut.metric}.\n\n"
        f"The edges with the largest scores ({scores.provenance.method}):"
    )
    typer.echo(strongest[["edge", "score"]].to_string(index=False))


@app.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `density --save` or `--circuit` has written.")],
    html: HtmlOption = None,
) -> None:
    """Print a saved curve or circuit."""
    require_folders(html)
    with quiet():
        result = _read_circuit(file) if file.suffix == ".json" else td.load(file)
        if html is not None:
            from tracedensity.plot import density_page, write_html

            write_html(result.plot() if isinstance(result, td.Circuit) else density_page(result), html)
    typer.echo(repr(result))


@app.command()
def verify(
    file: CircuitArgument,
    model: OwnModelOption = None,
    device: DeviceOption = None,
) -> None:
    """Run a saved circuit again: is it as faithful as it says?

    Exit code 1 if it is not.
    """
    with quiet():
        circuit = _read_circuit(file)
        measured = circuit.verify(_model_of(circuit, model, device)).faithfulness
    assert measured is not None
    said = circuit.faithfulness
    line = f"{circuit.n_edges:,} of {circuit.graph.n_edges:,} edges: faithfulness {measured:.6f} ({circuit.metric})"
    if said is None:
        typer.echo(f"{line}; the file says none.")
        return
    short = measured < said - SHORTFALL
    typer.echo(f"{line}; the file says {said:.6f}: {'it falls short' if short else 'verified'}.")
    if short:
        raise typer.Exit(1)


@app.command()
def check(
    what: Annotated[
        str, typer.Argument(metavar="CIRCUIT|MODEL", help="A file with a circuit; or a model, by its name or folder.")
    ],
    by: Annotated[
        Literal["edge", "node", "token"] | None,
        typer.Option(help="What is left out: an edge, a head or MLP, a token's embedding.", show_default="edge"),
    ] = None,
    model: OwnModelOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Is every edge of a circuit needed, and is anything missing? Or: does a model compute what the graphs say?"""
    file = Path(what)
    if not file.is_file() and file.suffix not in (".safetensors", ".json"):
        _check_model(what, {"--by": by, "--model": model}, device, as_json)
        return
    unit = "edge" if by is None else by
    with quiet():
        found = _read_circuit(file)
        loaded = _model_of(found, model, device)
        units, complete = td.minimality(loaded, found, **only_given(by=by)), td.completeness(loaded, found)
    if as_json:
        knockouts = [
            {"size": int(size), "model": float(whole), "circuit": float(part)}
            for size, whole, part in zip(complete.size, complete.model, complete.circuit, strict=True)
        ]
        rows = units.to_dict(orient="records")
        checked = {"complement": complete.complement, "knockouts": knockouts, f"{unit}s": rows}
        typer.echo(json.dumps(checked, allow_nan=False))
        return
    if not len(units):
        typer.echo(f"{found}\n{complete}\nIt has no {unit}s.")
        return
    typer.echo(f"{found}\n{complete}\n\nWhat it is less faithful by without each {unit}, least needed first:")
    typer.echo(units.head(10).to_string(index=False))


@app.command()
def refine(
    file: CircuitArgument,
    faithfulness: Annotated[
        float | None, typer.Option(metavar="F", help="What the circuit has to reach.", show_default="0.9")
    ] = None,
    budget: BudgetOption = None,
    seed: SeedOption = None,
    model: OwnModelOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    out: Annotated[Path | None, typer.Option(metavar="OUT", help="Write the circuit to this safetensors file.")] = None,
) -> None:
    """Search for a smaller circuit that is faithful enough."""
    require_folders(out)
    _require_own(out)
    with quiet():
        found = _read_circuit(file)
        loaded = _model_of(found, model, device)
        options = only_given(faithfulness=faithfulness, budget=budget, seed=seed)
        smaller = td.refine(loaded, found.provenance.subject, found, **options)
        if out is not None:
            smaller.save(out)
    if as_json:
        assert smaller.certificate is not None
        about = {"n_edges": smaller.n_edges, "metric": smaller.metric, "faithfulness": smaller.faithfulness}
        typer.echo(json.dumps({**about, "certificate": smaller.certificate.to_dict()}, allow_nan=False))
        return
    typer.echo(f"{found}\n{smaller}")


@app.command()
def trust(
    file: CircuitArgument,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="P", help="Another prompt to run it on; may be given several times.", show_default=False),
    ] = None,
    swap: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A=B",
            help="Swap a word for another; may be given several times.",
            show_default="names and nouns are drawn",
        ),
    ] = None,
    n_random: Annotated[
        int | None, typer.Option(help="How many random circuits of its size to run.", show_default="20")
    ] = None,
    n_seeds: Annotated[
        int | None, typer.Option(help="How many times to search again, if it was searched for.", show_default="2")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(metavar="N", help="What each search may spend.", show_default="the circuit's own")
    ] = None,
    seed: SeedOption = None,
    model: OwnModelOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """What a circuit does under other ablations, on other prompts and beside other circuits."""
    if bad := [each for each in swap or () if "=" not in each]:
        raise ValueError(f"`--swap` must be two words with = between them, like Lily=Anna, got {bad[0]!r}.")
    swaps = dict(each.split("=", 1) for each in swap) if swap else None
    with quiet():
        found = _read_circuit(file)
        loaded = _model_of(found, model, device)
        options = only_given(
            prompts=prompt, swaps=swaps, n_random=n_random, n_seeds=n_seeds, budget=budget, seed=seed
        )  # fmt: skip
        checked = found.check(loaded, **options)
    typer.echo(json.dumps(checked.to_dict(), allow_nan=False) if as_json else repr(checked))


@app.command()
def compare(first: CircuitArgument, second: CircuitArgument, as_json: JsonOption = False) -> None:
    """How much two circuits have in common."""
    with quiet():
        one, other = _read_circuit(first), _read_circuit(second)
        counts = {
            "first": one.n_edges,
            "second": other.n_edges,
            "both": (one & other).n_edges,
            "jaccard": one.jaccard(other),
        }
    if as_json:
        typer.echo(json.dumps(counts))
        return
    typer.echo(
        f"first:  {one}\nsecond: {other}\n"
        f"{counts['both']:,} edges of both, {(one - other).n_edges:,} of the first only, "
        f"{(other - one).n_edges:,} of the second only; Jaccard overlap {counts['jaccard']:.3f}"
    )


@app.command()
def convert(
    file: CircuitArgument,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A .safetensors, .graphml, .dot, .csv or .json (benchmark) file.")
    ],
) -> None:
    """Write a saved circuit in another format."""
    from tracedensity.files import replace_file

    require_folders(out)
    writers: dict[str, Callable[[Circuit, td.Scores | None], None]] = {
        ".safetensors": lambda circuit, scores: circuit.save(out),
        ".graphml": lambda circuit, scores: td.write_graphml(circuit, out, scores),
        ".dot": lambda circuit, scores: replace_file(out, circuit.to_dot(scores)),
        ".csv": lambda circuit, scores: replace_file(out, circuit.to_dataframe().to_csv(index=False)),
        ".json": lambda circuit, scores: td.write_benchmark(circuit, out, scores),
    }
    if out.suffix not in writers:
        raise ValueError(f"`OUT` must end in one of {', '.join(writers)}, got {str(out)!r}.")
    with quiet():
        scores = td.read_benchmark(file).scores if file.suffix == ".json" else None
        found = _read_circuit(file)
        writers[out.suffix](found, scores)
    typer.echo(f"{found.n_edges:,} edges written to {out}.")


@app.command()
def report(
    prompt: PromptArgument = None,
    compare: Annotated[
        str | None, typer.Option(metavar="P", help="Another prompt to set beside it.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="The page to write.")] = Path("report.html"),
    model: ModelOption = None,
    graph: GraphOption = None,
    task: TaskOption = None,
    pairs: PairsOption = None,
    n: CountOption = None,
    solved: SolvedOption = False,
    same_length: LengthOption = False,
    method: Annotated[
        DensityMethod | None,
        typer.Option(help="How edges are scored, as for `density`.", show_default="norm; as for `circuit` on tasks"),
    ] = None,
    family: FamilyOption = None,
    refine: Annotated[
        bool | None,
        typer.Option("--refine", help="Search for smaller circuits at every threshold.", show_default=False),
    ] = None,
    budget: BudgetOption = None,
    metric: Annotated[
        Literal[FaithfulnessMetric, Question] | None,
        typer.Option(help="What faithfulness means.", show_default="tv; logit_diff for tasks"),
    ] = None,
    ablation: AblationOption = None,
    keep_residual: Annotated[
        bool | None, typer.Option("--keep-residual", help="Keep all skip connections.", show_default=False)
    ] = None,
    faithfulness: Annotated[
        float | None,
        typer.Option(metavar="F", help="What the circuit that is looked at has to reach.", show_default="0.9"),
    ] = None,
    position: PositionOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
) -> None:
    """Write a page on a prediction: how much of the model it needs, which part, and why."""
    require_folders(out)
    if out.suffix != ".html":
        raise ValueError(f"`--out` must end in .html, got {str(out)!r}.")
    options = only_given(
        graph=_graph(graph, task, pairs), method=method, family=family, refine=refine, budget=budget, metric=metric,
        ablation=ablation, keep_residual=keep_residual, faithfulness=faithfulness, position=position, seed=seed,
    )  # fmt: skip
    with quiet():
        loaded = load(model, device)
        subject = _subject(loaded, prompt, task, pairs, n, solved, same_length, seed)
        other = None if compare is None else prompt_of(compare)
        made = replace(td.report(loaded, subject, compare=other, **options), command=_written(_words))
        made.save(out)
    for finding in made.findings:
        typer.echo(repr(finding.curve) + "\n")
    typer.echo(f"Written to {out}: open it in a browser.")


@app.command()
def plot(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Saved curves, or one or two saved circuits, to draw.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="OUT", help="An .html, .json, .png, .svg, .pdf, .jpg or .webp file."),
    ],
    kind: Annotated[
        Literal["curve", "circuits", "composition", "circuit", "heads", "tokens"] | None,
        typer.Option(help="What to draw.", show_default="curve or circuit; of several the comparison"),
    ] = None,
    theme: Annotated[Literal["light", "dark"], typer.Option(help="On which ground.")] = "light",
) -> None:
    """Draw saved curves or circuits, or what tells them apart."""
    from tracedensity.plot import write_figure

    require_folders(out)
    with quiet():
        results = [_read_circuit(file) if file.suffix == ".json" else td.load(file) for file in files]
        write_figure(_drawn(results, [file.stem for file in files], kind, theme), out)
    typer.echo(f"Written to {out}.")


@app.command()
def activations(
    prompt: PromptArgument = None,
    model: ModelOption = None,
    heads: Annotated[
        str | None,
        typer.Option(metavar="H,H,...", help="Whose attention to draw.", show_default="those that write most"),
    ] = None,
    position: PositionOption = None,
    top: Annotated[int, typer.Option(metavar="K", help="How many heads and neurons to print.")] = 10,
    device: DeviceOption = None,
    html: HtmlOption = None,
) -> None:
    """Print the heads and neurons that write most, and draw what heads attend to."""
    if prompt is None:
        raise ValueError("give a `PROMPT`, for example 'Once upon a time'.")
    if top < 1:
        raise ValueError(f"`--top` must be at least 1, got {top}.")
    if heads is not None and html is None:
        raise ValueError("`--heads` must come with `--html`, for which it chooses whose attention is drawn.")
    require_folders(html)
    with quiet():
        loaded = load(model, device)
        held = td.capture(loaded, prompt_of(prompt), **only_given(position=position))
        about = held.transformer
        tops = [held.top_heads(min(top, about.n_layers * about.n_heads))]
        if "post" in held.values:
            tops.append(held.top_neurons(min(top, about.n_layers * about.d_mlp)))
        if html is not None:
            from tracedensity.plot import activations_page, write_html

            write_html(activations_page(held, None if heads is None else heads.split(",")), html)
    typer.echo("\n\n".join(map(repr, tops)))


@app.command()
def strip(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="Text to colour; - reads it from standard input.")],
    model: ModelOption = None,
    threshold: Annotated[
        float, typer.Option(metavar="F", help="The faithfulness that circuits have to reach.")
    ] = _CIRCUIT_AT,
    method: MethodOption = None,
    device: DeviceOption = None,
    theme: Annotated[Literal["light", "dark"], typer.Option(help="On which ground.")] = "light",
    html: HtmlOption = None,
) -> None:
    """How much of the model the prediction of each token of a text needs."""
    from tracedensity.model import as_transformer
    from tracedensity.plot import density_strip

    require_folders(html)
    with quiet():
        loaded = load(model, device)
        tokens = as_transformer(loaded).tokens(prompt_of(text))
        options = {"thresholds": (threshold,), "baselines": False, **only_given(method=method)}
        curves = [td.density(loaded, tokens, position=position, **options) for position in range(len(tokens))]
        coloured = density_strip(curves, threshold=threshold, theme=theme)
        if html is not None:
            coloured.save(html)
    typer.echo(repr(coloured))


@app.command()
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A name, or a folder with a config.json.")],
    tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")],
    graph: GraphOption = None,
    method: MethodOption = None,
    ablation: AblationOption = None,
    steps: StepsOption = None,
    ungroup: UngroupOption = None,
    positions: PositionsOption = None,
    neurons: NeuronsOption = None,
    n: Annotated[int | None, typer.Option("--n", help="How many prompts a task has.", show_default="1")] = None,
    circuits: Annotated[
        int | None, typer.Option(help="How many circuits are run on each of them.", show_default="0")
    ] = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """What would scoring the edges of a model need, in memory and work? Its weights are not loaded."""
    options = only_given(
        graph=graph, method=method, ablation=ablation, steps=steps, ungroup=ungroup, positions=positions,
        neurons=neurons, n_examples=n, n_circuits=circuits, dtype=_dtype_of(dtype) or wanted.get("dtype"),
    )  # fmt: skip
    with quiet():
        planned = td.plan(model, tokens, **options)
    if as_json:
        typer.echo(json.dumps({**asdict(planned), "memory": planned.memory}))
    else:
        typer.echo(planned)


app.command()(sweep)
app.add_typer(study, name="study")


@app.command()
def models() -> None:
    """List the models to choose from."""
    from tracedensity.loading import bundled_models

    for name, line in bundled_models().items():
        typer.echo(f"{name:<12}  {line}")
    typer.echo(
        "Or the path of a folder in Hugging Face layout, or a TransformerLens model name such as gpt2, "
        "which is downloaded unless it is cached."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    What the user can mend is one sentence on standard error and code 2; a bug keeps its traceback.

    Args:
        arguments: The words after `tracedensity`; by default those of this process. No command at all is `--help`.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    _words[:] = words
    command = typer.main.get_command(app)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a token that the terminal cannot show is no error
    try:
        with _during:
            # commands and no command: help is no error
            asked = [*words, "--help"] if words in ([], ["study"]) else words
            code = command.main(asked, prog_name="tracedensity", standalone_mode=False)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        hint = "" if context is None else f" Try '{context.command_path} --help'."
        return _refuse(error.format_message().replace("Value error, ", "").rstrip(".") + "." + hint)
    except OSError as error:
        if error.filename is not None and error.strerror is not None:
            return _refuse(f"{error.filename}: {error.strerror}.")
        return _refuse(str(error))
    except ValueError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        code = 130
    if code == 130:
        typer.echo("Interrupted", err=True)
    return code or 0


def _refuse(reason: str) -> int:
    typer.echo(f"Error: {' '.join(reason.split())}", err=True)
    return 2


def _drawn(results: "list[Circuit | td.DensityCurve]", names: list[str], kind: str | None, theme: str) -> "Figure":
    """The figure of saved results that was asked for."""
    from tracedensity.plot import plot_curves, plot_difference, plot_heatmap

    circuits = [each for each in results if isinstance(each, td.Circuit)]
    curves = [each for each in results if isinstance(each, td.DensityCurve)]
    kinds = ("circuit", "heads", "tokens") if circuits else ("curve", "circuits", "composition", "heads", "tokens")
    kind = kinds[0] if kind is None else kind
    if circuits and curves:
        raise ValueError(f"`FILE` must be all curves or all circuits, got some of both: {names}.")
    if kind not in kinds:
        raise ValueError(f"`--kind` must be one of {', '.join(kinds)} for these files, got {kind!r} for {names}.")
    most = len(results) if kind == "curve" else 1 if kind in ("circuits", "composition") else 2
    if len(results) > most:
        raise ValueError(f"`FILE` must be at most {most} for the kind {kind!r}, got {len(results)}.")
    if kind in ("heads", "tokens"):
        return plot_heatmap(results[0], over=kind.removesuffix("s"), minus=[*results, None][1], theme=theme)
    if circuits[1:]:
        return plot_difference(circuits[0], circuits[1], names=(names[0], names[1]), theme=theme)
    if circuits:
        return circuits[0].plot(theme=theme)
    if curves[1:]:
        return plot_curves(curves, names=names, theme=theme)
    draw = {"curve": curves[0].plot, "circuits": curves[0].plot_circuits, "composition": curves[0].plot_composition}
    return draw[kind](theme=theme)


def _written(words: Sequence[str]) -> str:
    """The command of these words, for a shell such as bash to read."""
    return " ".join(["tracedensity", *map(_word, words)])


def _word(word: str) -> str:
    """A word quoted; what cannot be seen, a line break among it, is written out."""
    if word.isprintable():
        return shlex.quote(word)
    return "$'" + "".join(map(_char, word)) + "'"


def _char(char: str) -> str:
    """A character between ``$'`` and ``'``; what cannot be seen by its code point, since bytes are no characters."""
    if char.isprintable():
        return f"\\{char}" if char in "\\'" else char
    return "\\n" if char == "\n" else f"\\U{ord(char):08x}"


def _graph(graph: str | None, task: str | None, pairs: Path | None) -> str | None:
    """The graph that was asked for, or that pairs of prompts imply."""
    return "component" if graph is None and (task is not None or pairs is not None) else graph


def _size(ranking: "td.Ranking", size: int | None) -> int:
    """Number of edges of the circuit that was asked for; of whole nodes, if these were ranked."""
    usual = max(1, ranking.n_edges // 20)
    if not ranking.family.startswith("nodes") or ranking.natural_sizes is None:
        return usual if size is None else size
    natural = ranking.natural_sizes.tolist()
    if size is None:
        return next(edges for edges in natural if edges >= usual)
    if not 1 <= size <= len(natural):
        raise ValueError(f"`--size` must be a number of nodes from 1 to {len(natural)}, got {size}.")
    return natural[size - 1]


def _check_model(name: str, of_circuits: Mapping[str, object], device: str | None, as_json: bool) -> None:
    """Print the report on a model; the exit code is 1 if something does not hold."""
    if wrong := [option for option, value in of_circuits.items() if value is not None]:
        raise ValueError(f"leave out `{wrong[0]}` for a model: it is for circuits, and {name!r} is no file.")
    with quiet():
        report = td.check_model(load(name, device))
    if as_json:
        found = {
            "model": report.name,
            "class": report.kind,
            "transformer_lens": report.transformer_lens,
            "dtype": str(report.dtype).removeprefix("torch."),
            "ok": report.ok,
            "findings": report.table().to_dict(orient="records"),
            "granularities": {name: why or True for name, why in report.granularities.items()},
        }
        typer.echo(json.dumps(found))
    else:
        typer.echo(report)
    if not report.ok:
        raise typer.Exit(1)


def _read_circuit(file: Path) -> "Circuit":
    if file.suffix == ".json":
        return td.read_benchmark(file).circuit
    circuit = td.load(file)
    if not isinstance(circuit, td.Circuit):
        raise ValueError(f"`CIRCUIT` must be a saved circuit, got {str(file)!r}, a density curve.")
    return circuit


def _model_of(circuit: "Circuit", model: str | None, device: str | None) -> object:
    if circuit.provenance.task is None and not circuit.provenance.token_ids:
        raise ValueError(
            "`CIRCUIT` must say what it was found on, got a benchmark file, which names no model and no task."
        )
    name = circuit.provenance.model if model is None else model
    try:
        return load(name, device)
    except (ValueError, OSError) as error:
        if model is not None:
            raise
        # A folder's path is not in the file.
        raise ValueError(f"{error} Or give the model of the circuit, {name}, with `--model`.") from error


def _subject(
    model: object,
    prompt: str | None,
    task: str | None,
    pairs: Path | None,
    n: int | None,
    solved: bool,
    same_length: bool,
    seed: int | None,
) -> "str | td.Task":
    """The prompt or the task that was asked for: exactly one."""
    if sum(each is not None for each in (prompt, task, pairs)) != 1:
        raise ValueError("give one of `PROMPT`, `--task` and `--pairs`, for example `--task pronoun`.")
    if task is None and n is not None:
        raise ValueError("`--n` must come with `--task`, whose pairs it counts.")
    if prompt is not None:
        if solved or same_length:
            option = "--solved" if solved else "--same-length"
            raise ValueError(f"`{option}` must come with `--task` or `--pairs`, of which it keeps some.")
        return prompt_of(prompt)
    if pairs is not None:
        read = td.tasks.from_csv if pairs.suffix == ".csv" else td.tasks.from_jsonl
        found = read(pairs, model)
        found = found.where_solved(model) if solved else found
    else:
        assert task is not None
        found = td.tasks.make(task, model, **only_given(n=n, seed=seed), solved=solved)
    return found.of_length(model) if same_length else found


def _about(scores: "td.Scores") -> dict[str, Any]:
    about = scores.provenance
    return {
        "model": about.model,
        "task": None if about.named_task is None else about.named_task.name,
        "n_examples": 1 if about.task is None else len(about.task),
        "method": about.method,
        "score_metric": about.metric,
        "ablation": about.ablation,
        "seed": about.seed,
        "n_edges": scores.graph.n_edges,
    }


def _circuit_json(circuit: "Circuit", scores: "td.Scores", solves: Any) -> dict[str, Any]:
    return {
        **_about(scores),
        "size": circuit.n_edges,
        "pruned_size": circuit.pruned_size,
        "metric": circuit.metric,
        "faithfulness": circuit.faithfulness,
        "accuracy": None if solves is None else solves.accuracy,
        "mean_logit_difference": None if solves is None else solves.mean_logit_difference,
        "edges": [
            {"edge": name, "score": float(scores.values[kind][index])}
            for name in circuit.edge_names()
            for kind, index in [circuit.graph.edge_index(name)]
        ],
    }


def _require_own(*paths: Path | None) -> None:
    """Refuse a name that says the file is another format."""
    for path in paths:
        if path is not None and path.suffix == ".json":
            raise ValueError(f"`{path}` must not end in .json: it is a safetensors file. `convert` writes JSON.")
