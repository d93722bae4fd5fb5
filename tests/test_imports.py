"""The layout of DESIGN.md, read off the imports themselves."""

import ast
import subprocess
import sys
from pathlib import Path

import polymerge

SOURCE = Path(polymerge.__file__).parent

# A module imports only from modules that stand before it.
ORDER = [
    "errors", "response", "recipe", "checkpoint", "adapter", "gguf", "layers", "outline", "rsvd", "codes", "plan",
    "footprint", "compress", "fitting", "staging", "bundle", "assemble", "executor", "on_ray", "merger", "verification",
    "grow", "model", "engine", "router", "staged", "evaluate", "assess", "compete", "export", "inspection", "sweep",
    "target", "search", "report", "serve", "demo", "cli", "__main__",
]  # fmt: skip
# `open_checkpoint` hands some sources to modules that build on checkpoint; imported when it is called.
ALLOWED = {("checkpoint", "adapter"), ("checkpoint", "gguf")}


def imports_of(file: Path) -> set[str]:
    """Top-level modules of polymerge that a file imports, anywhere in it but under TYPE_CHECKING."""
    package = [*file.relative_to(SOURCE).parts[:-1]]
    tree = ast.parse(file.read_text())
    skipped = {id(n) for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
               for n in ast.walk(node)}  # fmt: skip
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level or id(node) in skipped:
            continue
        home = package[: len(package) - node.level + 1]
        full = [*home, *(node.module.split(".") if node.module else [])]
        found |= {full[0]} if full else {alias.name for alias in node.names}
    return found - {"__version__"}


def test_modules_import_only_leftwards() -> None:
    wrong = []
    for file in sorted(SOURCE.rglob("*.py")):
        module = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        assert module in ORDER, f"{module} has no place in the order"
        for target in imports_of(file) - {module}:
            if ORDER.index(target) > ORDER.index(module) and (module, target) not in ALLOWED:
                wrong.append(f"{file.name} imports {target}")
    assert not wrong


def test_importing_polymerge_loads_nothing_heavy() -> None:
    code = "import sys, polymerge; print([m for m in ('torch', 'transformers', 'numpy', 'plotly') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_all_is_sorted_and_every_name_loads() -> None:
    assert sorted(polymerge.__all__) == polymerge.__all__
    for name in polymerge.__all__:
        assert getattr(polymerge, name) is not None


def test_no_file_is_a_drawer() -> None:
    assert not [file for file in SOURCE.rglob("*.py") if file.stem in ("utils", "common", "helpers", "misc")]
