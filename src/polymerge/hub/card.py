"""The model card of a bundle: its experts with sources and licences, what each kept, and how to use it.

Made from the manifest, the statistics and, where there is one, the assessment. Knows Markdown; asks no network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..bundle.bundle import Bundle
from ..bundle.inspect import Inspection, inspect_bundle
from ..paths import here
from ..recipe.rates import in_words
from ..router.record import assessment_file, has_router
from ..sources.opening import HUB_ID

UNKNOWN = "not stated"


def model_card(bundle: Bundle, repo: str, licences: Mapping[str, str | None]) -> str:
    """Markdown with the hub's front matter.

    Args:
        licences: expert -> its source's licence; None where nobody says one.
    """
    inspection = inspect_bundle(bundle)
    parts = [
        _head(bundle, licences),
        f"# {repo.partition('/')[2]}\n",
        f"{len(bundle.experts)} fine-tuned models in one: a polymerge bundle of one shared average and a small "
        f"residual for every expert. It is {inspection.share_of_one_model:.2f} times the size of one model.\n",
        _experts(bundle, inspection, licences),
        _measured(bundle),
        _use(bundle, repo),
        _made(bundle, inspection),
    ]
    return "\n".join(part for part in parts if part)


def _head(bundle: Bundle, licences: Mapping[str, str | None]) -> str:
    known = set(licences.values())
    bases = [shown_source(record.source) for record in bundle.manifest.experts.values() if is_hub_id(record.source)]
    data: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    data["tags"] = ["polymerge", "merge"]
    if bases:
        data |= {
            "base_model": [base.partition("@")[0] for base in dict.fromkeys(bases)],
            "base_model_relation": "merge",
        }
    if len(known) == 1 and None not in known:
        data["license"] = known.pop()
    return f"---\n{yaml.safe_dump(data, sort_keys=False)}---\n"


def is_hub_id(source: str) -> bool:
    return HUB_ID.fullmatch(source.partition("@")[0]) is not None and not here(source)


def shown_source(source: str) -> str:
    """A source as strangers may see it: of a path on somebody's disk, the last folder alone."""
    return source if is_hub_id(source) or source.startswith(("package:", "memory:")) else Path(source).name


def _experts(bundle: Bundle, inspection: Inspection, licences: Mapping[str, str | None]) -> str:
    rows = [
        "## Experts\n",
        "| expert | fine-tune | licence | energy of its residual kept | prediction |",
        "|---|---|---|---|---|",
    ]
    for e in inspection.experts:
        record = bundle.manifest.experts[e.name]
        revision = f"@{record.revision[:12]}" if record.revision and "@" not in record.source else ""
        source = f"`{_cell(shown_source(record.source))}{revision}`"
        words = _cell(e.verdict.words)
        rows.append(
            f"| {_cell(e.name)} | {source} | {licences.get(e.name) or UNKNOWN} | {e.energy_kept:.1%} | {words} |"
        )
    rows.append("\nEach expert stands under its own licence, and the average under all of them together.\n")
    return "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _measured(bundle: Bundle) -> str:
    """Accuracies of the assessment that lies inside; nothing where none does."""
    try:
        data = json.loads(assessment_file(bundle.path).read_text(encoding="utf-8"))
        fields, models = list(data["fields"]), data["candidates"]
        rows = {name: models[name]["accuracy"] for name in models}
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    table = ["## Measured\n", f"| expert | {' | '.join(map(_cell, fields))} |", "|---" * (len(fields) + 1) + "|"]
    for name, accuracy in rows.items():
        cells = [f"{accuracy[field]:.1%}" if accuracy.get(field) is not None else "-" for field in fields]
        table.append(f"| {_cell(name)} | {' | '.join(cells)} |")
    return "\n".join([*table, "\nAccuracy, by `polymerge assess`.\n"])


def _use(bundle: Bundle, repo: str) -> str:
    expert = bundle.experts[0]
    auto = (
        f'polymerge generate {repo} --expert auto "..."      # the router picks the expert\n'
        if has_router(bundle.path)
        else ""
    )
    peft = PEFT if bundle.code.peft_readable else PEFT_BY_EXPORT
    return USE.format(repo=repo, expert=expert, auto=auto, peft=peft.format(repo=repo, expert=expert))


def _made(bundle: Bundle, inspection: Inspection) -> str:
    manifest = bundle.manifest
    notes = "".join(f"- {note}\n" for note in manifest.notes)
    return (
        f"## How it was made\n\npolymerge {manifest.polymerge_version}: {inspection.architecture}, stored in "
        f"{manifest.dtype}, compress rate {in_words(manifest.method.compress_rate)}, code {manifest.method.code}, "
        f"scale {manifest.method.scale}. `merge_stats.jsonl` says what every tensor lost.\n\n{notes}"
    )


USE = """## Use

With polymerge, every row of a batch with its own expert:

```
polymerge generate {repo} --expert {expert} "..."
{auto}polymerge serve {repo}                        # OpenAI's API; every expert is a model name
```

With transformers alone, the average:

```python
from transformers import AutoModelForCausalLM

average = AutoModelForCausalLM.from_pretrained("{repo}")
```

{peft}
For vLLM and for llama.cpp or Ollama, an export has the expert's own norms and tables folded in:

```
polymerge export {repo} --to vllm -o for-vllm
polymerge export {repo} --to gguf -o for-llamacpp
```
"""
PEFT = """With PEFT, an expert over it:

```python
from peft import PeftModel

expert = PeftModel.from_pretrained(average, "{repo}", subfolder="experts/{expert}")
```
"""
PEFT_BY_EXPORT = """With PEFT, after an export, which decodes the residuals:

```
polymerge export {repo} --to peft --expert {expert} -o {expert}
```
"""
