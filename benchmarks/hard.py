"""Experts of real data: `real` moved as far as a short fine-tune moves them, `hard` ones far.

    python benchmarks/hard.py --data ../shared/data                    # trains what the cache lacks, prints the folders
    python benchmarks/hard.py --data ../shared/data --set real

Two thousand short examples make a hard expert, one epoch at a high learning rate: 40 minutes each on one core, once.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from chosen import demo_base
from polymerge.demo.skills import Skill, read_skills
from polymerge.demo.train import TrainProgress, TrainSettings, fine_tune

SETS = {
    "real": (("support", "bash", "math", "rewrite"), TrainSettings(steps=60)),
    "hard": (("support", "bash", "slots"), TrainSettings(steps=400, batch=5, learning_rate=1e-3, warmup=20)),
}
TEST_EXAMPLES = 200


def real_experts(base: Path, data: Path, chosen: str, only: tuple[str, ...] = ()) -> tuple[list[Skill], dict[str, str]]:
    """The skills of a set with their held-out requests, and the experts' folders: from the cache, or trained."""
    names, settings = SETS[chosen]
    skills = read_skills(data, list(names), train=settings.steps * settings.batch, test=TEST_EXAMPLES)
    skills = [skill for skill in skills if not only or skill.name in only]
    return skills, {skill.name: str(fine_tune(base, skill, settings, _say)) for skill in skills}


def hard_experts(base: Path, data: Path, names: tuple[str, ...] = ()) -> tuple[list[Skill], dict[str, str]]:
    return real_experts(base, data, "hard", names)


def _say(progress: TrainProgress) -> None:
    if progress.step % 10 == 0:
        print(
            f"{time.strftime('%H:%M')} {progress.skill} {progress.step}/{progress.steps} loss {progress.loss:.3f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with NAME/train.jsonl and NAME/test.jsonl")
    parser.add_argument("--set", default="hard", choices=SETS)
    parser.add_argument("--skills", nargs="+", default=(), help="train these now")
    options = parser.parse_args()
    _, sources = real_experts(demo_base(), options.data, options.set, tuple(options.skills))
    for name, folder in sources.items():
        print(f"{name}={folder}")


if __name__ == "__main__":
    main()
