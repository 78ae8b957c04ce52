"""`layline plan` as a user meets it: what was searched, what is certain of it, and what else."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from layline import walk
from layline.cli import main
from layline.plan_text import certainty, plan_text, shown_places
from planner.plan import Certificate, Plan, load_plan, seal
from planner.search import Effort, SearchResult
from profiles.files import canonical_json
from profiles.goal import Goal
from tests.machine import made_up_profile
from tests.runs import make_plan
from tests.test_layline_cli import JOB

Call = Callable[..., Result]
GOLDEN = Path(__file__).parent / "golden" / "plan.txt"
TWO = Goal(objectives=("step_time", "memory_headroom"), limits={"tokens_per_s": 1000.0})
OPEN = Certificate(
    objective="step_time", value=0.2, lower_bound=0.15, gap=0.25, num_layouts=5_041_149,
    num_rejected={"divisibility": 41, "memory": 1_900, "limits": 0}, num_bounded=5_000_000,
    num_timed=208, num_open=39_000,
)  # fmt: skip


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """A command in a folder that holds a job and a made-up profile of four ranks."""
    monkeypatch.chdir(tmp_path)
    Path("job.toml").write_text(JOB)
    Path("profile.json").write_text(canonical_json(made_up_profile(num_ranks=4)))

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["plan", "job.toml", *arguments], catch_exceptions=False)

    return run


def changed(plan: Plan, **sections: object) -> Plan:
    """Return `plan` with other sections, sealed again."""
    return seal(**({name: getattr(plan, name) for name in plan.section_digests} | sections))


def test_the_text_is_one_that_a_person_can_read() -> None:
    plan = changed(make_plan(goal=TWO), certificate=OPEN, front=(0, 2))
    assert plan_text(plan, 3, Effort(budget_s=2.0)) + "\n" == GOLDEN.read_text()


def test_a_certificate_says_why_the_search_ended() -> None:
    near = replace(OPEN, lower_bound=0.1985, gap=0.0075)
    within = "no layout of this space is better in step time by more than 0.8 %"
    assert certainty(near, None) == certainty(near, Effort(budget_s=2.0)) == within
    assert certainty(replace(OPEN, gap=0.0), Effort()).startswith("proved best: no layout")
    assert certainty(OPEN, Effort(budget_s=2.0)).startswith("stopped after 2 s: a layout may be ")
    assert certainty(OPEN, Effort(), is_interrupted=True).startswith("interrupted: a layout may be")
    # What is known of a rate is known of the time that it is the reciprocal of.
    rate = replace(OPEN, objective="goodput", value=2e-6, lower_bound=1.6e-6, gap=0.2)
    assert certainty(rate, None).endswith("better in goodput by more than 25.0 %")
    assert certainty(replace(rate, lower_bound=0.0, gap=1.0), None).endswith("than any amount")


def test_a_long_front_is_thinned_from_end_to_end() -> None:
    plan = make_plan(goal=TWO)
    long = changed(plan, ranking=plan.ranking * 25, front=tuple(range(0, 100, 3)), chosen=0)
    shown = shown_places(long, 5)
    assert (shown[0], shown[-1], len(shown)) == (0, 99, 5)
    assert set(shown) <= set(long.front)
    assert shown_places(changed(plan, front=(0, 3), chosen=0), 2) == (0, 3)
    assert shown_places(changed(plan, goal=Goal(), chosen=0), 3) == (0, 1, 2)
    assert shown_places(changed(plan, goal=Goal(), chosen=3), 2) == (0, 3)
    assert shown_places(changed(plan, ranking=(), chosen=0), 3) == ()


def test_finalists_have_a_jittered_step() -> None:
    plan = make_plan()
    first, second, *others = plan.ranking
    shaken = (
        replace(first, jittered_ns=300_000_000), replace(second, jittered_ns=310_000_000), *others,
    )  # fmt: skip
    told = plan_text(changed(plan, ranking=shaken), 3)
    assert "jittered: until the slowest replica is done, where every kernel" in told
    rows = [line.split()[-2:] for line in told.splitlines() if ",mb=" in line][:3]
    assert rows[0] == ["300.0", "ms"] and rows[2][-1] == "-"
    assert "jittered" not in plan_text(plan, 3)


def test_objectives_have_columns_and_a_front_has_marks(call: Call) -> None:
    result = call("--set", 'goal.optimize=["step_time","memory_headroom"]', "--top", "4",
                  "-o", "plan.json")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "goal: step_time and memory_headroom" in result.stdout
    assert ">*    1 dp=" in result.stdout
    assert (
        "* on the front: of all that was timed, what betters step time or memory" in result.stdout
    )
    (head,) = (line for line in result.stdout.splitlines() if "P10 to P90" in line)
    assert "    memory       free" in head
    assert len(load_plan(Path("plan.json")).front) >= 1
    priced = call("--set", "goal.optimize=dollars_per_mtoken", "--set",
                  "cluster.price_per_gpu_hour=2.5")  # fmt: skip
    assert "$ a Mtoken" in priced.stdout
    assert "better in price of a token" in priced.stdout
    assumed = call("--set", "goal.optimize=goodput").stdout
    assert "note: assumed 0.000474 interruptions per GPU-day" in assumed


def test_why_not_a_layout(call: Call) -> None:
    result = call("--why", "dp=2,tp=2,pp=1,mb=1", "--why", "tp=1,pp=4", "-o", "plan.json")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\nwhy not dp=") == 2
    assert result.stdout.index("bottleneck: ") < result.stdout.index("why not dp=2,tp=2,pp=1,")
    told = json.loads(call("--why", "dp=2,tp=2,pp=1,mb=1", "--json").stdout)
    assert told["plan_digest"] == load_plan(Path("plan.json")).plan_digest
    (comparison,) = told["why"]
    assert comparison["account"]["layout"]["tp"] == 2
    assert "why" not in json.loads(call("--json").stdout)


def test_a_layout_that_cannot_be_is_refused_before_the_search(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "search_layouts", lambda *_: pytest.fail("searched"))
    for text, words in {
        "tp=3": "tp=3",
        "sails=2": "must be a word of a layout",
        "": "empty",
    }.items():
        result = call("--why", text)
        assert result.exit_code == 3
        assert words in result.stderr


def test_an_explanation_follows_the_ranking(call: Call) -> None:
    result = call("--explain", "--set", "search.schedule=[\"1f1b\"]", "--set",
                  "search.micro_batch=[1]")  # fmt: skip
    assert result.exit_code == 0, result.output
    ranking, choice, flips = (
        result.stdout.index(words)
        for words in ("best of", "The choice is dp=", "What would flip the choice")
    )
    assert ranking < choice < flips


def test_what_was_interrupted_is_printed_and_written(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = walk.search_layouts

    def stopped(*arguments: object) -> tuple[walk.Grounds, SearchResult]:
        grounds, result = whole(*arguments)  # type: ignore[arg-type]
        certificate = replace(result.certificate, lower_bound=0.0, gap=1.0)
        return grounds, replace(result, certificate=certificate, is_interrupted=True)

    monkeypatch.setattr(walk, "search_layouts", stopped)
    result = call("-o", "plan.json", "--explain")
    assert result.exit_code == 6
    assert "interrupted: a layout may be better by up to 100.0 %" in result.stdout
    assert "The choice is" not in result.stdout
    assert result.stdout.endswith("wrote plan.json\n")
    (line,) = result.stderr.splitlines()
    assert line.startswith("layline: interrupted: ")
    assert line.endswith("run it again to let the search end")
    assert load_plan(Path("plan.json")).certificate.gap == 1.0


def test_an_interrupted_explanation_costs_no_plan(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("planner.explain.explain", stopped)
    result = call("-o", "plan.json", "--explain", "--json")
    assert result.exit_code == 6
    assert json.loads(result.stdout)["plan_digest"] == load_plan(Path("plan.json")).plan_digest
    assert result.stderr.splitlines() == [
        "wrote plan.json", "layline: interrupted: the plan is whole, its explanation is not",
    ]  # fmt: skip


def test_nothing_fits_says_what_would(call: Call) -> None:
    result = call("--set", "search.tp=[1]", "--set", "search.dp=[2]", "--set", "search.pp=[1]")
    assert result.exit_code == 4
    found, would = result.stderr.splitlines()
    assert found.startswith("layline: no layout of 4 ranks will do: ")
    assert would.startswith("what would do: search.dp binds: lift search.dp (it is 2): dp 4 fits")
    slow = call("--set", "goal.limits.step_time=1 us")
    assert slow.exit_code == 4
    assert "goal.limits.step_time binds: lift goal.limits.step_time (it is 1.0 us)" in slow.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--budget-s", "nan"), "nan is not a finite number"),
        (("--budget-s", "0"), "not in the range x>0"),
        (("--gap", "-1"), "not in the range 0<=x<=100"),
        (("--gap", "inf"), "not in the range"),
        (("--top", "0"), "not in the range"),
        (("--sweep", "seed=1,2", "--why", "tp=1"), "--why is about one job; leave it out with"),
        (("--sweep", "seed=1,2", "--explain"), "--explain is about one job"),
        (("--sweep", "seed=1,2", "--verify", "2"), "--verify is about one job"),
        (("--farm", "dask"), "--farm is for the cases of --sweep"),
    ],
)
def test_options_that_do_not_go_together(call: Call, options: tuple[str, ...], words: str) -> None:
    result = call(*options)
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_gap_of_zero_is_a_proof(call: Call) -> None:
    assert "proved best: no layout of this space is better" in call("--gap", "0").stdout
