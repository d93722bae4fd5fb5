"""What libraries and polymerge's own log say while the command line speaks."""

from __future__ import annotations

import os


def hush_libraries() -> None:
    """transformers draws progress bars of its own for loading and saving; the command line has its own words."""
    from logging import getLogger

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in ("torchao", "torch.utils._pytree"):  # of kernels for other machines, when a base is quantised
        getLogger(name).setLevel("ERROR")


def log_to_stderr(level: str) -> None:
    """polymerge's own log lines, with their times."""
    import logging

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level="WARNING")
    logging.getLogger("polymerge").setLevel(level)


def hush_harness() -> None:
    """lm-evaluation-harness logs every step and draws a bar for each; the command line has its own words. Called
    before any library is imported that draws bars."""
    import logging

    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    hush_libraries()
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
