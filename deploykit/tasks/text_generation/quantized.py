"""Write the quantized forms of a language model, within the limit that the user sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.graphs.causal_architecture import CausalArchitecture
from deploykit.graphs.causal_decoder import build_causal_decoder
from deploykit.graphs.causal_lm import Bits, build_causal_lm
from deploykit.graphs.export_options import ExportOptions, Say
from deploykit.graphs.native_causal import NativeCausalWriter
from deploykit.graphs.writer import save_with_weights_of
from deploykit.measurement_log import MeasurementLog
from deploykit.quantization.compensated import Rounding
from deploykit.quantization.grading import Line
from deploykit.quantization.onnx_files import save_with_weights
from deploykit.quantization.qdq import Ranges
from deploykit.quantization.search import Search, hold_limit
from deploykit.runtime.engines import ENGINES, LANGUAGE_MODEL_FILES, NATIVE_LANGUAGE_MODELS
from deploykit.runtime.engines.native.weights import LARGEST_HEAD
from deploykit.runtime.engines.protocol import Precision
from deploykit.tasks.text_generation.calibration import StaticInt8
from deploykit.tasks.text_generation.grading import ENGINE, LanguageModelGrader, quantized_matrices

NATIVE = "native"
_MOST_SAMPLES = 16
"""For each, graphs of the whole model are written."""


@dataclass(frozen=True)
class QuantizedForm:
    """A quantized form of a model. ``save(kept=parts)`` writes ``file`` with some parts in a higher precision.
    ``calibrated``: its activations have fixed ranges."""

    engine: str
    precision: Precision
    file: Path
    save: Callable[..., None]
    calibrated: bool = False

    @property
    def instead(self) -> str:
        """The precision of the parts that are kept."""
        return "INT8" if (self.engine, self.precision) == (NATIVE, "int4") else "fp32"

    @property
    def remedy(self) -> str:
        """Remedy for INT8 or INT4 that loses too much."""
        if not self.calibrated:
            return "a larger --max-drop"
        return "--smooth-quant, another --method, more --calibration-rows, none of these options, a larger --max-drop"

    @property
    def name(self) -> str:
        return self.precision.upper() if self.engine == ENGINE else f"{self.precision.upper()} of {self.engine}"


def quantized_forms(
    architecture: CausalArchitecture,
    directory: Path,
    options: ExportOptions,
    static: StaticInt8 | None = None,
    rounding: Rounding | None = None,
) -> list[QuantizedForm]:
    """Return the forms that ``options`` ask for. With ``static``, INT8 graphs have calibrated activations, and ``rounding``
    is not theirs.

    Forms for ``native`` are left out if it does not run here or does not support this model: they could not be measured.
    """
    wanted: list[tuple[Precision, Bits]] = []
    wanted += [("int8", 8)] if options.int8 else []
    wanted += [("int4", 4)] if options.int4 else []
    runs = ENGINES[NATIVE].installed and architecture.head_size <= LARGEST_HEAD
    native = NativeCausalWriter(architecture, rounding, options.kv_cache) if runs else None
    forms = []
    for precision, bits in wanted:
        graph = directory / LANGUAGE_MODEL_FILES[precision][0]
        model, ranges = (architecture, None) if static is None or bits != 8 else (static.architecture, static.ranges)
        save = partial(
            save_graphs, model, bits, directory=directory, precision=precision, ranges=ranges, rounding=rounding
        )
        forms.append(QuantizedForm(ENGINE, precision, graph, save, calibrated=ranges is not None))
        if native is not None:
            file = directory / NATIVE_LANGUAGE_MODELS[precision][0]
            forms.append(QuantizedForm(NATIVE, precision, file, partial(native.save, file, bits)))
    return forms


def save_graphs(
    architecture: CausalArchitecture,
    bits: Bits | None,
    *,
    directory: Path,
    precision: Precision,
    ranges: Ranges | None = None,
    kept: Collection[str] = (),
    rounding: Rounding | None = None,
) -> None:
    """Write the graph in optimum's layout, and the one that deploykit decodes with, which shares its weights."""
    standard = standard_graph(directory, precision)
    save_with_weights(build_causal_lm(architecture, bits, ranges=ranges, kept=kept, rounding=rounding), standard)
    decoder = build_causal_decoder(architecture, bits, ranges=ranges, kept=kept, rounding=rounding)
    save_with_weights_of(decoder, directory / LANGUAGE_MODEL_FILES[precision][0], standard)


def standard_graph(directory: Path, precision: Precision) -> Path:
    """Return the graph that optimum and onnxruntime-genai open."""
    return directory / LANGUAGE_MODEL_FILES[precision][1].removesuffix("_data")


def quantize(
    forms: Sequence[QuantizedForm], parts: Sequence[str], options: ExportOptions, grader: LanguageModelGrader,
    trace: MeasurementLog, say: Say, compensate: Callable[[str], bool],
) -> dict[str, Any]:  # fmt: skip
    """Write the forms. Returns their records for the manifest, by precision; those of ``native`` are under its name.

    ``compensate`` rounds weights again by the layers' inputs; its argument is a text about the loss. It returns whether that
    changed anything.
    """
    found: dict[str, Any] = {"search": {}}
    for form in forms:
        search = _hold_limit(form, parts, options, grader, trace, say, compensate)
        place = found if form.engine == ENGINE else found.setdefault(form.engine, {})
        place[form.precision] = _record(form, grader, say)
        if search is not None:
            found["search"][f"{form.engine} {form.precision}"] = dataclasses.asdict(search)
    return found


def _hold_limit(
    form: QuantizedForm,
    parts: Sequence[str],
    options: ExportOptions,
    grader: LanguageModelGrader,
    trace: MeasurementLog,
    say: Say,
    compensate: Callable[[str], bool],
) -> Search | None:
    """Write a form. If it loses too much, round the weights by the layers' inputs, and if that is not enough, keep the
    most sensitive parts of the model in a higher precision."""

    def write(kept: Collection[str]) -> Line:
        form.save(kept=kept)
        return grader.grade(form.precision, form.engine)

    def sample(some: Collection[str]) -> NDArray[np.float32]:
        if not some:
            return grader.sample("fp32", ENGINE)
        form.save(kept={*parts} - {*some})
        return grader.sample(form.precision, form.engine)

    improve = (lambda loss: False) if form.calibrated else compensate
    return hold_limit(
        form.name, parts, write, sample, grader, options.max_drop, trace, say, form.remedy, form.instead, improve,
        _MOST_SAMPLES,
    )  # fmt: skip


def _record(form: QuantizedForm, grader: LanguageModelGrader, say: Say) -> dict[str, Any]:
    line = grader.metrics[f"{form.engine}-{form.precision}"]
    agreement = next(
        each.agreement for each in grader.table if (each.engine, each.precision) == (form.engine, form.precision)
    )
    ratio = line["perplexity"] / grader.metrics[f"{ENGINE}-fp32"]["perplexity"]
    say(
        f"{form.name}: perplexity x {ratio:.4f}, the same likeliest token at {agreement:.1%} of places, KL divergence of the "
        f"next token {line['kl_mean']:.4f} on average and {line['kl_p99']:.4f} at the 99th percentile"
    )
    return {
        "linear_layers": quantized_matrices(form.file), "perplexity_ratio": ratio, "kl_mean": line["kl_mean"],
        "kl_p99": line["kl_p99"],
    }  # fmt: skip
