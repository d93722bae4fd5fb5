"""Shifted rows are made the same every time, and of no text that a router is fitted to."""

import json
import random
from pathlib import Path

import pytest

import shift
from shifted import Side, make, mistyped

TOPICS = {"math": ["apples", "coins", "eggs"], "bash": ["files", "folders", "lines"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)

    def write(name: str, rows: list[dict[str, str]]) -> None:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    for field, words in TOPICS.items():
        for split, count in (("train", 300), ("validation", 60), ("test", 200)):
            texts = [f"{rng.choice(words)} with {rng.choice(words)} number {n} of {split}" for n in range(count)]
            write(f"{field}/{split}.jsonl", [{"prompt": text, "answer": text[:4]} for text in texts])
    (folder / "instructions.json").write_text(json.dumps(dict.fromkeys(TOPICS, "Do it.\n\n{prompt}")))
    for name in ("heldout/clinc_oos", "heldout/bbh", "heldout/e2e", "router/routellm_mmlu", "router/routellm_gsm8k"):
        write(f"{name}.jsonl", [{"prompt": f"{name} {n}", "task": "navigate"} for n in range(9)])
    return folder


def test_rows_are_the_same_every_time_and_none_is_a_sample(data: Path) -> None:
    made = make(data, list(TOPICS))
    assert make(data, list(TOPICS)) == made
    texts = {sample.text for sample in [*made.train, *made.held]}
    assert not texts & {row.text for row in made.rows}
    kinds = {row.kind for row in made.rows}
    assert kinds >= {
        "new wording",
        shift.AS_THEY_ARE,
        "instruction",
        "greeting",
        "typing errors",
        "other source",
        "exams",
    }
    assert all(row.answer for row in made.rows if row.field != "none" and row.kind != "other source")


def test_wording_that_is_kept_away_is_in_no_sample(data: Path) -> None:
    """A cluster of the small vocabulary is a pair of words: pairs of new rows and of samples are apart."""

    def pair(text: str) -> tuple[str, ...]:
        return tuple(sorted({text.split()[0], text.split()[2]}))

    made = make(data, ["math"])
    new = {pair(row.text) for row in made.rows if row.kind == "new wording"}
    assert new and not new & {pair(sample.text) for sample in made.train}


def test_errors_of_typing_change_a_text_a_little() -> None:
    text = "Count every folder below the current directory"
    changed = {mistyped(text, random.Random(seed)) for seed in range(20)}
    assert len(changed) > 5 and all(len(other.split()) == 7 and abs(len(other) - len(text)) <= 2 for other in changed)
    assert mistyped("a 12 b", random.Random(0)) == "a 12 b"
    assert Side("development") is Side.DEVELOPMENT
