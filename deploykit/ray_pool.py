"""Answer the rows of a file on a Ray cluster: actors hold the model, this process reads the rows and writes the answers.

So the file is the same, in the same order, as if this process had answered alone, and a killed run is continued in
the same way. If an actor or a node dies, another actor answers its parts; each part is written once.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deploykit.data.answer_file import Function, Part, Records
from deploykit.errors import DeploykitError, MissingDependencyError, ServerError
from deploykit.tasks.opening import identity_of, open_predictor

_AHEAD = 2
"""Number of parts that an actor has at a time, so that it never waits for the next one."""
_UNWRITTEN = 64
"""Maximum number of answered parts that wait for an earlier part."""
_MOST_DEATHS = 3
"""Number of actors that may die with the same part before the run stops."""

_Failed = tuple[str, str | None]


class _Actor:
    """Holds a model on a node."""

    def __init__(self, target: str, where: Mapping[str, Any]) -> None:
        self._target = target
        self._where = dict(where)
        self._model: Any = None

    def open(self, identity: str) -> _Failed | None:
        """Open the model, which must be the driver's. Returns why it cannot be used."""
        try:
            self._model = open_predictor(self._target, **self._where)
            if identity_of(self._target, self._model) == identity:
                return None
        except DeploykitError as error:
            return error.message, error.remedy
        return (
            f"{self._target}: is another model than on the machine that started this",
            "give all nodes the same files",
        )

    def answer(self, function: Function, part: Part) -> tuple[Records | None, _Failed | None]:
        """Return the part's records, or why there are none."""
        try:
            return function(self._model, part), None
        except DeploykitError as error:  # not all can be pickled
            return None, (error.message, error.remedy)


class RayPool:
    """An actor with the model ``target`` on each node of a cluster. Its ``spread`` is for ``answer_file``.

    ``address`` is Ray's, such as "auto" or "ray://host:10001"; "" is that of RAY_ADDRESS, or else starts a cluster on this
    machine. An actor takes ``where["threads"]`` CPUs, by default those of its node. Use it as a context manager.
    """

    def __init__(self, address: str, target: str, where: Mapping[str, Any], identity: str) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingDependencyError("Ray is not installed", "pip install 'deploykit[ray]'") from error
        self._ray: Any = ray
        path = Path(target)
        self._target = str(path.resolve()) if path.exists() else target
        self._where = dict(where)
        self._identity = identity
        self._owns = not ray.is_initialized()
        if self._owns:
            try:
                ray.init(address or None, log_to_driver=False, logging_level="error")
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ServerError(f"--ray {address}: {error}", "start a cluster with: ray start --head") from error
        self._opening: dict[Any, Any] = {}  # answer to ``open`` -> actor
        self._load: dict[Any, int] = {}  # actor that is ready -> number of its parts
        self._cpus: dict[Any, int] = {}
        self._working: dict[Any, tuple[Any, int]] = {}  # answer -> actor, number of the part

    def __enter__(self) -> RayPool:
        for node in self._ray.nodes():
            if node["Alive"] and (cpus := int(node["Resources"].get("CPU", 0))):
                threads = min(self._where.get("threads") or cpus, cpus)
                for _ in range(cpus // threads):
                    self._start_actor(threads)
        self._check_left()
        return self

    def __exit__(self, *_: object) -> None:
        for actor in (*self._opening.values(), *self._load):
            self._ray.kill(actor)
        if self._owns:
            self._ray.shutdown()

    def spread(self, function: Function, parts: Iterator[Part]) -> Iterator[Records]:
        """Yield the result of ``function`` for each part and the model of an actor, in the parts' order.

        ``function`` must be importable on the nodes. Raises ServerError when actors keep dying, or with what an actor
        raised.
        """
        unread = enumerate(parts)
        held: dict[int, Part] = {}  # parts that are not answered yet
        lost: deque[int] = deque()  # those of them whose actor died
        deaths: Counter[int] = Counter()
        answered: dict[int, Records] = {}
        wanted, all_read = 0, False
        while held or answered or not all_read:
            while not all_read or lost:
                actor = min(self._load, key=self._load.__getitem__, default=None)
                if actor is None or self._load[actor] >= _AHEAD or len(answered) >= _UNWRITTEN:
                    break
                if lost:
                    number = lost.popleft()
                elif (following := next(unread, None)) is not None:
                    number, held[following[0]] = following
                else:
                    all_read = True
                    break
                self._working[actor.answer.remote(function, held[number])] = actor, number
                self._load[actor] += 1
            if wanted in answered:
                yield answered.pop(wanted)
                wanted += 1
            elif held or not all_read:
                for number, records in self._wait():
                    if records is not None:
                        answered[number] = records
                        del held[number]
                        continue
                    lost.append(number)
                    deaths[number] += 1
                    if deaths[number] >= _MOST_DEATHS:
                        raise ServerError(
                            f"{deaths[number]} actors died while they answered the same rows",
                            "look at Ray's log; give each actor more memory",
                        )

    def _wait(self) -> list[tuple[int, Records | None]]:
        """Wait for an actor. Returns the number of the part that it answered, and the records: None if it died."""
        (reference,), _ = self._ray.wait([*self._working, *self._opening], num_returns=1)
        dead = (self._ray.exceptions.RayActorError, self._ray.exceptions.ObjectLostError)
        if reference in self._opening:
            actor = self._opening.pop(reference)
            try:
                failed = self._ray.get(reference)
            except dead:
                self._check_left()
                return []
            if failed is not None:
                raise ServerError(*failed)
            self._load[actor] = 0
            return []
        actor, number = self._working.pop(reference)
        try:
            records, failed = self._ray.get(reference)
        except dead:
            if self._load.pop(actor, None) is not None:  # not after another of its parts
                self._ray.kill(actor)
                self._start_actor(self._cpus[actor])  # it waits for room in the cluster
            return [(number, None)]
        if failed is not None:
            raise ServerError(*failed)
        if actor in self._load:
            self._load[actor] -= 1
        return [(number, records)]

    def _start_actor(self, cpus: int) -> None:
        actor = self._ray.remote(num_cpus=cpus)(_Actor).remote(self._target, {**self._where, "threads": cpus})
        self._cpus[actor] = cpus
        self._opening[actor.open.remote(self._identity)] = actor

    def _check_left(self) -> None:
        if not (self._opening or self._load):
            raise ServerError("the Ray cluster has no node with a CPU", "start one with: ray start --head")
