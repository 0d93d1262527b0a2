"""The command line: one command for each of load, density, show and verify; nothing heavy is imported for `--help`."""

import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import tracedensity as td
from tracedensity.choices import Attention, FaithfulnessMetric, Family, Method

if TYPE_CHECKING:
    from tracedensity.graph.circuit import Circuit

SHORTFALL = 1e-4
"""A circuit is verified if it is at most this much less faithful than its file says."""

_CIRCUIT_AT = 0.9

app = typer.Typer(
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# The library's defaults live in its signatures: an option that is not given is None and is not passed on. What
# `show_default` says of them is help text, which a test compares with the signatures.
ModelOption = Annotated[
    str | None,
    typer.Option(metavar="M", help="A name that `tracedensity models` lists, or a folder.", show_default="books-gpt2"),
]
DeviceOption = Annotated[
    str | None, typer.Option(metavar="D", help="Where to run, such as cpu or cuda.", show_default=False)
]
HtmlOption = Annotated[Path | None, typer.Option(metavar="OUT", help="Write a page with figures to this file.")]


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"tracedensity {td.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """How much of a language model does one prediction need, which part, and why?"""


@app.command()
def density(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue; - reads it from standard input.")],
    model: ModelOption = None,
    method: Annotated[Method | None, typer.Option(help="How edges are scored.", show_default="norm")] = None,
    family: Annotated[Family | None, typer.Option(help="How scores become an order.", show_default="greedy")] = None,
    thresholds: Annotated[
        str | None,
        typer.Option(
            metavar="F,F,...",
            help="Faithfulnesses above 0 and at most 1 to find the smallest circuits for.",
            show_default="0.5,0.8,0.9,0.95,0.99",
        ),
    ] = None,
    metric: Annotated[
        FaithfulnessMetric | None, typer.Option(help="What faithfulness means.", show_default="tv")
    ] = None,
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
    position: Annotated[
        int | None, typer.Option(help="The token whose successor is predicted; -1 is the last.", show_default="-1")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="For whatever is drawn at random.", show_default="0")] = None,
    device: DeviceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
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
    _require_folders(html, save, circuit)
    given = _given(
        method=method,
        family=family,
        thresholds=None if thresholds is None else _numbers(thresholds),
        metric=metric,
        keep_residual=keep_residual,
        attention=attention,
        baselines=False if no_baselines else None,
        position=position,
        seed=seed,
    )
    text = _prompt(prompt)
    with _quiet():
        curve = td.density(td.load_model(**_given(name_or_model=model, device=device)), text, **given)
        if save is not None:
            curve.save(save)
        if circuit is not None:
            curve.circuit(faithfulness=at).save(circuit)
        if html is not None:
            from tracedensity.plot import density_page, write_html

            write_html(density_page(curve, faithfulness=at), html)
    typer.echo(json.dumps(curve.to_dict(), allow_nan=False) if as_json else repr(curve))


@app.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `density --save` or `--circuit` has written.")],
    html: HtmlOption = None,
) -> None:
    """Print a saved curve or circuit."""
    _require_folders(html)
    with _quiet():
        result = td.load(file)
        if html is not None:
            from tracedensity.plot import density_page, write_html

            write_html(result.plot() if isinstance(result, td.Circuit) else density_page(result), html)
    typer.echo(repr(result))


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(metavar="CIRCUIT", help="What `density --circuit` has written.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="M", help="The model that it was found in.", show_default="the one that the file names"),
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Run a saved circuit again: is it as faithful as it says?

    Exit code 1 if it is not.
    """
    with _quiet():
        circuit = td.load(file)
        if not isinstance(circuit, td.Circuit):
            raise ValueError(f"`CIRCUIT` must be a saved circuit, got {str(file)!r}, a density curve.")
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
        arguments: The words after `tracedensity`; by default those of this process. None at all is `--help`.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    command = typer.main.get_command(app)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a token that the terminal cannot show is no error
    try:
        code = command.main(words or ["--help"], prog_name="tracedensity", standalone_mode=False)
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


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given, so that the defaults of the library hold for the others."""
    return {name: value for name, value in options.items() if value is not None}


def _model_of(circuit: "Circuit", model: str | None, device: str | None) -> object:
    name = circuit.provenance.model if model is None else model
    try:
        return td.load_model(name, **_given(device=device))
    except (ValueError, OSError) as error:
        if model is not None:
            raise
        # A folder's path is not in the file.
        raise ValueError(f"{error} Or give the model of the circuit, {name}, with `--model`.") from error


def _prompt(argument: str) -> str:
    try:
        # A line that `echo` wrote ends where its text does.
        text = sys.stdin.read().removesuffix("\n") if argument == "-" else argument
        text.encode()  # bytes that are no text reach us as lone surrogates
    except UnicodeError as error:
        raise ValueError(f"`PROMPT` must be UTF-8 text, got something else ({error}).") from error
    return text


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise ValueError(f"`--thresholds` must be numbers such as 0.5,0.9, got {text!r}.") from error


def _require_folders(*paths: Path | None) -> None:
    """Refuse a file that cannot be written before the work, not after it."""
    for path in paths:
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ValueError(f"the output must be a file in a folder that exists, got {str(path)!r}.")


@contextmanager
def _quiet() -> Iterator[None]:
    """While open, other libraries neither print nor warn; this one's own warnings become one line each."""

    def show_warning(message: Warning | str, *_: object, **__: object) -> None:
        typer.echo(f"Warning: {message}", err=True)

    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", category=UserWarning, module=r"tracedensity|__main__")
            warnings.showwarning = show_warning
            yield
    finally:
        logging.disable(disabled)


if __name__ == "__main__":
    sys.exit(main())
