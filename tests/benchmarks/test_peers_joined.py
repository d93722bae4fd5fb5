"""The joined table: rows find each other by method and tables, and experts that answer next to nothing do not count."""

from __future__ import annotations

from typing import Any

from peers_joined import table


def report(experts: dict[str, tuple[float, float]], methods: tuple[str, ...]) -> dict[str, Any]:
    """Args: experts: name -> the original's accuracy, and the share that is kept."""
    rows = [
        {
            "method": method,
            "tables": "averaged",
            "models": {"disk": 1.0 + len(experts) / 10 - number / 100, "resident": 2.0, "gguf": None},
            "kl": 0.25,
            "experts": {
                name: {"original_accuracy": accuracy, "kept": {"share": share, "low": share - 0.1, "high": 1.0}}
                for name, (accuracy, share) in experts.items()
            },
        }
        for number, method in enumerate(methods)
    ]
    return {"settings": {"experts": dict.fromkeys(experts), "requests": dict.fromkeys(experts, 200)}, "rows": rows}


def test_rows_of_one_method_lie_side_by_side_smallest_first() -> None:
    three = report({"a": (0.5, 0.9), "b": (0.5, 0.8), "c": (0.09, 0.1)}, ("polymerge, int4", "other"))
    four = report({"a": (0.5, 0.95), "b": (0.1, 0.7), "c": (0.5, 1.0), "d": (0.5, 1.0)}, ("other",))
    head, _, *lines = table({"demo": three, "real": four})
    assert head.endswith("| KL demo | least kept | disk, 4 experts | KL real | least kept |")
    assert lines == [
        "| other | averaged | 1.290 | 2.000 | - | 0.25 | 80.0 (70 to 100%) | 1.400 | 0.25 | 70.0 (60 to 100%) |",
        "| **polymerge, int4** | averaged | 1.300 | 2.000 | - | 0.25 | 80.0 (70 to 100%) | - | - | - |",
    ]
