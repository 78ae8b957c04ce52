"""A real rank for tests: its second step, traced as a capture traces it, as canonical JSON.

In the folder of LAYLINE_TEST_FOLDER, plan i leaves `trace-<i>-<rank>.json`.
"""

import os
import sys
from pathlib import Path

from executor.capture import trace_step, unfolded
from executor.capture_trace import Trace
from executor.data import load_stream
from executor.job import RunJob
from executor.recipe import recipe_of
from executor.train import Trainer
from planner.plan import load_plan
from profiles.files import canonical_json, load, write_text
from profiles.measure.ranks import joined


def main(path: Path) -> None:
    job = load(RunJob, path, "run job", "start runs with `layline run`")
    stream, rank = load_stream(None), int(os.environ["RANK"])
    for index, name in enumerate(job.directories):
        recipe = recipe_of(load_plan(Path(name, "plan.json")))
        with joined(f"plan{index}", "cpu") as device:
            trace = Trace()
            trainer = Trainer(recipe, stream, device, rank, trace.clock)
            trainer.recorder.begin()
            trainer.step(0)
            trainer.recorder.end()
            step = trace_step(trainer, trace)
        segments = unfolded(step, recipe.schedule, recipe.schedule, trainer.place.pp)
        file = Path(os.environ["LAYLINE_TEST_FOLDER"], f"trace-{index}-{rank}.json")
        write_text(file, canonical_json({"segments": segments, "held": step.held}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
