"""`layline validate` as a user meets it: the table, the JSON of the contract, and bad input."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from layline import validate
from layline.cli import main
from planner.plan import PeakMemory
from planner.predict import Prediction
from planner.setup import Setup
from profiles.profile import Cost

Call = Callable[..., Result]

HEADER = "id,framework,model,hidden,ffn,layers,heads,seq_len,gpu,gpus,global_batch,metric,value"
RUNS = f"""\
{HEADER}
lab-1,torchtitan,llama-3-8b,4096,14336,32,32,8192,H100,8,8,step_time_s,2
lab-2,torchtitan,llama-3-8b,4096,14336,32,32,8192,H100,8,8,oom,1
new-1,torchtitan,llama-3-8b,4096,14336,32,32,8192,Abacus,8,8,step_time_s,2
"""


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """A command in a folder of its own, with a model that says 1 s and 10 GiB of everything."""

    def predict(_: Setup) -> Prediction:
        memory = PeakMemory(parameters=10 << 30, gradients=0, optimizer=0, activations=0,
                            temporary=0, context=0)  # fmt: skip
        step = Cost(p10_ns=9 * 10**8, p50_ns=10**9, p90_ns=3 * 10**9)
        return Prediction(step=step, memory=(memory,), parts={})

    monkeypatch.setattr(validate, "reference_predict", predict)
    monkeypatch.chdir(tmp_path)
    Path("runs.csv").write_text(RUNS)
    return lambda *words: CliRunner().invoke(main, ["validate", *words], catch_exceptions=False)


def test_the_table_and_the_json(call: Call) -> None:
    done = call("runs.csv", "--json", "out.json")
    assert done.exit_code == 0, done.output
    assert "lab" in done.stdout
    assert 'unsupported: 1 x gpu is "Abacus"; known are ' in done.stdout
    assert "wrote out.json" in done.stdout
    written = json.loads(Path("out.json").read_text())
    assert written["groups"]["lab"]["median_abs_rel_err"] == 0.5
    assert [row["status"] for row in written["rows"]] == ["scored", "scored", "unsupported"]
    assert written["inputs"][0]["name"] == "runs.csv"
    first = Path("out.json").read_bytes()
    call("runs.csv", "--json", "out.json")
    assert Path("out.json").read_bytes() == first


def test_several_files_are_scored_together(call: Call) -> None:
    Path("more.csv").write_text(RUNS.replace("lab-", "other-"))
    done = call("runs.csv", "more.csv", "--json", "out.json")
    assert done.exit_code == 0
    assert list(json.loads(Path("out.json").read_text())["groups"]) == ["lab", "new", "other"]


def test_the_page_of_the_docs(call: Call) -> None:
    Path("docs").mkdir()
    done = call("runs.csv", "--page", "docs")
    assert done.exit_code == 0, done.output
    page = Path("docs/accuracy.md").read_text()
    assert "`layline validate runs.csv --page docs`" in page
    assert "(accuracy.svg)" in page
    assert Path("docs/accuracy.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "the header is without id, model"), (HEADER + "\n", "has no rows"),
     (RUNS.replace("gpus", "cards"), "the header is without gpus; it must name each column once")],
)  # fmt: skip
def test_files_that_cannot_be_scored_are_invalid_input(call: Call, text: str, message: str) -> None:
    Path("runs.csv").write_text(text)
    done = call("runs.csv")
    assert (done.exit_code, message in done.stderr) == (3, True), done.output


def test_outputs_are_checked_before_the_work(call: Call) -> None:
    assert call("runs.csv", "--json", "runs.csv").exit_code == 3
    assert call("runs.csv", "--json", "none/out.json").exit_code == 3
    assert call("runs.csv", "--page", "none").exit_code == 3
    assert call("none.csv").exit_code == 3
    assert Path("runs.csv").read_text() == RUNS
