"""Tasks of lm-evaluation-harness made of JSONL files (`polymerge.data.schema`): no YAML, no network.

Rows with `choices` become questions of multiple choice, scored by log-likelihood (`acc`, and `acc_norm` by length);
rows without are answered and judged (`exact_match`, `f1`) by `polymerge.data.score`. Knows the harness's configuration
of a task as a plain dict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.rows import content_hash, files_by_name
from ..data.schema import AnsweredRow, read_all
from ..data.score import is_right, token_f1
from ..errors import DataError, RecipeError

MAX_NEW_TOKENS = 64
STOP = ("\n\n",)  # an empty line ends an answer, for models that do not know their own end


def task_list(
    names: str | None, data: Path | None, *, ending: str = "", max_new_tokens: int = MAX_NEW_TOKENS
) -> list[str | dict[str, Any]]:
    """Tasks as a user names them: comma-separated names, of which those of data sets in `data` (NAME/test.jsonl) mean
    these. Without names, all of `data`.

    Raises:
        RecipeError: neither names nor data. DataError: an unusable data set.
    """
    files = files_by_name(data) if data is not None else {}
    wanted = [name.strip() for name in names.split(",") if name.strip()] if names else list(files)
    if not wanted:
        raise RecipeError("no tasks given; name some with --tasks, or a folder of data sets with --data")
    return [
        jsonl_task(name, files[name], ending=ending, max_new_tokens=max_new_tokens) if name in files else name
        for name in wanted
    ]


def jsonl_tasks(
    files: Mapping[str, Path], *, max_new_tokens: int = MAX_NEW_TOKENS, ending: str = ""
) -> list[dict[str, Any]]:
    """One task a file, in the harness's form.

    Args:
        files: task's name -> JSONL file.
        ending: what stands between a prompt and its answer, where no chat template sees to that.

    Raises:
        DataError: an unusable row, with its file and line.
    """
    return [jsonl_task(name, file, max_new_tokens=max_new_tokens, ending=ending) for name, file in files.items()]


def jsonl_task(name: str, file: Path, *, max_new_tokens: int = MAX_NEW_TOKENS, ending: str = "\n") -> dict[str, Any]:
    """A task of the harness. All rows of a file must be of one form, with choices or without."""
    rows = read_all(AnsweredRow, file)
    closed = {row.choices is not None for row in rows}
    if len(closed) > 1:
        raise DataError(f"{file}: some rows have choices and some have not; put them into two files")
    task: dict[str, Any] = {
        "task": name,
        "custom_dataset": lambda **_: {"test": _dataset(rows)},
        "test_split": "test",
        "doc_to_text": lambda row: row["prompt"] + ending,
        "target_delimiter": "",
        "metadata": {"version": content_hash(file)[:16]},
    }
    if closed == {True}:
        return task | {
            "output_type": "multiple_choice",
            "doc_to_choice": lambda row: list(row["choices"]),
            "doc_to_target": lambda row: row["choices"].index(row["answer"]),
            "metric_list": _means("acc", "acc_norm"),
        }
    return task | {
        "output_type": "generate_until",
        "doc_to_target": lambda row: row["answer"],
        "generation_kwargs": {"until": list(STOP), "max_gen_toks": max_new_tokens, "do_sample": False},
        "process_results": _score,
        "metric_list": _means("exact_match", "f1"),
    }


def _dataset(rows: Sequence[AnsweredRow]) -> Any:
    """The rows in the form that the harness reads. Keys of one's own are kept as text, for labels."""
    from datasets import Dataset

    labels = sorted({key for row in rows for key in row.model_extra or {}})
    return Dataset.from_list(
        [
            row.model_dump(include=set(AnsweredRow.model_fields)) | {key: _label(row, key) for key in labels}
            for row in rows
        ]
    )


def _label(row: AnsweredRow, key: str) -> str | None:
    value = (row.model_extra or {}).get(key)
    return None if value is None else str(value)


def _score(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return {
        "exact_match": float(is_right(results[0], row["answer"], final=row["final"])),
        "f1": token_f1(results[0], row["answer"]),
    }


def _means(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]
