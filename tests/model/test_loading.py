"""What loading imports. (What a loaded model says is in test_mixed.py.)"""

import subprocess
import sys


def test_the_triton_path_is_imported_only_when_it_is_asked_for() -> None:
    code = (
        "import sys, polymerge.model.loading, polymerge.engine.local.engine; "
        "print([m for m in sys.modules if m.split('.')[0] == 'triton' or m.startswith('polymerge.model.triton')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
