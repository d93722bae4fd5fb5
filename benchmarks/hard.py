"""Experts that moved far: fine-tunes on real data, of short examples and at a high learning rate.

    python benchmarks/hard.py --data ../shared/data                    # trains what the cache lacks, prints the folders

The other benchmarks take them with `--hard DATA`. Two thousand examples an expert are an epoch: some 40 to 60 minutes each on one
core, once.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from chosen import demo_base
from polymerge.demo.skills import Skill, read_skills
from polymerge.demo.train import TrainProgress, TrainSettings, fine_tune

SKILLS = ("support", "bash", "slots")
SETTINGS = TrainSettings(steps=400, batch=5, learning_rate=1e-3, warmup=20)
TEST_EXAMPLES = 200


def hard_experts(base: Path, data: Path, names: tuple[str, ...] = SKILLS) -> tuple[list[Skill], dict[str, str]]:
    """The skills with their held-out requests, and the experts' folders: from the cache, or trained."""
    skills = read_skills(data, list(SKILLS), train=SETTINGS.steps * SETTINGS.batch, test=TEST_EXAMPLES)
    skills = [skill for skill in skills if skill.name in names]
    return skills, {skill.name: str(fine_tune(base, skill, SETTINGS, _say)) for skill in skills}


def _say(progress: TrainProgress) -> None:
    if progress.step % 10 == 0:
        print(
            f"{time.strftime('%H:%M')} {progress.skill} {progress.step}/{progress.steps} loss {progress.loss:.3f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with NAME/train.jsonl and NAME/test.jsonl")
    parser.add_argument("--skills", nargs="+", default=SKILLS, choices=SKILLS, help="train these now")
    options = parser.parse_args()
    _, sources = hard_experts(demo_base(), options.data, tuple(options.skills))
    for name, folder in sources.items():
        print(f"{name}={folder}")


if __name__ == "__main__":
    main()
