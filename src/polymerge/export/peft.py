"""One expert as an adapter for plain PEFT, and what dropping the ratios rho costs there, as a share of each tensor."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from ..bundle import ADAPTER_FILE, Bundle
from ..checkpoint import read_json
from ..errors import ModelError
from ..staging import check_free_space, disk_errors, write_bytes, write_json
from .place import fresh, publish


@dataclass(frozen=True)
class PeftExport:
    """A written adapter and what plain PEFT loses because it has no place for the ratios rho.

    Attributes:
        folder: the adapter.
        dropped_ratio_error: largest ||(rho - 1) W̄|| / ||W|| of any tensor; 0 with `scale: shared`.
        worst_tensor: where that is.
        compression_error: the largest relative error that the compression itself left, to compare it with.
    """

    folder: Path
    dropped_ratio_error: float
    worst_tensor: str | None
    compression_error: float


def export_peft(bundle: Bundle | str | Path, expert: str, output: str | Path, *, overwrite: bool = False) -> PeftExport:
    """Writes an expert's adapter for plain PEFT over the bundle's average, and measures what dropping rho costs."""
    bundle, output = Bundle.open(bundle), Path(output).expanduser()
    folder = bundle.expert_folder(expert)
    check_free_space(output.parent, (folder / ADAPTER_FILE).stat().st_size)
    staged = fresh(output, overwrite=overwrite)
    config = read_json(folder / "adapter_config.json")
    if config["peft_type"] != "LORA":
        shutil.rmtree(staged)
        raise ModelError(
            f"expert {expert!r}: PEFT has no place for the whole matrices of its mixture-of-experts blocks; "
            "merge at a compress rate over 0, or export with --to dense"
        )
    config["base_model_name_or_path"] = str(bundle.path.resolve())
    write_json(staged / "adapter_config.json", config)
    with disk_errors(output.parent):
        shutil.copyfile(folder / ADAPTER_FILE, staged / ADAPTER_FILE)
    for file in sorted(bundle.path.glob("token*.json")):
        write_bytes(staged / file.name, file.read_bytes())
    error, worst = _cost_of_dropping_ratios(bundle, expert)
    lost = max((s["relative_error"] for s in bundle.stats() if s["expert"] == expert), default=0.0)
    return PeftExport(publish(staged, output), error, worst, lost)


def _cost_of_dropping_ratios(bundle: Bundle, expert: str) -> tuple[float, str | None]:
    worst, where = 0.0, None
    reader = bundle.expert_reader(expert)
    for tensor, ratio in bundle.scales(expert).items():
        if ratio == 1.0:
            continue
        base = float(torch.linalg.vector_norm(bundle.base_tensor(tensor).double()))
        weight = float(torch.linalg.vector_norm(reader.read(tensor).double()))
        error = abs(ratio - 1.0) * base / weight
        if error > worst:
            worst, where = error, tensor
    return worst, where
