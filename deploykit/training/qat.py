"""Fine-tune with quantization: the linear layers compute as their INT8 forms will.

Inputs of linear layers are rounded to symmetric S8 with one scale per tensor, their weights with one per output channel,
and gradients pass through rounding unchanged. Scales of inputs start at the calibrated values and are
learned; those of weights follow the weights, as at export. Embeddings that the export stores in INT8 are rounded too.
torchao learns such scales only in a prototype; torch.ao.quantization, which is deprecated, in a private class.

Source: Esser et al., "Learned Step Size Quantization", ICLR 2020 (gradients of scales); Jain et al., "Trained
Quantization Thresholds", MLSys 2020 (scales are learned by their logarithm).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from deploykit.artifacts import digest_of
from deploykit.errors import ArtifactError, ExportError
from deploykit.quantization.calibration import Method, Observe, clipped_range, collect, equal_length_batches
from deploykit.quantization.qdq import MIN_EMBEDDING_ROWS, activation_parameters

FILE = "qat.json"
"""File of a checkpoint with the scales that its linear layers' inputs were trained with."""

_LEARNING_RATE = 100
"""Steps of a scale's logarithm, in those of a weight: learning rates are for weights of size 0.1, and a scale may have
to double."""


@dataclass(frozen=True)
class TrainedScales:
    """The S8 scale of each linear layer's input, by the name of its module; other layers stay unchanged.

    ``method`` and ``rows`` say how the initial scales were calibrated.
    """

    scales: Mapping[str, float]
    method: Method
    rows: int

    def save(self, folder: Path) -> None:
        record = {"format": 1, "method": self.method, "rows": self.rows, "scales": dict(self.scales)}
        (folder / FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> TrainedScales | None:
        """Load the scales; None for a checkpoint that was not trained for INT8. Raises ArtifactError for a file that holds no scales."""
        path = folder / FILE
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            scales = {str(name): float(scale) for name, scale in record["scales"].items()}
            found = cls(scales, record["method"], int(record["rows"]))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtifactError(f"{path}: holds no trained scales", "copy the checkpoint again") from error
        if not all(0 < scale < float("inf") for scale in scales.values()):
            raise ArtifactError(f"{path}: a scale is not a positive number", "copy the checkpoint again")
        return found


class InputScales(torch.nn.Module):  # type: ignore[misc]
    """The scales of all quantized inputs, learned as ``initial * exp(100 * shift)``; both float32 [inputs]."""

    initial: torch.Tensor

    def __init__(self, initial: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("initial", torch.tensor(initial, dtype=torch.float32))
        self.shift = torch.nn.Parameter(torch.zeros(len(initial)))

    def scale(self, index: int) -> torch.Tensor:
        return self.initial[index] * torch.exp(_LEARNING_RATE * self.shift[index])


class FakeQuantization:
    """``model`` with its linear layers computing as in INT8, until ``remove``.

    The model keeps its modules, and one more: ``input_scales``, so that Trainer's checkpoints hold the scales.
    """

    def __init__(self, model: torch.nn.Module, token_ids: Sequence[Sequence[int]], method: Method) -> None:
        """Calibrate by ``method`` on tokenized rows, unpadded, and begin. Raises ExportError for a model without linear
        layers over tokens, or with matrices that are not PyTorch linear layers."""
        self._model, self._method = model, method
        self._rows = len(token_ids)
        self._groups = _layers_by_input(model, token_ids[0])
        if not self._groups:
            raise ExportError(f"--qat: {type(model).__name__} has no linear layers over tokens", "leave --qat out")
        firsts = [group[0] for group in self._groups]

        def run(observe: Observe) -> None:
            with _watched(model, firsts, lambda name, x: observe(name, x.float().cpu().numpy())):
                for batch in equal_length_batches(token_ids):
                    _run(model, torch.from_numpy(batch))

        calibration = collect(run, self._rows, digest_of([list(ids) for ids in token_ids]))
        limits = [clipped_range(calibration.histograms[name], method) for name in firsts]
        self._input_scales = InputScales([float(activation_parameters(*pair, "s8s8")[0]) for pair in limits])
        model.add_module("input_scales", self._input_scales)
        for index, group in enumerate(self._groups):
            scale = functools.partial(self._input_scales.scale, index)
            for name in group:
                module = model.get_submodule(name)
                module.forward = functools.partial(_linear, module, scale)
        self._embeddings = [
            module.register_forward_hook(lambda _, __, rows: _round_weight(rows))
            for module in model.modules()
            if isinstance(module, torch.nn.Embedding) and module.num_embeddings >= MIN_EMBEDDING_ROWS
        ]

    def remove(self) -> TrainedScales:
        """Restore the model's structure, with the trained weights; returns the learned scales."""
        with torch.no_grad():
            scales = [float(self._input_scales.scale(index)) for index in range(len(self._groups))]
        for group in self._groups:
            for name in group:
                del self._model.get_submodule(name).forward
        del self._model.input_scales
        for hook in self._embeddings:
            hook.remove()
        by_module = {name: scale for group, scale in zip(self._groups, scales) for name in group}
        return TrainedScales(by_module, self._method, self._rows)


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, lowest: int) -> torch.Tensor:
    """Round ``x`` to multiples of ``scale`` from ``lowest`` to 127 of them, as QuantizeLinear rounds.

    Gradients pass where ``x`` is in range; that of ``scale`` is LSQ's.
    """
    steps = (x / scale).clamp(lowest, 127)
    return (steps + (steps.round() - steps).detach()) * scale


def _linear(module: torch.nn.Linear, scale: Callable[[], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    x_scale = scale()
    if x_scale.requires_grad:
        # So that the few scales, each with the gradients of a whole tensor, do not outweigh all weights in the norm
        # that is clipped (LSQ, section 2.2).
        x_scale.register_hook(lambda gradient: gradient / (127 * x.numel()) ** 0.5)
    return functional.linear(fake_quantize(x.float(), x_scale, -128), _round_weight(module.weight), module.bias)


def _round_weight(weight: torch.Tensor) -> torch.Tensor:
    """Round the rows of the last axis to S8 with a scale each, as ``quantize_weight`` does."""
    weight = weight.float()
    return fake_quantize(weight, weight.detach().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127, -127)


def _layers_by_input(model: torch.nn.Module, token_ids: Sequence[int]) -> list[list[str]]:
    """Return names of the linear layers whose input has a row for each token, those that read one tensor together."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) and getattr(weight, "ndim", 0) == 2:
            raise ExportError(
                f"--qat: {name} of {type(model).__name__} is a {type(module).__name__}, which is not supported",
                "leave --qat out, or fine-tune another architecture",
            )
    tokens = torch.tensor([list(token_ids)] * 2)
    inputs: dict[str, list[torch.Tensor]] = {}
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    with _watched(model, names, lambda name, x: inputs.setdefault(name, []).append(x)):
        _run(model, tokens)
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensors in inputs.items():
        if all(x.ndim > 2 and x.numel() // x.shape[-1] == tokens.numel() for x in tensors):
            # All of them are held here, so no two share an address by chance.
            groups.setdefault(tuple((x.data_ptr(), x.shape) for x in tensors), []).append(name)
    return list(groups.values())


@contextmanager
def _watched(
    model: torch.nn.Module, names: Sequence[str], show: Callable[[str, torch.Tensor], object]
) -> Iterator[None]:
    """Pass the inputs of the modules with these names to ``observe``."""
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            functools.partial(lambda name, _, args: (show(name, args[0]), None)[1], name)
        )
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _run(model: Any, input_ids: torch.Tensor) -> None:
    device = next(model.parameters()).device
    with torch.no_grad():
        model(input_ids=input_ids.to(device), attention_mask=torch.ones_like(input_ids, device=device))
