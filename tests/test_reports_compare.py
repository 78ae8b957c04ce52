"""Comparisons: a case worked by hand, and the sum that must always be exact."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.lower import simulate_plan
from profiles.files import canonical_json
from profiles.profile import PROFILE_SCHEMA_VERSION, Profile
from reports.compare import compare, exposed_ns, format_comparison, scales_from
from simulator.timeline import Span, Timeline
from tests.machine import interleaved_plan
from tests.runs import MS, make_layout, make_plan, make_record, predict

KINDS = ("forward", "backward", "send", "all_reduce", "optimizer", "data", "other")
TIMES = st.fixed_dictionaries({}, optional={kind: st.integers(0, 10**12) for kind in KINDS})


def timeline_of(times: dict[str, int]) -> Timeline:
    start_ns = 0
    spans = []
    for kind, time_ns in times.items():
        spans.append(Span(rank=0, stream="compute", name=kind, kind=kind,  # type: ignore[arg-type]
                          start_ns=start_ns, end_ns=start_ns + time_ns))  # fmt: skip
        start_ns += time_ns
    return Timeline(source="simulated", spans=tuple(spans))


@given(
    predicted=TIMES,
    measured=TIMES,
    predicted_step_ns=st.integers(1, 10**13),
    measured_step_ns=st.integers(1, 10**13),
    slowdown=st.floats(0.1, 20),
)
def test_contributions_lead_exactly_from_predicted_to_measured(
    predicted: dict[str, int],
    measured: dict[str, int],
    predicted_step_ns: int,
    measured_step_ns: int,
    slowdown: float,
) -> None:
    plan = make_plan(make_layout(pp=1), step_ns=predicted_step_ns)
    record = replace(
        make_record(plan, kind_ns=(measured,), step_ns=measured_step_ns),
        machine_slowdown=slowdown,
    )
    comparison = compare(plan, record, timeline_of(predicted))
    parts = [explanation.contribution_ns for explanation in comparison.explanations]
    assert predicted_step_ns + sum(parts) == measured_step_ns
    assert [abs(part) for part in parts] == sorted(map(abs, parts), reverse=True)


def test_a_case_worked_by_hand() -> None:
    plan = make_plan(make_layout(pp=1), step_ns=100 * MS)
    record = make_record(
        plan, kind_ns=({"forward": 44 * MS, "backward": 70 * MS},), step_ns=125 * MS
    )
    record = replace(record, machine_slowdown=1.1)
    predicted = timeline_of({"forward": 40 * MS, "backward": 50 * MS})
    predicted = replace(predicted, spans=(*predicted.spans, Span(
        rank=1, stream="compute", name="x", kind="other", start_ns=0, end_ns=100 * MS
    )))  # fmt: skip
    comparison = compare(plan, record, predicted)
    found = [(part.name, part.contribution_ns / MS) for part in comparison.explanations]
    # Predicted idle is 100 - 90, measured 125 - 114; forward is wholly explained by the machine.
    assert found == [("backward", 15.0), ("machine", 9.0), ("idle", 1.0)]
    assert comparison.ratio == 1.25
    assert not comparison.is_within_band


def test_the_busiest_rank_is_compared_with_its_stage() -> None:
    plan = make_plan(make_layout(dp=2, pp=2))
    times = ({"forward": 5}, {"forward": 6}, {"forward": 9}, {"forward": 9})
    comparison = compare(plan, make_record(plan, kind_ns=times), predict(plan.layout))
    assert comparison.critical_rank == 2
    assert comparison.critical.stages == (1,)
    assert [rank.stages for rank in comparison.ranks] == [(0,), (0,), (1,), (1,)]


def test_a_rank_with_several_stages_is_compared_as_one() -> None:
    plan = interleaved_plan()
    predicted = simulate_plan(plan)
    record = replace(
        make_record(make_plan(make_layout(pp=2))),
        plan_digest=plan.plan_digest,
        kind_ns=tuple(exposed_ns(predicted, rank) for rank in range(2)),
        median_step_ns=predicted.makespan_ns,
    )
    comparison = compare(plan, record, predicted)
    assert [rank.stages for rank in comparison.ranks] == [(0, 2), (1, 3)]
    peaks = [rank.predicted_peak_bytes for rank in comparison.ranks]
    assert peaks == [memory.total for memory in plan.memory]
    critical = comparison.critical_rank
    assert f"rank {critical} (stages {critical},{critical + 2})" in format_comparison(comparison)


def test_a_run_as_predicted_has_nothing_to_explain() -> None:
    plan = make_plan()
    comparison = compare(plan, make_record(plan), predict(plan.layout))
    assert comparison.explanations == ()
    assert comparison.is_within_band


def test_it_is_json() -> None:
    plan = make_plan()
    comparison = compare(plan, make_record(plan), predict(plan.layout))
    assert json.loads(canonical_json(comparison))["layout"] == str(plan.layout)


def test_a_record_of_another_plan_is_refused() -> None:
    plan = make_plan()
    record = make_record(make_plan(make_layout(pp=4)))
    with pytest.raises(ValueError, match="the record belongs to plan"):
        compare(plan, record, predict(plan.layout))


def test_text_fits_a_terminal() -> None:
    plan = make_plan(make_layout(dp=2, pp=2))
    record = make_record(plan, slowdown=1.2, scale={"send": 4.0, "all_reduce": 2.5})
    text = format_comparison(compare(plan, record, predict(plan.layout)))
    assert max(map(len, text.splitlines())) <= 100
    assert "the machine ran 1.20 x slower" in text
    assert str(plan.layout) in text


def test_recalibration_scales_what_was_off() -> None:
    plan = make_plan(make_layout(dp=2, pp=1))
    record = make_record(
        plan,
        kind_ns=({"forward": 50, "backward": 70, "all_reduce": 30},) * 2,
        step_ns=150,
    )
    predicted = timeline_of({"forward": 40, "backward": 60, "all_reduce": 20, "optimizer": 7})
    profile = Profile(
        schema_version=PROFILE_SCHEMA_VERSION,
        device=plan.profile.device,
        kernels=(),
        collectives=(),
        host_ns={},
        context_bytes=0,
        versions={},
        measured_at="",
        scales={"compute": 2.0, "optimizer": 1.5},
    )
    scales = scales_from(profile, compare(plan, record, predicted)).scales
    assert scales == {"compute": 2.4, "host": 1.2, "communication": 1.5, "optimizer": 1.5}


@given(
    ends=st.lists(
        st.tuples(
            st.sampled_from(["compute", "to 0", "to 2"]),
            st.sampled_from(KINDS),
            st.integers(0, 50),
            st.integers(0, 9),
        ),
        max_size=12,
    )
)
def test_exposed_time_counts_every_instant_once(ends: list[tuple[str, str, int, int]]) -> None:
    spans = tuple(
        Span(
            rank=0,
            stream=stream,
            name="x",
            kind=kind,  # type: ignore[arg-type]
            start_ns=start_ns,
            end_ns=start_ns + time_ns,
        )
        for stream, kind, start_ns, time_ns in ends
    )
    timeline = Timeline(source="simulated", spans=spans)
    exposed = exposed_ns(timeline, 0)
    assert sum(exposed.values()) == timeline.makespan_ns
    covered = {ns for span in spans for ns in range(span.start_ns, span.end_ns)}
    assert exposed["idle"] == timeline.makespan_ns - len(covered)


def test_messages_that_a_run_cannot_see_are_read_as_idle() -> None:
    plan = make_plan(make_layout(pp=2))
    times = ({"forward": 10 * MS, "backward": 20 * MS},) * 2
    comparison = compare(
        plan, make_record(plan, kind_ns=times, step_ns=100 * MS), predict(plan.layout)
    )
    sends = [time for rank in comparison.ranks for time in rank.kinds if time.kind == "send"]
    assert all(time.predicted_ns == time.measured_ns == 0 for time in sends)
