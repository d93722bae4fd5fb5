"""Where an export is written: in a work folder beside its place, to which it is moved when whole.

The bundle that is exported must stay what it is meanwhile (`polymerge.bundle.reading.steady`), and so must what it was
made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..bundle.bundle import Bundle
from ..bundle.files import check_free_space, disk_errors
from ..bundle.lock import writing
from ..bundle.manifest import MANIFEST
from ..bundle.place import begin_work, check_own, discard_work, mark_of, publish, restore, work_folder
from ..errors import OutputExistsError
from ..paths import here

KIND = "export"


@contextmanager
def placed(output: Path, bundle: Bundle, *, overwrite: bool, needed: int = 0) -> Iterator[Path]:
    """An empty folder for the block to fill. It is at the output's place when the block has ended well.

    Args:
        output: as `polymerge.bundle.place.settled` gives it.
        bundle: what is exported. Neither it nor its sources are overwritten.
        needed: bytes that will be written.

    Raises:
        OutputExistsError, LockedError, DiskSpaceError: before anything is written.
    """
    check_place(output, bundle, overwrite=overwrite)
    check_free_space(output.parent, needed)
    with disk_errors(output), writing(output):
        restore(output)
        work = work_folder(output)
        if (mark_of(work) or {}).get("polymerge") == KIND:  # an export that was killed is not gone on with
            discard_work(work)
        check_place(output, bundle, overwrite=overwrite)
        folder = begin_work(work, KIND) / "model"
        folder.mkdir()
        try:
            yield folder
        except BaseException:
            discard_work(work)
            raise
        publish(folder, output)


def check_place(output: Path, bundle: Bundle, *, overwrite: bool) -> None:
    """Raises OutputExistsError unless a model may be exported to `output`."""
    if output.exists() and not overwrite:
        raise OutputExistsError(f"{output}: exists; give --overwrite to replace it, or another --output")
    if output.exists() and not (output.is_dir() and _is_export(output)):
        raise OutputExistsError(f"{output}: exists and is not an exported model; it is never overwritten")
    lost = _held(output, bundle) if output.exists() else None
    if lost is not None:
        raise OutputExistsError(f"{output}: holds {lost}, which {bundle.path} is made of; it is never overwritten")
    check_own(work_folder(output))


def _held(output: Path, bundle: Bundle) -> Path | None:
    """The bundle, or a source of it, where it is the folder or lies in it."""
    records = bundle.manifest.experts.values()
    said = [str(bundle.path), *(text for record in records for text in (record.source, record.base) if text)]
    there, folder = filter(None, map(here, said)), output.resolve()
    return next((path for path in there if folder in (path.resolve(), *path.resolve().parents)), None)


def _is_export(folder: Path) -> bool:
    known = ("config.json", "adapter_config.json")
    if (folder / MANIFEST).exists():  # a bundle, perhaps the very one that is exported
        return False
    return not any(folder.iterdir()) or any((folder / name).exists() for name in known)
