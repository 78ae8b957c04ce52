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
from profiles.cluster import Operation, UplinkSpec
from profiles.errors import InvalidInputError
from profiles.files import canonical_json
from profiles.goal import Goal
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


def changed(plan: Plan, **sections: object) -> Plan:
    """Return `plan` with other sections, sealed again."""
    return seal(**({name: getattr(plan, name) for name in plan.section_digests} | sections))


def test_a_plan_without_a_ranking_still_has_a_page() -> None:
    bare = changed(make_plan(), ranking=(), rejections=(), front=())
    assert "given, not searched for" in render_report([], [plan_view(bare)])


def test_the_certificate_accounts_for_every_layout() -> None:
    known = replace(
        make_plan().certificate, lower_bound=0.2, gap=0.1234, num_layouts=1_000_000,
        num_rejected={"divisibility": 1_000, "memory": 9_000, "limits": 0}, num_bounded=900_000,
        num_timed=40_000, num_open=50_000,
    )  # fmt: skip
    text = text_of(render_report([], [plan_view(changed(make_plan(), certificate=known))]))
    for words in (
        "No layout of this space is better in step time by more than 12.4 %.",
        "accounted for 1,000,000 100.0 % rejected: memory 9,000 0.9 % rejected: divisibility "
        "1,000 0.1 % bounded away, never timed 900,000 90.0 % timed by their full schedule 40,000 "
        "4.0 % left open when the search ended: the bound holds 50,000 5.0 %",
        "memory 9,000 dp=1, tp=1, pp=1, mb=8x1 needs 2.4 of 2.0 GiB",
        "number 4 of 1,000,000 layouts",
    ):
        assert words in text
    assert "rejected: limits" not in text
    assert "Proved best: no layout of this space is better in step time." in text_of(
        page_of("plan")
    )


@pytest.mark.parametrize(
    "objectives", [("step_time", "memory_headroom"), ("goodput", "joules_per_token", "step_time")]
)
def test_a_front_is_drawn_with_the_places_of_the_ranking(objectives: tuple[str, ...]) -> None:
    plan = make_plan(goal=Goal(objectives=objectives))
    powered = replace(plan.cluster, operation=Operation(watts_per_gpu=900.0))
    plan = changed(plan, cluster=powered, front=(0, 2))
    page = render_report([], [plan_view(plan)])
    (figure,) = re.findall(r"<svg[^>]*Layouts by the objectives.*?</svg>", page, flags=re.DOTALL)
    places = re.findall(r">(\d)</text>", figure)
    assert {"1", "3"} <= set(places) and "2" not in places
    assert figure.count(" [") == len(objectives)
    assert "The front of 2 layouts" in page
    assert re.search(r">1 \*</td>", page) and re.search(r">3 \*</td>", page)
    assert "Layouts by the objectives" not in page_of("plan")


def test_what_a_plan_rests_on_is_told_with_its_source() -> None:
    plan = make_plan(goal=Goal(objectives=("goodput",), limits={"step_time": 2.0}))
    uplinks = UplinkSpec(pod_nodes=384, oversubscription=7.0, source="a paper", date="2024-07-31")
    said = Operation(
        dollars_per_gpu_hour=2.5, watts_per_gpu=1_100.0, pue=1.2, restart_ns=300 * 10**9,
        checkpoint_stall_ns=5 * 10**9,
    )  # fmt: skip
    cluster = replace(plan.cluster, uplinks=uplinks, operation=said)
    text = text_of(render_report([], [plan_view(changed(plan, cluster=cluster))]))
    for words in (
        "over pods of 384 nodes at full rate, uplinks of 1 / 7 of their NICs (source: a paper, "
        "2024-07-31)",
        "price $2.5 a GPU-hour (source: the job file)",
        "power 1.1 kW a GPU with its share of the node (source: the job file)",
        "power PUE 1.2 (source: the job file)",
        "failures 300.0 s to restart (source: the job file)",
        "checkpoints stop the job for 5.000 s each (source: the job file)",
        "goal best goodput; step time at most 2.000 s",
        "note assumed 0.000474 interruptions per GPU-day: Llama 3 405B",
    ):
        assert words in text
    assert "to restart: MegaScale" not in text


def test_layouts_are_ranked_by_the_goal() -> None:
    plan = make_plan(goal=Goal(objectives=("memory_headroom",)))
    roomy = tuple(
        replace(each, peak_bytes=each.peak_bytes - place) for place, each in enumerate(plan.ranking)
    )
    (study,) = studies([plan_view(changed(plan, ranking=roomy))])
    assert study.ranking() == roomy[::-1]
    assert study.front() == frozenset()
