"""Build TensorRT engines from the graphs of an export, with any of three builders.

Networks are always strongly typed: fp16 and bf16 are graphs of that type, INT8 is explicit Q/DQ in an fp16 graph. So
types are not builder options, and TensorRT 10.3 (JetPack 6) to 11, TensorRT-RTX and trtexec are called in the same way.
TensorRT-RTX builds without a GPU, but neither loads nor runs an engine without one.

Source: NVIDIA TensorRT documentation, "Strongly Typed Networks", "Working with Dynamic Shapes", "trtexec".
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploykit.artifacts import digest_of, digest_path, hash_file, new_file
from deploykit.errors import ArtifactError, ExportError, MissingDependencyError, UsageError
from deploykit.runtime.cuda import Gpu, has_gpu
from deploykit.runtime.engines.tensorrt import BINDINGS, EngineRecord, last_error, make_log
from deploykit.tensorrt import engine_cache
from deploykit.tensorrt.options import EngineOptions, Limits, Profile, parse_size, profiles_of

Say = Callable[[str], None]

_LAYER = re.compile(
    r"^Name: (?P<name>.+?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], (?:Constants|Outputs):"
)
_DATATYPE = re.compile(r"Datatype: (\w+)")
_GEMMS = ("gemm", "runtime_fusion")  # TensorRT-RTX's names of matrix products

Inputs = Mapping[str, Sequence[int | str]]
"""A graph's inputs by name, with their dimensions (numbers or names)."""
CLASSIFIER_INPUTS: Inputs = dict.fromkeys(("input_ids", "attention_mask"), ("batch", "tokens"))


def choose_builder(name: str) -> str:
    """Resolve ``auto``: TensorRT if there is a GPU, else TensorRT-RTX. Raises MissingDependencyError."""
    here = {"tensorrt": _importable("tensorrt"), "trtexec": bool(shutil.which("trtexec")), "rtx": _importable("rtx")}
    if name == "auto":
        names = ("tensorrt", "trtexec", "rtx") if has_gpu() else ("rtx",)
        name = next((each for each in names if here[each]), "rtx")
    if not here[name]:
        package = {
            "tensorrt": "pip install 'deploykit[tensorrt]'",
            "trtexec": "put trtexec on the PATH: it comes with NVIDIA's TensorRT packages and containers",
            "rtx": "pip install 'deploykit[rtx]'",
        }[name]
        raise MissingDependencyError(f"the TensorRT builder {name} is not installed", package)
    return name


def plan(options: EngineOptions, limits: Limits) -> tuple[str, list[Profile]]:
    """Check the options before the export starts. Returns the builder and the profiles.

    Raises UsageError naming the option, MissingDependencyError.
    """
    options.check()
    builder = choose_builder(options.builder)
    if builder == "rtx":
        if options.timing_cache:
            raise UsageError(
                "--timingCacheFile: TensorRT-RTX has no timing cache: it chooses kernels on the GPU", "leave it out"
            )
        known = importlib.import_module(BINDINGS["rtx"]).ComputeCapability.__members__
        if options.gpu.replace("sm_", "SM") not in known and options.gpu.startswith("sm_"):
            targets = [name.replace("SM", "sm_") for name in known if name.startswith("SM")]
            raise UsageError(
                f"TensorRT-RTX builds nothing for --gpu {options.gpu}", f"choose one of: {', '.join(targets)}"
            )
    elif options.gpu.startswith("sm_"):
        raise UsageError(
            f"{builder} builds only for this machine's GPU, not for --gpu {options.gpu}",
            "give this-gpu or portable, or --builder rtx",
        )
    if builder != "rtx" and not has_gpu():
        raise MissingDependencyError(
            f"--builder {builder} needs an NVIDIA GPU and its driver, and this machine has none",
            "give --builder rtx, which builds without one, or check nvidia-smi",
        )
    if options.gpu == "this-gpu" and not has_gpu():
        raise UsageError("--gpu this-gpu: there is no NVIDIA driver here", "give portable, or one like sm_86")
    return builder, profiles_of(options, limits)


def build_engine(
    graph: Path,
    precision: str,
    options: EngineOptions,
    limits: Limits,
    say: Say,
    calibration: str | None = None,
    *,
    inputs: Inputs = CLASSIFIER_INPUTS,
    weights: Path | None = None,
) -> EngineRecord:
    """Build ``graph``, whose inputs have dimensions of ``_AXES``, and write engine, record and builder's log next to it.

    ``calibration`` is the digest of the ranges in an INT8 graph, ``weights`` the file with its external weights. An
    engine built before from the same graph, options, builder and GPU is taken from the user's cache.

    Raises ExportError naming the node that TensorRT does not support, or another cause; UsageError for a profile that
    exceeds ``limits``.
    """
    builder, profiles = plan(options, limits)
    target = Gpu().capability if options.gpu == "this-gpu" else options.gpu
    engine = graph.with_name(f"{graph.stem}.{builder}-{target}.engine")
    graph_digest = digest_path(graph)
    made_of = [graph_digest, *([] if weights is None else [digest_path(weights)])]
    key = digest_of(*made_of, precision, options.workspace, target, list(map(str, profiles)), _maker(builder))
    kept = engine_cache.take(key, engine)
    if kept is not None:
        say(f"{engine.name}: reused from {engine_cache.folder() / key}")
    else:
        say(f"building {engine.name} with {builder}")
    record = kept or _build(graph, graph_digest, inputs, engine, precision, builder, profiles, options, say)
    record = replace(
        record, file=engine.name, graph=graph.name, target=target, calibration=calibration, command=options.command
    )
    record.save(engine)
    if kept is None:
        try:
            engine_cache.keep(key, engine)
        except ArtifactError as error:
            say(f"{engine.name} is not cached: {error.message}")
    return record


def _maker(builder: str) -> list[str]:
    """Return the builder's version and, if it measures kernels, the GPU."""
    if builder == "rtx":
        return [builder, importlib.import_module(BINDINGS[builder]).__version__]
    program = shutil.which("trtexec") if builder == "trtexec" else None
    version = hash_file(Path(program)) if program else importlib.import_module(BINDINGS[builder]).__version__
    gpu = Gpu()
    return [builder, version, gpu.name, gpu.capability]


def _build(
    graph: Path,
    graph_digest: str,
    inputs: Inputs,
    engine: Path,
    precision: str,
    builder: str,
    profiles: Sequence[Profile],
    options: EngineOptions,
    say: Say,
) -> EngineRecord:
    started = time.monotonic()
    build = _run_trtexec if builder == "trtexec" else _build_here
    version, log = build(builder, graph, inputs, engine, profiles, options)
    engine.with_suffix(".log").write_text("\n".join(log) + "\n", encoding="utf-8")
    layers, int8_gemms = count_layers(log)
    if precision == "int8" and layers and not int8_gemms:
        raise ExportError(f"{builder} runs none of {graph.name}'s layers in INT8", "report this graph")
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(layers.items())) or "not reported by the builder"
    say(f"{engine.name}: {engine.stat().st_size / 1e6:.1f} MB, {int8_gemms} INT8 matrix products; layers: {kinds}")
    return EngineRecord(
        file=engine.name,
        graph=graph.name,
        graph_digest=graph_digest,
        precision=precision,
        builder=builder,
        version=version,
        target=options.gpu,
        profiles=tuple(map(str, profiles)),
        workspace_bytes=parse_size(options.workspace),
        seconds=round(time.monotonic() - started, 2),
        size_bytes=engine.stat().st_size,
        sha256=hash_file(engine),
        command=options.command,
        layers=layers,
        int8_gemms=int8_gemms,
    )


def count_layers(log: Sequence[str]) -> tuple[dict[str, int], int]:
    """Count, in a detailed log, layers by "kind type", as in ``gemm Int8``, and INT8 matrix products."""
    counts: Counter[str] = Counter()
    for line in log:
        if match := _LAYER.match(line):
            kind = _DATATYPE.search(match["inputs"])
            counts[f"{match['kind']} {kind[1] if kind else 'none'}"] += 1
    return dict(counts), sum(counts[f"{kind} Int8"] for kind in _GEMMS)


def _build_here(
    builder: str, graph: Path, inputs: Inputs, engine: Path, profiles: Sequence[Profile], options: EngineOptions
) -> tuple[str, list[str]]:
    """Build with the Python bindings, the same for TensorRT and TensorRT-RTX."""
    trt = importlib.import_module(BINDINGS[builder])
    lines: list[str] = []
    log = make_log(trt, lines)
    maker = trt.Builder(log)
    flags = trt.NetworkDefinitionCreationFlag
    network = maker.create_network(1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        raise _unsupported_operator(graph, [parser.get_error(i) for i in range(parser.num_errors)])
    config = maker.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, parse_size(options.workspace))
    _set_target(trt, builder, config, options.gpu)
    for profile in profiles:
        shapes = maker.create_optimization_profile()
        for name, dimensions in inputs.items():
            shapes.set_shape(name, *profile.shapes(dimensions))
        if config.add_optimization_profile(shapes) < 0:
            raise ExportError(
                f"{builder} refuses the profile {profile}: {last_error(lines)}",
                "give other --minShapes, --optShapes and --maxShapes",
            )
    cache = Path(options.timing_cache) if options.timing_cache else None
    if cache is not None:
        config.set_timing_cache(config.create_timing_cache(cache.read_bytes() if cache.exists() else b""), False)
    blob = maker.build_serialized_network(network, config)
    if blob is None:
        raise _build_error(f"{builder} {trt.__version__}", graph, last_error(lines), "report this graph")
    engine.write_bytes(memoryview(blob))
    if cache is not None:
        with new_file(cache) as temporary:
            temporary.write_bytes(memoryview(config.get_timing_cache().serialize()))
    return str(trt.__version__), lines


def read_inputs(graph: Path) -> Inputs:
    """Return the inputs of an ONNX file."""
    try:
        import onnx  # a device that builds engines has no onnx
    except ImportError as error:
        raise MissingDependencyError(
            f"{graph}: onnx is needed to read it, and is not installed", "pip install 'deploykit[finetune]'"
        ) from error

    model = onnx.load(graph, load_external_data=False)
    return {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}


def _set_target(trt: Any, builder: str, config: Any, target: str) -> None:
    if builder == "rtx" and target != "portable":
        name = "CURRENT" if target == "this-gpu" else target.replace("sm_", "SM")
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)
    elif builder == "tensorrt" and target == "portable":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS


def _build_error(builder: str, graph: Path, reason: str, remedy: str) -> ExportError:
    """Return the error for a failed build. ``remedy`` is used if none of the known causes applies."""
    if re.search(
        r"out ?of ?memory|(insufficient|not enough|failed to allocate) \w*\s?memory|killed", reason, re.IGNORECASE
    ):
        remedy = "give a smaller --memPoolSize, --maxShapes of smaller batches or lengths, or free memory"
    elif re.search(r"profile", reason, re.IGNORECASE):
        remedy = "give --minShapes, --optShapes and --maxShapes that fit every input of the graph"
    elif re.search(r"cuda|driver", reason, re.IGNORECASE):
        remedy = "check nvidia-smi, and that the driver is as new as TensorRT wants; --builder rtx needs none"
    return ExportError(f"{builder} cannot build {graph.name}: {reason}", remedy)


def _unsupported_operator(graph: Path, errors: Sequence[Any]) -> ExportError:
    """Return an error naming the rejected node, its operator and the PyTorch module it came from."""
    if not errors:
        return ExportError(f"TensorRT cannot read {graph.name}", "export the model again")
    error = errors[0]
    node, operator = error.node_name(), error.node_operator()
    module = ".".join(node.strip("/").split("/")[1:-1])
    others = {f"{e.node_operator()} ({e.node_name()})" for e in errors[1:]} - {f"{operator} ({node})"}
    return ExportError(
        f"TensorRT does not support the operator {operator} of {graph.name} (node {node}"
        + (f", from the PyTorch module {module}" if module else "")
        + f"): {error.desc()}"
        + (f"; nor {', '.join(sorted(others))}" if others else ""),
        (f"change the module {module} to use other operators" if module else "compute it with other operators")
        + ", or export without --trt: ONNX Runtime and OpenVINO run this graph",
    )


def trtexec_command(
    graph: Path, engine: Path, profiles: Sequence[Profile], options: EngineOptions, inputs: Inputs = CLASSIFIER_INPUTS
) -> list[str]:
    """Return the arguments for trtexec 10.3 and later to build the same engine as the bindings."""
    command = ["trtexec", f"--onnx={graph}", f"--saveEngine={engine}", "--stronglyTyped", "--skipInference",
               "--verbose", "--profilingVerbosity=detailed",
               f"--memPoolSize=workspace:{max(1, parse_size(options.workspace) >> 20)}M"]  # fmt: skip
    for number, profile in enumerate(profiles):
        command += [f"--profile={number}"] if len(profiles) > 1 else []
        shapes = {name: profile.shapes(dimensions) for name, dimensions in inputs.items()}
        for i, option in enumerate(("minShapes", "optShapes", "maxShapes")):
            each = [f"{name}:{'x'.join(map(str, of[i]))}" for name, of in shapes.items()]
            command.append(f"--{option}={','.join(each)}")
    if options.gpu == "portable":
        command.append("--hardwareCompatibilityLevel=ampere+")
    if options.timing_cache:
        command.append(f"--timingCacheFile={options.timing_cache}")
    return command


def _run_trtexec(
    builder: str, graph: Path, inputs: Inputs, engine: Path, profiles: Sequence[Profile], options: EngineOptions
) -> tuple[str, list[str]]:
    command = trtexec_command(graph, engine, profiles, options, inputs)
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    lines = done.stdout.splitlines()
    if done.returncode or not engine.is_file() or not engine.stat().st_size:
        reason = next((line for line in reversed(lines) if "[E]" in line), lines[-1] if lines else "no message")
        if done.returncode == -signal.SIGKILL:
            reason = "it was killed, as Linux does where memory ends"
        raise _build_error("trtexec", graph, reason, f"run it yourself: {shlex.join(command)}")
    version = next((m[1] for line in lines if (m := re.search(r"TensorRT version: (\d[\d.]*)", line))), "unknown")
    return version, lines


def _importable(builder: str) -> bool:
    return importlib.util.find_spec(BINDINGS[builder]) is not None
