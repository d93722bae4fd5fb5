"""Prompts are templates in files: versions, a user's own, and that a wrong one is one line before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from polymerge.errors import RecipeError
from polymerge.staged.templates import NAMES, OWN, Templates

VALUES = {"question": "Which?", "choices": ["red", "blue"], "field": "colour"}


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_every_version_has_every_template_and_says_question_and_thought(version: str) -> None:
    assert sorted(file.stem for file in (OWN / version).glob("*.jinja")) == sorted(NAMES)
    templates = Templates(version)  # type: ignore[arg-type]
    for choices in ([], ["red", "blue"]):
        assert "Which?" in templates.render("think", question="Which?", choices=choices, field="")
        prompt = templates.render("format", question="Which?", choices=choices, field="", thought="It is red.")
        assert "Which?" in prompt and "It is red." in prompt


def test_versions_differ_and_a_digest_follows_the_text(tmp_path: Path) -> None:
    assert Templates("v1").digest != Templates("v2").digest
    write(tmp_path, "think.text.jinja", "{{ question }}")
    assert Templates("v1", tmp_path).digest != Templates("v1").digest


def test_a_folder_overrides_for_all_fields_and_for_one(tmp_path: Path) -> None:
    write(tmp_path, "think.choice.jinja", "All: {{ question }}")
    write(tmp_path, "colour/think.choice.jinja", "Colours: {{ choices | join(', ') }}\n")
    templates = Templates("v2", tmp_path)
    assert templates.render("think", **VALUES) == "Colours: red, blue"  # type: ignore[arg-type]
    assert templates.render("think", **{**VALUES, "field": "law"}) == "All: Which?"  # type: ignore[arg-type]
    assert templates.render("think", **{**VALUES, "field": "../v1"}) == "All: Which?"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "think.text.jinja",
            "{{ qestion }}",
            ["think.text.jinja", "unknown variable 'qestion'", "known are", "question"],
        ),
        ("think.text.jinja", "{{ thought }}", ["unknown variable 'thought'"]),
        ("law/format.text.jinja", "{{ thoughts }}", ["law", "unknown variable 'thoughts'"]),
        ("format.text.jinja", "a\n{% if %}", ["format.text.jinja, line 2"]),
        ("format.jinja", "{{ question }}", ["not the name of a template", "format.text"]),
        ("-x/think.text.jinja", "{{ question }}", ["not the name of a field"]),
    ],
)
def test_a_wrong_template_is_one_line_at_once(tmp_path: Path, name: str, text: str, words: list[str]) -> None:
    write(tmp_path, name, text)
    with pytest.raises(RecipeError) as caught:
        Templates("v2", tmp_path)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "{{ question.__class__.__mro__ }}",
        "{{ choices.append('x') }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ choices[99].x }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_is_kept_in_its_sandbox(tmp_path: Path, text: str) -> None:
    file = write(tmp_path, "think.choice.jinja", text)
    templates = Templates("v2", tmp_path)
    with pytest.raises(RecipeError, match=str(file)) as caught:
        templates.render("think", **VALUES)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_braces_in_a_question_are_text_not_a_template() -> None:
    for text in ("{{ 7 * 7 }}", "{% raw %}", "🦊 \u2028 \x00"):
        assert text in Templates("v1").render("think", question=text, choices=[], field="")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nowhere"):
        Templates("v1", tmp_path / "nowhere")
