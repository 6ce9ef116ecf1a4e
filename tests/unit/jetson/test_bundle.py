from __future__ import annotations

import gzip
import io
import os
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jetson_bundles import silent, with_tensorrt_graphs
from key_pairs import make_key_pair

import deploykit
from deploykit.artifacts import SAMPLES, load_manifest, write_manifest
from deploykit.errors import (
    ArtifactError,
    CorruptArtifactError,
    DeploykitError,
    MissingDependencyError,
    UsageError,
)
from deploykit.jetson import library
from deploykit.jetson.boards import BOARDS, JETPACKS
from deploykit.jetson.bundle import bundle, fits, unpack
from deploykit.jetson.contents import read_config, read_description, read_rows, verify_sums
from deploykit.runtime.batching import batches
from deploykit.runtime.engines import NATIVE_FILE, TRANSLATION_FILES
from deploykit.runtime.engines.native import loader
from deploykit.signatures import sign
from deploykit.tasks.opening import open_graph
from deploykit.tasks.translation.facts import Translation
from deploykit.tensorrt.build import read_inputs
from deploykit.tensorrt.options import TRANSLATOR_GRAPHS, parse_profile
from deploykit.triton.repository import check_config, list_models, verify_version

WHEELS = (
    "numpy-1.26.4-cp310-cp310-manylinux_2_17_aarch64.manylinux2014_aarch64.whl",
    "onnxruntime-1.23.2-cp310-cp310-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl",
    "psutil-7.2.2-cp36-abi3-manylinux2014_aarch64.manylinux_2_17_aarch64.whl",
    "tokenizers-0.23.3-cp310-abi3-manylinux_2_17_aarch64.manylinux2014_aarch64.whl",
)


@pytest.fixture(scope="module")
def export(make_tiny_export: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tensorrt_graphs(make_tiny_export(tmp_path_factory.mktemp("jetson") / "tiny"))


@pytest.fixture(scope="module")
def archive(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "tiny.tar.gz"
    bundle(export, out, "jetson-orin-nano", "6.2", say=silent)
    return out


def test_the_same_inputs_give_the_same_bytes(export: Path, archive: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(export, tmp_path / "tiny")
    for path in copy.iterdir():
        os.utime(path, (1, 1))
        path.chmod(0o600)
    bundle(copy, tmp_path / "other name.tgz", "orin-nano", "6.2", say=silent)
    assert (tmp_path / "other name.tgz").read_bytes() == archive.read_bytes()
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == sorted(m.name for m in members)
    assert {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in members} == {(0, 0, "", "", 315532800)}
    assert [m.name for m in members if m.mode == 0o755] == ["tiny-orin-nano/run.sh"]


def test_a_bundle_has_all_files_for_the_device(export: Path, archive: Path, tmp_path: Path) -> None:
    folder = unpack(archive, tmp_path / "out")
    verify_sums(folder)
    description = read_description(folder)
    assert (description.jetpack, description.tensorrt, description.python) == ("6.2", "10.3", "3.10")
    assert list(description.graphs) == ["int8", "fp16"], "INT8 is built unless another is asked for"
    part = load_manifest(folder / "export", "export")
    assert set(part.files) == {"model.fp16.onnx", "model.qdq.onnx", "model.u8s8.onnx", "tokenizer.json"}
    rows = read_rows(folder)
    assert len(rows.texts) == 64
    whole = load_manifest(export)
    expected = open_graph(export, whole, engine="onnxruntime").scores(rows.texts)
    for graph in ("model.qdq.onnx", "model.fp16.onnx", "model.u8s8.onnx"):
        np.testing.assert_array_equal(rows.answers[graph], expected)
    check_config(folder / "model_repository" / "tiny" / "config.pbtxt", whole.task)
    assert read_config(folder)["max_batch_size"] == 64
    assert (folder / "lib/deploykit/jetson/device.py").is_file()
    assert not list(folder.rglob("*.pyc"))


@pytest.mark.parametrize("board", BOARDS)
@pytest.mark.parametrize("longest", [8, 64, 512])
def test_no_run_has_more_rows_than_the_boards_profile(
    board: str, longest: int, make_tiny_export: Callable[..., Path], tmp_path: Path
) -> None:
    export = with_tensorrt_graphs(make_tiny_export(tmp_path / "tiny", max_length=longest))
    bundle(export, tmp_path / "a.tgz", board, "7.2", say=silent)
    folder = unpack(tmp_path / "a.tgz", tmp_path / "out")
    profile = parse_profile(read_description(folder).profile, {"length": longest})
    budget = int(read_config(folder)["parameters"]["token_budget"]["string_value"])
    lengths = [n for n in (1, 8, 17, 64, 200, 512) if n <= longest for _ in range(100)]
    for batch in batches([[1] * n for n in lengths], 0, max_length=longest, token_budget=budget):
        rows, length = batch.input_ids.shape
        assert profile.ranges["batch"][0] <= rows <= profile.ranges["batch"][2]
        assert profile.ranges["length"][0] <= length <= profile.ranges["length"][2]


@pytest.mark.parametrize(
    ("target", "jetpack", "named"),
    [
        ("xavier", "6.2", "unknown --device 'xavier'"),
        ("thor", "6.2", "does not run on Jetson Thor"),
        ("orin-nx", "7.1", "runs on Jetson Thor only"),
        ("orin-nx", "5.1", "TensorRT is older than 10.3"),
        ("orin-nx", "6.0", "TensorRT is older than 10.3"),
        ("orin-nx", "8", "unknown --jetpack '8'"),
    ],
)
def test_boards_and_jetpacks_that_do_not_fit(
    export: Path, tmp_path: Path, target: str, jetpack: str, named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        bundle(export, tmp_path / "a.tgz", target, jetpack, say=silent)
    assert not list(tmp_path.iterdir())


def test_exports_that_cannot_be_bundled(export: Path, tiny_export: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.tgz"
    with pytest.raises(ArtifactError, match=r"has no graph for TensorRT \(model\.qdq\.onnx\)") as refusal:
        bundle(tiny_export, out, "thor", "7.0", say=silent)
    assert "--trt --precision fp16 --precision int8" in str(refusal.value.remedy)
    half = shutil.copytree(tiny_export, tmp_path / "half")
    with_tensorrt_graphs(half, "model.fp16.onnx")
    with pytest.raises(ArtifactError, match=r"model\.qdq\.onnx"):
        bundle(half, out, "thor", "7.0", precision="int8", say=silent)
    assert list(bundle(half, out, "thor", "7.0", say=silent).description.graphs) == ["fp16"]
    with pytest.raises(ArtifactError, match=r"a\.tgz: already exists"):
        bundle(export, out, "thor", "7.0", say=silent)
    before = out.read_bytes()
    bundle(export, out, "thor", "7.0", name="other", force=True, say=silent)
    assert out.read_bytes() != before
    (half / SAMPLES).unlink()
    write_manifest(half, "export", load_manifest(export).task, inputs="no samples")
    with pytest.raises(ArtifactError, match="has no rows"):
        bundle(half, tmp_path / "b.tgz", "thor", "7.0", say=silent)
    (tmp_path / "lines.txt").write_text("w1 w2\n\nw3\n")
    bundle(half, tmp_path / "b.tgz", "thor", "7.0", data=str(tmp_path / "lines.txt"), say=silent)
    assert read_rows(unpack(tmp_path / "b.tgz", tmp_path / "b")).texts == ("w1 w2", "w3")


def test_a_translators_bundle_has_graphs_stream_and_recorded_answers(
    tiny_translation_to_bundle: Path, tmp_path: Path
) -> None:
    export = tiny_translation_to_bundle
    bundle(export, tmp_path / "a.tgz", "orin-nano", "6.2", name="fr", say=silent)
    bundle(export, tmp_path / "b.tgz", "orin-nano", "6.2", name="fr", say=silent)
    assert (tmp_path / "a.tgz").read_bytes() == (tmp_path / "b.tgz").read_bytes()
    folder = unpack(tmp_path / "a.tgz", tmp_path / "out")
    whole = load_manifest(export)
    task = whole.task
    assert isinstance(task, Translation)

    description = read_description(folder)
    assert list(description.graphs) == ["int8", "fp16"]
    assert tuple(description.graphs["int8"]) == TRANSLATOR_GRAPHS["int8"]
    runs = [TRANSLATOR_GRAPHS["int8"], TRANSLATOR_GRAPHS["fp16"], TRANSLATION_FILES["int8"]]
    if loader.lacks() is None:
        runs.append((NATIVE_FILE,))
    part = load_manifest(folder / "export", "export")
    assert set(part.files) == {*description.tokenizer, *(file for files in runs for file in files)}
    assert "source.spm" in description.tokenizer
    profile = parse_profile(description.profile, {"length": task.max_source_length, "past": task.max_target_length})
    assert profile.ranges == {"batch": (1, 4, 16), "length": (1, 64, 128), "past": (1, 64, 128)}
    for graph, inputs in description.inputs.items():
        assert inputs == read_inputs(folder / "export" / graph)
        assert all(profile.shapes(dimensions)[2] for dimensions in inputs.values()), "every axis has a range"
    assert "sentencepiece==" in (folder / "wheels.txt").read_text()
    assert "import numpy, tokenizers, sentencepiece" in (folder / "run.sh").read_text()

    rows = read_rows(folder)
    assert len(rows.texts) == 6
    translator = open_graph(export, whole, engine="onnxruntime")
    expected = [translated.text for translated in translator.translate(rows.texts)]
    assert [answer["text"] for answer in rows.answers[TRANSLATION_FILES["int8"][0]]] == expected
    assert set(rows.answers) == {files[0] for files in runs}
    models = list_models(folder / "model_repository")
    assert [model.name for model in models] == ["fr", "fr_stream"]
    check_config(models[0].path / "config.pbtxt", task)
    assert read_config(folder)["parameters"]["max_rows"]["string_value"] == "16", "no more than the profile"
    assert verify_version(models[1]).options["streams"] == "fr"


def test_the_library_for_arm_comes_from_deploykits_wheel_or_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"deploykit-{deploykit.__version__}-py3-none-manylinux_2_17_aarch64.manylinux2014_aarch64.whl"
    with zipfile.ZipFile(tmp_path / name, "w") as wheel:
        wheel.writestr(library.LIBRARY, b"for Arm")
    assert library.library_for_arm(tmp_path) == b"for Arm"
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    assert library.library_for_arm(None) is None


def test_rows_to_verify_a_translator_with(tiny_translation_to_bundle: Path, tmp_path: Path) -> None:
    export = tiny_translation_to_bundle
    (tmp_path / "rows.tsv").write_text("en\tfr\nSave the file.\tx\nClose it.\ty\n")
    bundle(export, tmp_path / "a.tgz", "thor", "7.0", data=str(tmp_path / "rows.tsv"), precision="fp16", say=silent)
    folder = unpack(tmp_path / "a.tgz", tmp_path / "out")
    assert read_rows(folder).texts == ("Save the file.", "Close it.")
    assert next(iter(read_description(folder).graphs)) == "fp16"


def test_a_translator_without_graphs_for_tensorrt_is_refused(tiny_translation: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no graph for TensorRT \(encoder\.trt\.int8\.onnx\)"):
        bundle(tiny_translation, tmp_path / "a.tgz", "thor", "7.0", say=silent)


@pytest.mark.parametrize(
    ("wheel", "jetpack", "expected"),
    [
        *((wheel, "6.2", True) for wheel in WHEELS),
        (WHEELS[0], "7.2", False),
        (WHEELS[3], "7.2", True),
        ("numpy-1.26.4-cp310-cp310-manylinux_2_17_x86_64.whl", "6.2", False),
        ("onnxruntime-1.31.1-cp310-cp310-manylinux_2_38_aarch64.whl", "6.2", False),
        ("onnxruntime-1.31.1-cp312-cp312-manylinux_2_38_aarch64.whl", "7.2", True),
        ("tokenizers-0.23.3-cp312-abi3-manylinux_2_17_aarch64.whl", "6.2", False),
        ("tqdm-4.70.1-py3-none-any.whl", "6.2", True),
    ],
)
def test_which_wheels_a_jetpacks_python_takes(wheel: str, jetpack: str, expected: bool) -> None:
    assert fits(wheel, JETPACKS[jetpack]) is expected


def test_wheels_of_a_folder_are_included_and_those_missing_named(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    folder = tmp_path / "wheels"
    folder.mkdir()
    for wheel in (*WHEELS[1:], "numpy-1.26.4-cp312-cp312-manylinux_2_17_aarch64.whl"):
        (folder / wheel).write_bytes(b"a wheel")
    with pytest.raises(DeploykitError, match=r"lacks numpy==1\.26\.4, and pip cannot download them: .*numpy"):
        bundle(export, tmp_path / "a.tgz", "orin-nx", "6.2", wheels=folder, say=silent)
    assert not (tmp_path / "a.tgz").exists()
    (folder / WHEELS[0]).write_bytes(b"a wheel")
    bundle(export, tmp_path / "a.tgz", "orin-nx", "6.2", wheels=folder, say=silent)
    included = unpack(tmp_path / "a.tgz", tmp_path / "out") / "wheels"
    assert sorted(path.name for path in included.iterdir()) == sorted(WHEELS)


def archive_of(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def member(name: str, **attributes: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info


def test_unpacking_refuses_paths_and_links_that_leave_the_folder(tmp_path: Path) -> None:
    link = member("a/link", type=tarfile.SYMTYPE, linkname="/etc")
    for i, (info, named) in enumerate([(member("a/../../evil"), "evil"), (link, "not a plain file")]):
        archive = archive_of(tmp_path / f"{i}.tgz", (member("a/run.sh"), b"x"), (info, b""))
        with pytest.raises(ArtifactError, match=named):
            unpack(archive, tmp_path / "deep" / "out")
    assert not list((tmp_path / "deep").iterdir())
    assert not (tmp_path / "evil").exists()


def test_unpacking_refuses_changed_contents(archive: Path, tmp_path: Path) -> None:
    with tarfile.open(archive) as tar:
        members = [(m, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    changed = [(m, b"# evil" if m.name.endswith("device.py") else content) for m, content in members]
    extra = [*members, (member("tiny-orin-nano/lib/sitecustomize.py"), b"# evil")]
    missing = [(m, content) for m, content in members if not m.name.endswith("rows.json")]
    for contents, named in ((changed, "device.py: its SHA-256"), (extra, "sitecustomize.py: is not in"), (missing, "rows.json: is missing")):  # fmt: skip
        with pytest.raises(CorruptArtifactError, match=named):
            unpack(archive_of(tmp_path / "x.tgz", *contents), tmp_path / "out")
    (tmp_path / "half.tgz").write_bytes(archive.read_bytes()[:-20000])
    with pytest.raises(CorruptArtifactError, match=r"not a complete \.tar\.gz"):
        unpack(tmp_path / "half.tgz", tmp_path / "out")
    (tmp_path / "text.tgz").write_bytes(gzip.compress(b"no tar"))
    with pytest.raises(ArtifactError):
        unpack(tmp_path / "text.tgz", tmp_path / "out")
    with pytest.raises(ArtifactError, match="is not a bundle"):
        unpack(archive_of(tmp_path / "y.tgz", (member("readme"), b"")), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="out: already exists"):
        unpack(archive, tmp_path / "out")


def test_a_signature_is_verified_before_unpacking(export: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing", reason="needs model-signing: pip install 'deploykit[sign]'")
    private, public = make_key_pair(tmp_path)
    out = tmp_path / "a.tgz"
    with pytest.raises(UsageError, match="key"):
        bundle(export, out, "thor", "7.0", key=public, say=silent)
    assert not out.exists(), "nobody takes an unsigned one for a signed one"
    done = bundle(export, out, "thor", "7.0", key=private, say=silent)
    assert done.signature == tmp_path / "a.tgz.sig"
    unpack(out, tmp_path / "good", public_key=public)
    with out.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtifactError, match=r"a\.tgz: was changed after it was signed"):
        unpack(out, tmp_path / "bad", public_key=public)
    done.signature.unlink()
    with pytest.raises(ArtifactError, match="is not signed"):
        unpack(out, tmp_path / "bad", public_key=public)
    assert not (tmp_path / "bad").exists()


def test_only_a_signed_export_is_bundled(export: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing", reason="needs model-signing: pip install 'deploykit[sign]'")
    private, public = make_key_pair(tmp_path)
    copy = Path(shutil.copytree(export, tmp_path / "export"))
    with pytest.raises(ArtifactError, match="is not signed"):
        bundle(copy, tmp_path / "a.tgz", "thor", "7.0", require_signature=public, say=silent)
    assert not (tmp_path / "a.tgz").exists()
    sign(copy, private)
    bundle(copy, tmp_path / "a.tgz", "thor", "7.0", require_signature=public, say=silent)
    with (copy / "manifest.json").open("a") as file:
        file.write("\n")
    with pytest.raises(ArtifactError, match=r"manifest\.json: was changed after it was signed"):
        bundle(copy, tmp_path / "b.tgz", "thor", "7.0", require_signature=public, say=silent)


def test_without_model_signing_no_bundle_is_signed(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(MissingDependencyError, match="model-signing is not installed"):
        bundle(export, tmp_path / "a.tgz", "thor", "7.0", key=tmp_path / "key.pem", say=silent)
    assert not (tmp_path / "a.tgz").exists()
