"""Settings: what circuits are run on, a model with prompts and something in place of absent edges."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tracedensity.ablate import Carried, ablated_values, carried, resampled
from tracedensity.choices import Ablation, TokenAblation
from tracedensity.model import Transformer
from tracedensity.task import Examples, Task, as_task

CPU_WORKSPACE = 2**28
"""Bytes that the activations of one batch may take on a CPU."""

_CPU_CACHED = 2**26  # beyond this, fresh pages for every result cost more than larger batches save
_CPU_BATCH = 4  # but so many rows share the reading of large weights


@dataclass(frozen=True, eq=False)
class Setting:
    """What circuits are run on.

    Attributes:
        model: The model.
        fingerprint: Hash of its architecture and weights, made before anything is run.
        prompts: The prompts, as token ids.
        ablated: For some of the examples, what ablated writers write (`Written`), on the token graph what ablated edges
            carry (`Carried`).
        task: What they were made of; None for one prompt on the token graph.
        ablation: What replaces an absent edge.
    """

    model: Transformer
    fingerprint: str
    prompts: Examples
    ablated: Callable[[slice], Any]
    task: Task | None = None
    ablation: str = "zero"

    @property
    def asked(self) -> bool:
        """Whether the task itself says what the answers are; if not, they are what the model finds most probable."""
        return self.prompts.answer is not None

    @cached_property
    def examples(self) -> Examples:
        """The prompts with answers, and with what the model predicts; it is run when this is first asked for."""
        logits = self.prompts.clean_logits
        if logits is None:
            parts = self.prompts.parts(rows_at_once(self.model, self.prompts.tokens.shape[1]))
            logits = torch.cat(
                [self.model.observe(self.prompts.tokens[part], {}, self.prompts.last[part]) for part in parts]
            )
        answer = logits.argmax(-1)[:, None] if self.prompts.answer is None else self.prompts.answer
        return replace(self.prompts, clean_logits=logits, answer=answer)

    @property
    def clean_logits(self) -> Float[Tensor, "example d_vocab"]:
        """What the model predicts."""
        assert self.examples.clean_logits is not None
        return self.examples.clean_logits

    def predicting(self, logits: Float[Tensor, "example d_vocab"]) -> "Setting":
        """The same where the model's predictions are known already."""
        return replace(self, prompts=replace(self.prompts, clean_logits=logits))

    def answered(self, token: int) -> "Setting":
        """The same with one token for the answer to every example."""
        answer = torch.full((len(self.prompts), 1), token, device=self.model.device)
        return replace(self, prompts=replace(self.prompts, answer=answer))

    def common_length(self) -> int:
        """Number of tokens of every prompt.

        Raises:
            ValueError: If it is not the same for all.
        """
        last = self.prompts.last
        if (last != last[0]).any():
            raise ValueError(
                f"`positions` must be left out for prompts of different lengths, got {int(last.min()) + 1} to "
                f"{int(last.max()) + 1} tokens: a position of one would be added to that of another. "
                "`task.of_length(model)`, on the command line `--same-length`, keeps pairs of one length."
            )
        return int(last[0]) + 1


def token_setting(
    model: Transformer, prompt: object, ablation: str | None, position: int, seed: int, *, neurons: bool = False
) -> Setting:
    """One prompt on the token graph; where absent edges carry what they do on other tokens, several times.

    Args:
        model: The model.
        prompt: The prompt.
        ablation: What replaces an absent edge; by default nothing does.
        position: Which prediction is asked for.
        seed: For drawn tokens.
        neurons: Whether MLPs are ablated neuron by neuron.

    Raises:
        ValueError: If it is a task, or there is no such ablation.
    """
    if isinstance(prompt, Task):
        raise ValueError(
            '`prompt` must be one prompt on the token graph, got a task. Use `graph="component"` for tasks.'
        )
    if ablation not in (None, *get_args(TokenAblation)):
        raise ValueError(
            f"`ablation` must be one of {list(get_args(TokenAblation))} on the token graph, got {ablation!r}."
        )
    tokens = model.tokens(prompt, position)
    fingerprint = model.fingerprint()  # first: it finds weights that are not finite
    examples, ablation = Examples.of_prompt(tokens), ablation or "zero"
    if ablation == "resample":
        examples = resampled(model, examples, seed)
    instead = carried(model, examples, ablation, neurons=neurons)

    def ablated(part: slice) -> Carried:
        return {site: value if len(value) == 1 else value[part] for site, value in instead.items()}

    return Setting(model, fingerprint, examples, ablated, ablation=ablation)


def component_setting(
    model: Transformer, subject: object, ablation: str | None, position: int, seed: int, *, neurons: bool = False
) -> Setting:
    """A task, or a prompt, on the component graph.

    Args:
        model: The model.
        subject: A task or a prompt.
        ablation: What replaces an absent edge; by default what it carries on the corrupted prompt, and where there
            is none on the prompt with tokens drawn at random.
        position: Which prediction of a prompt is asked for.
        seed: For the drawn tokens.
        neurons: Whether ablated activations of neurons are wanted as well.

    Raises:
        ValueError: If the task does not fit the model, there is no such ablation, or a hook of the user's stands where
            circuits do not pass.
    """
    if isinstance(subject, Task) and position != -1:
        raise ValueError(f"`position` must be left to the task, which has its own, got {position}.")
    if ablation not in (None, *get_args(Ablation)):
        raise ValueError(f"`ablation` must be one of {list(get_args(Ablation))}, got {ablation!r}.")
    model.require_no_hooks_on_reading()
    task = as_task(subject)
    task = task if isinstance(subject, Task) else replace(task, position=position)
    examples = task.examples(model)
    fingerprint = model.fingerprint()
    if ablation is None:
        ablation = "resample" if examples.corrupted is None else "counterfactual"
    if ablation == "resample":
        examples = resampled(model, examples, seed)
    n_at_once = rows_at_once(model, examples.tokens.shape[1])
    kind = "counterfactual" if ablation == "resample" else ablation
    ablated = ablated_values(model, examples, kind, n_at_once=n_at_once, neurons=neurons)
    return Setting(model, fingerprint, examples, ablated, task, ablation)


# -- how much at a time ----------------------------------------------------------------------------


def rows_at_once(model: Transformer, n_pos: int, n_held: int = 0) -> int:
    """How many rows to run at once: what fits in the free memory of an accelerator, or suits a CPU.

    Args:
        model: The model.
        n_pos: Tokens of a row.
        n_held: Vectors per token that are kept through the run.
    """
    return _as_many(model, bytes_per_row(model, n_pos, n_held))


def gradients_at_once(model: Transformer, n_pos: int) -> int:
    """How many rows to run at once where gradients are wanted."""
    attention = 3 * model.n_heads * n_pos * n_pos
    tokens = n_pos * (4 * model.d_mlp + 16 * model.d_model)
    return _as_many(model, (model.n_layers * (attention + tokens) + 3 * model.d_vocab) * 4)


def bytes_per_row(model: Transformer, n_pos: int, n_held: int = 0) -> int:
    """Estimate of the memory that one row of a batch takes while a layer is run."""
    attention = 5 * model.n_heads * n_pos * n_pos  # scores, their masked copy, pattern, its copies
    mlp = n_pos * (4 * model.d_mlp + 8 * model.d_model + 4 * model.n_heads * model.d_head)
    kept = n_held * n_pos * model.d_model
    return (attention + mlp + kept + 2 * model.d_vocab) * torch.empty((), dtype=model.dtype).element_size()


def _as_many(model: Transformer, size: int) -> int:
    if model.device.type == "cuda":
        return max(1, torch.cuda.mem_get_info(model.device)[0] // 2 // size)
    return max(1, _CPU_CACHED // size, min(_CPU_BATCH, CPU_WORKSPACE // size))
