"""What this machine is: where to compute, in which dtype, how much memory was needed, where the cache lies.

Knows torch, the process and the environment; does not know models, bundles or recipes.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

from .errors import DeviceError

# The dtypes that a bundle may be stored in, by the names of recipes, manifests and config.json.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """torch.float32 for "float32". Raises DeviceError for a name that is no dtype for weights."""
    if name not in DTYPES:
        raise DeviceError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def pick_device(device: str | torch.device | None = "auto") -> torch.device:
    """Where to compute; `auto` and None are the GPU where there is one.

    Raises:
        DeviceError: no device's name, or this machine or this torch lacks it.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError):  # torch raises either, by how it was built
        raise DeviceError(f"device {str(device)!r}: this machine or this torch has no such device; try auto") from None
    return chosen


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """What to compute in: as asked (float64 too); by default float32 on a CPU, where most multiply bfloat16 hundreds of
    times slower, and what is `stored` elsewhere.

    Raises:
        DeviceError: a name that is no dtype for weights.
    """
    if dtype is None:
        return torch.float32 if device.type == "cpu" else stored
    if dtype == "float64":
        return torch.float64
    return dtype_of(dtype) if isinstance(dtype, str) else dtype


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a GPU; None for a device whose memory is everybody's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def gpu_memory() -> int:
    """Bytes of this machine's GPU, used or free. Raises DeviceError where there is none."""
    if not torch.cuda.is_available():
        raise DeviceError("auto: this machine has no GPU that torch sees; say its memory, such as 24GB")
    return torch.cuda.mem_get_info()[1]


def available_memory() -> int | None:
    """Bytes of main memory that programs can still have, within what a container may; None where that is not told."""
    told = Path("/proc/meminfo")
    if not told.exists():  # macOS
        return None
    line = next((line for line in told.read_text().splitlines() if line.startswith("MemAvailable")), None)
    limit = Path("/sys/fs/cgroup/memory.max")
    most = limit.read_text().strip() if limit.exists() else "max"
    known = [int(line.split()[1]) * 1024] if line else []
    return min([*known, *([int(most)] if most.isdigit() else [])], default=None)


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def cache_folder() -> Path:
    """Where polymerge keeps what can be made again: `$POLYMERGE_CACHE`, else `polymerge` in `$XDG_CACHE_HOME`, which is
    `~/.cache` where it is not said."""
    said = os.environ.get("POLYMERGE_CACHE")
    return Path(said or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polymerge")


def peak_memory() -> int:
    """Peak resident bytes of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # the kernel's other count (ru_maxrss) starts with that of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
