"""The pages say what the code does."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer

from polymerge import load_recipe
from polymerge.assess import AssessRecipe
from polymerge.cli.main import app
from polymerge.recipe.merge import Recipe
from tests.pages import blocks_of
from tests.test_imports import FLOORS

ROOT = Path(__file__).parents[1]


def test_the_page_of_commands_is_what_the_commands_say() -> None:
    spec = importlib.util.spec_from_file_location("write_cli", ROOT / "docs" / "write_cli.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "cli.md").read_text() == module.page(), "run `make docs`"
    assert all(f"## {command.callback.__name__}\n" in module.page() for command in app.registered_commands)


def test_the_page_of_the_recipe_names_every_key_and_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", (ROOT / "docs" / "recipe.md").read_text(), re.MULTILINE))
    for name, field in Recipe.model_fields.items():
        shown = rows[name].strip().strip("`")
        if shown not in ("required", "none", "the sources'"):
            assert shown.lower() == str(field.default).lower(), name


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_the_recipes_are_valid(recipe: Path) -> None:
    assert len(load_recipe(recipe).experts) == 3


def _headings(page: Path) -> set[str]:
    """As GitHub makes them into the ends of links."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_to_pages_and_headings(page: Path) -> None:
    for target, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]+))?\)", page.read_text()):
        place = page.parent / target if target else page
        assert place.exists(), target
        assert not heading or heading in _headings(place), (target, heading)


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_files_of_the_repository_are_where_the_pages_say(page: Path) -> None:
    named = re.findall(
        r"(?<![\w/.-])((?:tests|benchmarks|recipes|deploy|docs)/[\w./-]*\w\.(?:py|md|yaml))\b", page.read_text()
    )
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_page_of_the_assessment_names_every_key_and_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", (ROOT / "docs" / "assess.md").read_text(), re.MULTILINE))
    for name, field in AssessRecipe.model_fields.items():
        shown = rows[name].strip().strip("`")
        if shown not in ("required", "none"):
            assert shown.lower() == str(field.default).lower(), name


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def test_every_file_of_the_house_is_where_the_page_says() -> None:
    named = re.findall(r"`([\w./-]+(?:\.py|\.html|/))`", ARCHITECTURE)
    assert len(named) > 60
    places = [ROOT / "src" / "polymerge", ROOT]
    assert not [name for name in named if not any((place / name).exists() for place in places)]


def test_the_floors_of_the_page_are_those_that_the_imports_are_held_to() -> None:
    table = ARCHITECTURE.split("## The floors")[1].split("## ")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    floors = [re.findall(r"`(\w+)(?:\.py|/)`", row) for row in rows]
    assert floors == [list(names) for names in FLOORS[:-1]]


def test_every_question_has_one_file_and_both_lives_have_eight_steps() -> None:
    answers = re.findall(r"^\| [^|]+\? \| `([^`]+)` \|$", ARCHITECTURE, re.MULTILINE)
    assert len(answers) >= 36
    for life in ("A recipe's life", "A request's life"):
        steps = ARCHITECTURE.split(f"## {life}")[1].split("## ")[0]
        assert re.findall(r"^(\d)\. `", steps, re.MULTILINE) == list("12345678"), life


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands_of(page: Path) -> list[str]:
    """Every `polymerge` command of a page's blocks, as one line each, without what it is piped to."""
    blocks = re.findall(r"^```(?:console|bash|sh)?\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        line.strip().removeprefix("$ ") for line in lines if line.strip().removeprefix("$ ").startswith("polymerge ")
    ]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "cli.md"], ids=lambda p: p.name)
def test_every_command_of_the_pages_is_one(page: Path) -> None:
    """Verbs, options and the kinds of their values; the commands themselves are not run."""
    for line in commands_of(page):
        words = shlex.split(re.split(r"\s[|;>&]\s?|\s\(", line)[0], comments=True)[1:]
        if not words or "..." in words:
            continue
        command = typer.main.get_command(app)
        while words and hasattr(command, "commands") and not words[0].startswith("-"):
            assert words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        if hasattr(command, "commands") or "--help" in words:
            continue
        command.make_context(line, words)  # raises for an option or a value that there is not


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_who_is_told_to_serve_is_told_to_install_what_that_needs(page: Path) -> None:
    for block in blocks_of(page):
        extras = re.findall(r"pip install -e '\.\[([\w,]+)\]'", block)
        if extras and "polymerge serve" in block:
            assert "serve" in ",".join(extras).split(","), block


def test_every_page_is_reached_from_the_readme_in_two_steps() -> None:
    def links(page: Path) -> set[Path]:
        targets = re.findall(r"\]\((?!https?:)([^)#]+\.md)[^)]*\)", page.read_text())
        return {(page.parent / target).resolve() for target in targets}

    first = links(ROOT / "README.md")
    reached = first | {target for page in first for target in links(page)}
    assert not {page.resolve() for page in PAGES[1:]} - reached


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda p: p.name)
def test_every_page_says_first_what_it_is_for(page: Path) -> None:
    title, empty, purpose = page.read_text().splitlines()[:3]
    assert title.startswith("# ") and not empty and purpose.startswith("**For:** ") and purpose.endswith(".")
