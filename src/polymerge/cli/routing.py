"""How the verbs around routing say how good a router is."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from ..router.embed import PROMPTS
from .console import out, say, tell

if TYPE_CHECKING:
    from ..router.evaluation import RouterEvaluation
    from ..router.fit import Fitted
    from ..router.record import RouterRecord


def print_fit(bundle: Path, fitted: Fitted) -> None:
    """The learning curve and what the threshold does."""
    report, record = fitted.report, fitted.router.record
    if report["learning_curve"]:
        curve = Table("samples a field", "accuracy", "lowest draw", "highest draw", title="learning curve (validation)")
        for point in report["learning_curve"]:
            shares = (f"{point[name]:.1%}" for name in ("accuracy", "lowest", "highest"))
            curve.add_row(str(point["samples"]), *shares)
        out.print(curve)
    named = {template: name for name, template in PROMPTS.items()}
    tell(f"prompt       {named.get(record.embed.template or '', record.embed.template)}", 13)
    goes = ", ".join(f"{field} → {expert}" for field, expert in record.experts.items())
    tell(f"fields       {goes}", 13)
    if report["measured_on"]:
        out.print(f"accuracy     {report['accuracy']:.1%} ({report['measured_on']})")
        error, before = report["calibration_error"], report["calibration_error_before"]
        out.print(f"calibration  error {error:.3f} ({before:.3f} before), temperature {record.temperature:.3g}")
    else:
        tell(
            "accuracy     not measured: fitted without labels; `polymerge router eval` measures it on labelled rows", 13
        )
    if report["repeated"]:
        repeated = report["repeated"]
        tell(f"repeated     {repeated} validation samples are training samples too, and were left out", 13)
    tell(f"threshold    {', '.join(_thresholds(record))}", 13)
    kept, refused = report["new_wording_kept"], report["strangers_refused"]
    passing = f"{kept:.1%} of samples of new wording pass, " if kept is not None else ""
    tell(f"gate         {passing}{refused:.1%} of strangers do not pass", 13)
    out.print(f"fallback     {record.fallback}")
    say(f'try: polymerge route {shlex.quote(str(bundle))} "a request"')


def _thresholds(record: RouterRecord) -> list[str]:
    """The one of all fields, or each field's where they differ."""
    if not record.thresholds:
        return [f"{record.threshold:.3f}"]
    return [f"{field} {record.threshold_of(field):.3f}" for field in record.fields]


def print_evaluation(evaluation: RouterEvaluation) -> None:
    """The confusion matrix and the figures below it."""
    fields = list(next(iter(evaluation.confusion.values())))
    confusion = Table("right field", *fields, "accuracy", title="likeliest field")
    for row, counts in evaluation.confusion.items():
        share = f"{evaluation.by_field[row]:.1%}" if row in evaluation.by_field else ""
        confusion.add_row(row, *(str(counts[name]) for name in fields), share)
    out.print(confusion)
    lines = [
        ("accuracy", evaluation.accuracy, "of the likeliest field"),
        ("kept", evaluation.kept, "of known requests over the threshold"),
        ("right", evaluation.accuracy_kept, "of those"),
        ("fallback", evaluation.outside_to_fallback, "of requests out of domain"),
    ]
    for title, part, of in lines:
        if part is not None:
            out.print(f"{title:<12} {part:.1%} {of}")
    if evaluation.calibration_error is not None:
        out.print(f"calibration  error {evaluation.calibration_error:.3f}")
    if evaluation.auroc is not None:
        out.print(f"AUROC        {evaluation.auroc:.3f}, confidence of known requests against those out of domain")
