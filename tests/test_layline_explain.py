"""What `layline plan` says of a choice, word for word, on a world whose numbers fit on paper."""

from dataclasses import replace
from pathlib import Path

from layline.explain import comparison_text, explanation_text
from planner.explain import Explanation, explain, why
from planner.flips import Point, Sensitivity
from profiles.job import Job
from tests.worlds import WORLD, paper_job, read

GOLDEN = Path(__file__).parent / "golden"


def explained(job: Job) -> Explanation:
    return explain(job, WORLD, WORLD.search(job))


def why_not(text: str, job: Job) -> str:
    found = why(job, WORLD.costs(job), WORLD.search(job), read(text, job))
    return comparison_text(found)


def test_an_explanation_reads_as_a_colleague_would_tell_it() -> None:
    said = explanation_text(explained(paper_job(gib=12.0, tp=(1, 2), recompute=("none",))))
    assert said + "\n" == (GOLDEN / "explanation.txt").read_text()


def test_why_not_another_layout_says_what_it_takes_and_what_keeps_it_out() -> None:
    job = paper_job(gib=12.0, tp=(1, 2), recompute=("none",))
    said = "\n\n".join(why_not(text, job) for text in ("tp=1,pp=1", "tp=8,pp=1,mb=1", "tp=1,pp=8"))
    assert said + "\n" == (GOLDEN / "why_not.txt").read_text()


def test_the_choice_itself_is_no_rival() -> None:
    job = paper_job()
    text = str(WORLD.search(job).ranking[0].layout)
    said = why_not(text, job)
    assert said.startswith(f"why {text}\nIt is the chosen layout. A step takes 57.0 ms")
    assert "difference" not in said


def test_no_line_is_wider_than_a_terminal_unless_a_layout_is() -> None:
    for line in explanation_text(explained(paper_job())).splitlines():
        assert len(line) <= 100


def test_what_there_is_not_is_said_so() -> None:
    found = explained(paper_job())
    nothing = replace(found, runner_up=None, near_misses=(), thumb=None, sensitivities=())
    said = explanation_text(nothing)
    assert "there is no runner-up" in said
    assert "Nothing better is near" in said
    assert "has no layout for this job" in said
    best = WORLD.search(paper_job()).ranking[0]
    lost = Point(factor=2.0, value="", best=None, kept=None, is_flip=False, reason="it is too long")
    gone = Point(
        factor=0.5, value="16 sequences", best=best, kept=None, is_flip=True, reason="no such batch"
    )
    batch = Sensitivity(knob="global_batch", value="32 sequences", base_ns=1, points=(gone, lost))
    links = replace(batch, knob="inter_node_rate", points=(), reason="the cluster is one node")
    said = explanation_text(replace(found, sensitivities=(batch, links)))
    assert "it holds at x1 only, of what was tried; nothing at x2: it is too long." in said
    assert "- at x1/2 (16 sequences) another split into stages; the choice does not exist" in said
    assert "rate between nodes, 32 sequences: not tried, the cluster is one node." in said
