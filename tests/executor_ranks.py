"""A rank for tests: the executor's worker, which also saves the gradients of the first step.

In the folder of LAYLINE_TEST_FOLDER, plan i leaves `gradients-<i>-<rank>.npz`: the shards of each
rank by parameter name.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from executor.model import LlamaStage
from executor.shards import local
from executor.worker import main


def save(stages: Sequence[LlamaStage], numbers: Iterator[int]) -> None:
    """Write the gradients of `stages` under the next plan's number."""
    shards: dict[str, Any] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert parameter.grad is not None
            shards[name] = local(parameter.grad).detach().cpu().numpy()
    folder = Path(os.environ["LAYLINE_TEST_FOLDER"])
    np.savez(folder / f"gradients-{next(numbers)}-{os.environ['RANK']}.npz", **shards)


if __name__ == "__main__":
    NUMBERS = count()
    main(Path(sys.argv[1]), lambda stages: save(stages, NUMBERS))
