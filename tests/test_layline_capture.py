"""`layline capture`: what it prints and writes, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

from click.testing import CliRunner, Result

from executor.capture import capture
from layline.cli import main
from planner.plan import Plan, save_plan
from tests.captures import cut, large_plan, llama
from tests.plans import tiny_layout, tiny_plan


def invoke(plan: Plan, folder: Path, *arguments: str) -> Result:
    save_plan(plan, folder / "plan.json")
    return CliRunner().invoke(main, ["capture", str(folder / "plan.json"), *arguments])


def test_the_command_tells_ops_collectives_and_memory(tmp_path: Path) -> None:
    model = replace(llama("8b"), num_layers=2)
    plan = large_plan(model, cut(model, 2, dp=2, tp=2, pp=2))
    told = invoke(plan, tmp_path, "--rank", "4", "-o", str(tmp_path / "capture.json"))
    assert told.exit_code == 0, told.output
    lines = [" ".join(line.split()) for line in told.stdout.splitlines()]
    assert lines[0].endswith("rank 4 of 8: pp 1, dp 0, tp 0, stage 1")
    # Two micro-batches of a layer's seven products and the head, at 2 m n k.
    widths = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 4096 * 128256
    assert f"mm forward 16 {2 * 2 * 4096 * widths / 2 / 1e12:,.3f}" in lines
    assert "recv send pp 2 2 32.0 MiB 64.0 MiB" in lines
    assert any(line.startswith("all ") and line.endswith("%)") for line in lines)
    written = json.loads((tmp_path / "capture.json").read_text())
    found = capture(plan, 4)
    assert written["peak_bytes"] == found.peak.total == sum(written["peak"].values())
    actions = [part["action"] for part in written["segments"] if part["action"]]
    assert actions[:3] == ["1RECV_F0", "1F0", "1RECV_F1"]
    listed = sum(len(written["lists"][part["list"]]) for part in written["segments"])
    assert listed == sum(row["count"] for row in written["ops"] + written["collectives"])
    assert json.loads(invoke(plan, tmp_path, "--rank", "4", "--json").stdout) == written


def test_the_command_refuses_by_exit_code(tmp_path: Path) -> None:
    plan = tiny_plan(tiny_layout(dp=2))
    wide = tiny_plan(replace(plan.layout, sharding="zero1"))
    for refused, arguments, code, words in (
        (plan, ["--rank", "2"], 3, "--rank is 2; it must be from 0 to 1"),
        (wide, [], 5, "layout.sharding is zero1; the executor knows sharding none alone"),
        (plan, ["-o", str(tmp_path / "plan.json")], 3, "is also read"),
    ):
        told = invoke(refused, tmp_path, *arguments)
        assert (told.exit_code, told.stdout) == (code, "")
        assert words in told.stderr
