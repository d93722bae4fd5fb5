"""The rows of benchmarks/stages.py are what `stages` reads, and each has a form."""

from pathlib import Path

from polymerge.data.score import is_right
from polymerge.engine.grammar import has_form
from polymerge.staged.forms import form_of
from polymerge.staged.validation import read_questions
from stages import write_rows


def test_every_row_has_a_form_that_its_answer_has(tmp_path: Path) -> None:
    files = write_rows(tmp_path, 8)
    kinds = {}
    for name, file in files.items():
        for asked in read_questions(file):
            form = form_of(asked)
            assert form is not None
            answer = asked.final or asked.answer
            assert has_form(form, answer)
            assert is_right(answer, asked.answer, choices=asked.question.choices, final=asked.final)
            kinds[name] = form.kind
    assert kinds == {"json": "json", "math": "regex", "shell": "choice", "orders": "json"}
