"""The page: one file, nothing from outside, hostile names escaped, every headline number there."""

import html
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from planner.layout import Layout
from planner.lower import simulate_plan, simulation_of
from planner.plan import Plan, save_plan, seal
from planner.waterfall import waterfall
from profiles.errors import InvalidInputError
from profiles.files import canonical_json
from reports.compare import compare
from reports.page import build_report, render_report
from reports.views import PlanView, RunView, order_agreement, studies
from reports.words import PART_NAMES, duration, size, utilization_text
from simulator.idle import stream_uses
from tests.machine import interleaved_plan
from tests.runs import make_layout, make_plan, make_record

HOSTILE = "</title><script src=http://x>alert('$1')</script>\"&"


def plan_view(plan: Plan, path: str = "plan.json") -> PlanView:
    return PlanView(path=path, plan=plan, predicted=simulate_plan(plan))


def run_view(layout: Layout, path: str = "run", *, slowdown: float = 1.0) -> RunView:
    plan = make_plan(layout)
    record = make_record(plan, slowdown=slowdown, scale={"all_reduce": 2.0})
    return RunView(path=path, plan=plan, predicted=simulate_plan(plan), record=record)


def text_of(page: str) -> str:
    page = re.sub(r"<(style|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


@cache
def page_of(what: str) -> str:
    """Return the page of one run, of several runs, or of a plan without a run."""
    if what == "plan":
        return render_report([], [plan_view(make_plan())])
    views = [run_view(make_layout(dp=2, pp=2), slowdown=1.1)]
    if what == "runs":
        views.append(run_view(make_layout(dp=4, pp=1), "runs/b"))
        views.append(run_view(make_layout(pp=4), "runs/c"))
    return render_report(views)


@pytest.mark.parametrize("what", ["run", "runs", "plan"])
def test_a_page_needs_nothing_from_outside(what: str) -> None:
    page = page_of(what)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert f'http-equiv="Content-Security-Policy" content="{policy}"' in page
    assert "<script" not in page
    assert "@import" not in page
    found = re.findall(r"""(?:\bsrc|\bhref)\s*=\s*["']?([^"'\s>]*)|url\(([^)]*)\)""", page)
    assert found
    assert all((attribute or url).strip("'\"").startswith("#") for attribute, url in found)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    anchors = set(re.findall(r'href="#([^"]+)"', page))
    assert anchors <= set(ids)


@pytest.mark.parametrize("what", ["run", "runs", "plan"])
def test_every_question_has_an_answer(what: str) -> None:
    questions = re.findall(r"<h2[^>]*>([^<]*)</h2>", page_of(what))
    assert questions[-2:] == ["What is it made of?", "How can it be repeated?"]
    for question in ("What was decided?", "Which layouts were compared?", "Why not the others?",
                     "Where does a step go?", "Does it fit?"):  # fmt: skip
        assert question in questions
    assert ("Did the run do what was predicted?" in questions) == (what != "plan")
    assert ("Did the runs come out as predicted?" in questions) == (what == "runs")


def test_the_headline_numbers_are_there() -> None:
    view = run_view(make_layout(dp=2, pp=2), slowdown=1.1)
    comparison = compare(view.plan, view.record, view.predicted)
    text = text_of(page_of("run"))
    tokens_per_s = view.plan.workload.tokens_per_step * 1e9 / comparison.measured_ns
    for number in (
        duration(comparison.predicted_ns),
        duration(comparison.measured_ns),
        f"{tokens_per_s:,.0f}",
        size(view.plan.memory[0].total),
        size(max(memory.peak_bytes for memory in view.record.memory)),
        "Confidence: measured.",
        str(view.plan.layout),
        view.plan.plan_digest,
        view.plan.profile.digest[:12],
        "divisibility 2",
        f"layline run run/plan.json --steps {len(view.record.steps)} -o run-again",
        *(explanation.text for explanation in comparison.explanations),
    ):
        assert number in text


def test_a_plan_with_several_stages_a_rank_has_a_page() -> None:
    plan = interleaved_plan()
    page = render_report([], [plan_view(plan)])
    text = text_of(page)
    for words in (str(plan.layout), "4F0 is the forward of 0 on stage 4", "0,2", "1,3"):
        assert words in text
    assert "stages 1,3" in page


def test_an_extrapolated_plan_says_so() -> None:
    text = text_of(render_report([], [plan_view(make_plan(is_extrapolated=True))]))
    assert "Confidence: extrapolated." in text
    assert "nobody has run it yet" in text


def test_the_parts_of_the_step_and_their_formula_are_there() -> None:
    view = run_view(make_layout(dp=2, pp=2))
    found = waterfall(view.plan, stream_uses(simulation_of(view.plan)))
    sentence = utilization_text(view.plan, found)
    assert sentence.startswith(f"MFU {100 * (found.mfu or 0):.1f} %, HFU ")
    assert sentence.endswith("(step x 4 ranks x 100.0 GFLOP/s dense fp32)")
    assert sentence in text_of(page_of("run"))
    assert text_of(page_of("runs")).count("What the predicted step goes to") == 3
    for part, ns in found.parts_ns.items():
        assert f">{PART_NAMES[part]}<" in page_of("run")
        assert f">{duration(ns)}<" in page_of("run")


def test_hostile_names_are_escaped() -> None:
    plan = make_plan(model_name=HOSTILE, reason=HOSTILE)
    runs = [
        RunView(
            path=HOSTILE + str(number),
            plan=plan,
            predicted=simulate_plan(plan),
            record=replace(make_record(plan), data=HOSTILE),
        )
        for number in (1, 2)
    ]
    page = render_report(runs)
    assert "<script" not in page
    assert text_of(page).count(HOSTILE) > 5


def test_order_is_judged_only_where_the_measured_gap_is_clear() -> None:
    near = order_agreement([("a", 100, 109), ("b", 101, 100)])
    assert (near.num_pairs, near.wrong) == (0, ())
    wrong = order_agreement([("a", 100, 120), ("b", 101, 100)])
    assert (wrong.num_pairs, wrong.wrong) == (1, (("b", "a"),))
    assert "pairs of runs" in text_of(page_of("runs"))


def test_plans_of_other_inputs_are_told_apart() -> None:
    one, other = make_plan(), make_plan(model_name="other")
    page = render_report([], [plan_view(one), plan_view(other)])
    assert "other on local: Does it fit?" in page
    assert "llama-tiny on local: Does it fit?" in page
    assert len(studies([plan_view(one), plan_view(make_plan(make_layout(pp=4)))])) == 1


def test_files_become_a_page_and_always_the_same(tmp_path: Path) -> None:
    plan = make_plan()
    save_plan(plan, tmp_path / "plan.json")
    run = tmp_path / "run"
    run.mkdir()
    save_plan(plan, run / "plan.json")
    (run / "record.json").write_text(canonical_json(make_record(plan)), encoding="utf-8")
    page = build_report([tmp_path / "plan.json", run])
    assert page == build_report([tmp_path / "plan.json", run])
    # The plan is the run's own: it is not told twice.
    assert page.count("What was decided?") == 2
    assert "nobody has run it yet" not in page
    assert "nobody has run it yet" in build_report([tmp_path / "plan.json"])


def test_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one plan or run"):
        build_report([])
    with pytest.raises(InvalidInputError, match="is not there"):
        build_report([tmp_path])


def test_a_plan_without_a_ranking_still_has_a_page() -> None:
    plan = make_plan()
    sections = {name: getattr(plan, name) for name in plan.section_digests}
    bare = seal(**{**sections, "ranking": (), "rejections": (), "num_layouts": 1})
    assert "given, not searched for" in render_report([], [plan_view(bare)])
