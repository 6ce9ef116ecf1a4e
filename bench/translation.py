"""Measure translation in one run: Hugging Face's generate, CTranslate2 and deploykit, on the same weights and threads.

There are two models: one of opus-mt's shape with random weights, which reads 20 tokens and generates 32, and the demo's
translator with the sentences of its test split. Writes bench/results/<date>-translation.json and .html.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from projection import projection_share
from suite import begin, candidate, measured_alone, say, write
from translation_contenders import (
    CONTENDERS,
    CTRANSLATE2,
    DEPLOYKIT,
    OURS,
    Contender,
    CTranslate2,
    Subject,
    convert,
    job_of,
    missing,
    open_contender,
    ours,
    size_mb,
    tokenizer_of,
)

from deploykit.artifacts import load_manifest
from deploykit.bench.load import answer_texts
from deploykit.bench.rows import read_rows
from deploykit.bench.run import run_bench
from deploykit.bench.scenarios import ClosedLoop
from deploykit.bench.separate_process import ProcessMeasurement
from deploykit.hardware import available_cpus
from deploykit.runtime.engines import NATIVE_FILE, TRANSLATION_FILES
from deploykit.runtime.generation import Generation, override
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.predictor import TextTranslator, Translator

ROOT = Path(__file__).parents[1]
PARTS = ("shape", "example", "serving")
SOURCE_TOKENS, TARGET_TOKENS = 20, 32
BEAMS = 4
_SHAPE_TEXTS = 256
_AGREEMENT_TEXTS = 64
_LEAST_AGREEMENT = 0.8  # of CTranslate2's float32 with our fp32: below it the two run different models
_ALL = 256  # batches of more sentences are timed once to tune a peer, not twice


@dataclass(frozen=True)
class Shape:
    """Sizes of the random model: opus-mt's, or smaller in a quick run."""

    vocabulary: int = 59514
    d_model: int = 512
    layers: int = 6
    heads: int = 8
    ffn: int = 2048


@dataclass(frozen=True)
class Plan:
    """Amount of measuring."""

    threads: int
    greedy: tuple[int, ...] = (1, 8, 32, 64)
    beam: tuple[int, ...] = (1, 8, 32)
    rounds: int = 5
    seconds: float = 3.0
    warmup_s: float = 0.5
    serving_rounds: int = 2
    serving_seconds: float = 3.0
    quick: bool = False


QUICK_SHAPE = Shape(vocabulary=400, d_model=32, layers=2, heads=4, ffn=64)


def main() -> None:
    options = _options()
    if options.quick:
        plan = Plan(
            options.threads,
            (1, 2),
            (2,),
            rounds=1,
            seconds=0.05,
            warmup_s=0.0,
            serving_rounds=1,
            serving_seconds=0.3,
            quick=True,
        )
    else:
        plan = Plan(options.threads, rounds=options.rounds, seconds=options.seconds)
    suite = begin(
        "translation.py", plan.threads, {c.name: reason for c in CONTENDERS if (reason := missing(c))}, ["ctranslate2"]
    )
    suite["environment"] = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    with tempfile.TemporaryDirectory() as folder:
        if {"shape", "serving"} & set(options.parts):
            say("writing the shape of opus-mt with random weights")
            shape = random_subject(Path(folder) / "shape", QUICK_SHAPE if plan.quick else Shape())
        if "shape" in options.parts:
            texts = random_texts(shape.task.vocabulary, 8 if plan.quick else _SHAPE_TEXTS)
            suite["workloads"] += measure_subject("shape", shape, texts, None, plan, suite["skipped"])
        if not options.export.is_dir() or not options.checkpoint.is_dir():
            suite["skipped"]["trained example"] = f"there is no {options.export} or no {options.checkpoint}"
        elif {"example", "serving"} & set(options.parts):
            subject = trained_subject(options.checkpoint, options.export, Path(folder) / "example")
            data = options.data or options.checkpoint / "splits" / "test.jsonl"
            texts, references = read_rows(str(data), subject.task, most=options.max_rows, seed=0)
            if "example" in options.parts:
                suite["workloads"] += measure_subject("example", subject, texts, references, plan, suite["skipped"])
            if "serving" in options.parts:
                suite |= measure_servers(shape, options.export, Path(folder), texts, references, options.rate, plan)
    write(suite, options.out)


def measure_subject(
    key: str,
    subject: Subject,
    texts: Sequence[str],
    references: Sequence[str] | None,
    plan: Plan,
    skipped: dict[str, str],
) -> Iterator[dict[str, Any]]:
    """Return one record for greedy search and one for beam search, with the data to judge them.

    Adds contenders that could not take part to ``skipped``, with the reason.
    """
    opened: dict[Contender, TextTranslator] = {}
    alone: dict[Contender, ProcessMeasurement | None] = {}
    if not missing(Contender(CTRANSLATE2, "int8")):
        try:
            convert(_torch_model(subject), subject)
        except ValueError as error:
            skipped[f"{CTRANSLATE2} ({key})"] = str(error)
    for contender in CONTENDERS:
        if missing(contender) or (contender.engine == CTRANSLATE2 and not subject.converted.exists()):
            continue
        say(f"opening {contender.name} ({key})")
        alone[contender] = _alone(contender, subject, texts, plan)
        opened[contender] = open_contender(contender, subject, plan.threads)
    for beams, batches in ((1, plan.greedy), (BEAMS, plan.beam)):
        generation = _searching(subject.task, beams)
        agreement = _agreement(opened, texts, generation)
        if beams == 1 and (reason := void(agreement)):
            skipped[f"{CTRANSLATE2} ({key})"] = reason
            opened = {c: translator for c, translator in opened.items() if c.engine != CTRANSLATE2}
        counts = [*batches, *([len(texts)] if references is not None else [])]
        tuned = {c.name: _tune(opened[c], texts, generation, counts) for c in opened if c.engine == CTRANSLATE2}
        result = run_bench(
            [
                candidate(contender, translator, size_mb(contender, subject), alone[contender], generation)
                for contender, translator in opened.items()
            ],
            texts,
            references,
            [ClosedLoop(n) for n in counts],
            rounds=plan.rounds,
            seconds=plan.seconds,
            warmup_s=plan.warmup_s,
            progress=say,
        )
        yield {
            "key": f"{key}-{'greedy' if beams == 1 else f'beam-{beams}'}",
            "subject": key,
            "beam_size": beams,
            "bench": result.to_json(),
            "agreement": agreement,
            "tuned": tuned,
            "projection": _projection(subject, texts, generation, batches, plan.threads),
        }


def measure_servers(
    shape: Subject,
    example: Path,
    folder: Path,
    texts: Sequence[str],
    references: Sequence[str],
    rates: Sequence[float] | None,
    plan: Plan,
) -> dict[str, dict[str, Any]]:
    """Return records by key: the demo's translator and the random shape, each with and without in-flight batching."""
    from translation_serving import LIMITS_MS, measure_serving, mixed_lengths, served_shape

    limits = dict.fromkeys(LIMITS_MS) if plan.quick else LIMITS_MS
    served = served_shape(shape.export, shape.task, example, folder / "served")
    some, lengths = mixed_lengths(served, texts, references)
    return {
        "serving": measure_serving(
            example, folder / "repository", texts, references, rates=rates, limit_ms=limits["serving"],
            rounds=plan.serving_rounds, seconds=plan.serving_seconds, say=say,
        ),
        # It answers only a few requests/s, so one longer round.
        "serving-shape": measure_serving(
            served, folder / "shape-repository", some, None, rates=None, limit_ms=limits["serving-shape"],
            rounds=1, seconds=1.6 * plan.serving_seconds, say=say, lengths=lengths,
        ),
    }  # fmt: skip


def void(agreement: Mapping[str, float]) -> str | None:
    """Return the reason if CTranslate2 runs a different model, judging by greedy search; else None."""
    share = agreement.get(f"{CTRANSLATE2} float32", 1.0)
    if share >= _LEAST_AGREEMENT:
        return None
    return f"void: its float32 translates {share:.0%} of the texts as deploykit's fp32 does"


def random_subject(folder: Path, shape: Shape) -> Subject:
    """Make a MarianMT of ``shape`` with random weights, as checkpoint and export. Its generation ends at 32 tokens."""
    import torch
    from transformers import MarianConfig, MarianMTModel

    from deploykit.graphs.families import read_architecture
    from deploykit.graphs.native_writer import save_native
    from deploykit.graphs.seq2seq import build_decoder, build_encoder, save_graphs
    from deploykit.tasks.translation.calibration import activations_of
    from deploykit.training.checkpoint import quiet

    quiet()
    torch.manual_seed(0)
    v = shape.vocabulary
    model = MarianMTModel(
        MarianConfig(
            vocab_size=v, decoder_vocab_size=v, d_model=shape.d_model, encoder_layers=shape.layers,
            decoder_layers=shape.layers, encoder_attention_heads=shape.heads, decoder_attention_heads=shape.heads,
            encoder_ffn_dim=shape.ffn, decoder_ffn_dim=shape.ffn, max_position_embeddings=512,
            activation_function="swish", scale_embedding=True, pad_token_id=v - 1, eos_token_id=0,
            decoder_start_token_id=v - 1,
        )
    ).eval()  # fmt: skip
    model.final_logits_bias.normal_(std=0.1)
    model.save_pretrained(folder / "checkpoint")
    export = folder / "export"
    export.mkdir()
    architecture = read_architecture(model)
    graphs = build_encoder(architecture), build_decoder(architecture)
    save_graphs(export, *graphs, TRANSLATION_FILES["fp32"])
    ranges = dict.fromkeys(activations_of(export), (-6.0, 6.0))
    graphs = build_encoder(architecture, ranges), build_decoder(architecture, ranges)
    save_graphs(export, *graphs, TRANSLATION_FILES["int8"])
    save_native(export / NATIVE_FILE, architecture, ranges)
    limit = TARGET_TOKENS + 1  # with the start token
    generation = Generation(max_length=limit, min_length=limit, bad_words=((v - 1,),))
    task = Translation("en", "fr", "marian", v, 512, 512, v - 1, (0,), v - 1, generation)
    return Subject(folder / "checkpoint", export, folder / "converted", task, tokenizer=False)


def random_texts(vocabulary: int, count: int) -> list[str]:
    """Return texts of 20 token ids as numbers, the end token included."""
    random = np.random.default_rng(0)
    ids = random.integers(2, vocabulary - 1, (count, SOURCE_TOKENS - 1))
    return [" ".join(map(str, [*row, 0])) for row in ids.tolist()]


def trained_subject(checkpoint: Path, export: Path, folder: Path) -> Subject:
    """Return a checkpoint and its export, with greedy search as the default."""
    task = load_manifest(export, "export").task
    assert isinstance(task, Translation), f"{export} does not translate"
    task = dataclasses.replace(task, generation=_searching(task, 1))
    return Subject(checkpoint, export, folder / "converted", task, tokenizer=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "demo/runs/en-fr", help="of the trained example")
    parser.add_argument(
        "--export", type=Path, default=ROOT / "demo/exports/en-fr", help="of that checkpoint, with --int8"
    )
    parser.add_argument("--data", type=Path, help="pairs (default: the checkpoint's splits/test.jsonl)")
    parser.add_argument("--max-rows", type=int, default=500, help="of them")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument(
        "--rate", type=float, nargs="+", help="texts/s that servers are asked (default: from a closed loop)"
    )
    parser.add_argument("--quick", action="store_true", help="see that it works: a tiny shape, one short round")
    default = ROOT / "bench" / "results" / f"{datetime.date.today()}-translation.json"
    parser.add_argument("--out", type=Path, default=default)
    return parser.parse_args()


def _searching(task: Translation, beams: int) -> Generation:
    return override(task, {"num_beams": beams})


def _torch_model(subject: Subject) -> Any:
    from transformers import MarianMTModel

    return MarianMTModel.from_pretrained(subject.checkpoint).eval()


def _alone(contender: Contender, subject: Subject, texts: Sequence[str], plan: Plan) -> ProcessMeasurement | None:
    """Measure a contender alone, without the engines of the others."""
    hidden = [] if contender.precision.startswith("onnxruntime") else ["onnxruntime"]
    hidden += ["torch"] if contender.engine == CTRANSLATE2 else []
    job = job_of(contender, subject, plan.threads)
    return measured_alone(contender, "translation_contenders", hidden, job, texts, times=1 if plan.quick else 3)


def _agreement(
    opened: dict[Contender, TextTranslator], texts: Sequence[str], generation: Generation
) -> dict[str, float]:
    """Return for each contender the share of texts translated exactly as deploykit does in fp32."""
    some = texts[:_AGREEMENT_TEXTS]
    answers = {c.name: [a.text for a in answer_texts(translator, some, generation)] for c, translator in opened.items()}
    ours = answers[OURS.name]
    return {name: sum(map(str.__eq__, theirs, ours)) / len(ours) for name, theirs in answers.items()}


def _tune(
    translator: TextTranslator, texts: Sequence[str], generation: Generation, counts: Sequence[int]
) -> dict[str, str]:
    """Find the fastest way to call CTranslate2 for each number of texts at once."""
    assert isinstance(translator, Translator)
    peer: Any = translator.decoder
    assert isinstance(peer, CTranslate2)
    random = np.random.default_rng(0)
    found = {}
    for n in counts:
        say(f"tuning {peer.name} for {n} texts at once")
        batches = []
        for _ in range(1 if n >= _ALL else 2):
            chosen = [texts[i] for i in random.choice(len(texts), n, replace=n > len(texts))]
            jobs = translator.begin(chosen, generation, scored=False)
            batches.append([sentence for job in jobs for sentence in job.sentences])
        found[str(n)] = str(peer.tune(batches))
    return found


def _projection(
    subject: Subject, texts: Sequence[str], generation: Generation, batches: Sequence[int], threads: int
) -> dict[str, dict[str, float]]:
    """Return the output projection's share of decoder time, by engine and batch."""
    sentences = tokenizer_of(subject).encode(texts[: max(batches)])
    task = dataclasses.replace(subject.task, generation=generation)
    return {
        contender.precision: {
            str(n): round(projection_share(subject.export, task, *ours(contender), threads, sentences[:n]), 4)
            for n in batches
        }
        for contender in CONTENDERS
        if contender.engine == DEPLOYKIT and not missing(contender)
    }


if __name__ == "__main__":
    main()
