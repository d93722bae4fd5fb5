"""Every verb that writes, killed: the old state or the new one, the same bytes in the end, no stranger's file moved."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from polymerge import Bundle, add_expert, export_dense, merge, remove_expert, verify
from polymerge.compete import compete
from polymerge.errors import BundleError
from polymerge.router.fit import fit_samples
from polymerge.router.record import read_arrays, read_record, read_texts, router_folder
from polymerge.router.settings import FitSettings
from tests.compete.test_run import make_input, pipeline
from tests.killed import content, moves_until_death, started
from tests.router.scripted import ScriptedEngine, make_samples
from tests.staged.scripted import ScriptedThinker
from tests.tiny import COMMON, make_experts

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {**COMMON, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}
RATE = {"compress_rate": 0.6}
# Names that polymerge uses, or used once, with something before or after; and those of others' tools.
DECOYS = (
    "out.previous",
    "out.writing",
    "out.partial.bak",
    "out2.partial",
    ".out",
    ".out.polymerge",
    "out.lock",
    "x.partial",
    ".polymerge",
    "parts",
    "previous",
    "bundle",
    "merge.json",
    "polymerge.json",
    "polymerge.json.writing",
    ".0123456789ab-0123456789ab.polymerge",
)


@dataclass(frozen=True)
class Verb:
    """Attributes:
    do: what is killed: gets the folder with `out` in it, and what was made for all.
    again: after a kill, until it is done.
    """

    do: Callable[[Path, Path], object]
    again: Callable[[Path, Path], object]


def sources(made: Path) -> dict[str, str]:
    return {f"e{n}": str(made / f"llama-0-{n}") for n in range(3)}


def do_merge(folder: Path, made: Path) -> None:
    experts = {name: path for name, path in sources(made).items() if name != "e2"}
    merge({"experts": experts, **RATE}, folder / "out", overwrite=True, resume=True)


def do_add(folder: Path, made: Path) -> None:
    add_expert(folder / "out", "e2", sources(made)["e2"])


def do_remove(folder: Path, made: Path) -> None:
    remove_expert(folder / "out", "e1")


def do_export(folder: Path, made: Path) -> None:
    export_dense(made / "old", "e1", folder / "out", overwrite=True)


def do_fit(folder: Path, made: Path) -> None:
    experts = {"math": "e0", "shell": "e1", "json": "e0"}
    engine = ScriptedEngine(("e0", "e1"))
    fitted = fit_samples(
        folder / "out",
        engine,
        make_samples(6, seed=5),
        make_samples(4, seed=6),
        settings=FitSettings(),
        experts=experts,
    )
    fitted.router.save(folder / "out")


def do_compete(folder: Path, made: Path) -> None:
    compete(pipeline(thinker=ScriptedThinker()), made / "test.csv", folder / "out", overwrite=True)


def unless(error: type[Exception], do: Callable[[Path, Path], object]) -> Callable[[Path, Path], None]:
    """Done already is done, and cleans up as well."""

    def again(folder: Path, made: Path) -> None:
        try:
            do(folder, made)
        except error as refused:
            assert "already holds" in str(refused) or "no expert" in str(refused)

    return again


VERBS = {
    "merge": Verb(do_merge, do_merge),
    "add": Verb(do_add, unless(BundleError, do_add)),
    "remove": Verb(do_remove, unless(BundleError, do_remove)),
    "export": Verb(do_export, do_export),
    "router fit": Verb(do_fit, do_fit),
    "compete": Verb(do_compete, do_compete),
}


def state(verb: str, folder: Path) -> object:
    """What a user has, once it was opened: a bundle heals when it is."""
    out = folder / "out"
    if verb == "compete":
        return out.read_bytes()
    if verb == "export":
        return content(out) if out.exists() else content(folder / "out.partial" / "previous")
    bundle = Bundle.open(out)
    if verb == "router fit":
        router = router_folder(out)
        record = read_record(router)
        return (
            record,
            {k: v.tobytes() for k, v in read_arrays(router, record).items()},
            read_texts(router, record.samples),
        )
    listed = {name: (out / name).read_bytes() for name in bundle.manifest.files}
    assert not list(bundle.damaged_files())
    return bundle.manifest, listed


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources, an old bundle with a router, an old export and the competition's input."""
    folder = tmp_path_factory.mktemp("made")
    make_experts("llama", folder, config=LlamaConfig(**TINY))
    experts = {name: path for name, path in sources(folder).items() if name != "e2"}
    merge({"experts": experts, **RATE, "seed": 1}, folder / "old")
    engine, samples = ScriptedEngine(("e0", "e1")), make_samples(5)
    fields = dict.fromkeys(("math", "shell", "json"), "e0")
    fit_samples(folder / "old", engine, samples, settings=FitSettings(), experts=fields).router.save(folder / "old")
    export_dense(folder / "old", "e0", folder / "old export")
    make_input(folder, 70)
    return folder


def fresh(verb: str, made: Path, folder: Path) -> None:
    """The old state, with strangers' files beside it."""
    folder.mkdir(parents=True)
    if verb == "compete":
        (folder / "out").write_text("an old submission")
    else:
        shutil.copytree(made / ("old export" if verb == "export" else "old"), folder / "out")
    for name in DECOYS:
        if name.endswith(("partial", "previous", "parts", "bundle")):
            (folder / name).mkdir()
            (folder / name / "mine").write_text("years of work")
        else:
            (folder / name).write_text("years of work")


def decoys(folder: Path) -> dict[str, str]:
    return {
        name: (folder / name / "mine" if (folder / name).is_dir() else folder / name).read_text() for name in DECOYS
    }


@pytest.fixture(scope="module")
def states(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[object, object]]:
    """The state before and after every verb, undisturbed."""
    known: dict[str, tuple[object, object]] = {}

    def get(verb: str) -> tuple[object, object]:
        if verb not in known:
            folder = tmp_path_factory.mktemp("undisturbed") / "f"
            fresh(verb, made, folder)
            before = state(verb, folder)
            VERBS[verb].do(folder, made)
            known[verb] = before, state(verb, folder)
        return known[verb]

    return get


def kill_at_once(verb: str, folder: Path, made: Path, call: int, after: bool) -> None:
    moves_until_death(lambda: VERBS[verb].do(folder, made), call, after, folder.with_name("calls"))


def just_do(verb: str, folder: Path, made: Path) -> None:
    torch.set_num_threads(1)
    VERBS[verb].do(folder, made)


def assert_old_or_new(verb: str, folder: Path, made: Path, states: Callable[[str], tuple[object, object]]) -> bool:
    """Whether it is the new one. In the end it is, with nothing half-done beside it."""
    old, new = states(verb)
    assert decoys(folder) == dict.fromkeys(DECOYS, "years of work")
    now = state(verb, folder)
    assert now in (old, new)
    VERBS[verb].again(folder, made)
    assert state(verb, folder) == new
    left = {path.name for path in folder.iterdir()} - {*DECOYS, "out"}
    assert left <= {".out.polymerge.lock"}
    assert decoys(folder) == dict.fromkeys(DECOYS, "years of work")
    if verb in ("merge", "add", "remove", "router fit"):
        assert verify(folder / "out").ok
        assert not [path for path in (folder / "out").rglob("*") if path.name.startswith(".")]
    return now == new and old != new


def count_moves(verb: str, made: Path, folder: Path) -> int:
    fresh(verb, made, folder)
    process = started(kill_at_once, verb, folder, made, -1, False)
    process.join(100)
    assert process.exitcode == 0
    return int(folder.with_name("calls").read_text())


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "merge"])  # which has its own such test
def test_a_kill_around_a_move_leaves_the_old_state_or_the_new_one(
    made: Path, states: Callable[[str], tuple[object, object]], tmp_path: Path, verb: str
) -> None:
    moves = count_moves(verb, made, tmp_path / "count" / "f")
    news = set()
    for call in range(max(1, moves - 7), moves + 1):
        folder = tmp_path / str(call) / "f"
        fresh(verb, made, folder)
        process = started(kill_at_once, verb, folder, made, call, True)
        process.join(100)
        assert process.exitcode == -signal.SIGKILL
        news.add(assert_old_or_new(verb, folder, made, states))
    assert True in news and moves >= 2


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_kills_at_random_moments(
    made: Path, states: Callable[[str], tuple[object, object]], tmp_path: Path, verb: str
) -> None:
    """20 a verb, 120 in all, spread over the time that the work takes."""
    draw, kills, longest = random.Random(verb), 0, 0.0
    for number in range(200):
        folder = tmp_path / str(number) / "f"
        fresh(verb, made, folder)
        began = time.monotonic()
        process = started(just_do, verb, folder, made)
        if longest:
            time.sleep(longest * draw.random())
            process.kill()
        process.join(100)
        longest = longest or time.monotonic() - began
        kills += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (0, -signal.SIGKILL)
        assert_old_or_new(verb, folder, made, states)
        shutil.rmtree(folder)
        if kills == 20:
            return
    raise AssertionError(f"{kills} kills in 200 runs")
