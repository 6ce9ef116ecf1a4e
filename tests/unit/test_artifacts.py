from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deploykit import artifacts
from deploykit.errors import ArtifactError, CorruptArtifactError
from deploykit.tasks.classification.facts import Classification

TASK = Classification(labels=("no", "yes"), max_length=16, pad_token_id=0)


def write(out: Path, content: bytes = b"weights", inputs: str = "i") -> artifacts.Manifest:
    with artifacts.new_directory(out) as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "model.onnx").write_bytes(content)
        return artifacts.write_manifest(directory, "export", TASK, inputs=inputs, metrics={"rows": 3})


def test_a_manifest_reads_back_equal(tmp_path: Path) -> None:
    written = write(tmp_path / "a")
    assert dataclasses.replace(artifacts.load_manifest(tmp_path / "a", "export"), recorded_task=None) == written


def test_the_digest_is_of_contents_not_of_time(tmp_path: Path) -> None:
    assert write(tmp_path / "a").digest == write(tmp_path / "b").digest
    assert write(tmp_path / "c", b"other").digest != write(tmp_path / "a2").digest


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "a")
    file = tmp_path / "a" / "sub" / "model.onnx"
    if damage == "flip":
        file.write_bytes(b"weighTs")
    elif damage == "truncate":
        file.write_bytes(b"w")
    else:
        file.unlink()
    with pytest.raises(CorruptArtifactError, match=r"sub/model\.onnx"):
        artifacts.load_manifest(tmp_path / "a")


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    record = json.loads(path.read_text())
    record["task"]["labels"] = ["yes", "no"]
    path.write_text(json.dumps(record))
    with pytest.raises(CorruptArtifactError, match="digest"):
        artifacts.load_manifest(tmp_path / "a")


def test_an_artifact_of_an_earlier_version_has_fewer_facts_and_its_own_digest(tmp_path: Path) -> None:
    write(tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    record = json.loads(path.read_text())
    record["task"] = {name: record["task"][name] for name in ("name", "labels", "max_length", "pad_token_id")}
    files = {name: file["sha256"] for name, file in record["files"].items()}
    record["digest"] = artifacts.digest_of("export", record["task"], files)
    path.write_text(json.dumps(record))
    manifest = artifacts.load_manifest(tmp_path / "a")
    assert manifest.task == TASK
    assert manifest.to_json()["task"] == record["task"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format": 1}', '{"format": 1, "task": 3}'])
def test_a_broken_manifest_is_an_artifact_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError):
        artifacts.load_manifest(tmp_path)


def test_a_manifest_may_not_name_files_outside(tmp_path: Path) -> None:
    write(tmp_path / "a")
    (tmp_path / "secret").write_text("x")
    manifest = artifacts.load_manifest(tmp_path / "a")
    outside = artifacts.Manifest(
        kind="export",
        task=TASK,
        inputs="i",
        files={"../secret": artifacts.FileRecord(1, artifacts.hash_file(tmp_path / "secret"))},
    )
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(outside.to_json()))
    with pytest.raises(CorruptArtifactError, match="outside"):
        artifacts.load_manifest(tmp_path / "a")
    assert manifest.files


def test_an_artifact_of_another_kind_is_refused_with_the_expected_one(tmp_path: Path) -> None:
    write(tmp_path / "a")
    with pytest.raises(ArtifactError, match="is an export, not a checkpoint"):
        artifacts.load_manifest(tmp_path / "a", "checkpoint")


def test_a_failed_block_leaves_the_old_directory(tmp_path: Path) -> None:
    write(tmp_path / "a", b"old")

    def fail_half_way() -> None:
        with artifacts.new_directory(tmp_path / "a") as directory:
            (directory / "half").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert (tmp_path / "a" / "sub" / "model.onnx").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_directory_is_replaced_whole(tmp_path: Path) -> None:
    write(tmp_path / "a", b"old")
    write(tmp_path / "a", b"new")
    assert (tmp_path / "a" / "sub" / "model.onnx").read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_of_two_commands_that_write_one_folder_the_first_to_end_stays(tmp_path: Path) -> None:
    def write(shared: bool) -> None:
        with artifacts.new_directory(out, shared=shared) as second:
            (second / "name").write_text("second")
            with artifacts.new_directory(out) as first:
                (first / "name").write_text("first")

    for out in (tmp_path / "new", tmp_path / "empty"):
        if out.name == "empty":
            out.mkdir()
        with pytest.raises(ArtifactError, match=f"{out}: another command wrote it in the meantime"):
            write(shared=False)
        assert (out / "name").read_text() == "first"
        write(shared=True)
        assert (out / "name").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"], "nothing half-written is left"


def test_equal_inputs_are_reused_and_others_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", inputs="i")
    assert artifacts.existing(tmp_path / "a", "export", "i", force=False) is not None
    assert artifacts.existing(tmp_path / "a", "export", "i", force=True) is None
    with pytest.raises(ArtifactError, match="--force"):
        artifacts.existing(tmp_path / "a", "export", "other", force=False)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("out", ["theirs", "theirs/notes.txt", ""])
def test_what_no_stage_wrote_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, force: bool
) -> None:
    """An empty path is the working directory: --force removed it, with all that was in it."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="no deploykit stage wrote it"):
        artifacts.existing(Path(out), "export", "i", force=force)


def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    write(tmp_path / "a", b"0")
    writer = (
        "import itertools, sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "from test_artifacts import write\n"
        "print('go', flush=True)\n"
        "for i in itertools.count(1): write(Path(sys.argv[1]), str(i).encode() * 1000)\n"
    )
    for delay in (0.01, 0.03, 0.06, 0.1):
        process = subprocess.Popen(
            [sys.executable, "-c", writer, str(tmp_path / "a"), str(Path(__file__).parent)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert artifacts.load_manifest(tmp_path / "a").kind == "export"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not lock directories")
def test_what_a_killed_command_left_is_removed_by_the_next_and_what_runs_is_not(tmp_path: Path) -> None:
    writer = (
        "import sys, time; from pathlib import Path; from deploykit import artifacts\n"
        "with artifacts.new_directory(Path(sys.argv[1])) as directory:\n"
        "    (directory / 'model.onnx').write_bytes(b'half')\n"
        "    print('go', flush=True)\n"
        "    time.sleep(60)\n"
    )
    running, killed = (
        subprocess.Popen([sys.executable, "-c", writer, str(tmp_path / "a")], stdout=subprocess.PIPE) for _ in range(2)
    )
    for process in (running, killed):
        assert process.stdout is not None
        process.stdout.readline()
    killed.kill()
    killed.wait()
    (tmp_path / ".a.notes.partial").mkdir()
    assert len(list(tmp_path.glob(".a.????????.partial"))) == 2
    write(tmp_path / "a")
    (left,) = tmp_path.glob(".a.????????.partial")
    assert (left / "model.onnx").read_bytes() == b"half"
    running.kill()
    running.wait()
    write(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.notes.partial", "a"]
    for process in (running, killed):
        assert process.stdout is not None
        process.stdout.close()


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        with pytest.raises(ArtifactError, match="no space left"):
            write(disk / "a", b"x" * 1_000_000)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_read_only_disk_is_named(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        with pytest.raises(ArtifactError, match=r"disk.*read-only"):
            write(disk / "a")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="file"):
        write(tmp_path / "file" / "a")


def test_a_file_system_without_locks_is_written_and_nothing_is_removed_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, *, wait: bool) -> bool:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("deploykit.locks.lock", refuse)
    monkeypatch.setattr("deploykit.artifacts.lock", refuse)
    other = tmp_path / ".out.abcdefgh.partial"
    other.mkdir()
    with artifacts.new_directory(tmp_path / "out") as folder:
        (folder / "file").write_text("written")
    assert (tmp_path / "out" / "file").read_text() == "written"
    assert other.is_dir()


def test_a_name_that_is_too_long_is_told_with_a_remedy(tmp_path: Path) -> None:
    for written in (artifacts.new_directory, artifacts.new_file):
        with (
            pytest.raises(ArtifactError, match="the name is too long"),
            written(tmp_path / ("n" * 300)) as temporary,
        ):
            temporary.touch()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_a_folder_has_the_permissions_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with artifacts.new_directory(tmp_path / "out"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_a_file_that_may_not_be_read_is_not_called_unwritable(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").touch(0o000)
    program = (
        "import os, sys; from deploykit.artifacts import write_refusal\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "try: open(sys.argv[1])\n"
        "except OSError as error: print(write_refusal(error))"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "rows.csv")]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "rows.csv: cannot be opened: permission denied" in told
    assert "let this user read it" in told


def test_a_file_that_has_only_a_number_is_named_by_it() -> None:
    told = str(artifacts.write_refusal(PermissionError(errno.EACCES, "Permission denied", 3)))
    assert told.startswith("3: cannot be written: permission denied")
