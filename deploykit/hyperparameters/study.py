"""Keep a study of optuna in a folder, so that killed searches can be continued, and several processes can share one."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from deploykit.errors import ArtifactError
from deploykit.hyperparameters.space import Space
from deploykit.locks import lock

_KEY = "key"
_TENTHS = 10
"""Number of points of a run at which evaluations are compared, because runs differ in epochs and batches."""
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def fits(run: FrozenTrial) -> bool:
    """Return whether a run finished, within the limits."""
    return run.state == TrialState.COMPLETE and all(excess <= 0 for excess in run.constraints.values())


@dataclass
class TakenRun:
    """A run that this process trains. ``lock`` is a file descriptor, held until the run ends or the process dies. ``same`` is an
    earlier run with the same values, if one has ended: training again would give its result."""

    trial: optuna.Trial
    values: Mapping[str, Any]
    lock: int
    continued: bool
    same: FrozenTrial | None = None

    @property
    def number(self) -> int:
        return self.trial.number


class SharedStudy:
    """The runs of a search, in ``folder``. The value of a run is higher if it is better."""

    def __init__(
        self, folder: Path, key: str, *, space: Space, start: Mapping[str, Any], pruner: str, runs: int, seed: int
    ) -> None:
        """Open the study, or make a new one. Raises ArtifactError if the folder has one with another ``key``."""
        self.folder = folder
        self._space, self._runs, self._seed = space, runs, seed
        folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with self.locked():
            # Another process may hold the database for a moment.
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{folder.absolute() / 'study.db'}", engine_kwargs={"connect_args": {"timeout": 60}}
            )
            self._study = optuna.create_study(
                storage=storage, study_name="search", direction="maximize", load_if_exists=True, pruner=_pruner(pruner)
            )
            known = self._study.user_attrs.get(_KEY)
            if known is None:
                self._study.set_user_attr(_KEY, key)
                if start:
                    self._study.enqueue_trial(dict(start))
            elif known != key:
                raise ArtifactError(
                    f"{folder}: is a search with other options, rows or limits, or of another version of deploykit",
                    "pass --restart to start over, or choose another --output-dir",
                )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Prevent the other processes of the search from taking, ending and removing runs."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            lock(descriptor, wait=True)
            yield
        finally:
            os.close(descriptor)

    @property
    def runs(self) -> list[FrozenTrial]:
        """All runs that have started."""
        return [run for run in self._study.get_trials(deepcopy=False) if run.state != TrialState.WAITING]

    @property
    def best(self) -> FrozenTrial | None:
        """The best run within the limits; the first among equals."""
        return max((run for run in self.runs if fits(run)), key=lambda run: float(run.value or 0.0), default=None)

    def path(self, number: int) -> Path:
        """Return the folder of a run's checkpoint."""
        return self.folder / f"run-{number:04}"

    def take(self, *, new: bool = True) -> TakenRun | None:
        """Return a run to train: one whose process died, or a new one. None if no run is left."""
        with self.locked():
            for run in self.runs:
                if run.state == TrialState.RUNNING and (lock := self._lock(run.number)) is not None:
                    return self._taken(optuna.Trial(self._study, run._trial_id), lock, continued=True)
            if not new or len(self.runs) >= self._runs:
                return None
            # Each run has its own seed: a continued search must not draw the same values again.
            self._study.sampler = optuna.samplers.TPESampler(
                seed=self._seed + 1009 * len(self.runs), n_startup_trials=max(3, min(10, self._runs // 3))
            )
            trial = self._study.ask()
            lock = self._lock(trial.number)
            assert lock is not None
            return self._taken(trial, lock, continued=False)

    def _taken(self, trial: optuna.Trial, lock: int, *, continued: bool) -> TakenRun:
        values = self._values(trial)
        ended = (run for run in self.runs if run.state in _ENDED and run.params == trial.params)
        return TakenRun(trial, values, lock, continued, next(ended, None))

    @property
    def running(self) -> bool:
        """Whether a run has not ended: another process trains it, or has died."""
        return any(run.state == TrialState.RUNNING for run in self.runs)

    def report(self, run: TakenRun, done: float, selection: float) -> None:
        """Record an evaluation after the share ``done`` of the run. Raises optuna.TrialPruned to end a bad run."""
        if not done:  # of the checkpoint before training
            return
        tenth = max(1, round(_TENTHS * done))
        reported = self._study.get_trials(deepcopy=False)[run.number].intermediate_values
        if tenth not in reported:  # already reported if the run was continued
            run.trial.report(selection, tenth)
        if done < 1 and run.trial.should_prune():
            raise optuna.TrialPruned

    def end(self, run: TakenRun, value: float | None = None, *, pruned: bool = False, **facts: Any) -> None:
        """Record the end of a run: its ``value``, None if it was pruned or failed; ``facts`` are kept with it.

        Checkpoints of runs that are not the best are removed.
        """
        for name, fact in facts.items():
            run.trial.set_user_attr(name, fact)
        state = TrialState.COMPLETE if value is not None else TrialState.PRUNED if pruned else TrialState.FAIL
        with self.locked():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._study.tell(run.trial, value, state=state)
            kept = self.best.number if self.best is not None else None
            for ended in (r for r in self.runs if r.state in _ENDED and r.number != kept):
                for path in (self.path(ended.number), *self.folder.glob(f".run-{ended.number:04}.*")):
                    shutil.rmtree(path, ignore_errors=True)
                (self.folder / f"run-{ended.number:04}.lock").unlink(missing_ok=True)
        os.close(run.lock)

    def repeat(self, run: TakenRun, same: FrozenTrial) -> None:
        """Record that a run has the result of an earlier one, ``same``."""
        for tenth, selection in same.intermediate_values.items():
            run.trial.report(selection, tenth)
        for name, excess in same.constraints.items():
            run.trial.set_constraint(name, excess)
        value = same.value if same.state == TrialState.COMPLETE else None
        self.end(run, value, pruned=same.state == TrialState.PRUNED, **{**same.user_attrs, "seconds": 0.0})

    def release(self, run: TakenRun) -> None:
        """Release a run, so that a process (also this one) may take it again. It may have ended."""
        with suppress(OSError):
            os.close(run.lock)

    def importance(self) -> dict[str, float]:
        """Return the share of each searched option in the differences between runs (fANOVA; Hutter et al., ICML 2014);
        {} with less than 4 ended runs."""
        if sum(run.state == TrialState.COMPLETE for run in self.runs) < 4:
            return {}
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=self._seed)
        return optuna.importance.get_param_importances(self._study, evaluator=evaluator)

    def _values(self, trial: optuna.Trial) -> dict[str, Any]:
        return {name: entry.suggest(trial, name) for name, entry in self._space.items()}

    def _lock(self, number: int) -> int | None:
        """Return the lock of a run, or None if a living process holds it."""
        descriptor = os.open(self.folder / f"run-{number:04}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        if lock(descriptor, wait=False):
            return descriptor
        os.close(descriptor)
        return None


def _pruner(name: str) -> optuna.pruners.BasePruner:
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=_TENTHS)
    return optuna.pruners.MedianPruner(n_startup_trials=4) if name == "median" else optuna.pruners.NopPruner()
