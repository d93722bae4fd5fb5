"""The NeurIPS 2024 LLM Merging Competition: its files in, its submission out.

table.py    the CSV files, row by row
scoring.py  accuracy and ROUGE where targets are known
journal.py  what a run has done so far, so that a killed one goes on
clock.py    time and memory
expected.py what the rest of a run will take
pieces.py   from questions to answers against the clock
run.py      a file in, a submission out
merges.py   the drop-in for the starter kit
"""

from .merges import PolymergeMerges
from .run import Summary, compete

__all__ = ["PolymergeMerges", "Summary", "compete"]
