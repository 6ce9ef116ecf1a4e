"""Write the tables of README and docs/ from the newest results under bench/results/."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deploykit.metric_titles import TITLES

ROOT = Path(__file__).parents[1]
PEER = "CTranslate2 int8"
BASE = "ONNX Runtime fp32"
GENERATION_BASE = ANSWERING_BASE = "transformers fp32"
TRAINING_BASE = "transformers Trainer"
_BUSY = 10.0  # percent of the CPUs, as BUSY_PERCENT of deploykit.bench.run
_SHOWN = 160  # characters of a message
_SUBJECTS = {
    "tweets": "The demo's classifier, {rows} of its test tweets",
    "articles": "A topic classifier, {rows} BBC articles of up to 512 tokens",
}
_TITLES = {
    "shape-greedy": "A model of opus-mt's shape, random weights, 20 source and 32 target tokens, greedy",
    "shape-beam-4": "The same with 4 beams",
    "example-greedy": "The demo's translator, its {rows} test sentences, greedy",
    "example-beam-4": "The same with 4 beams",
}
_SERVED = {
    "serving": "The demo's translator served, requests of one sentence arriving at random",
    "serving-shape": "A model of opus-mt's shape served: sentences of up to 64 tokens, translations as long as the references",
}

_SUMMARY_TITLES = {
    **{key: title for key, title in _TITLES.items() if key.endswith("greedy")},
    "shape-beam-4": "A model of opus-mt's shape, 4 beams",
    "example-beam-4": "The demo's translator, 4 beams",
}
PAGES = (ROOT / "README.md", ROOT / "docs" / "what-has-been-run.md")

Record = Mapping[str, Any]


def render_classification(suite: Record) -> str:
    """Return Markdown: a table per dataset, texts/s as ratios to ONNX Runtime fp32 in the same run; then the servers."""
    lines = [
        f"{_when_and_where(suite)}, {suite['threads']} threads, the same weights for all. The other tools get batches of up to "
        "32 texts as they arrive, padded to the longest text of the batch. Texts/s are multiples of "
        f"{BASE} in the same run: the median round (lowest to highest round). p50 is measured with 1 caller.",
    ]
    by_key = {workload["key"]: workload["bench"] for workload in suite["workloads"]}
    for key, title in _SUBJECTS.items():
        if key in by_key:
            rows = by_key[key]["texts"]["rows"]
            lines += ["", f"**{title.format(rows=rows)}**", "", *_subject(by_key[key], by_key[f"{key}-offline"])]
    if "serving" in suite:
        lines += [
            "",
            "**The demo's classifier behind three servers, one text per request**",
            "",
            *_servers(suite["serving"]),
        ]
    return "\n".join(lines) + "\n"


def render_translation(suite: Record) -> str:
    """Return Markdown: a table per workload, target tokens/s as ratios to CTranslate2 int8 in the same run; then the servers."""
    lines = [
        f"{_when_and_where(suite)}, {suite['threads']} threads, the same weights for all. A column's number is the sentences of "
        f"one call. Target tokens/s are multiples of {PEER} (called in its fastest way) in the same run: the median round "
        "(lowest to highest round)."
        + (" Processes keep freed memory, and it counts as used." if suite.get("environment") else ""),
    ]
    for workload in suite["workloads"]:
        title = _TITLES[workload["key"]].format(rows=f"{workload['bench']['texts']['rows']:,}")
        lines += ["", f"**{title}**", "", *_workload(workload["bench"])]
    for key, title in _SERVED.items():
        if key in suite:
            lines += ["", f"**{title}**", "", *_serving(suite[key])]
    return "\n".join(lines) + "\n"


def render_generation(suite: Record) -> str:
    """Return Markdown: tokens/s in process as ratios to transformers fp32 in the same run; then the server's figures."""
    settings = suite["settings"]
    rounds = suite["workloads"][0].get("rounds", settings["rounds"])  # parts that were added may have had others
    lines = [
        f"{_when_and_where(suite)}, {suite['threads']} threads, SmolLM2-135M-Instruct, greedy, {_rounds(rounds)}. Tokens/s are multiples "
        f"of {GENERATION_BASE} in the same run, which has the tokens/s in its row: the median round (lowest to highest round)."
        + _load_told(suite),
    ]
    for workload in suite["workloads"]:
        if any(c["name"].startswith("deploykit native") for c in workload.get("contenders", ())):
            lines[0] += (
                " While few rows run, `native` guesses tokens from repetitions in the text, and these answers repeat themselves. So "
                "the speed with 1 and 8 rows is not that of the kernels alone; docs/engines.md has that."
            )
        rows = _generation if workload["key"] == "process" else _streams
        lines += ["", *rows(workload, settings)]
    return "\n".join(lines) + "\n"


def _generation(workload: Record, settings: Record) -> Iterator[str]:
    contenders = workload["contenders"]
    base = next((c for c in contenders if c["name"] == GENERATION_BASE), None)
    columns = [f"decode, {n} row{'s' * (n > 1)}" for n in settings["batches"]]
    yield from _head(f"prefill, {settings['prefill_tokens']} tokens", *columns, "same tokens", "size MB", "memory MB")
    for c in contenders:
        cells = [
            _multiple(_speeds(c)[i], None if base is None or c is base else _speeds(base)[i])
            for i in range(len(columns) + 1)
        ]
        same = "-" if c["tokens_as_base"] is None else f"{c['tokens_as_base']:.0%}"
        yield _row([c["name"], *cells, same, _whole(c["size_mb"]), _whole(c["peak_memory_mb"])])


def _speeds(contender: Record) -> list[Record | None]:
    return [contender["prefill_tokens_per_s"], *contender["decode_tokens_per_s"].values()]


def _multiple(spread: Record | None, base: Record | None) -> str:
    if spread is None:
        return "-"
    if base is None:
        return f"{_spread(spread)} tokens/s"
    middle, low, high = (spread[of] / base["median"] for of in ("median", "min", "max"))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})" if low < high else f"{middle:.2f}"


def _streams(workload: Record, settings: Record) -> Iterator[str]:
    yield f"Streaming clients of a server, prompts of {settings['prompt_tokens']} tokens and the template, {settings['new_tokens']} new tokens:"
    yield ""
    yield from _head("tokens/s", "first token ms p50", "p99", "between tokens ms p50", "p99")
    for load in workload["loads"]:
        times = ("first_token_p50_ms", "first_token_p99_ms", "between_tokens_p50_ms", "between_tokens_p99_ms")
        name = f"{load.get('server', 'deploykit')} {load['precision']}, {load['clients']} client{'s' * (load['clients'] > 1)}"
        yield _row([name, _spread(load["tokens_per_s"]), *(f"{load[key]['median']:.0f}" for key in times)])


def render_finetuning(suite: Record) -> str:
    """Return Markdown: tokens/s of training and the loss that it leads to, with the ratio to transformers' Trainer."""
    (workload,) = suite["workloads"]
    contenders = workload["contenders"]
    base = next((c for c in contenders if c["name"] == TRAINING_BASE), None)
    lines = [
        f"{_when_and_where(suite)}, {suite['threads']} threads, SmolLM2-135M-Instruct, {contenders[0]['tokens']:,} tokens of the demo's rows, one epoch at "
        f"the same learning rate, {_rounds(suite['settings']['rounds'])}. The loss is per validation token; before training it was {contenders[0]['loss_before']:.2f}."
        + _load_told(suite),
        "",
        *_head("tokens/s", f"against {TRAINING_BASE}", "loss"),
    ]
    for c in contenders:
        ratio = "-" if base is None else f"{c['tokens_per_s']['median'] / base['tokens_per_s']['median']:.2f}"
        lines.append(_row([c["name"], _spread(c["tokens_per_s"]), ratio, f"{c['loss']['median']:.2f}"]))
    return "\n".join(lines) + "\n"


def render_instruction_sets(suite: Record) -> str:
    """Return Markdown: how many times faster each instruction set of ``native`` is than the reference."""
    names = list(suite["workloads"][0]["sets"])
    lines = [
        f"{_when_and_where(suite)}, {suite['threads']} threads. How many times faster than `{suite['reference']}`: the median of "
        "neighbouring calls (the middle half of them). Tokenization is part of a call.",
        "",
        *_head(*(f"`{name}`" for name in names if name != suite["reference"])),
    ]
    for workload in suite["workloads"]:
        found = [workload["sets"][name]["ratio"] for name in names if name != suite["reference"]]
        ratios = [f"{ratio['median']:.2f} ({ratio['p25']:.2f} to {ratio['p75']:.2f})" for ratio in found]
        lines.append(_row([f"{workload['task']}: {workload['calls']}", *ratios]))
    return "\n".join(lines) + "\n"


def _load_told(suite: Record) -> str:
    """Return a sentence if other programs made the figures unreliable."""
    busy = max(load["cpu_percent"] for load in suite["load_before"])
    return f" Other programs used up to {busy:.0f}% of the CPUs: these figures are not final." if busy > _BUSY else ""


def _rounds(count: int) -> str:
    return f"{count} round{'s' * (count > 1)}"


def render_answering(suite: Record) -> str:
    """Return Markdown: F1 and that of a plain Trainer, speed as ratios to transformers' pipeline, and the equal spans."""
    lines = [
        f"Question answering: {_when_and_where(suite)}, {suite['threads']} threads, windows of 384 tokens that share 128."
    ]
    if "training" in suite:
        lines += ["", *_training(suite["training"])]
    if "short" in suite:
        short = suite["short"]
        lines += [
            "",
            f"**{short['questions']} questions on {short['contexts']} paragraphs of XQuAD, in one call**",
            "",
            *_head("exact match", "F1", "questions/s", "multiple of transformers"),
            *_answerers(short, "questions_per_s", ("exact_match", "f1")),
        ]
    if "article" in suite:
        article = suite["article"]
        lines += [
            "",
            f"**Questions on an article of {article['characters']:,} characters, one per call; then {article['questions']} in one call**",
            "",
            *_head("p50 ms", "questions/s", "multiple of transformers"),
            *_answerers(article, "questions_per_s", (), "p50_ms"),
        ]
    if "spans" in suite:
        lines += ["", *_spans(suite["spans"])]
    return "\n".join(lines) + "\n"


def _training(found: Record) -> Iterator[str]:
    low, high = found["deploykit"]["f1_interval"]
    yield (
        f"MiniLM trained on {found['train_rows']} questions of XQuAD (two epochs), tested on {found['rows']}; both runs give the same "
        f"answer to {found['same_answers']:.1%} of them:"
    )
    yield ""
    yield from _head("exact match", "F1")
    interval = f" ({low:.1f} to {high:.1f})"
    for name, key in (
        ("`deploykit finetune` (95 % interval)", "deploykit"),
        ("a plain transformers Trainer", "trainer"),
    ):
        shown = f"{found[key]['f1']:.1f}{interval if key == 'deploykit' else ''}"
        yield _row([name, f"{found[key]['exact_match']:.1f}", shown])


def _answerers(workload: Record, key: str, metrics: tuple[str, ...], latency: str = "") -> Iterator[str]:
    base = next((c for c in workload["contenders"] if c["name"] == ANSWERING_BASE), workload["contenders"][0])
    for c in workload["contenders"]:
        cells = [f"{c[metric]:.1f}" for metric in metrics]
        cells += [_spread(c[latency])] if latency else []
        middle, low, high = (c[key][of] / base[key]["median"] for of in ("median", "min", "max"))
        yield _row([c["name"], *cells, f"{c[key]['median']:.3g}", f"{middle:.2f} ({low:.2f} to {high:.2f})"])


def _spans(found: list[Record]) -> Iterator[str]:
    equal, asked = (sum(each[key] for each in found) for key in ("equal", "questions"))
    data = list(dict.fromkeys(each["data"] for each in found))
    yield (
        f"{equal:,} of {asked:,} spans ({equal / asked:.2%}) of random models equal those of transformers 4.57's "
        "`QuestionAnsweringPipeline`:"
    )
    yield ""
    yield from _head(*data)
    by_place = {(each["family"], each["data"]): f"{each['equal']:,} of {each['questions']:,}" for each in found}
    for family in dict.fromkeys(each["family"] for each in found):
        yield _row([family, *(by_place[family, name] for name in data)])


def render_exactness(result: Record) -> str:
    """Return a sentence: the number of translations equal to those of ``generate``."""
    parity = result["parity"]
    counts = ", ".join(
        f"{'greedy' if g['beams'] == 1 else str(g['beams']) + ' beams'} {g['equal']:,}"
        + (f" (the others ties within 1e-4: {g['ties']})" if g["ties"] else "")
        for g in parity["generations"]
    )
    return (
        f"Of {parity['rows']:,} test sentences of the demo's translator in fp32, this many have exactly the tokens of Hugging Face's `generate`: "
        f"{counts} ({_when_and_where(result)}).\n"
    )


def render_methods(result: Record) -> str:
    """Return Markdown: a table per model, a row per precision, calibration method and engine."""
    lines = [
        f"{_when_and_where(result)}. Every linear layer that can be quantized is INT8, regardless of the loss of accuracy. ONNX Runtime runs the "
        "graphs made for TensorRT; the count of INT8 products comes from TensorRT-RTX's build log."
    ]
    for workload in result["workloads"]:
        found, first = workload["calibration"], workload["lines"][0]
        metrics = [name for name in TITLES if name in first and name != "accuracy"]
        lines += [
            "",
            f"**{workload['key']}**, {workload['rows']:,} test rows; calibrated on {found['rows']:,} rows in "
            f"{found['seconds']:.0f} s, at most {found['peak_memory_mb']:,.0f} MB",
            "",
            *_head("method", *(TITLES[name] for name in metrics), "INT8 layers", "INT8 products of the engine"),
        ]
        for line in workload["lines"]:
            name = f"{line['precision']}, {line['target'] or line['engine']}"
            scores = [f"{line[metric]:.{2 if line[metric] > 1 else 4}f}" for metric in metrics]
            cells = [str(line["int8_kernels"] or "-"), "-" if line["int8_gemms"] is None else str(line["int8_gemms"])]
            lines.append(_row([name, line["method"] or "-", *scores, *cells]))
    return "\n".join(lines) + "\n"


def render_architectures(result: Record) -> str:
    """Return Markdown: the types that are served, by the engines that run them, and those that are refused, with the reason."""
    return _types(result, result["architectures"], "classifies texts", "The exports give PyTorch's answers.")


def render_translators(result: Record) -> str:
    """Return the same for the types that turn texts into texts; "" if they were not tried."""
    tokens = "The exports give the tokens of `generate`."
    return _types(result, result["translators"], "turns texts into texts", tokens) if "translators" in result else ""


def _types(result: Record, found: Mapping[str, Record], does: str, same: str) -> str:
    served: dict[str, list[str]] = {}
    rest: dict[str, list[str]] = {}
    for name, record in found.items():
        if record["outcome"] == "served":
            served.setdefault(_engines(record["engines"]), []).append(f"`{name}`")
        else:
            message = record["message"].replace(f"is of type {name}, which ", "").replace(f"is of type {name},", "is")
            # Types with one reason share a line.
            message = re.sub(r"\w+ForSequenceClassification", "the model", message)
            what = f"{record['outcome']}: {message}"
            short = what if len(what) <= _SHOWN else f"{what[: _SHOWN - 1].rstrip()}…"
            rest.setdefault(short.replace("|", "\\|").replace("<", "&lt;"), []).append(f"`{name}`")
    lines = [
        f"{result['started'][:10]}, transformers {result['transformers']}: each model type that {does}, tiny and with "
        f"random weights, trained for two steps and exported. {same}",
        "",
        "| runs on | model types |",
        "|---|---|",
        *(_row([engines, ", ".join(names)]) for engines, names in served.items()),
        "",
        "| other model types | |",
        "|---|---|",
        *(_row([", ".join(names), message]) for message, names in rest.items()),
    ]
    return "\n".join(lines) + "\n"


def render_gpu(result: Record) -> str:
    """Return Markdown: each step of bench/gpu/run.sh, its outcome, seconds, and the figures that it found."""
    lines = [
        f"{result['started'][:10]}, {result['card']}: `bench/gpu/run.sh {result['device']}`.",
        "",
        "| step | outcome | seconds | found |",
        "|---|---|---:|---|",
    ]
    for name, step in result["steps"].items():
        found = {} if name == "doctor" else step.get("result", {})
        figures = "<br>".join(f"{key}: {_figures(value)}" for key, value in found.items())
        lines.append(_row([name, step["status"], f"{step['seconds']:.0f}", figures]))
    return "\n".join(lines) + "\n"


def _figures(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {_figures(of)}" for key, of in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _engines(engines: Mapping[str, list[str]]) -> str:
    titles = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "native": "native"}
    parts = [
        f"{precision.replace('int', 'INT')} on {', '.join(titles[e] for e in engines[precision]) or 'none: no layer can be quantized'}"
        for precision in engines
    ]
    return "; ".join(parts)


def _subject(at_once: Record, offline: Record) -> Iterator[str]:
    base = next((c for c in at_once["candidates"] if c["name"] == BASE), at_once["candidates"][0])
    everything = {c["name"]: c for c in offline["candidates"]}
    (all_at_once,) = _closed_loops(offline["candidates"][0])
    yield from _head(
        "macro-F1", "p50 ms", *_closed_loops(base), "all in one call", "size MB", "memory MB", "first answer s"
    )
    for c in at_once["candidates"]:
        ratios = [_ratio(c, base, name, "throughput_per_s") for name in _closed_loops(base)]
        alone = next(s for s in c["scenarios"] if s["scenario"].get("concurrency") == 1)
        whole = "-"
        if c["name"] in everything:
            whole = _ratio(everything[c["name"]], everything[base["name"]], all_at_once, "throughput_per_s")
        first = "-" if c["first_answer_s"] is None else f"{c['first_answer_s']:.1f}"
        figures = [f"{c['metrics']['macro_f1']:.4f}", f"{alone['latency_ms']['p50']['median']:.2f}"]
        yield _row([c["name"], *figures, *ratios, whole, _whole(c["size_mb"]), _whole(c["peak_memory_mb"]), first])


def _servers(result: Record) -> Iterator[str]:
    scenarios = [s["scenario"]["name"] for s in result["candidates"][0]["scenarios"]]
    yield from _head(
        *(f"{name}: {title}" for name in scenarios for title in ("texts/s", "p50 ms", "p99 ms")), "memory MB"
    )
    for c in result["candidates"]:
        cells = []
        for s in c["scenarios"]:
            cells.append(_spread(s["throughput_per_s"]))
            cells += [f"{x['median']:.1f}" if (x := s["latency_ms"][key]) else "-" for key in ("p50", "p99")]
        yield _row([c["name"], *cells, _whole(c["peak_memory_mb"])])


def _workload(result: Record) -> Iterator[str]:
    candidates = result["candidates"]
    base = next((c for c in candidates if c["name"] == PEER), candidates[0])
    graded = base["metrics"] is not None
    callers = _closed_loops(base)
    titles = ["all" if name.startswith(f"{result['texts']['rows']} ") else name.split()[0] for name in callers]
    yield from _head(*(["BLEU", "chrF"] if graded else []), *titles, "size MB", "memory MB", "first answer s")
    for c in candidates:
        scores = [f"{c['metrics'][name]:.2f}" for name in ("bleu", "chrf")] if graded else []
        first = "-" if c["first_answer_s"] is None else f"{c['first_answer_s']:.1f}"
        ratios = [_ratio(c, base, name, "tokens_per_s") for name in callers]
        yield _row([c["name"], *scores, *ratios, _whole(c["size_mb"]), _whole(c["peak_memory_mb"]), first])


def _serving(result: Record) -> Iterator[str]:
    candidates = result["candidates"]
    columns = [f"{c['name']}: {title}" for c in candidates for title in ("texts/s", "p50 ms", "p99 ms")]
    yield from _head(*columns, "texts/s, ratio")
    for i, scenario in enumerate(candidates[0]["scenarios"]):
        cells = [scenario["scenario"]["name"]]
        for c in candidates:
            s = c["scenarios"][i]
            latencies = (s["latency_ms"][key] for key in ("p50", "p99"))
            cells += [f"{s['throughput_per_s']['median']:.0f}"]
            cells += [f"{spread['median']:.1f}" if spread else "-" for spread in latencies]
        ours, theirs = (c["scenarios"][i]["throughput_per_s"]["median"] for c in candidates)
        yield _row([*cells, f"{ours / theirs:.2f}" if theirs else "-"])


def _when_and_where(result: Record) -> str:
    machine = result["machine"]
    return f"{result['started'][:10]}, {machine['cpu']}, {machine['cpus_usable']} cores"


def _closed_loops(candidate: Record) -> list[str]:
    return [s["scenario"]["name"] for s in candidate["scenarios"] if s["scenario"]["kind"] == "closed_loop"]


def _ratio(candidate: Record, base: Record, scenario: str, key: str) -> str:
    ours, theirs = (
        next(s for s in x["scenarios"] if s["scenario"]["name"] == scenario)[key] for x in (candidate, base)
    )
    if not ours or not theirs:
        return "-"  # nothing was answered
    middle, low, high = (ours[of] / theirs["median"] for of in ("median", "min", "max"))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})" if low < high else f"{middle:.2f}"


def _median(candidate: Record, scenario: str, key: str) -> float:
    found = next((s[key] for s in candidate["scenarios"] if s["scenario"]["name"] == scenario), None)
    return float(found["median"]) if found else 0.0


def _spread(values: Record) -> str:
    middle, low, high = (f"{values[of]:.0f}" for of in ("median", "min", "max"))
    return middle if low == high else f"{middle} ({low} to {high})"


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _head(*titles: str) -> list[str]:
    return [_row(["", *titles]), "|---|" + "---:|" * len(titles)]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def render_defaults(suite: Record) -> str:
    """Return Markdown: a row for each set, with the macro-F1 of a run without options and of the best run of a search."""
    lines = [
        f"`finetune` without options and the best run of a search: {_when_and_where(suite)}, {suite['threads']} thread, "
        "all-MiniLM-L6-v2, bf16 if the CPU has it. The search chooses the best run on the validation rows; then both sides train "
        "with several seeds. Macro-F1 of the test rows in points: the mean over seeds with its 95 % interval over rows, and the "
        "runs of the single seeds. A negative difference means that the search is better.",
        "",
        *_head("rows for training, validation, test", "defaults", "macro-F1", "runs of the search (ended early)",
               "its best run", "macro-F1", "difference"),
    ]  # fmt: skip
    for found in suite["workloads"]:
        ours, theirs = found["default"], found["search"]
        gap = found["difference"]
        low, high = gap["interval"]
        lines.append(
            _row([
                f"{found['key']}: {found['title']}",
                ", ".join(f"{rows:,}" for rows in found["rows"].values()),
                _chosen(ours["values"]),
                _points(ours),
                f"{theirs['runs']} ({theirs['ended_early']})",
                _chosen(theirs["values"]),
                _points(theirs),
                f"{100 * gap['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]",
            ])
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def _chosen(values: Record) -> str:
    rate, epochs = f"{values['learning_rate']:.1e}", f"{values['num_train_epochs']:g}"
    return f"rate {rate}, {epochs} epochs, batch {values['per_device_train_batch_size']}"


def _points(run: Record) -> str:
    low, high = run["interval"]
    seeds = ", ".join(f"{100 * f1:.1f}" for f1 in run["of_seeds"])
    return f"{100 * run['macro_f1']:.1f} [{100 * low:.1f}, {100 * high:.1f}]: {seeds}"


TABLES: Mapping[str, tuple[str, Callable[[Record], str]]] = {
    "answering": ("answering", render_answering),
    "answering-amx": ("answering-amx", render_answering),
    "answering-avx512vnni": ("answering-avx512vnni", render_answering),
    "architectures": ("architectures", render_architectures),
    "classification": ("classification", render_classification),
    "defaults": ("defaults", render_defaults),
    "exactness": ("exactness", render_exactness),
    "finetuning": ("finetuning", render_finetuning),
    "finetuning-amx": ("finetuning-amx", render_finetuning),
    "gpu": ("gpu-*", render_gpu),
    "generation": ("generation", render_generation),
    "generation-amx": ("generation-amx", render_generation),
    "generation-avx512vnni": ("generation-avx512vnni", render_generation),
    "instruction-sets": ("instruction-sets-amx", render_instruction_sets),
    "instruction-sets-avx512vnni": ("instruction-sets-avx512vnni", render_instruction_sets),
    "methods": ("methods", render_methods),
    "translation": ("translation", render_translation),
    "translators": ("architectures", render_translators),
}
"""Marker name in a page -> (suffix of the result files, function that renders the table)."""


def render_summary(results: Mapping[str, Record]) -> str:
    """Return a short Markdown table: the engine ``native`` and the fastest peer, under the last load of each workload."""
    lines = _head("native int8", "fastest peer", "against")
    for name, base_name, key in (("classification", BASE, "throughput_per_s"), ("translation", PEER, "tokens_per_s")):
        titles = _SUBJECTS if name == "classification" else _SUMMARY_TITLES
        for workload in results.get(name, {}).get("workloads", []):
            if workload["key"] not in titles:
                continue
            bench = workload["bench"]
            by_name = {c["name"]: c for c in bench["candidates"]}
            base, load = by_name[base_name], _closed_loops(by_name[base_name])[-1]
            peers = [c for n, c in by_name.items() if not n.startswith("deploykit")]
            fastest = max(peers, key=lambda c: _median(c, load, key))
            title = titles[workload["key"]].format(rows=bench["texts"]["rows"])
            ours = _ratio(by_name["deploykit native int8"], base, load, key)
            peer = f"{fastest['name']}: {_ratio(fastest, base, load, key)}"
            # The translation suite's callers are the sentences of one call.
            shown = load.replace("callers", "sentences a call") if name == "translation" else load
            lines.append(_row([f"{title}; {shown}", ours, peer, base_name]))
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def with_tables(text: str, results: Mapping[str, Record]) -> str:
    """Return ``text`` with the content between its markers replaced; empty where there is no result."""
    contents = {name: table(results[name]) if name in results else "" for name, (_, table) in TABLES.items()}
    for name, content in {**contents, "summary": render_summary(results)}.items():
        start, end = f"<!-- {name}:start -->\n", f"<!-- {name}:end -->"
        if start in text:
            before, rest = text.split(start)
            text = before + start + content + end + rest.split(end, 1)[1]
    return text


def newest() -> dict[str, Record]:
    """Return the newest result of each table that has one."""
    found = {}
    for name, (suffix, _) in TABLES.items():
        paths = sorted((ROOT / "bench" / "results").glob(f"*-{suffix}.json"))
        if paths:
            found[name] = json.loads(paths[-1].read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8"), newest()), encoding="utf-8")
