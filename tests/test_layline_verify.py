"""The race of the best layouts: on made-up ranks for every way it can end, and once for real."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from layline.verify import Verification, VerifiedPlan, check_verifiable, verify, verify_best
from layline.verify_text import interrupted_text, verification_text
from layline.walk import costs_for
from planner.plan import Plan, save_plan, seal
from planner.record import StepRecord
from planner.search import search
from profiles.errors import UnsupportedError
from profiles.files import canonical_json, plain, write_text
from profiles.job import read_job
from profiles.measure.ranks import RanksFailedError
from tests.machine import made_up_job, made_up_profile
from tests.runs import MS, make_layout, make_plan, make_record

LAYOUTS = (make_layout(dp=4, pp=1), make_layout(dp=2, tp=2, pp=1), make_layout(pp=4))
PLANS = [make_plan(layout, step_ns=(400 + 10 * i) * MS) for i, layout in enumerate(LAYOUTS)]
TEXT = Path(__file__).parent / "golden" / "verification.txt"

StepTimes = Callable[[int, int], int]
"""The step in ns of a plan, by its place, in the n-th block of all; it may raise."""


class MadeUpRanks:
    """Ranks that take a made-up time a step, and leave what real ones leave."""

    def __init__(self, step_ns: StepTimes) -> None:
        self.step_ns, self.launches = step_ns, list[list[int]]()
        self.numbers: Iterator[int] = count()

    def __call__(
        self,
        plans: Sequence[Plan],
        directories: Sequence[Path],
        *,
        num_steps: int,
        on_step: Callable[[int, StepRecord], None] | None,
    ) -> None:
        """Run each of `plans` in turn, as `run_series` does."""
        assert on_step is not None
        self.launches.append([])
        for index, (plan, directory) in enumerate(zip(plans, directories, strict=True)):
            place = PLANS.index(plan)
            self.launches[-1].append(place)
            directory.mkdir()
            save_plan(plan, directory / "plan.json")
            step_ns = self.step_ns(place, next(self.numbers))
            record = make_record(plan, step_ns=step_ns, num_steps=num_steps)
            for step in record.steps:
                on_step(index, step)
            write_text(directory / "record.json", canonical_json(record))


def steady(*steps_ms: float) -> StepTimes:
    """Return the times of plans that take `steps_ms`, on a machine that grows slower and slower."""

    def step_ns(place: int, number: int) -> int:
        shake = (place * 7 + number * number) % 5 - 2
        return round(steps_ms[place] * MS * (1 + 0.02 * number + 0.002 * shake))

    return step_ns


def test_the_measurement_overrules_the_model_and_the_slower_is_run_no_more() -> None:
    ranks = MadeUpRanks(steady(440, 400, 900))
    found = verify(PLANS, run=ranks)
    assert [plan.verdict for plan in found.plans] == ["slower", "best", "slower"]
    assert (found.chosen, found.outcome, found.is_as_predicted) == (1, "best", False)
    low, high = found.plans[0].slower_by or (0, 0)
    assert 0 < low < 0.10 < high < 0.25
    assert found.num_launches == len(ranks.launches) == 2
    assert 2 not in ranks.launches[1]
    assert [len(plan.blocks_ns) for plan in found.plans][2] < found.num_rounds
    assert found.num_steps == 5


def test_equal_plans_are_a_tie_and_the_prediction_decides() -> None:
    found = verify(PLANS[:2], run=MadeUpRanks(lambda place, number: 400 * MS + number % 3 - place))
    assert (found.outcome, found.chosen) == ("tie", 0)
    assert "differ by less than 1 %, and it was predicted the fastest" in verification_text(found)


def test_what_the_rounds_do_not_tell_is_said() -> None:
    noisy = MadeUpRanks(lambda place, number: (400 + 20 * (number * number % 5) - place) * MS)
    found = verify(PLANS[:2], max_rounds=4, run=noisy)
    assert (found.outcome, found.num_rounds) == ("open", 4)
    text = verification_text(found)
    assert "not certain after 4 rounds" in text
    assert "not told apart: -" in text
    once = verify(PLANS[:2], max_rounds=1, run=noisy)
    assert once.plans[0].interval_ns is once.plans[1].slower_by is None
    assert "too few rounds to tell" in verification_text(once)
    assert json.loads(canonical_json(once))["outcome"] == "open"


def test_a_plan_that_fails_is_out_and_the_others_go_on() -> None:
    steps = steady(400, 500, 450)

    def step_ns(place: int, number: int) -> int:
        if (place, number) == (0, 5):
            raise RanksFailedError("rank 1: OutOfMemoryError: CUDA out of memory\nmore")
        return steps(place, number)

    ranks = MadeUpRanks(step_ns)
    found = verify(PLANS, run=ranks)
    assert ranks.launches[0] == [0, 1, 2, 2, 1, 0]
    assert all(0 not in launch for launch in ranks.launches[1:])
    assert [plan.verdict for plan in found.plans] == ["failed", "slower", "best"]
    assert "failed: rank 1: OutOfMemoryError: CUDA out of memory\n" in verification_text(found)
    assert found.plans[0].reason.endswith("more")


def test_where_all_fail_each_reason_is_told() -> None:
    def step_ns(place: int, _number: int) -> int:
        raise RanksFailedError(f"no memory for {place}")

    with pytest.raises(RanksFailedError) as caught:
        verify(PLANS[:2], run=MadeUpRanks(step_ns))
    assert str(caught.value).splitlines() == [
        f"{plan.layout}: no memory for {place}" for place, plan in enumerate(PLANS[:2])
    ]


def test_an_interrupt_leaves_what_is_known() -> None:
    steps = steady(440, 400)

    def interrupted(at: int) -> MadeUpRanks:
        def step_ns(place: int, number: int) -> int:
            if number == at:
                raise KeyboardInterrupt
            return steps(place, number)

        return MadeUpRanks(step_ns)

    found = verify(PLANS[:2], run=interrupted(at=5))
    assert (found.is_interrupted, found.outcome, found.chosen) == (True, "open", 1)
    assert [len(plan.blocks_ns) for plan in found.plans] == [3, 2]
    assert interrupted_text(found).startswith("3 rounds of the race begun; the choice is the best")
    at_once = verify(PLANS[:2], run=interrupted(at=0))
    assert at_once.chosen == 0
    assert "the model's choice, as nothing was measured yet" in verification_text(at_once)


def sharded(plan: Plan) -> Plan:
    """Return `plan` with a layout that the executor does not know."""
    sections = {name: getattr(plan, name) for name in plan.section_digests}
    return seal(**{**sections, "layout": replace(plan.layout, sharding="zero1")})


def test_what_cannot_be_run_is_out_before_anything_starts() -> None:
    ranks = MadeUpRanks(steady(400, 400, 400))
    found = verify([sharded(PLANS[0]), PLANS[1]], run=ranks)
    assert ranks.launches == [[1]]
    assert [plan.verdict for plan in found.plans] == ["failed", "best"]
    assert "layout.sharding is zero1" in found.plans[0].reason
    assert "the only one that was trained" in verification_text(found)
    with pytest.raises(UnsupportedError, match="none of the best 1 layouts can be run"):
        verify([sharded(PLANS[0])], run=ranks)


def test_a_job_for_another_place_is_refused() -> None:
    job = made_up_job(num_ranks=2)
    check_verifiable(job)
    elsewhere = replace(job, cluster=replace(job.cluster, name="rented", local_device=""))
    with pytest.raises(UnsupportedError, match=r"not on cluster rented.*preset = .local"):
        check_verifiable(elsewhere)
    roomy = replace(job, goal=replace(job.goal, objectives=("memory_headroom",)))
    with pytest.raises(UnsupportedError, match="the job's goal is memory_headroom"):
        check_verifiable(roomy)


def test_the_text_is_one_that_a_person_can_read() -> None:
    slower, best, failed = (
        VerifiedPlan(
            place=place, layout=str(plan.layout), predicted_ns=plan.step.p50_ns, measured_ns=0,
            interval_ns=None, blocks_ns={}, verdict="failed", rival=1, slower_by=None, reason="",
        )
        for place, plan in enumerate(PLANS)
    )  # fmt: skip
    blocks_ns = dict.fromkeys(range(5), 400 * MS)
    plans = (
        replace(slower, measured_ns=440 * MS, interval_ns=(418 * MS, 463 * MS),
                verdict="slower", slower_by=(0.071, 0.124)),
        replace(best, measured_ns=400 * MS, interval_ns=(392 * MS, 408 * MS), verdict="best",
                blocks_ns=blocks_ns),
        replace(failed, reason="no memory"),
    )  # fmt: skip
    made_up = Verification(
        plans=plans, chosen=1, outcome="best", is_interrupted=False, is_as_predicted=False,
        error=0.05, tie=0.01, num_rounds=5, num_steps=5, num_launches=2, duration_ns=84 * 10**9,
    )  # fmt: skip
    assert verification_text(made_up) == TEXT.read_text().rstrip("\n")


@pytest.mark.dist
@pytest.mark.slow
def test_the_best_two_of_the_example_are_raced_for_real(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    example = Path(__file__).parent.parent / "examples" / "local.toml"
    path.write_text(example.read_text().replace('profile = "auto"', 'profile = "profile.json"'))
    write_text(tmp_path / "profile.json", canonical_json(made_up_profile(num_ranks=2)))
    job = read_job(path, ["foreign_profile=true", "workload.seq_len=16", "workload.global_batch=4"])
    costs = costs_for(job)
    result = search(job, costs)
    told: list[str] = []
    plan, found = verify_best(
        job, costs, result, 2, progress=lambda _share, what: told.append(what), max_rounds=2
    )
    assert found.num_rounds == 2 and found.num_launches == 1
    assert [len(raced.blocks_ns) for raced in found.plans] == [2, 2]
    assert all(raced.measured_ns > 0 for raced in found.plans)
    assert plan.chosen == found.chosen
    assert str(plan.layout) == found.plans[found.chosen].layout
    assert any(what.startswith("round 2 of at most 2: dp=") for what in told)
    assert plain(found)["outcome"] == "open"
