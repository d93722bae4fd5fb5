"""Runs one function and prints this process's peak memory. Started with any interpreter; standard library alone.

python worker.py '{"call": "module:function", "args": [...], "options": {...}}'
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path


def main(request: str) -> None:
    asked = json.loads(request)
    module, _, name = asked["call"].partition(":")
    getattr(importlib.import_module(module), name)(*asked["args"], **asked["options"])
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    print(json.dumps({"peak": peak * 1024}))


if __name__ == "__main__":
    main(sys.argv[1])
