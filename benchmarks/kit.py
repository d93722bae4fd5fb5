"""The competition's starter kit itself, in its own environment, against `polymerge compete`.

    git clone https://github.com/llm-merging/LLM-Merging
    python benchmarks/kit.py BUNDLE --expert NAME --kit LLM-Merging --python KIT-ENV/bin/python --limit 20

A copy of the kit gets `compete/kit_client.py` and a line in its `main.py`, as docs/competition.md says. Its `main.py`
then answers the first rows of its own files three times: by the client and a `polymerge serve`; by the client in
`exact` mode; and by the kit's own code on the expert as a dense checkpoint. The first must be `polymerge compete`'s CSV
to the byte, the second the third's.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

POLYMERGE = [sys.executable, "-m", "polymerge"]
HERE = "        ## TODO Add more merge methods here\n"  # where the kit's main.py wants a method to be listed
METHODS = '        "served": Served, "exact": Exact, "dense": Dense,\n'
MODULE = '''
import os
import torch
from llm_merging.merging.Merges import Merges
from llm_merging.merging.kit_client import ServedMerges

class Served(ServedMerges):
    model = os.environ["KIT_EXPERT"]

class Exact(Served):
    exact = True

class Dense(Merges):
    """A local checkpoint, answered by the kit's own code."""
    def __init__(self, name):
        super().__init__(name)
        self.base_model_name, self.architecture, self.max_gen_len = os.environ["KIT_DENSE"], "decoder", 64
        self.device = torch.device("cpu")

    def merge(self):
        self._load_base_model()
        self._load_tokenizer()
        self.base_model.eval()

    def save_model(self, output_dir):
        pass
'''


@dataclass(frozen=True)
class Line:
    """One file: rows, whether the CSVs are equal to the byte, and seconds of all of its rows by way."""

    file: str
    rows: int
    served_is_compete: bool
    exact_is_kit: bool
    compete_seconds: float
    served_seconds: float
    kit_seconds: float


def main() -> None:
    """Prints the table and, with --json, writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--expert", required=True)
    parser.add_argument("--kit", type=Path, required=True, help="the kit's folder")
    parser.add_argument("--python", required=True, help="of an environment with the kit's libraries")
    parser.add_argument("--files", type=Path, nargs="*", help="by default the kit's validation files")
    parser.add_argument("--limit", type=int, default=20, help="rows of each file")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    sources = given.files or sorted((given.kit / "data" / "validation").glob("*.csv"))
    lines = compare(given.bundle, given.expert, given.kit, given.python, sources, given.limit)
    for line in lines:
        print(json.dumps(asdict(line)))
    if given.json:
        given.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")


def compare(
    bundle: Path, expert: str, kit: Path, python: str, sources: Sequence[Path], limit: int, folder: Path | None = None
) -> list[Line]:
    """Runs everything in a folder, by default a new one."""
    with tempfile.TemporaryDirectory() as made:
        work = folder or Path(made)
        copy = equipped(kit, work / "kit")
        parts = [first_rows(source, work / source.name, limit) for source in sources]
        run([*POLYMERGE, "export", str(bundle), "--to", "dense", "--expert", expert, "-o", str(work / "dense")])
        as_older(work / "dense")
        settings = {"KIT_EXPERT": expert, "KIT_DENSE": str(work / "dense"), "HF_AUTH_TOKEN": "none"}
        ran: dict[str, float] = {}
        with serving(bundle) as url:
            for method in ("served", "exact", "dense"):
                for part in parts:
                    words = ["llm_merging/main.py", "-m", method, "--dataset_filepaths", str(part)]
                    words += ["--output_folder", str(work / method)]
                    ran[f"{method} {part.name}"] = run([python, *words], copy, settings | {"POLYMERGE_URL": url})
        for part in parts:
            out = work / "compete" / part.name
            out.parent.mkdir(exist_ok=True)
            words = ["compete", str(bundle), "--input", str(part), "-o", str(out), "--expert", expert, "--quiet"]
            ran[f"compete {part.name}"] = run([*POLYMERGE, *words])
        return [line(work, part, ran) for part in parts]


def line(work: Path, part: Path, ran: dict[str, float]) -> Line:
    written = {way: (work / way / part.name).read_bytes() for way in ("compete", "served", "exact", "dense")}
    with part.open(newline="") as handle:
        rows = sum(1 for _ in csv.DictReader(handle))
    equal = written["served"] == written["compete"], written["exact"] == written["dense"]
    seconds = (round(ran[f"{way} {part.name}"], 1) for way in ("compete", "served", "dense"))
    return Line(part.name, rows, *equal, *seconds)


def equipped(kit: Path, copy: Path) -> Path:
    """A copy of the kit with our client and the methods listed."""
    shutil.copytree(kit, copy, ignore=shutil.ignore_patterns(".git"))
    merging, main_file = copy / "llm_merging" / "merging", copy / "llm_merging" / "main.py"
    client = (files("polymerge") / "compete" / "kit_client.py").read_text(encoding="utf-8")
    (merging / "kit_client.py").write_text(client, encoding="utf-8")
    (merging / "Compared.py").write_text(MODULE, encoding="utf-8")
    with (merging / "__init__.py").open("a") as handle:
        handle.write("\nfrom llm_merging.merging.Compared import Served, Exact, Dense\n")
    text = main_file.read_text(encoding="utf-8")
    if HERE not in text:
        raise SystemExit(f"{main_file}: has no place for more merge methods; is it another version of the kit?")
    main_file.write_text(text.replace(HERE, HERE + METHODS), encoding="utf-8")
    return copy


def first_rows(source: Path, part: Path, limit: int) -> Path:
    """The first rows of a file, in a file of their own."""
    with source.open(newline="", encoding="utf-8") as read, part.open("w", newline="", encoding="utf-8") as written:
        csv.writer(written).writerows(itertools.islice(csv.reader(read), limit + 1))
    return part


def as_older(folder: Path) -> None:
    """Says in the words of transformers 4 what a checkpoint of transformers 5 says of itself."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters", None) or config.get("rope_scaling") or {}
    config |= {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    config["torch_dtype"] = config.pop("dtype", config.get("torch_dtype"))
    file.write_text(json.dumps(config))
    file = folder / "tokenizer_config.json"
    tokenizer = json.loads(file.read_text())
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    file.write_text(json.dumps(tokenizer))
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    if merges := tokenizer["model"].get("merges"):  # pairs since tokenizers 0.20; one text before
        tokenizer["model"]["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    file.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


@contextmanager
def serving(bundle: Path) -> Iterator[str]:
    """The URL of a `polymerge serve` in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", str(bundle), "--port", str(port), "--engine", "transformers", "--quiet"]
    process = subprocess.Popen([*POLYMERGE, *words], stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        answers(url, process)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            if process.poll() is not None:
                raise SystemExit("polymerge serve ended before it listened") from None
            time.sleep(0.5)
    raise SystemExit("polymerge serve does not answer")


def run(words: Sequence[str], folder: Path | None = None, settings: dict[str, str] | None = None) -> float:
    """Seconds of a command that must succeed. The kit's sees nothing of this process's environment of Python."""
    environment = dict(os.environ)
    if folder:
        environment = {key: value for key, value in environment.items() if not re.match("PYTHON|VIRTUAL", key)}
        environment |= {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", **(settings or {})}
    began = time.monotonic()
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return time.monotonic() - began


if __name__ == "__main__":
    main()
