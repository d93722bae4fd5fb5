"""The one reader of JSON files with a version. What manifests, routers and notes refuse is theirs to test."""

from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, model_validator

from polymerge.bundle.versioned import read_versioned
from polymerge.errors import BundleError


class Settings(BaseModel):
    format_version: Literal[4]
    size: int = 0

    @model_validator(mode="after")
    def _size_fits(self) -> "Settings":
        if self.size > 9:
            raise ValueError("the size does not fit")
        return self


def read(file: Path) -> Settings:
    return read_versioned(Settings, file, error=BundleError, missing="there is none", fix="make it again")


def test_what_a_whole_file_says_comes_back(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"format_version": 4, "size": 7}')
    assert read(tmp_path / "x.json").size == 7


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"{", "cannot be read: .*; make it again"),
        (b"\xff", "cannot be read: .*; make it again"),
        (b"[" * 100_000, "cannot be read: .*; make it again"),
        (b"[4]", "format version None; this polymerge reads version 4"),
        (b'{"format_version": [4]}', r"format version \[4\]; this polymerge reads version 4"),
        (b'{"format_version": 4, "size": "x"}', "size: Input should be .*; make it again"),
        (b'{"format_version": 4, "size": 10}', "the size does not fit; make it again"),  # of no key
    ],
)
def test_a_broken_one_is_one_line_with_the_fix(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(BundleError, match=f"^{tmp_path / 'x.json'}: {said}$"):
        read(tmp_path / "x.json")


def test_a_missing_one_says_what_its_reader_knows(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"^there is none$"):
        read(tmp_path / "x.json")
