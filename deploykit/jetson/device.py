"""Steps of run.sh on the device: check, build, verify, serve, bench."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from deploykit.artifacts import Manifest, digest_of, load_manifest, new_directory, new_file, write_manifest
from deploykit.errors import ArtifactError, DeploykitError, EngineError, MissingDependencyError
from deploykit.jetson.check import examine, free_bytes, tensorrt_version
from deploykit.jetson.contents import (
    EXPORT,
    REPOSITORY,
    VERSION,
    Description,
    native_files,
    read_config,
    read_description,
    read_rows,
)
from deploykit.runtime.engines.native import loader
from deploykit.runtime.find_graphs import find_graphs
from deploykit.runtime.finite import NoNumberError
from deploykit.signals import handled
from deploykit.tasks.protocol import Predictor
from deploykit.tasks.registry import task_of
from deploykit.tensorrt.build import build_engine, choose_builder
from deploykit.tensorrt.options import EngineOptions
from deploykit.triton.backends import InstalledTriton, assemble_backends, find_installed_triton

STEPS = ("check", "build", "verify", "serve", "bench")
_EXIT_S = 5  # Triton waits this long for idle connections; all but very long requests are done by then
_TRTEXEC = "/usr/src/tensorrt/bin"


@dataclass(frozen=True)
class Bundle:
    """An unpacked bundle with the engine to run; ``precision`` is that of TensorRT's graphs, or auto."""

    root: Path
    description: Description
    engine: str
    precision: str

    @property
    def export(self) -> Path:
        return self.root / EXPORT

    @property
    def model(self) -> Path:
        return self.root / REPOSITORY / self.description.name

    @property
    def version(self) -> Path:
        return self.model / VERSION

    def graphs(self, export: Manifest) -> tuple[str, tuple[str, ...]]:
        """Return (precision, files) of the model's graphs. Raises DeploykitError."""
        if self.engine != "tensorrt":
            chosen = find_graphs(self.export, export, engine=self.engine, precision=self.precision)
            return chosen.precision, chosen.files
        graphs = self.description.graphs
        precision = next(iter(graphs)) if self.precision == "auto" else self.precision
        if precision not in graphs:
            raise ArtifactError(f"the bundle has no {precision} graph", f"give --precision {' or '.join(graphs)}")
        return precision, tuple(graphs[precision])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one step, or check, build and serve, which includes verify. Returns the exit code."""
    parser = argparse.ArgumentParser(
        "run.sh", description="Steps of this bundle, in their order. Without one: all but bench."
    )
    parser.add_argument("step", nargs="?", choices=STEPS)
    parser.add_argument(
        "--engine",
        choices=("auto", "tensorrt", "native", "onnxruntime"),
        default="auto",
        help="engine to build or run (default: TensorRT; if it is not installed and the bundle has native, native on the CPU)",
    )
    parser.add_argument("--precision", default="auto", help="precision of the graph (default: INT8 if available)")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: 127.0.0.1)")
    parser.add_argument(
        "--port", type=int, default=8000, help="HTTP port to serve on; 0 takes a free one (default: 8000)"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="duration of each measurement of bench (default: 2)")
    parser.add_argument(
        "--out", type=Path, default=Path("bench.json"), help="result file of bench (default: bench.json)"
    )
    given = parser.parse_args(arguments)
    root = Path.cwd()
    os.environ["PATH"] += f"{os.pathsep}{_TRTEXEC}"  # JetPack does not put it on PATH
    try:
        engine = choose_engine(root) if given.engine == "auto" else given.engine
        bundle = Bundle(root, read_description(root), engine, given.precision)
        for step in (given.step,) if given.step else ("check", "build", "serve"):
            if step == "check":
                check(bundle)
            elif step == "build":
                build(bundle)
            elif step == "verify":
                verify(bundle)
            elif step == "serve":
                serve(bundle, given.host, given.port)
            else:
                bench(bundle, given.seconds, given.out)
    except DeploykitError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.remedy:
            print(f"remedy: {error.remedy}", file=sys.stderr)
        return error.exit_code
    return 0


def choose_engine(root: Path) -> str:
    """Return TensorRT, or ``native`` if TensorRT is missing and the bundle in ``root`` has ``native`` for this CPU."""
    if tensorrt_version() is None and native_files(root / EXPORT, load_manifest(root / EXPORT, "export")):
        say(f"TensorRT is not installed: the engine native runs the model on the CPU ({loader.instruction_set()})")
        return "native"
    return "tensorrt"


def say(message: str) -> None:
    print(message, flush=True)


def check(bundle: Bundle, root: Path = Path("/")) -> None:
    """Print this machine's properties and requirements. Raises EngineError if the model cannot be built or run here."""
    _, files = bundle.graphs(load_manifest(bundle.export, "export"))
    size = sum((bundle.export / file).stat().st_size for file in files)
    findings = examine(bundle.description, bundle.engine, size, root)
    for finding in findings:
        say(str(finding))
    problems = [finding.what for finding in findings if finding.level == "problem"]
    if problems:
        raise EngineError(f"not ready: {', '.join(problems)}", "see the lines marked problem above")


def build(bundle: Bundle) -> Manifest:
    """Make version 1 of the model for the engine, unless it exists and was made from the same files. Raises
    DeploykitError.
    """
    export = load_manifest(bundle.export, "export")
    precision, files = bundle.graphs(export)
    made_by = tensorrt_version() if bundle.engine == "tensorrt" else None
    inputs = digest_of(export.digest, bundle.engine, precision, files, bundle.description.profile, made_by)
    if bundle.version.exists():
        try:
            manifest = load_manifest(bundle.version, "model")
        except ArtifactError as error:
            say(f"building again: {error.message}")
        else:
            if manifest.inputs == inputs:
                say(f"{bundle.version}: reused: it was built here before")
                return manifest
    with new_directory(bundle.version) as folder:
        for file in (*files, *bundle.description.tokenizer):
            shutil.copyfile(bundle.export / file, folder / file)
        engines = _build_engines(bundle, folder, files, precision, export) if bundle.engine == "tensorrt" else []
        manifest = write_manifest(
            folder,
            "model",
            export.task,
            inputs=inputs,
            parent=export.digest,
            options={"engine": bundle.engine, "precision": precision, "name": bundle.description.name, "graph": files[0],
                     "files": [engine["file"] for engine in engines] or files},
            metrics={"engines": engines},
        )  # fmt: skip
    say(f"{bundle.version}: {bundle.engine}, {precision}")
    return manifest


def _build_engines(
    bundle: Bundle, folder: Path, files: Sequence[str], precision: str, export: Manifest
) -> list[dict[str, Any]]:
    """Build an engine from each graph of ``files``, in the graph's place. Returns their records."""
    # The board's limit, or a quarter of free memory: graph, weights and kernel timing need the rest.
    workspace = min(bundle.description.workspace_mib, max(64, free_bytes() >> 22))
    profile, inputs = bundle.description.profile, bundle.description.inputs
    options = EngineOptions((precision,), (profile,), f"{workspace}MiB", "this-gpu", builder=_builder())
    weights = next((folder / file for file in files if file not in inputs), None)
    limits = export.task.shape_limits
    engines = [
        build_engine(folder / file, precision, options, limits, say, inputs=inputs[file], weights=weights)
        for file in files
        if file in inputs
    ]
    for file in files:
        (folder / file).unlink()
    return [asdict(engine) for engine in engines]


def _builder() -> str:
    """Return TensorRT's Python module, else trtexec. Raises MissingDependencyError."""
    for name in ("tensorrt", "trtexec"):
        try:
            return choose_builder(name)
        except MissingDependencyError:
            continue
    raise MissingDependencyError(
        "neither TensorRT's Python module nor trtexec is installed", "sudo apt-get install nvidia-jetpack"
    )


def open_model(bundle: Bundle) -> tuple[Predictor, Manifest]:
    """Open the model that ``build`` made. Raises ArtifactError if there is none or it is for another engine;
    EngineError.
    """
    again = f"./run.sh build --engine {bundle.engine}"
    if not bundle.version.exists():
        raise ArtifactError(f"{bundle.version}: is not built yet", again)
    manifest = load_manifest(bundle.version, "model")
    options = manifest.options
    if options["engine"] != bundle.engine:
        raise ArtifactError(f"{bundle.version}: is built for {options['engine']}", again)
    parameters = {key: value["string_value"] for key, value in read_config(bundle.root)["parameters"].items()}
    try:
        model = (
            task_of(manifest.task)
            .bundle(manifest.task)
            .load(bundle.version, options["files"], bundle.engine, parameters)
        )
    except EngineError as error:  # its remedy names an export, which the device does not have
        raise EngineError(error.message, f"rm -r {bundle.version}; {again}") from error
    return model, manifest


def verify(bundle: Bundle) -> None:
    """Compare the model's answers to the recorded rows with the recorded ones. Raises EngineError for a wrong
    engine."""
    model, manifest = open_model(bundle)
    part, rows = task_of(manifest.task).bundle(manifest.task), read_rows(bundle.root)
    recorded = rows.answers[manifest.options["graph"]]
    try:
        verdict = part.compare(part.answers(model, rows.texts), recorded, manifest.options["precision"])
        right, told, limits = verdict.right, verdict.told, f"; {verdict.limits}"
    except NoNumberError as error:
        right, told, limits = False, error.message, ""
    summary = f"{len(rows.texts)} rows: {told}"
    if not right:
        raise EngineError(
            f"{bundle.version}: wrong answers: {summary}{limits}",
            f"rm -r {bundle.version}; build again, or with another --precision",
        )
    say(summary)


def serve(bundle: Bundle, host: str, port: int) -> None:
    """Verify the model, then serve it until a signal: with Triton where installed, else in this process."""
    verify(bundle)
    triton = find_installed_triton()
    if triton is not None:
        _exec_triton(bundle, triton, host, port)
    from deploykit.triton.in_process import InProcessModel
    from deploykit.triton.kserve import KServeServer

    stop = threading.Event()
    with handled(lambda *_: stop.set()):
        model = InProcessModel(bundle.description.name, bundle.model, VERSION, read_config(bundle.root))
        with closing(model), KServeServer(model, host, port) as server:
            say(
                f"serving {model.name} at {server.url} (in this process, because Triton is not installed); stop with Ctrl-C"
            )
            stop.wait()


def _exec_triton(bundle: Bundle, triton: InstalledTriton, host: str, port: int) -> NoReturn:
    """Replace this process by Triton, which does not verify the model: the caller did."""
    backends = bundle.root / ".backends"
    shutil.rmtree(backends, ignore_errors=True)
    site = bundle.root / "site"
    assemble_backends(backends, triton.python_backend, triton.stub, sorted(site.iterdir()) if site.is_dir() else ())
    command = [str(triton.binary), f"--model-repository={bundle.root / REPOSITORY}", f"--backend-directory={backends}",
               f"--http-address={host}", f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false",
               "--disable-auto-complete-config", f"--exit-timeout-secs={_EXIT_S}"]  # fmt: skip
    say(f"serving {bundle.description.name} at http://{host}:{port} with {triton.binary}; stop with Ctrl-C")
    os.execv(triton.binary, command)


def bench(bundle: Bundle, seconds: float, out: Path) -> None:
    """Measure the model in this process under load, print each measurement, and write ``out`` (JSON, as deploykit
    bench).
    """
    from deploykit.bench.run import Candidate, run_bench
    from deploykit.bench.scenarios import ClosedLoop

    model, manifest = open_model(bundle)
    precision = manifest.options["precision"]
    size = sum(manifest.files[file].bytes for file in manifest.options["files"]) / 1e6
    name = f"{bundle.description.name} {bundle.engine} {precision}"
    result = run_bench(
        [Candidate(name, model, size, precision, bundle.engine)],
        read_rows(bundle.root).texts,
        scenarios=[ClosedLoop(1), ClosedLoop(8), ClosedLoop(32)],
        seconds=seconds,
        warmup_s=min(1.0, seconds),
        progress=say,
    ).to_json()
    with new_file(out) as file:
        file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    say(f"{out}: written")


if __name__ == "__main__":
    sys.exit(main())
