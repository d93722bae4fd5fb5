"""The bundle's HTML report.

page.py         a bundle's page: which sections, in which order
answers.py      which expert answers as before, in words
blocks.py       a page's frame, headings, tables, plots, folds
merge.py        sizes, errors, energy and ranks of the merge
assessment.py   accuracy of every candidate on every field; also a page of its own
router.py       learning curve, right and wrong fields, calibration, the embeddings in the plane
demo.py         the demo's table
sweep.py        a sweep's page: bytes against KL
"""

from .assessment import write_assessment
from .page import write_report

__all__ = ["write_assessment", "write_report"]
