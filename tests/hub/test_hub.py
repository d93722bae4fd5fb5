"""A bundle goes to the hub and comes back byte for byte; what cannot work is one line before a byte is sent."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from polymerge import Bundle, inspect_bundle, pull_bundle, push_bundle, remove_expert
from polymerge.bundle.hub import hub_id
from polymerge.cli.main import main
from polymerge.errors import BundleError, LockedError
from polymerge.hub.card import model_card
from tests.conftest import Merged
from tests.hub.standin import Hub, Repo, standin_for_all

# huggingface_hub's own, of the library that it sends with
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with standin_for_all(tmp_path) as made:
        monkeypatch.chdir(tmp_path)
        yield made


@pytest.fixture
def bundle(merged: Merged) -> Bundle:
    return merged("llama", compress_rate=0.6)[0]


def test_a_bundle_comes_back_byte_for_byte_and_is_private(hub: Hub, bundle: Bundle) -> None:
    pushed = push_bundle(bundle, "org/three")
    assert pushed.private and hub.repos["org/three"].private
    pulled = pull_bundle("org/three")
    assert pulled.path.name == "three" and pulled.digest == bundle.digest
    for name in [*bundle.manifest.files, "polymerge.json", "merge_stats.jsonl"]:
        assert (pulled.path / name).read_bytes() == (bundle.path / name).read_bytes(), name
    assert {path.name for path in Path().iterdir()} - {"cache"} == {"three", ".three.polymerge.lock"}


def test_every_reader_takes_a_hub_id_and_no_writer_does(
    hub: Hub, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    push_bundle(bundle, "org/three")
    assert inspect_bundle("org/three").experts == inspect_bundle(bundle).experts
    monkeypatch.setattr("sys.argv", ["polymerge", "verify", "org/three"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0, capsys.readouterr()
    with pytest.raises(LockedError, match=r"the hub's cache, which is only read; `polymerge pull`"):
        remove_expert("org/three", "e0")
    with monkeypatch.context() as offline:  # undone before the stand-in's own settings are
        offline.setattr(constants, "HF_HUB_OFFLINE", True)  # what is in the cache needs no network
        assert Bundle.open("org/three").digest == bundle.digest


def test_a_push_that_broke_goes_on_with_what_is_missing(hub: Hub, bundle: Bundle) -> None:
    hub.fail_after = 2
    with pytest.raises(BundleError, match=r"org/three: Error while uploading .* \(status 400\); run it again"):
        push_bundle(bundle, "org/three")
    first, hub.fail_after = list(hub.sent), None
    push_bundle(bundle, "org/three")
    assert len(first) == 2 and len(hub.sent) == len(set(hub.sent)) > 2  # nothing is sent twice
    large = [name for name in bundle.manifest.files if name.endswith(".safetensors")]
    assert all(hub.repos["org/three"].files[name] == (bundle.path / name).read_bytes() for name in large)


def test_of_what_is_no_bundle_nothing_is_loaded_and_a_pull_leaves_nothing(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["org/model"] = Repo(private=False, commits=[{"config.json": b"{}", "model.safetensors": b"x" * 99}])
    for wrong in ("org/model", "org/nobody"):
        for read in (pull_bundle, Bundle.open):
            with pytest.raises(BundleError, match=f"^{wrong}: "):
                read(wrong)
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(BundleError, match="cannot be reached"):
            pull_bundle("org/model")
    assert not [request for request in hub.requests if "config.json" in request or "model.safetensors" in request]
    assert not list(Path().glob("*.partial"))


def test_a_smaller_bundle_leaves_nothing_of_the_larger_one(hub: Hub, bundle: Bundle) -> None:
    push_bundle(bundle, "org/three")
    hub.repos["org/three"].commits[-1]["experts/gone/adapter_model.safetensors"] = b"old"
    push_bundle(bundle, "org/three")
    assert not [name for name in hub.repos["org/three"].files if "gone" in name]


def test_what_cannot_work_is_one_line_before_a_byte_is_sent(
    hub: Hub, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BundleError, match="three: not a hub id; write org/name"):
        push_bundle(bundle, "three")
    hub.repos["org/other"] = Repo(private=False, commits=[{"model.safetensors": b"x"}])
    with pytest.raises(BundleError, match="org/other: holds something that is no bundle"):
        push_bundle(bundle, "org/other")
    with pytest.raises(BundleError, match=r"org/other: that repository is no bundle: it has no polymerge\.json"):
        Bundle.open("org/other")
    with pytest.raises(BundleError, match=r"org/nobody: neither a folder here nor a repository .* is it private\?"):
        Bundle.open("org/nobody")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(BundleError, match="org/three: no token to write with"):
        push_bundle(bundle, "org/three")
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{place.getsockname()[1]}")
    with pytest.raises(BundleError, match="cannot be reached, so nothing was sent"):
        push_bundle(bundle, "org/three")
    assert not hub.sent and not [request for request in hub.requests if "commit" in request]


def test_no_token_is_ever_said(
    hub: Hub, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    monkeypatch.setattr("sys.argv", ["polymerge", "push", str(bundle.path), "org/three"])
    with caplog.at_level("DEBUG"), pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and "hf auth login" in said.err and said.err.count("Traceback") == 0
    monkeypatch.setenv("HF_TOKEN", hub.token)
    with caplog.at_level("DEBUG"), pytest.raises(SystemExit) as ended:
        main()
    said_too = capsys.readouterr()
    assert ended.value.code == 0 and "private" in said_too.out
    everything = "".join([said.err, said.out, said_too.err, said_too.out, caplog.text])
    assert "hf_wrong" not in everything and hub.token not in everything
    assert not [data for data in hub.repos["org/three"].files.values() if hub.token.encode() in data]


def test_a_pull_that_was_changed_on_the_way_is_refused(hub: Hub, bundle: Bundle) -> None:
    push_bundle(bundle, "org/three")
    files = hub.repos["org/three"].files
    files["config.json"] = files["config.json"].replace(b"1", b"2", 1)
    with pytest.raises(BundleError, match=r"org/three: .*config\.json"):
        pull_bundle("org/three")
    assert not Path("three").exists()


def test_the_card_says_sources_without_folders_and_licences_and_how_to_use_it(bundle: Bundle) -> None:
    card = model_card(bundle, "org/three", {"e0": "mit", "e1": None, "e2": "mit"})
    head, rest = card.split("---\n")[1], card.split("---\n", 2)[2]
    assert "license:" not in head and "polymerge" in head
    for expert, record in bundle.manifest.experts.items():
        assert f"| {expert} | `{Path(record.source).name}` |" in rest and record.source not in card
    assert "| mit |" in rest and "| not stated |" in rest
    for words in ("polymerge generate org/three", 'subfolder="experts/e0"', "--to vllm", "--to gguf", "AutoModel"):
        assert words in rest
    assert "license: mit" in model_card(bundle, "org/three", dict.fromkeys(bundle.experts, "mit"))


def test_a_path_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert hub_id("org/name") == "org/name" and hub_id(Path("org/name@v2")) == "org/name@v2"
    for words in ("runs/lost", "name", "/org/name", "./a/b/c", str(tmp_path)):
        assert hub_id(words) is None, words
