"""The layout of DESIGN.md, read off every file's own imports: no circle, none upwards, no exceptions."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import polymerge

SOURCE = Path(polymerge.__file__).parent

# From the ground up. A file imports from its own package and from floors below; names of one floor know nothing of
# each other.
FLOORS = (
    ("errors", "version", "naming"),
    ("paths",),
    ("host",),
    ("method",),
    ("data",),
    ("recipe",),
    ("sources",),
    ("bundle",),
    ("model",),
    ("merging",),
    ("engine",),
    ("search",),
    ("export",),
    ("router",),
    ("staged", "evaluate"),
    ("assess", "compete", "serve"),
    ("report", "hub"),
    ("demo",),
    ("cli",),
    ("__main__", "__init__"),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
FILES = sorted(SOURCE.rglob("*.py"))
FACES = [file for file in FILES if file.name == "__init__.py" and file.parent != SOURCE]


def name_of(file: Path) -> str:
    return file.relative_to(SOURCE).as_posix()


def place_of(file: Path) -> str:
    """The package or the file right under polymerge/ that holds it."""
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def file_of(parts: list[str]) -> Path | None:
    """The file of a dotted name under polymerge; None where it is no module."""
    place = SOURCE.joinpath(*parts)
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if parts and file.is_file()), None)


def imports_of(file: Path) -> Iterator[Path]:
    """Files of polymerge that a file names in an import, anywhere in it: in functions and for types too."""
    package = list(file.relative_to(SOURCE).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names if alias.name.split(".")[0] == "polymerge"]
            yield from (file_of(parts[1:]) or SOURCE / "__init__.py" for parts in names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if not node.level and module[:1] != ["polymerge"]:
                continue
            home = [*package[: len(package) - node.level + 1], *module] if node.level else module[1:]
            for alias in node.names:
                yield file_of([*home, alias.name]) or file_of(home) or SOURCE / "__init__.py"


GRAPH = {file: sorted(set(imports_of(file))) for file in FILES}


def test_the_floors_are_the_house() -> None:
    assert set(FLOOR) == {place_of(file) for file in FILES}


def test_files_import_only_downwards() -> None:
    wrong = [
        f"{name_of(file)} imports {name_of(target)}"
        for file, targets in GRAPH.items()
        for target in targets
        if place_of(file) != place_of(target) and FLOOR[place_of(file)] <= FLOOR[place_of(target)]
    ]
    assert not wrong


def test_no_files_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" imported by ".join(name_of(file) for file in error.args[1]))


def test_the_reader_of_imports_sees_them_all() -> None:
    """A circle and an arrow upwards that hide in a function and under TYPE_CHECKING would be seen."""
    seen = {name_of(target) for target in GRAPH[SOURCE / "cli" / "merge.py"]}
    assert {"cli/console.py", "search/merge.py"} <= seen
    assert "model/assignment.py" in {name_of(target) for target in GRAPH[SOURCE / "engine" / "base.py"]}
    assert "bundle/bundle.py" in {name_of(target) for target in GRAPH[SOURCE / "__init__.py"]}


@pytest.mark.parametrize("face", FACES, ids=name_of)
def test_a_package_s_face_only_gives_names_on(face: Path) -> None:
    for node in ast.parse(face.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            assert node.module == "__future__" or (node.level == 1 and node.module), ast.unparse(node)
        elif isinstance(node, ast.Assign):
            assert ast.unparse(node.targets[0]) == "__all__"
        else:
            assert isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant), ast.unparse(node)


def loaded_by(statement: str, *modules: str) -> list[str]:
    """Which of the modules are loaded after a statement, in a process of its own."""
    code = f"{statement}\nimport sys\nprint(*[name for name in {modules} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_importing_polymerge_loads_nothing_heavy() -> None:
    assert loaded_by("import polymerge", "torch", "transformers", "numpy", "plotly", "pydantic", "typer") == []
    assert loaded_by("import polymerge.cli.main", "torch", "transformers", "numpy", "plotly", "pydantic") == []


def test_triton_is_imported_only_when_it_is_asked_for() -> None:
    """The package of kernels, and Triton itself, unless torch has brought it along."""
    assert loaded_by("import polymerge.model.loading", "polymerge.model.triton", "polymerge.model.triton.kernel") == []
    assert loaded_by("import polymerge.model.loading", "triton") == loaded_by("import torch, transformers", "triton")


def test_no_file_is_a_drawer() -> None:
    assert not [file for file in FILES if file.stem in ("utils", "common", "helpers", "misc")]
