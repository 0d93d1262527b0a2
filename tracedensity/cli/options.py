"""What commands have in common: options, and how they are read."""

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import tracedensity as td
from tracedensity.choices import Ablation, Family, GraphName, Method, Precision, Question, TaskName

wanted: dict[str, Any] = {}
"""What options before the command say of how a model is loaded."""

# The library's defaults live in its signatures: an option that is not given is None and is not passed on. What
# `show_default` says of them is help text, which a test compares with the signatures.
ModelOption = Annotated[
    str | None,
    typer.Option(metavar="M", help="A name that `tracedensity models` lists, or a folder.", show_default="books-gpt2"),
]
DeviceOption = Annotated[
    str | None, typer.Option(metavar="D", help="Where to run, such as cpu or cuda.", show_default=False)
]
DtypeOption = Annotated[Precision | None, typer.Option(help="Precision of the weights.", show_default="float32")]
HtmlOption = Annotated[Path | None, typer.Option(metavar="OUT", help="Write a page with figures to this file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
PromptArgument = Annotated[
    str | None, typer.Argument(metavar="[PROMPT]", help="Text to continue; - reads it from standard input.")
]
PositionOption = Annotated[
    int | None, typer.Option(help="The token whose successor is predicted; -1 is the last.", show_default="-1")
]
TaskOption = Annotated[
    TaskName | None, typer.Option(help="Generate pairs of this task in place of a prompt.", show_default=False)
]
PairsOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Read pairs from this .csv or .jsonl file.", show_default=False)
]
CountOption = Annotated[int | None, typer.Option("--n", help="How many pairs to generate.", show_default="32")]
SolvedOption = Annotated[bool, typer.Option("--solved", help="Keep only pairs that the model solves.")]
LengthOption = Annotated[bool, typer.Option("--same-length", help="Keep only pairs of the most common length.")]
AblationOption = Annotated[
    Ablation | None,
    typer.Option(
        help="What replaces an absent edge.",
        show_default="zero; counterfactual or resample on the component graph",
    ),
]
StepsOption = Annotated[int | None, typer.Option(help="Points of integrated gradients.", show_default="5")]
UngroupOption = Annotated[
    bool | None,
    typer.Option("--ungroup", help="Keys and values of every query head by themselves.", show_default=False),
]
SignedOption = Annotated[
    bool | None, typer.Option("--signed", help="Edges that help first, those that hurt last.", show_default=False)
]
GraphOption = Annotated[
    GraphName | None, typer.Option(help="What an edge is.", show_default="token; component for tasks")
]
MethodOption = Annotated[
    Method | None,
    typer.Option(help="How edges are scored.", show_default="norm; as for `circuit` on the component graph"),
]
QuestionOption = Annotated[
    Question | None, typer.Option(help="What edges have an effect on.", show_default="logit_diff, or logprob")
]
FamilyOption = Annotated[Family | None, typer.Option(help="How scores become an order.", show_default="greedy")]
PositionsOption = Annotated[
    bool | None, typer.Option("--positions", help="Tell edges apart by token.", show_default=False)
]
RobustOption = Annotated[
    bool | None,
    typer.Option("--robust", help="Find circuits that also stand other ablations and prompts.", show_default=False),
]
NeuronsOption = Annotated[
    bool | None, typer.Option("--neurons", help="Take every neuron of an MLP by itself.", show_default=False)
]
NodesOption = Annotated[
    Literal["sum", "max"] | None,
    typer.Option(help="Whole nodes, by the sum or the maximum of what leaves them.", show_default=False),
]
OwnModelOption = Annotated[
    str | None,
    typer.Option(metavar="M", help="The model that it was found in.", show_default="the one that the file names"),
]
CircuitArgument = Annotated[
    Path, typer.Argument(metavar="CIRCUIT", help="A saved circuit, or a JSON file of the MIB benchmark.")
]
BudgetOption = Annotated[
    int | None, typer.Option(metavar="N", help="What a search may spend, in forward passes.", show_default="400")
]
SeedOption = Annotated[int | None, typer.Option(help="For whatever is drawn at random.", show_default="0")]


def only_given(**options: Any) -> dict[str, Any]:
    """The options that were given, so that the defaults of the library hold for the others."""
    return {name: value for name, value in options.items() if value is not None}


def as_numbers(text: str, option: str = "--thresholds") -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise ValueError(f"`{option}` must be numbers such as 0.5,0.9, got {text!r}.") from error


def require_folders(*paths: Path | None) -> None:
    """Refuse a file that cannot be written before the work, not after it."""
    for path in paths:
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ValueError(f"the output must be a file in a folder that exists, got {str(path)!r}.")


@contextmanager
def quiet() -> Iterator[None]:
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


def load(model: str | None, device: str | None) -> Any:
    return td.load_model(**only_given(name_or_model=model, device=device), **wanted)


def prompt_of(argument: str) -> str:
    try:
        # A line that `echo` wrote ends where its text does.
        text = sys.stdin.read().removesuffix("\n") if argument == "-" else argument
        text.encode()  # bytes that are no text reach us as lone surrogates
    except UnicodeError as error:
        raise ValueError(f"`PROMPT` must be UTF-8 text, got something else ({error}).") from error
    return text
