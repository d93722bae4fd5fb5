"""The experts that a benchmark is about: the demo's, or those that its options name."""

from __future__ import annotations

import argparse
from pathlib import Path

from polymerge import Bundle
from polymerge.demo.run import BASE_PACKAGE, DemoSettings, load_skills
from polymerge.demo.skills import Skill, demo_skills
from polymerge.demo.train import TrainSettings, fine_tune
from polymerge.sources.gguf import package_gguf, unpack


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, help="measure the sources of this bundle")
    parser.add_argument("--experts", nargs="+", metavar="NAME=FOLDER", help="measure these experts")


def named_sources(options: argparse.Namespace) -> dict[str, str]:
    """Expert -> its source, as the options say; empty where they say nothing."""
    if options.bundle:
        return {name: record.source for name, record in Bundle.open(options.bundle).manifest.experts.items()}
    return dict(item.split("=", 1) for item in options.experts or ())


def demo_base() -> Path:
    """The folder of the model that the demo's experts come from."""
    return unpack(package_gguf(BASE_PACKAGE), label=f"package:{BASE_PACKAGE}")


def demo_experts(base: Path) -> tuple[list[Skill], dict[str, str]]:
    """The demo's skills, and their experts' folders: from the cache, or trained."""
    skills = load_skills(DemoSettings(output=Path()))
    return skills, {skill.name: str(fine_tune(base, skill, TrainSettings())) for skill in skills}


def demo_requests(skills: list[Skill], count: int) -> list[Skill]:
    """The demo's skills with as many held-out requests as asked for: the next ones of its generator, none of which any
    expert was trained on."""
    more = {}
    for skill in skills:
        held, trained = len(skill.test), len(skill.train)
        drawn = next(s for s in demo_skills(train=trained + max(0, count - held), test=held) if s.name == skill.name)
        assert drawn.test == skill.test and drawn.train[:trained] == skill.train
        more[skill.name] = (skill.test + drawn.train[trained:])[:count]
    return [Skill(skill.name, skill.train, more[skill.name]) for skill in skills]
