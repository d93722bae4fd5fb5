"""Every verb of the command line is a function of `polymerge`, with the same arguments; docs/api.md says which."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import typer

import polymerge
from polymerge.cli.main import app
from polymerge.errors import PolymergeError
from polymerge.recipe.merge import RecipeSettings

SOURCE = Path(polymerge.__file__).parent
PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
# A positional word of the command line that is more than one argument in Python.
SPLIT = {("add", "expert"): ("name", "source")}
REQUIRED = object()


def section(title: str) -> str:
    """The text below a heading of docs/api.md."""
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def first_cells(title: str) -> list[str]:
    """What stands in backticks in the first column of a section's table."""
    return [word for cell in re.findall(r"^\| (`[^|]+) \|", section(title), re.MULTILINE) for word in ticked(cell)]


def ticked(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def rows() -> Iterator[tuple[str, str]]:
    """(command, function) of the table of verbs."""
    for command, function in re.findall(r"^\| `polymerge ([^`]+)` \| `(\w+)` \|", section("The verbs"), re.MULTILINE):
        yield command.split(" --")[0], function


def commands(group: Any = None, before: str = "") -> Iterator[tuple[str, Any]]:
    """Every command of the app with its full name."""
    for name, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{before}{name} ")
        else:
            yield before + name, command


def plain(value: Any) -> Any:
    """A default as it is written on the command line."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value) if isinstance(value, Path) else value


def arguments_of(command: Any) -> dict[str, Any]:
    """Name -> default. An option is known by its flag, whatever its variable is called."""
    given = {}
    for param in command.params:
        flag = max(param.opts, key=len).lstrip("-").replace("-", "_")
        given[flag if param.param_type_name == "option" else param.name] = (
            REQUIRED if param.required else plain(param.default)
        )
    return given


def parameters_of(name: str) -> tuple[dict[str, Any], set[str]]:
    """Name -> default of a public function, and which of them it takes as keys of a recipe."""
    signature = inspect.signature(getattr(polymerge, name)).parameters
    keys = set(RecipeSettings.__annotations__) if "settings" in signature else set()
    given = {
        key: REQUIRED if param.default is inspect.Parameter.empty else plain(param.default)
        for key, param in signature.items()
        if param.kind is not inspect.Parameter.VAR_KEYWORD
    }
    return given | dict.fromkeys(keys), keys


COMMANDS = dict(commands())
CONSOLE_ONLY = {flag.removeprefix("--").replace("-", "_") for flag in first_cells("Only on the console")}
PYTHON_ONLY = set(first_cells("Only in Python"))


def test_every_command_has_its_function() -> None:
    assert {command for command, _ in rows()} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_verb_has_the_same_arguments_in_python(name: str) -> None:
    given = {key: default for key, default in arguments_of(COMMANDS[name]).items() if key not in CONSOLE_ONLY}
    for word in [word for command, word in SPLIT if command == name]:
        given |= dict.fromkeys(SPLIT[name, word], given.pop(word))
    functions = {function: parameters_of(function) for command, function in rows() if command == name}
    known = {key for parameters, _ in functions.values() for key in parameters}
    assert not given.keys() - known, "on the command line alone"
    for function, (parameters, keys) in functions.items():
        assert not parameters.keys() - given.keys() - PYTHON_ONLY - keys, f"in {function} alone"
        if len(functions) == 1:
            shared = {key: default for key, default in parameters.items() if key in given}
            assert shared == given
        else:  # a function of `export --to` has some of the arguments, and those that it needs are options there
            for key in parameters.keys() & given.keys():
                assert parameters[key] is REQUIRED or parameters[key] == given[key], (function, key)


def test_what_is_on_one_side_alone_is_somewhere() -> None:
    """The lists of docs/api.md hold nothing that is gone."""
    assert {key for command in COMMANDS.values() for key in arguments_of(command)} >= CONSOLE_ONLY
    assert {key for _, function in rows() for key in parameters_of(function)[0]} >= PYTHON_ONLY


def test_the_page_names_everything_that_is_public() -> None:
    verbs = {function for _, function in rows()}
    beside = set(first_cells("Beside the verbs"))
    assert not verbs & beside
    assert verbs | beside == set(polymerge.__all__)


def test_all_is_sorted_and_every_name_loads() -> None:
    assert sorted(polymerge.__all__) == polymerge.__all__
    for name in polymerge.__all__:
        assert getattr(polymerge, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        polymerge.nothing  # noqa: B018


def test_no_public_name_is_a_package_s_or_a_file_s() -> None:
    taken = {path.stem for path in SOURCE.iterdir()}
    assert not taken & {*polymerge.__all__}


EXPERTS = {"math": "./m", "code": "org/c"}  # `code` is a key of a recipe too


def test_experts_stand_in_for_a_recipe() -> None:
    recipe = polymerge.load_recipe(EXPERTS)
    assert {name: source.source for name, source in recipe.experts.items()} == EXPERTS
    assert (recipe.compress_rate, recipe.code) == (0.95, "auto")
    changed = polymerge.load_recipe(EXPERTS, compress_rate=0.5, code="int8", dtype=None, norms="average")
    assert (changed.compress_rate, changed.code, changed.dtype, changed.norms) == (0.5, "int8", None, "average")
    here = polymerge.load_recipe({"a": Path("m"), "b": Path("/m"), "c": {"source": "x", "base": "org/b"}}).experts
    assert [source.source for source in here.values()] == ["./m", "/m", "x"] and here["c"].base == "org/b"


def test_a_recipe_is_told_from_experts_by_the_mapping_under_its_key() -> None:
    assert polymerge.load_recipe({"experts": EXPERTS, "code": "int4"}).code == "int4"
    assert list(polymerge.load_recipe({"experts": "./x", "code": "./y"}).experts) == ["experts", "code"]
    for wrong in ({}, {"compress_rate": 0.5}, {"experts": ["a", "b"]}, {"a": 1, "b": 2}):
        with pytest.raises(PolymergeError, match="recipe: experts"):
            polymerge.load_recipe(wrong)


def test_a_key_counts_over_the_recipes_and_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("experts: {a: ./m, b: org/c}\ncompress_rate: 0.9\nscale: shared\n")
    recipe = polymerge.load_recipe(file, compress_rate=0.5)
    assert (recipe.compress_rate, recipe.scale) == (0.5, "shared")
    assert recipe.experts["a"].source == str(tmp_path / "m")
    with pytest.raises(PolymergeError, match=r"recipe: compress_rate: .* less than or equal to 1"):
        polymerge.load_recipe(file, compress_rate=1.5)
    with pytest.raises(PolymergeError, match="recipe: compres_rate: unknown key"):
        polymerge.load_recipe(file, compres_rate=0.5)  # type: ignore[call-arg]
