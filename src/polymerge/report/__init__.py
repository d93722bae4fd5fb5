"""The bundle's HTML report.

page.py     the page: which sections, in which order
blocks.py   the page's frame, headings, tables, plots
merge.py    sizes, errors, energy and ranks of the merge
demo.py     the demo's table
"""

from .page import write_report

__all__ = ["write_report"]
