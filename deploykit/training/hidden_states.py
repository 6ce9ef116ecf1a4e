"""Learn a teacher's hidden states, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from deploykit.errors import UsageError

_PROJECTION = "distill_projection"


class HiddenTeacher:
    """A teacher whose hidden states ``student`` learns. If they are wider or narrower than the student's, the student gets
    a layer that projects its own hidden states. It is trained with the student, and ``detach`` removes it.

    ``kept`` are the layers that the student has of an origin with ``depth`` layers. It learns from the same layers of the teacher
    if the teacher is as deep. Otherwise its layers are spread evenly over the teacher's, up to the last (Jiao et al., 2020).
    """

    def __init__(
        self,
        teacher: Any,
        student: Any,
        inputs: Mapping[str, torch.Tensor],
        *,
        takes_types: bool,
        kept: Sequence[int] = (),
        depth: int = 0,
    ) -> None:
        """Try both models on ``inputs``, a row. ``takes_types``: the teacher reads token types.

        Raises UsageError for a model without one stack of layers.
        """
        self._takes_types = takes_types
        self._model = teacher.requires_grad_(False)
        with torch.no_grad():
            theirs, ours = self.states(inputs), states_of(student(**inputs, output_hidden_states=True))
        if not kept or len(theirs) != depth:
            kept = [round((layer + 1) * len(theirs) / len(ours)) - 1 for layer in range(len(ours))]
        self.layers = list(kept)
        width, wanted = ours[0].shape[-1], theirs[0].shape[-1]
        self.projects = width != wanted
        if self.projects:
            projection = nn.Linear(width, wanted, bias=False)
            nn.init.orthogonal_(projection.weight)
            student.add_module(_PROJECTION, projection)
            # Within the forward pass, because several processes average the gradients of the parameters that it uses.
            self._hook = student.register_forward_hook(_project)

    def told(self) -> str:
        """Return the pairs of a student's and a teacher's layer, from 0."""
        pairs = ", ".join(f"{ours} from {theirs}" for ours, theirs in enumerate(self.layers))
        return f"layers of the student learn the teacher's hidden states: {pairs}" + (
            ", projected to their width" if self.projects else ""
        )

    def states(self, inputs: Mapping[str, torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return the teacher's hidden states after each layer, float [rows, tokens, width]."""
        self._model.to(inputs["input_ids"].device)
        names = ("input_ids", "attention_mask", *(("token_type_ids",) if self._takes_types else ()))
        with torch.no_grad():
            return states_of(
                self._model(**{name: inputs[name] for name in names if name in inputs}, output_hidden_states=True)
            )

    def distance(
        self, ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], mask: torch.Tensor
    ) -> torch.Tensor:
        """Return the sum over rows of the mean, over tokens and layers, of the squared distance of the two states, each of
        length 1 (Sun et al., EMNLP 2019)."""
        total = torch.zeros((), device=mask.device)
        for layer, state in zip(self.layers, ours):
            apart = 2 - 2 * functional.cosine_similarity(state.float(), theirs[layer].float(), dim=-1)
            total = total + ((apart * mask).sum(dim=1) / mask.sum(dim=1)).sum()
        return total / len(self.layers)

    def detach(self, model: Any) -> None:
        """Remove the projection from a trained model, and move the teacher back to the CPU, where it answers."""
        self._model.to("cpu")
        if self.projects:
            self._hook.remove()
            delattr(model, _PROJECTION)


def check_projection(hidden: HiddenTeacher, lora_r: int) -> None:
    """Raise UsageError if a layer that projects hidden states would have to be trained beside an adapter alone."""
    if hidden.projects and lora_r:
        raise UsageError(
            "--distill-hidden projects the student's hidden states to the width of the teacher's, and --lora-r "
            "trains an adapter alone",
            "leave one out",
        )


def _project(model: Any, _: Any, outputs: Any) -> Any:
    """Replace a model's hidden states by projected ones."""
    if (states := outputs.get("hidden_states")) is not None:
        projection = getattr(model, _PROJECTION)
        outputs["hidden_states"] = (states[0], *(projection(state) for state in states[1:]))
    return outputs


def states_of(outputs: Any) -> Sequence[torch.Tensor]:
    """Return the hidden states after each layer. Raises UsageError for a model without hidden states, or with several lengths of them."""
    states = getattr(outputs, "hidden_states", None)
    if not states or len({state.shape for state in states[1:]}) != 1:
        raise UsageError("--distill-hidden: a model does not have one stack of layers", "leave it out")
    return list(states[1:])
