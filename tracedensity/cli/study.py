"""Commands on a corpus: sweeps, and what is asked of their tables."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import tracedensity as td
from tracedensity.choices import Attention, DensityMethod, Engine, FaithfulnessMetric, Outcome, Question
from tracedensity.cli.options import (
    AblationOption,
    BudgetOption,
    DeviceOption,
    FamilyOption,
    GraphOption,
    HtmlOption,
    JsonOption,
    MethodOption,
    ModelOption,
    PositionOption,
    PositionsOption,
    RobustOption,
    SeedOption,
    SignedOption,
    StepsOption,
    UngroupOption,
    as_numbers,
    load,
    only_given,
    prompt_of,
    quiet,
    require_folders,
    wanted,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

study = typer.Typer(
    help="Ask something of the tables that `sweep` has written.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The folder that `sweep` has written.")]
CountsOption = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Text to count tokens in, for how rare they are; may be given several times."),
]
AskedModelOption = Annotated[
    str | None,
    typer.Option(metavar="M", help="The model, whose tokenizer counts; needed with `--counts`.", show_default=False),
]
ThresholdOption = Annotated[
    float | None,
    typer.Option(metavar="F", help="Faithfulness at which sizes are taken.", show_default="0.9"),
]
OutcomeOption = Annotated[
    Outcome | None,
    typer.Option(help="Which density.", show_default="area"),
]
OutcomesOption = Annotated[
    Outcome | None,
    typer.Option(help="Only this density.", show_default="all"),
]
CsvOption = Annotated[Path | None, typer.Option(metavar="OUT", help="Write the table to this CSV file.")]
BootstrapOption = Annotated[
    int | None, typer.Option("--bootstrap", metavar="N", min=0, help="How often documents are resampled.")
]
PermutationsOption = Annotated[
    int | None, typer.Option("--permutations", metavar="N", min=0, help="How often prompts are exchanged.")
]
SignsOption = Annotated[
    int | None,
    typer.Option("--permutations", metavar="N", min=0, help="How often the signs of whole documents are turned."),
]


def sweep(
    prompts: Annotated[
        list[Path],
        typer.Argument(
            metavar="PROMPTS...", help="Files of prompts: .txt, .jsonl, .csv or .parquet; or any text to cut."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write, or to go on with.")],
    model: ModelOption = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Every model in this folder, each into a folder of its own in DIR."),
    ] = None,
    context_words: Annotated[
        int | None,
        typer.Option(metavar="N", help="Cut text into contexts of so many words; the next word is the target."),
    ] = None,
    context_tokens: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Or of so many tokens; several numbers give nested contexts."),
    ] = None,
    per_document: Annotated[
        int | None, typer.Option(metavar="N", help="At most so many contexts of each document.")
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(help="Where tables have their prompts.", show_default="prompt, text or content"),
    ] = None,
    counts: CountsOption = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Only the first so many prompts.")] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="The I-th of N runs, from 0, or auto: as Slurm or torchrun say."),
    ] = None,
    engine: Annotated[Engine | None, typer.Option(help="Where it is run.", show_default="local")] = None,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", help="Processes, or actors of Ray.", show_default="one per core, for many prompts"),
    ] = None,
    gpus: Annotated[
        float | None, typer.Option(metavar="N", help="GPUs of each actor of Ray.", show_default="0")
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help="Threads of each process.", show_default="1")] = None,
    part_size: Annotated[
        int | None, typer.Option(metavar="N", help="Prompts that are lost if a run is killed.", show_default="64")
    ] = None,
    curves: Annotated[
        bool | None, typer.Option("--curves", help="Write the curve of each prompt as well.", show_default=False)
    ] = None,
    circuits: Annotated[
        str | None,
        typer.Option(metavar="F,F,...", help="Write the circuits of these faithfulnesses as well."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with a sweep that is in the folder, or refuse it.")
    ] = True,
    retry_errors: Annotated[
        bool | None,
        typer.Option("--retry-errors", help="Run parts with errors in them again.", show_default=False),
    ] = None,
    graph: GraphOption = None,
    method: Annotated[
        DensityMethod | None, typer.Option(help="How edges are scored, as for `density`.", show_default="norm")
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
            help="Faithfulnesses to find the smallest circuits for.",
            show_default="0.5,0.8,0.9,0.95,0.99",
        ),
    ] = None,
    signed: SignedOption = None,
    metric: Annotated[
        Literal[FaithfulnessMetric, Question] | None,
        typer.Option(help="What faithfulness means.", show_default="tv"),
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
    no_baselines: Annotated[
        bool, typer.Option("--no-baselines", help="Leave out random and inverse circuits.")
    ] = False,
    position: PositionOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Density of all prompts of a corpus, as tables on disk; run again, it goes on where it ended."""
    options = only_given(
        context_words=context_words,
        context_tokens=None if context_tokens is None else _whole(context_tokens, "--context-tokens"),
        per_document=per_document, column=column, limit=limit, shard=shard, engine=engine, workers=workers, gpus=gpus,
        threads=threads, part_size=part_size, curves=curves, resume=resume,
        retry_errors=retry_errors,
        circuits=None if circuits is None else as_numbers(circuits, "--circuits"), graph=graph, method=method,
        family=family, refine=refine, budget=budget, robust=robust, positions=positions,
        thresholds=None if thresholds is None else as_numbers(thresholds), signed=signed, metric=metric,
        ablation=ablation, steps=steps, ungroup=ungroup, keep_residual=keep_residual, attention=attention,
        baselines=False if no_baselines else None, position=position, seed=seed,
    )  # fmt: skip
    if model is not None and checkpoints is not None:
        raise ValueError("`--model` must be left out with `--checkpoints`, which are the models.")
    models = {"": "books-gpt2" if model is None else model}
    if checkpoints is not None:
        models = {path.name: str(path) for path in td.study.checkpoints(checkpoints)}
    for name, each in models.items():
        with quiet():
            done = td.sweep(
                each, prompts, out / name, counts=counts or None, loading={**only_given(device=device), **wanted},
                **options,
            )  # fmt: skip
        typer.echo(json.dumps({**vars(done), "path": str(done.path)}) if as_json else done)


@study.command()
def table(
    folder: FolderArgument,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="A .csv, .jsonl or .parquet file.")],
    name: Annotated[
        Literal["prompts", "thresholds", "points"], typer.Option("--table", help="Which of its tables.")
    ] = "prompts",
) -> None:
    """Write a table of a sweep to one file."""
    require_folders(out)
    if out.suffix not in (".csv", ".jsonl", ".parquet"):
        raise ValueError(f"`--out` must end in .csv, .jsonl or .parquet, got {str(out)!r}.")
    from tracedensity.study.table import TABLES

    with quiet():
        rows: Any = td.read_sweep(folder, name)
        rows.attrs = {}
        if out.suffix == ".parquet":
            content = rows.to_parquet(index=False)
        elif out.suffix == ".csv":
            # lists as JSON: what a cell says of a long array leaves out its middle
            for column in (each.name for each in TABLES[name] if each.type.startswith("list")):
                rows[column] = [None if each is None else json.dumps(each.tolist()) for each in rows[column]]
            content = rows.to_csv(index=False)
        else:
            content = rows.to_json(orient="records", lines=True, force_ascii=False)
        _write(out, content)
    typer.echo(f"{len(rows):,} rows written to {out}.")


@study.command()
def factors(
    folder: FolderArgument,
    outcome: OutcomesOption = None,
    threshold: ThresholdOption = None,
    controls: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Covariates that partial correlations hold fixed.",
            show_default="entropy,rarity_target,n_tokens",
        ),
    ] = None,
    counts: CountsOption = None,
    model: AskedModelOption = None,
    bootstrap: BootstrapOption = None,
    permutations: PermutationsOption = None,
    seed: SeedOption = None,
    csv: CsvOption = None,
    html: HtmlOption = None,
) -> None:
    """What density goes with: entropy, rarity, length, repetition, complexity, domain."""
    require_folders(csv, html)
    with quiet():
        known = _counted(folder, counts, model)
        found = td.study.factors(
            known,
            **only_given(
                outcomes=None if outcome is None else (outcome,), threshold=threshold, n_bootstrap=bootstrap,
                n_permutations=permutations, seed=seed,
                controls=None if controls is None else tuple(filter(None, controls.split(","))),
            ),
        )  # fmt: skip
    shown = dict.fromkeys(found.table["outcome"])
    _finish("What density goes with", found, found.table, csv, html, [*map(found.plot, shown)] if html else [])


@study.command()
def lengths(
    folder: FolderArgument,
    outcome: OutcomesOption = None,
    threshold: ThresholdOption = None,
    bootstrap: BootstrapOption = None,
    permutations: SignsOption = None,
    seed: SeedOption = None,
    rows: Annotated[Literal["slopes", "means"], typer.Option("--table", help="What `--csv` writes.")] = "slopes",
    csv: CsvOption = None,
    html: HtmlOption = None,
) -> None:
    """What longer contexts do to the density of the same predictions (nested contexts)."""
    require_folders(csv, html)
    with quiet():
        found = td.study.lengths(
            td.read_sweep(folder),
            **only_given(
                outcomes=None if outcome is None else (outcome,), threshold=threshold, n_bootstrap=bootstrap,
                n_permutations=permutations, seed=seed,
            ),
        )  # fmt: skip
    written = {"slopes": found.table, "means": found.by_length}[rows]
    _finish("Density and the length of the context", found, written, csv, html, [found.plot()] if html else [])


@study.command()
def compare(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR DIR...", help="Sweeps of different models over the same prompts.")
    ],
    other: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Sweeps of the same models with another method, for reliability."),
    ] = None,
    families: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Family of each DIR's model, for means within and between these."),
    ] = None,
    outcome: OutcomeOption = None,
    threshold: ThresholdOption = None,
    bootstrap: BootstrapOption = None,
    permutations: PermutationsOption = None,
    seed: SeedOption = None,
    rows: Annotated[
        Literal["pairs", "reliability", "matrix", "families"], typer.Option("--table", help="What `--csv` writes.")
    ] = "pairs",
    csv: CsvOption = None,
    html: HtmlOption = None,
) -> None:
    """Whether the same inputs are dense for different models."""
    require_folders(csv, html)
    with quiet():
        if len(folders) < 2:
            raise ValueError(f"`DIR` must be two or more sweeps, of models over the same prompts, got {folders[0]}.")
        tables = _by_model(folders)
        found = td.study.compare(
            tables,
            others=_by_model(other or []),
            families=None if families is None else _families(families, [*tables]),
            **only_given(
                outcome=outcome, threshold=threshold, n_bootstrap=bootstrap, n_permutations=permutations, seed=seed
            ),
        )
    matrix = found.matrix.rename_axis("model").reset_index()
    written = {"pairs": found.table, "reliability": found.reliability, "matrix": matrix, "families": found.families}[
        rows
    ]
    _finish("The density of different models", found, written, csv, html, [found.plot()] if html else [])


@study.command()
def trend(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR DIR...", help="Sweeps in their order; or one folder of sweeps.")
    ],
    against: Annotated[
        Literal["previous", "first"] | None,
        typer.Option(help="What each is compared with.", show_default="previous"),
    ] = None,
    outcome: OutcomeOption = None,
    threshold: ThresholdOption = None,
    bootstrap: BootstrapOption = None,
    permutations: SignsOption = None,
    seed: SeedOption = None,
    csv: CsvOption = None,
    html: HtmlOption = None,
) -> None:
    """How density goes from sweep to sweep: over the checkpoints of a training, over languages."""
    require_folders(csv, html)
    names = _names_of(folders)
    with quiet():
        found = td.study.trend(
            folders[0] if len(folders) == 1 else dict(zip(names, map(td.read_sweep, folders), strict=True)),
            **only_given(
                outcome=outcome, threshold=threshold, against=against, n_bootstrap=bootstrap,
                n_permutations=permutations, seed=seed,
            ),
        )  # fmt: skip
    _finish("Density from sweep to sweep", found, found.table, csv, html, [found.plot()] if html else [])


@study.command()
def target(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text; - reads it from standard input.")],
    model: ModelOption = None,
    faithfulness: Annotated[
        float | None, typer.Option("--faithfulness", "-f", metavar="F", help="To reach.", show_default="0.9")
    ] = None,
    method: MethodOption = None,
    kind: Annotated[
        Literal["stable", "first"] | None,
        typer.Option(help="Whether larger circuits must reach it as well.", show_default="stable"),
    ] = None,
    position: PositionOption = None,
    circuit: Annotated[Path | None, typer.Option(metavar="OUT", help="Write the circuit to this file.")] = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the size that reaches one faithfulness by halving, in few runs: for models that are dear to run."""
    require_folders(circuit)
    with quiet():
        found = td.study.target(
            load(model, device), prompt_of(prompt),
            **only_given(faithfulness=faithfulness, method=method, kind=kind, position=position),
        )  # fmt: skip
        if circuit is not None and found.ranking is not None:
            found.ranking.circuit(found.size).save(circuit)
    about = {name: value for name, value in vars(found).items() if name != "ranking"}
    typer.echo(json.dumps(about) if as_json else found)


@study.command()
def thresholds(
    folder: FolderArgument,
    split: Annotated[
        float | None, typer.Option(metavar="F", help="Share of documents to choose on.", show_default="0.5")
    ] = None,
    bootstrap: BootstrapOption = None,
    seed: SeedOption = None,
    csv: CsvOption = None,
    html: HtmlOption = None,
) -> None:
    """Choose a threshold where the mean curve bends, and try it on other documents."""
    require_folders(csv, html)
    with quiet():
        found = td.study.thresholds(td.read_sweep(folder), **only_given(split=split, n_bootstrap=bootstrap, seed=seed))
    _finish("Where the curve bends", found, found.table, csv, html, [found.plot()] if html else [])


@study.command()
def shap(
    folder: FolderArgument,
    outcome: OutcomeOption = None,
    threshold: ThresholdOption = None,
    regressor: Annotated[
        Literal["boosting", "ridge"] | None, typer.Option(help="Which regression.", show_default="boosting")
    ] = None,
    counts: CountsOption = None,
    model: AskedModelOption = None,
    folds: Annotated[
        int | None, typer.Option("--folds", metavar="N", help="Folds of cross-validation.", show_default="5")
    ] = None,
    null: Annotated[
        int | None,
        typer.Option("--null", metavar="N", min=0, help="How often density is exchanged.", show_default="100"),
    ] = None,
    bootstrap: BootstrapOption = None,
    seed: SeedOption = None,
    rows: Annotated[
        Literal["covariates", "groups"], typer.Option("--table", help="What `--csv` writes.")
    ] = "covariates",
    csv: CsvOption = None,
    html: HtmlOption = None,
) -> None:
    """Which covariates a regression of density draws on (Shapley values)."""
    require_folders(csv, html)
    with quiet():
        found = td.study.shap_values(
            _counted(folder, counts, model),
            **only_given(
                outcome=outcome, threshold=threshold, regressor=regressor, n_folds=folds, n_null=null,
                n_bootstrap=bootstrap, seed=seed,
            ),
        )  # fmt: skip
    figures = [found.plot(), *map(found.plot, found.table["covariate"])] if html else []
    written = {"covariates": found.table, "groups": found.groups}[rows]
    _finish("What a regression of density draws on", found, written, csv, html, figures)


@study.command()
def contents(
    folder: FolderArgument,
    share: Annotated[
        float | None,
        typer.Option(metavar="F", help="Size of the circuits whose components are counted.", show_default="0.01"),
    ] = None,
    null: Annotated[
        int | None,
        typer.Option("--null", metavar="N", min=0, help="How often components are drawn.", show_default="1000"),
    ] = None,
    bootstrap: BootstrapOption = None,
    seed: SeedOption = None,
    rows: Annotated[
        Literal["sizes", "recurrence"], typer.Option("--table", help="What `--csv` writes: by size, or by component.")
    ] = "sizes",
    csv: CsvOption = None,
    html: HtmlOption = None,
) -> None:
    """What circuits hold: parts and layers, components that come again, what small ones predict, phases."""
    require_folders(csv, html)
    with quiet():
        found = td.study.contents(folder, **only_given(share=share, n_null=null, n_bootstrap=bootstrap, seed=seed))
        kinds = ("composition", "layers", "recurrence", "prediction", "phases")
    written = {"sizes": found.by_size, "recurrence": found.recurrence}[rows]
    _finish("What circuits hold", found, written, csv, html, [found.plot(each) for each in kinds] if html else [])


def _counted(folder: Path, counts: list[Path] | None, model: str | None) -> Any:
    """The prompts of a sweep with covariates, rarities among them where counts are given."""
    known = td.read_sweep(folder)
    if not counts:
        if model is not None:
            raise ValueError("`--model` must come with `--counts`, texts whose tokens it counts.")
        return known
    if model is None:
        raise ValueError("`--counts` must come with `--model`, whose tokens are counted.")
    loaded = td.load_model(model, **wanted)
    return td.study.with_covariates(known, counts=td.study.count_tokens(loaded, *counts), model=loaded)


def _by_model(folders: list[Path]) -> dict[str, Any]:
    """Tables by the name of their model; by that of the folder as well, where two are of one model."""
    tables = [td.read_sweep(folder) for folder in folders]
    models = [str(each.attrs["sweep"]["model"]) for each in tables]
    names = [
        model if models.count(model) == 1 else f"{model} ({called})"
        for model, called in zip(models, _names_of(folders), strict=True)
    ]
    return dict(zip(names, tables, strict=True))


def _families(said: str, models: list[str]) -> dict[str, str]:
    """Families of models, by their names."""
    names = said.split(",")
    if len(names) != len(models):
        raise ValueError(f"`--families` must be {len(models)} names, one for each sweep, got {said!r}.")
    return dict(zip(models, names, strict=True))


def _names_of(folders: list[Path]) -> list[str]:
    """What to call sweeps: by the last part of their paths, if these differ.

    Raises:
        ValueError: If one is given twice.
    """
    short = [folder.name for folder in folders]
    names = short if len(set(short)) == len(short) else [*map(str, folders)]
    if len(set(names)) < len(names):
        raise ValueError(f"`DIR` must be different sweeps, got {', '.join(names)}.")
    return names


def _finish(title: str, found: object, rows: Any, csv: Path | None, html: Path | None, figures: "list[Figure]") -> None:
    """Print what was found, and write the files that were asked for."""
    if csv is not None:
        _write(csv, rows.to_csv(index=False))
    if html is not None:
        from tracedensity.plot import figures_page, write_html

        write_html(figures_page(title, figures, rows), html)
    typer.echo(found)


def _write(path: Path, content: str | bytes) -> None:
    from tracedensity.files import replace_file

    replace_file(path, content)


def _whole(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise ValueError(f"`{option}` must be whole numbers such as 8,16,32, got {text!r}.") from error
