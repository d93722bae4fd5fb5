"""Model selection: every candidate on every field, and the set that is worth merging.

recipe.py    what an assessment is told
measure.py   one expert on one task
worker.py    one candidate's tasks in a process of its own; process.py starts it and listens
run.py       all candidates, remembered as they are measured
sizes.py     what sets of candidates weigh as bundles
propose.py   the best set within a memory limit, and the runner-up
results.py   what was found, as plain data
"""

from .recipe import AssessRecipe, load_assess_recipe
from .results import Assessment, Candidate, write_assessment_table
from .run import AssessProgress, assess, assess_bundle

__all__ = [
    "AssessProgress",
    "AssessRecipe",
    "Assessment",
    "Candidate",
    "assess",
    "assess_bundle",
    "load_assess_recipe",
    "write_assessment_table",
]
