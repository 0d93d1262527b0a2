"""What a number is about: the model, the prompt, and how it was made."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tracedensity.metric import QUESTIONS
from tracedensity.model import Transformer
from tracedensity.setting import Setting
from tracedensity.task import Task


@dataclass(frozen=True)
class Provenance:
    """Enough to make a result again, and to refuse to mix it with another model.

    Attributes:
        model: Name of the model.
        fingerprint: Hash of its architecture and weights (`Transformer.fingerprint`).
        token_ids: The prompt, up to the position that is explained; of a task, its first clean one.
        texts: The text of each of these tokens.
        method: How edges were scored.
        seed: Seed of whatever was drawn at random.
        task: What was asked, where that is more than the prompt's next token.
        metric: What scores are effects on; "" where they are none.
        ablation: What edges carried when they were ablated.
        d_model: Width of the model; 0 if unknown.
        text: The prompt as a whole, where that is more than its tokens one by one: of a character that several of them
            make up, none has a text.
    """

    model: str
    fingerprint: str
    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    method: str
    seed: int = 0
    task: Task | None = None
    metric: str = ""
    ablation: str = "zero"
    d_model: int = 0
    text: str = ""

    @classmethod
    def of(cls, setting: Setting, method: str, seed: int = 0, metric: str = "") -> "Provenance":
        """Provenance of something computed in a setting."""
        model, examples = setting.model, setting.prompts
        ids = tuple(examples.tokens[0, : int(examples.last[0]) + 1].tolist())
        return cls(
            model.name, setting.fingerprint, ids, tuple(model.texts(ids)), method, seed, setting.task, metric,
            setting.ablation, model.d_model, model.text(ids),
        )  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Provenance":
        """Inverse of `to_dict`."""
        task = None if values.get("task") is None else Task(**values["task"])
        return cls(**{**values, "token_ids": tuple(values["token_ids"]), "texts": tuple(values["texts"]), "task": task})

    def to_dict(self) -> dict[str, Any]:
        """As what JSON can hold."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "task": None if self.task is None else self.task.to_dict()}

    @property
    def prompt(self) -> str:
        """The text of the prompt, with its beginning-of-sequence token."""
        return self.text or "".join(self.texts)

    @property
    def tokens(self) -> Int[Tensor, " pos"]:
        return torch.tensor(self.token_ids)

    @property
    def subject(self) -> Tensor | Task:
        """What circuits are run on again: the task, or the prompt.

        Raises:
            ValueError: If it is not known.
        """
        if self.task is None and not self.token_ids:
            raise ValueError("`circuit` must know its prompt or task, got one from a file without: use `td.evaluate`.")
        return self.tokens if self.task is None else self.task

    @property
    def named_task(self) -> Task | None:
        """The task, if it is more than a prompt."""
        return self.task if self.task is not None and self.task.name else None

    @property
    def usual_metric(self) -> str:
        """What circuits are measured by if nothing else is said: the question's metric, or closeness of predictions."""
        if self.task is None or self.task.answer is None:
            return "tv"
        if self.metric in QUESTIONS:
            return self.metric
        return "logprob" if self.task.distractor is None else "logit_diff"

    def require_same_model(self, model: Transformer) -> None:
        """Raise a ValueError if `model` is not the one that the result was computed on."""
        if (fingerprint := model.fingerprint()) != self.fingerprint:
            raise ValueError(
                f"`model` must be the one that this was computed on, {self.model} ({self.fingerprint}), "
                f"got {model.name} ({fingerprint}, {str(model.dtype).removeprefix('torch.')}). "
                "Folding, editing or rounding weights makes another model."
            )

    def __str__(self) -> str:
        task = self.named_task
        about = f"{len(self.token_ids)} tokens" if task is None else f"{task.name} ({len(task)})"
        return f"{self.method} on {self.model}, {about}"
