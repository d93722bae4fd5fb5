"""A merge on a Ray cluster of two worker machines (processes here), of which one is lost: the local run's bytes."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from polymerge import Bundle, merge
from polymerge.cli.main import main
from polymerge.errors import PolymergeError, SourceError
from polymerge.merging.ray import ray_cluster
from polymerge.merging.run import Progress
from tests.killed import assert_nothing_beside, content
from tests.merging.test_kill import LONG
from tests.sweep.experts import make_experts as make_any
from tests.tiny import make_experts

ray = pytest.importorskip("ray", reason="Ray is not installed (pip install -e '.[ray]')")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = make_experts("llama", tmp_path_factory.mktemp("long"), count=2, config=LlamaConfig(**LONG))
    return {"experts": {name: str(path) for name, path in made.items()}, "compress_rate": 0.6}


@pytest.fixture(scope="module")
def local(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return content(merge(recipe, tmp_path_factory.mktemp("local") / "b").path)


@pytest.fixture(scope="module")
def cluster(one_thread: None) -> Iterator[Any]:
    """A head that runs no tasks and two workers with one CPU each."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        started.add_node(num_cpus=1)
    started.wait_for_nodes()
    try:
        yield started
    finally:
        started.shutdown()


def machines() -> int:
    """That live and take tasks."""
    return sum(node["Alive"] and bool(node["Resources"].get("CPU")) for node in ray.nodes())


def test_a_cluster_gives_the_local_runs_bytes(
    cluster: Any, recipe: dict[str, Any], local: dict[str, bytes], tmp_path: Path
) -> None:
    with ray_cluster(cluster.address) as executor:
        assert content(merge(recipe, tmp_path / "b", executor=executor).path) == local


def test_a_merge_goes_from_threads_to_a_cluster_and_back(
    cluster: Any, recipe: dict[str, Any], local: dict[str, bytes], tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def after(count: int) -> Any:
        def progress(step: Progress) -> None:
            nonlocal count
            count -= 1
            if not count:
                raise Stop

        return progress

    with pytest.raises(Stop):
        merge(recipe, tmp_path / "b", progress=after(10))
    with ray_cluster(cluster.address) as executor, pytest.raises(Stop):
        merge(recipe, tmp_path / "b", resume=True, executor=executor, progress=after(10))
    steps: list[Progress] = []
    bundle = merge(recipe, tmp_path / "b", resume=True, progress=steps.append)
    assert len(steps) <= len(bundle.layers) - 20
    assert content(bundle.path) == local


@pytest.mark.parametrize("architecture", ["granitemoe", "mixtral"])
def test_matrices_that_lie_in_one_tensor_are_found_on_every_machine(
    cluster: Any, architecture: str, tmp_path: Path
) -> None:
    experts = make_any(architecture, tmp_path, count=2)
    if architecture == "mixtral":  # stored one by one, unless it is saved as the model holds it
        model = AutoModelForCausalLM.from_pretrained(experts["e1"])
        model.save_pretrained(tmp_path / "own", save_original_format=False)
        experts["e1"] = tmp_path / "own"
    recipe = {"experts": {name: str(path) for name, path in experts.items()}, "compress_rate": 0.6}
    expected = content(merge(recipe, tmp_path / "here").path)
    with ray_cluster(cluster.address) as executor:
        assert content(merge(recipe, tmp_path / "there", executor=executor).path) == expected


def test_a_workers_error_is_the_users_one_line(cluster: Any, tmp_path: Path) -> None:
    experts = make_experts("llama", tmp_path, count=2)
    file = experts["e1"] / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-4096:] = b"\xff" * 4096  # NaN
    file.write_bytes(data)
    recipe = {"experts": {name: str(path) for name, path in experts.items()}}
    with ray_cluster(cluster.address) as executor, pytest.raises(SourceError, match=r"'e1'.*NaN or infinite") as raised:
        merge(recipe, tmp_path / "b", executor=executor)
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "b").exists()


def test_a_cluster_that_cannot_be_reached_is_one_line() -> None:
    began = time.monotonic()
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1", "nowhere"):
        with pytest.raises(PolymergeError, match="cannot be reached") as raised, ray_cluster(address):
            pass
        assert len(str(raised.value).splitlines()) == 1
    assert time.monotonic() - began < 30


def test_the_command_merges_on_a_cluster(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = make_experts("llama", tmp_path, count=2)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"experts": {n: f"./{p.name}" for n, p in experts.items()}}))
    monkeypatch.chdir(tmp_path)  # a worker has another working folder
    there = ["--executor", "ray", "--address", cluster.address]
    for options, code, said in ((there, 0, "2 experts in"), (there[2:], 2, "--address belongs to --executor ray")):
        monkeypatch.setattr("sys.argv", ["polymerge", "merge", "recipe.yaml", "-o", "b", "--overwrite", *options])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == code
        printed = capsys.readouterr()
        assert said in printed.out + printed.err
    assert not list(Bundle.open("b").damaged_files())


# The last one, because a machine stays lost.
def test_a_lost_machine_costs_time_and_no_byte(
    cluster: Any, recipe: dict[str, Any], local: dict[str, bytes], tmp_path: Path
) -> None:
    lost = next(iter(cluster.worker_nodes))
    seen: list[Progress] = []

    def kill_one(step: Progress) -> None:
        seen.append(step)
        if len(seen) == 5:
            raylet = lost.all_processes["raylet"][0].process
            raylet.send_signal(signal.SIGKILL)

    with ray_cluster(cluster.address) as executor:
        bundle = merge(recipe, tmp_path / "b", executor=executor, progress=kill_one)
        until = time.monotonic() + 30  # the head notices some seconds later
        while machines() > 1 and time.monotonic() < until:
            time.sleep(0.2)
        assert machines() == 1
    assert len(seen) > 40 and seen[-1].done == seen[-1].total
    assert content(bundle.path) == local
    assert_nothing_beside(tmp_path / "b")
