"""Every command block of README.md and docs/ is run, in a folder of tiny models with the names that the pages use.

What can't be run here is listed, with the reason. A page's blocks run in order in one folder, in this process and by
the command line's own `main`; servers are stopped as soon as they have answered. Where a page shows several ways to
make one thing, each makes it anew.
"""

import itertools
import json
import re
import shlex
import shutil
import sys
import threading
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from polymerge import merge
from polymerge.cli.main import main
from polymerge.serve import start as serve_start
from polymerge.serve.run import Running
from polymerge.staged import opening
from tests.tiny import make_experts, text_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Blocks that show what is printed, or what lies in a folder: by the beginning of their first line.
SHOWN = {
    "README.md": [" exact match on held-out requests"],
    "format.md": ["bundle/"],
    "scale.md": ["answering    about 37.2 GB"],
    "cli.md": ["polymerge "],  # the usage of each command, made from its --help (tests/test_docs.py)
}
# Lines that only show what a command printed stand in its block, below a line that begins with "$ ".

# Commands that are not run here, by their beginnings: why not, and what tries them instead.
INSTALLS = "installs packages: the registry is no part of a test"
VLLM = "needs vLLM; `pytest -m vllm` starts it"
CLUSTER = "needs the machines of a cluster; `pytest -m ray` has one on this machine"
HUB = "needs a model hub; tests/hub has a stand-in"
BENCHMARK = "a benchmark of minutes or hours; tests/benchmarks and the page's own figures"
UNLIKE = "models made at random are so far from each other that no rate reaches it; tests/search/test_find.py"
DATA = "trains models on data that is not in the repository"
NOT_RUN = {
    "make demo": "minutes of training; CI runs it",
    "make test": "these tests",
    "pip install": INSTALLS,
    "python3 -m venv": INSTALLS,
    "/tmp/vllm/bin/pip": INSTALLS,
    "POLYMERGE_VLLM_PYTHON=": VLLM,
    "vllm serve": VLLM,
    "ray start": CLUSTER,
    "polymerge merge recipe.yaml -o bundle --executor ray": CLUSTER,
    "polymerge push": HUB,
    "polymerge generate your-org/bundle": HUB,
    "polymerge eval bundle --tasks gsm8k": "tasks whose data a hub has; tests/evaluate has local ones",
    "polymerge merge recipe.yaml -o bundle --target kl": UNLIKE,
    "polymerge merge recipe.yaml -o bundle --target accuracy": UNLIKE,
    "python benchmarks/": BENCHMARK,
    "locust": "loads a server with another's tool, in an environment of its own",
    "python - >": "writes the prompts of locust",
    "python -c": "writes the demo's held-out requests for the next command",
    "lm_eval": "another's client of a server that runs; tests/serve/test_clients.py is that client",
    "curl": "asks a server that runs for what tests/serve/test_experts.py asks",
    "ollama": "needs Ollama",
    "SKILLS=": DATA,
    "polymerge demo": "minutes of training; tests/demo runs it small",
    "polymerge export demo-output": "of the demo's bundle, which is not made here",
    "polymerge compete demo-output": "of the demo's bundle, which is not made here",
    "polymerge merge recipes/neurips2024.yaml": "three models of eight billion parameters, of a hub",
    "polymerge compete bundle --input test.csv -o submission.csv --staged --recipe": "a thinker of a hub",
    "POLYMERGE_URL=": "the kit's own environment; tests/clients/test_kit.py runs it",
    "polymerge generate bundle --staged --policy always --thinker package:gemma3": "a package of 250 MB",
    "polymerge generate bundle --staged --policy always --thinker https:": "an endpoint; tests/staged has a stand-in",
    "polymerge serve bundle --engine llamacpp": "needs llama.cpp; `pytest -m llamacpp` starts it",
    "polymerge export bundle --to gguf": "writes the tokenizers that llama.cpp has; tests/export/gguf makes such a one",
}
# What stands for a model that only a hub has, and what keeps a long search short.
STANDS_FOR = {
    "your-org/llama-3-8b-code@v2": "./llama-3-8b-code",
    "org/c": "./c",
    "DIR": "data",
}
MADE_SHORT = {"polymerge search": ["--trials", "2"], "polymerge sweep": ["--rates", "0.9,0.95", "--codes", "int4"]}
BEFORE = {"eval.md": ["polymerge router fit bundle --data data"]}  # what a page takes for done
SLOW = {"assess.md", "codes.md", "eval.md", "README.md"}
Run = Callable[[str], None]
NAMES = ("math", "code")
SAID = {"math": ["{0} plus {1}", "add {0} to {1}"], "code": ["def f{0}(): x{1}", "print list {0} of {1}"]}


def blocks_of(page: Path) -> list[str]:
    """The page's blocks of commands or of what they print: those of no language, or of a shell's."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [block for language, block in fenced if language in ("", "console", "bash", "sh")]


def commands_of(block: str) -> Iterator[str]:
    """Whole commands: a backslash, an open quotation or a text to read join lines. With a "$ " others are output."""
    lines = block.splitlines()
    marked = any(line.startswith("$ ") for line in lines)
    while lines:
        text = lines.pop(0)
        if (marked and not text.startswith("$ ")) or not text.strip() or text.lstrip().startswith("#"):
            continue
        text = text.removeprefix("$ ")
        while _open(text):
            text += "\n" + lines.pop(0)
        if ends := re.search(r"<<'(\w+)'", text):
            lines = lines[lines.index(ends[1]) + 1 :]
        yield text.strip()


def _open(text: str) -> bool:
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return True
    return text.endswith("\\")


def inline_of(page: Path) -> list[str]:
    """The commands inside the page's sentences. A verb's name alone is none, nor are its options alone."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    quoted = [" ".join(words.split()) for words in re.findall(r"`(polymerge [^`]+)`", text)]
    return [command for command in quoted if len(command.split()) > 2 and not command.split()[2].startswith("-")]


def reason_of(command: str) -> str | None:
    plain = re.sub(r"^(?:(?:PYTHONPATH|OMP_NUM_THREADS)=\S+ )+", "", command)
    return next((beginning for beginning in NOT_RUN if plain.startswith(beginning)), None)


def shown(page: Path, block: str) -> bool:
    return any(block.startswith(beginning) for beginning in SHOWN.get(page.name, []))


def runnable(page: Path) -> list[str]:
    commands = [c for block in blocks_of(page) if not shown(page, block) for c in commands_of(block)]
    return [command for command in commands if reason_of(command) is None]


def rows_of(name: str, start: int, count: int) -> str:
    lines = []
    for n in range(start, start + count):
        form = SAID[name][n % 2].format(n, n + 3)
        answer = {"answer": str(n), "final": str(n)} if name == "math" else {"answer": "ok"}
        lines.append(json.dumps({"prompt": form, **answer}))
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the pages name: experts, recipes, data, a bundle."""
    folder = tmp_path_factory.mktemp("pages")
    tokenizer = text_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    made = make_experts("llama", folder / "made", count=2, config=config)
    called = ("math", "m", "llama-3-8b-math", "thinker"), ("code", "c", "json", "llama-3-8b-code", "llama-3-8b-law")
    for path, names in zip(made.values(), called, strict=True):
        tokenizer.save_pretrained(path)
        # nearly every token ends an answer: random models would go on to the last
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(2, 240))}))
        for name in names:
            (folder / name).symlink_to(path, target_is_directory=True)
    (folder / "recipe.yaml").write_text("experts: {math: ./math, code: ./code}\n")
    (folder / "assess.yaml").write_text(
        "candidates: {math: ./math, code: ./code}\nmerge: {compress_rate: 0.95}\nmemory_gb: 48\nlimit: 2\n"
        "fields: {math: [data/math/test.jsonl], code: [data/code/test.jsonl]}\n"
    )
    for place in ("data", "my-data"):
        for name in NAMES:
            (folder / place / name).mkdir(parents=True)
            for file, start, count in (("train", 0, 24), ("validation", 100, 12), ("test", 200, 4)):
                (folder / place / name / f"{file}.jsonl").write_text(rows_of(name, start, count))
    (folder / "my-tasks").mkdir()
    (folder / "my-tasks" / "my_task.yaml").write_text(
        "task: my_task\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'choices.jsonl'}}}}}\n"
        "doc_to_text: '{{prompt}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{choices.index(answer)}}'\n"
        "metric_list: [{metric: acc}]\n"
    )
    (folder / "choices.jsonl").write_text('{"prompt": "1 plus 1", "answer": "2", "choices": ["2", "3"]}\n' * 2)
    (folder / "validation").mkdir()
    for file in ("math", "prompts", "rows", "shots", "validation/math"):
        (folder / f"{file}.jsonl").write_text(rows_of("math", 300, 2))
    for file in ("code", "validation/law"):
        (folder / f"{file}.jsonl").write_text(rows_of("code", 300, 2))
    (folder / "test.csv").write_text(
        "id,input,eval_type,answer_choices\n0,1 plus 2,generation,\n1,1 plus 3,multiple_choice,\"['4', '5']\"\n"
    )
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    merge({"math": str(folder / "math"), "code": str(folder / "code")}, folder / "bundle")
    return folder


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Servers take a free port, and end when they have said what they serve; a list of what they said."""
    serve_bundle, said = serve_start.serve_bundle, list[str]()

    def served(*bundle: Any, **options: Any) -> None:
        def ready(running: Running) -> None:
            options["told"](running)
            threading.Thread(target=ask, args=(running,)).start()

        def ask(running: Running) -> None:
            try:
                with urllib.request.urlopen(f"{running.url}/v1/models", timeout=60) as answer:
                    said.append(answer.read().decode())
            finally:
                running.stop()

        options["told"] = options.pop("on_ready")
        serve_bundle(*bundle, **{k: v for k, v in options.items() if k != "told"} | {"port": 0, "on_ready": ready})

    monkeypatch.setattr(serve_start, "serve_bundle", served)
    return said


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stopping: list[str]
) -> Callable[[str], None]:
    def ran(command: str) -> None:
        words = [STANDS_FOR.get(word, word) for word in shlex.split(command, comments=True)]
        words = [re.sub(r"=(.+)", lambda m: "=" + STANDS_FOR.get(m[1], m[1]), word) for word in words]
        words += [word for beginning, more in MADE_SHORT.items() if command.startswith(beginning) for word in more]
        assert words[0] == "polymerge", f"{command}: run by nobody; list it in NOT_RUN with the reason"
        _clear(words)
        monkeypatch.setattr(sys, "argv", words)
        heard = len(stopping)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other libraries, which the command line hides
            with pytest.raises(SystemExit) as ended:
                main()
        printed = capsys.readouterr()
        assert ended.value.code in (0, None), f"{command}\n{printed.out[-1500:]}\n{printed.err[-1500:]}"
        assert words[1] != "serve" or "math" in stopping[heard]

    return ran


def _clear(words: list[str]) -> None:
    """What a command is to make is not there yet."""
    for flag, value in itertools.pairwise(words):
        if flag in ("-o", "--output", "--html"):
            folder = Path(value).is_dir() and not Path(value).is_symlink()
            shutil.rmtree(value) if folder else Path(value).unlink(missing_ok=True)


RUN = [page for page in PAGES if runnable(page)]


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=[pytest.mark.slow] if p.name in SLOW else [], id=p.name) for p in RUN]
)
def test_the_blocks_of_a_page_run(
    page: Path, world: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(world, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(opening, "DEFAULT_THINKER", str(folder / "thinker"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    for command in [*BEFORE.get(page.name, []), *runnable(page)]:
        run(command)


def test_the_commands_inside_the_guides_sentences_run(
    world: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(world, tmp_path / "here", symlinks=True))
    commands = [command for command in inline_of(ROOT / "docs" / "guide.md") if reason_of(command) is None]
    assert len(commands) >= 8 and {"plan", "merge", "inspect", "verify", "export", "add", "remove"} == {
        command.split()[1] for command in commands
    }
    for command in commands:
        run(command)


def test_what_is_not_run_is_still_there() -> None:
    """No line of the lists is about a command or a block that is gone."""
    blocks = [(page, block) for page in PAGES for block in blocks_of(page)]
    used = {reason_of(command) for page, block in blocks if not shown(page, block) for command in commands_of(block)}
    gone = sorted(NOT_RUN.keys() - used)
    assert not gone
    for name, beginnings in SHOWN.items():
        for beginning in beginnings:
            assert any(page.name == name and block.startswith(beginning) for page, block in blocks), (name, beginning)


def test_a_command_is_whole() -> None:
    block = "a 'b\nc' d   # e\n\n# f\ng \\\n  h\ni <<'END' > k\nl\nEND\nm\n"
    assert list(commands_of(block)) == ["a 'b\nc' d   # e", "g \\\n  h", "i <<'END' > k", "m"]
    assert list(commands_of("$ a\nb\n$ c\n")) == ["a", "c"]
