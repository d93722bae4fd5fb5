"""A GGUF file inside Python packages: whole, in parts, under another name than the package's."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from polymerge.errors import SourceError
from polymerge.sources.gguf import package_gguf


class Site:
    """A folder of installed packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, package: str, module: str, files: dict[str, bytes], requires: tuple[str, ...] = ()) -> None:
        (self.folder / module).mkdir(parents=True)
        info = self.folder / f"{package.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        for name, data in ({"__init__.py": b"raise SystemExit('this code must not run')"} | files).items():
            (self.folder / module / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / module / name).write_bytes(data)
        wanted = "".join(f"Requires-Dist: {name}\n" for name in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n{wanted}")
        (info / "RECORD").write_text("".join(f"{module}/{name},,\n" for name in ["__init__.py", *files]))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("POLYMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    (tmp_path / "site").mkdir()
    return Site(tmp_path / "site")


def parts(site: Site, sums: str = "", numbers: tuple[int, ...] = (0, 1, 2)) -> None:
    for number in numbers:
        data = {f"data/m.gguf.part{number:02d}": b"GGUF"[number : number + 1] * 10}
        site.install(f"big-part{number}", f"big_part{number}", data)
    required = (*(f"big-part{number}==1.0" for number in numbers), "pytest; extra == 'test'")
    site.install("big", "big", {"data/SHA256SUMS": sums.encode()} if sums else {}, required)


def test_a_whole_file_is_found_also_where_the_module_has_another_name(site: Site) -> None:
    site.install("some-model", "some_model", {"m.gguf": b"GGUF"})
    site.install("other-model", "weights", {"data/w.gguf": b"GGUF"})
    assert package_gguf("some-model").name == "m.gguf"
    assert package_gguf("other-model").read_bytes() == b"GGUF"


def test_parts_in_the_packages_that_it_requires_are_joined_in_order_once(site: Site) -> None:
    whole = b"G" * 10 + b"G" * 10 + b"U" * 10
    parts(site, f"{hashlib.sha256(whole).hexdigest()}  m.gguf\n")
    found = package_gguf("big")
    assert found.read_bytes() == whole and found.suffix == ".gguf"
    before = found.stat().st_mtime_ns
    assert package_gguf("big").stat().st_mtime_ns == before
    assert [file.name for file in found.parent.iterdir()] == [found.name]


@pytest.mark.parametrize(
    ("sums", "numbers", "words"), [("0" * 64 + "  m.gguf\n", (0, 1), "damaged"), ("", (0, 2), "not all there")]
)
def test_damaged_or_missing_parts_are_one_line(site: Site, sums: str, numbers: tuple[int, ...], words: str) -> None:
    parts(site, sums, numbers)
    with pytest.raises(SourceError, match=words):
        package_gguf("big")
    assert not list(Path(site.folder.parent).glob("cache/gguf/*"))


def test_none_two_and_not_installed_are_one_line(site: Site) -> None:
    site.install("two", "two", {"a.gguf": b"GGUF", "b.gguf": b"GGUF"})
    site.install("none", "none", {})
    for package, words in [("two", "found 2"), ("none", "found 0"), ("not-there-at-all", "not installed")]:
        with pytest.raises(SourceError, match=words):
            package_gguf(package)
    assert "two" not in sys.modules
