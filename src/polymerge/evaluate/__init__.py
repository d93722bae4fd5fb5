"""Evaluation through lm-evaluation-harness, and data sets of one's own.

tasks.py           JSONL files as tasks of the harness
modes.py           which expert answers a question: average, expert:NAME, routed, mixture, oracle
harness_model.py   the harness's model `polymerge` (imports the harness)
run.py             the harness on an engine
compare.py         the same by several modes, side by side
"""

from .compare import Comparison, evaluate_modes, write_results
from .modes import MODES, Question, chooser
from .run import HarnessSettings, accuracy, evaluate
from .tasks import jsonl_tasks, task_list

__all__ = [
    "MODES",
    "Comparison",
    "HarnessSettings",
    "Question",
    "accuracy",
    "chooser",
    "evaluate",
    "evaluate_modes",
    "jsonl_tasks",
    "task_list",
    "write_results",
]
