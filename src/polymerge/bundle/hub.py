"""Bundles that live on the model hub: which words name one, and how it gets here.

Knows hub ids (`org/name`, `org/name@revision`), the hub's cache, and how its errors are told in one line. Does not know
how a bundle gets there (`polymerge.hub`). The token is huggingface_hub's own affair: it is never read here, and never
part of a message.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import BundleError
from ..paths import here
from ..sources.hub import download_begins, hub_answers
from ..sources.opening import HUB_ID
from .manifest import MANIFEST


def hub_id(text: str | Path) -> str | None:
    """The words themselves where they name a repository and no folder of this machine; None otherwise.

    A path whose first folder is here is a path, also where its last is not.
    """
    words = str(text)
    repo = words.partition("@")[0]
    if not HUB_ID.fullmatch(repo) or here(words) or here(repo.partition("/")[0]):
        return None
    return words


def fetched(words: str) -> Path:
    """The folder of the hub's cache that holds a bundle; what is there already is not loaded again.

    Raises:
        BundleError: it is not there, is no bundle, or the hub cannot be reached.
    """
    return snapshot(words, None)


def snapshot(words: str, folder: Path | None) -> Path:
    """A repository's files in a folder, or in the hub's cache. Never code, whatever the repository holds.

    Raises:
        BundleError: as `fetched`.
    """
    from huggingface_hub import constants, hf_hub_download, snapshot_download

    repo, _, revision = words.partition("@")
    cached = not hub_answers()
    if cached and folder is not None:
        raise BundleError(f"{words}: {constants.ENDPOINT} cannot be reached")
    if not cached:
        download_begins()
    version, endpoint = revision or None, constants.ENDPOINT
    with hub_errors(words):
        if not cached:  # the manifest first: of a repository that is no bundle nothing else is loaded
            hf_hub_download(repo, MANIFEST, revision=version, local_dir=folder, endpoint=endpoint)
        place = Path(
            snapshot_download(
                repo, revision=version, local_dir=folder, local_files_only=cached, ignore_patterns=["*.py"],
                endpoint=endpoint,
            )
        )  # fmt: skip
    if not (place / MANIFEST).is_file():
        raise BundleError(_NO_BUNDLE.format(words))
    return place


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Whatever the hub's library raises, as one line that says what was asked for.

    Raises:
        BundleError: always one of these.
    """
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.RepositoryNotFoundError:
        raise BundleError(
            f"{what}: neither a folder here nor a repository of {constants.ENDPOINT} that may be read; is it private? "
            "then `hf auth login`, or HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise BundleError(f"{what}: the repository has no such revision") from None
    except errors.RemoteEntryNotFoundError:
        raise BundleError(_NO_BUNDLE.format(what)) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no"
        raise BundleError(
            f"{what}: the hub refused (status {status}); {_REFUSED.get(str(status), 'try later')}"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise BundleError(
            f"{what}: no such folder here; not in the hub's cache, and {constants.ENDPOINT} could not give it"
        ) from None
    except RuntimeError as error:  # of an upload thread
        cause = error.__cause__
        response = cause.response if isinstance(cause, errors.HfHubHTTPError) else None
        why = f"status {response.status_code}" if response is not None else type(cause).__name__
        raise BundleError(f"{what}: {' '.join(str(error).split())[:200]} ({why}); run it again") from None
    except (ValueError, ConnectionError) as error:
        raise BundleError(f"{what}: {' '.join(str(error).split())[:200]}") from None


_NO_BUNDLE = f"{{}}: that repository is no bundle: it has no {MANIFEST}"
_REFUSED = {
    "401": "the token is not known there: `hf auth login`",
    "403": "the token may not do this: it needs the right to write, and the organisation's leave",
    "409": "somebody else writes there at this moment",
    "413": "it is too large",
}
