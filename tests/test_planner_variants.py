"""Variants of a job: numerics and the optimizer's place, their time, their memory, their search."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import variants
from planner.cost import measured_costs
from planner.evaluate import Costs
from planner.plan import PeakMemory, load_plan, save_plan
from planner.predict import memory_of, predict
from planner.reference.costs import reference_costs
from planner.search import (
    Effort,
    InfeasibleError,
    Progress,
    SearchResult,
    make_plan,
    search,
)
from planner.setup import Setup
from planner.variants import search_variants, variant_name, variant_text, variants_of
from profiles.choices import Choices
from profiles.cluster import ClusterSpec, HostSpec
from profiles.errors import UnsupportedError
from profiles.job import Job
from profiles.presets import cluster_preset, link_preset, stack_preset
from profiles.stack import StackSpec, changed_stack
from tests.machine import made_up_job, made_up_profile
from tests.setups import MOE, SMALL, STACK, pass_ns, setup_of, stage
from tests.worlds import reference_job

OFFLOADING = replace(STACK, offloads_optimizer=True)
GRADIENT, PARAMETER, STATES = 4, 2, 4 + 8
"""Bytes of each parameter of `STACK` in bf16; its states are a master copy and two moments."""
ADAM = GRADIENT + 2 * STATES + PARAMETER
ROUND = HostSpec(
    name="round", memory_bytes=10**12, memory_bytes_per_s=80e9, source="made up for tests",
    date="2026-01-01", link=replace(link_preset("pcie5"), bytes_per_s=5e9, latency_ns=1000),
)  # fmt: skip


def with_host(cluster: ClusterSpec, host: HostSpec | None) -> ClusterSpec:
    return replace(cluster, pools=tuple(replace(pool, host=host) for pool in cluster.pools))


def offloaded(host: HostSpec | None = ROUND, stack: StackSpec = OFFLOADING, **axes: Any) -> Setup:
    """Return a setup on one node of eight H100 with `host`."""
    cluster = with_host(cluster_preset("h100-sxm"), host)
    return setup_of(stack=stack, cluster=cluster, **axes)


def kept(setup: Setup) -> Setup:
    """Return the same setup with its optimizer on the GPU."""
    return replace(setup, stack=replace(setup.stack, offloads_optimizer=False))


def peak(setup: Setup) -> PeakMemory:
    (only,) = memory_of(setup)
    return only


def choosing(job: Job, **choices: Any) -> Job:
    return replace(job, choices=Choices(**choices))


# The time of an update on the host.


@pytest.mark.parametrize(("sharding", "shards"), [("none", 1), ("zero1", 8), ("zero3", 8)])
def test_an_update_on_the_host_is_closed_form(sharding: str, shards: int) -> None:
    """A link of 5 GB/s, and an eighth of 80 GB/s of memory for each of eight GPUs."""
    setup = offloaded(dp=8, sharding=sharding)
    parameters = round(
        peak(kept(setup)).gradients / GRADIENT * (shards if sharding == "zero3" else 1)
    )
    found, own = stage(setup), stage(kept(setup))
    # Norms are more than what the step counts as parameters, by less than a thousandth.
    owned = parameters / shards
    seconds = (GRADIENT + PARAMETER) * owned / 5e9 + ADAM * owned / 10e9
    adam_here = pass_ns(owned * (2 * GRADIENT + ADAM)) - pass_ns(owned * 2 * GRADIENT)
    assert found.optimizer[0] - own.optimizer[0] == pytest.approx(
        1e9 * seconds - adam_here, rel=2e-3
    )
    assert (found.forward[0], found.reduction[0]) == (own.forward[0], own.reduction[0])


@pytest.mark.parametrize(
    ("dp", "link", "memory", "rate"),
    [(2, 5e9, 80e9, 5e9), (8, 5e9, 80e9, 5e9), (8, 50e9, 80e9, 10e9)],
)
def test_the_slower_of_link_and_shared_memory_binds(
    dp: int, link: float, memory: float, rate: float
) -> None:
    host = replace(ROUND, link=replace(ROUND.link, bytes_per_s=link), memory_bytes_per_s=memory)
    fast = replace(host, link=replace(host.link, bytes_per_s=1e18), memory_bytes_per_s=1e18)
    slow, free = (stage(offloaded(each, dp=dp)) for each in (host, fast))
    owned = peak(kept(offloaded(dp=dp))).gradients / GRADIENT
    traffic, adam = (GRADIENT + PARAMETER) * owned / rate, ADAM * owned / (memory / dp)
    assert slow.optimizer[0] - free.optimizer[0] == pytest.approx(1e9 * (traffic + adam), rel=2e-3)


def test_each_bucket_has_its_latency() -> None:
    small = replace(OFFLOADING, gradient_bucket_bytes=1 << 20)
    far = replace(ROUND, link=replace(ROUND.link, latency_ns=2000))
    near, later = (stage(offloaded(host, small, dp=8)) for host in (ROUND, far))
    owned = peak(kept(offloaded(dp=8))).gradients / GRADIENT
    messages = owned * GRADIENT / 2**20 + owned * PARAMETER / 2**20
    assert later.optimizer[0] - near.optimizer[0] == pytest.approx(1000 * messages, rel=5e-3)


def test_what_no_run_was_compared_with_is_extrapolated() -> None:
    setup = offloaded(stack=changed_stack(stack_preset("nemo"), "bf16", optimizer_offload=True))
    own = predict(replace(setup, stack=stack_preset("nemo"))).step
    step = predict(setup).step
    assert (step.is_extrapolated, own.is_extrapolated) == (True, False)
    assert step.p90_ns / step.p50_ns > own.p90_ns / own.p50_ns


def test_a_host_of_which_nothing_is_known_is_no_host() -> None:
    with pytest.raises(UnsupportedError, match="nothing is known of the hosts of h100-sxm"):
        predict(offloaded(None))
    job = reference_job(stack="nemo")
    asked = replace(job, cluster=with_host(job.cluster, None), stack=OFFLOADING)
    with pytest.raises(UnsupportedError, match="or keep the optimizer on the GPU"):
        reference_costs(asked)


# Its memory.


@pytest.mark.parametrize("model", [SMALL, MOE])
@pytest.mark.parametrize("sharding", ["none", "zero1", "zero2", "zero3"])
def test_the_states_leave_the_gpu(model: object, sharding: str) -> None:
    """Nothing else changes but a bucket in each direction; under zero3 the parameters stay."""
    setup = offloaded(stack=replace(OFFLOADING, gradient_bucket_bytes=10_000_000), dp=8,
                      sharding=sharding)  # fmt: skip
    setup = replace(setup, model=model)  # type: ignore[arg-type]
    away, here = peak(setup), peak(kept(setup))
    assert away.optimizer == 0
    assert away.gradients == here.gradients
    assert away.buffers - here.buffers == 2 * 10_000_000
    share = here.optimizer // STATES
    assert away.parameters - here.parameters == (PARAMETER * share if sharding == "zero3" else 0)
    assert (away.activations, away.context) == (here.activations, here.context)


@given(st.integers(0, 2**36), st.integers(0, 2**36))
def test_a_small_bucket_is_staged_whole(bucket: int, other: int) -> None:
    """Never more than the gradients and parameters of a GPU's own, and more of a larger bucket."""
    less, more = sorted((bucket, other))
    few, many = (
        peak(offloaded(stack=replace(OFFLOADING, gradient_bucket_bytes=size), dp=8)).buffers
        for size in (less, more)
    )
    owned = peak(offloaded(dp=8)).gradients // GRADIENT
    assert few <= many <= (GRADIENT + PARAMETER) * owned


def test_conversion_is_the_hosts() -> None:
    narrow = replace(OFFLOADING, gradient_bytes=2)
    assert peak(offloaded(stack=narrow)).update == 0
    assert peak(kept(offloaded(stack=narrow))).update > 0


def test_our_own_executor_runs_only_what_was_measured() -> None:
    profile = made_up_profile(num_ranks=4)
    job = choosing(made_up_job(4), optimizer_offload=(False, True))
    with pytest.raises(UnsupportedError, match="leave these keys out"):
        search_variants(job, lambda each: measured_costs(each, profile))
    job = choosing(made_up_job(4), dtype=(job.workload.dtype, "fp8"))
    with pytest.raises(UnsupportedError, match="fp8"):
        search_variants(job, lambda each: measured_costs(each, profile))


# The search.


def small_job(**limits: Any) -> Job:
    return reference_job(stack="torchtitan", nodes=1, global_batch=32,
                         **({"schedule": ("1f1b",)} | limits))  # fmt: skip


def test_a_job_without_choices_is_searched_as_ever() -> None:
    job = small_job()
    assert variants_of(job) == (job,)
    found, _, result = search_variants(job, reference_costs)
    assert found is job
    assert result == search(job, reference_costs(job))


def test_variants_differ_and_the_job_comes_first() -> None:
    job = choosing(small_job(), dtype=("bf16", "fp8"), gradient_dtype=("bf16", "fp16", "fp32"),
                   optimizer_offload=(False, True))  # fmt: skip
    found = variants_of(job)
    assert found[0] is job
    assert len(found) == len({variant_name(job, each) for each in found}) == 8
    assert all(variants_of(each) == (each,) for each in found[1:])


@pytest.mark.parametrize(
    "choices",
    [
        {"dtype": ("bf16", "fp8")},
        {"gradient_dtype": ("fp32", "bf16"), "optimizer_offload": (False, True)},
        {"dtype": ("fp16", "bf16", "fp32")},
    ],
)
def test_the_best_variant_is_that_of_separate_searches(choices: dict[str, Any]) -> None:
    """What one has reached spares the others work, never a layout that is better."""
    job = choosing(small_job(), **choices)
    alone = {
        variant_name(job, each): search(each, reference_costs(each)) for each in variants_of(job)
    }
    best = min(alone, key=lambda name: alone[name].certificate.value)
    chosen, costs, result = search_variants(job, reference_costs)
    assert variant_name(job, chosen) == best
    assert costs.workload == chosen.workload
    assert result.ranking == alone[best].ranking
    assert [each.name for each in result.variants] == list(alone)
    assert [each.name for each in result.variants if each.is_chosen] == [best]
    told, certificates = result.certificate, [each.certificate for each in alone.values()]
    assert told.num_layouts == sum(each.num_layouts for each in certificates)
    counts = told.num_bounded + told.num_timed + told.num_open + sum(told.num_rejected.values())
    assert counts == told.num_layouts
    assert told.value == min(each.value for each in certificates)
    assert told.lower_bound <= told.value
    assert told.gap == pytest.approx((told.value - told.lower_bound) / told.value)
    assert told.lower_bound >= 0.98 * min(each.lower_bound for each in certificates)


def test_eight_bits_are_chosen_where_they_may_be_and_the_plan_says_so(tmp_path: Path) -> None:
    job = choosing(reference_job("llama-3-8b", nodes=1, schedule=("1f1b",)), dtype=("bf16", "fp8"))
    chosen, costs, result = search_variants(job, reference_costs)
    plan = make_plan(chosen, costs, result, 0, "0")
    assert plan.workload.dtype == "fp8"
    assert [(each.name, each.is_chosen) for each in plan.variants] == [
        ("bf16", False), ("fp8", True),
    ]  # fmt: skip
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert [variant_text(each)[:15] for each in plan.variants] == [
        "  variant bf16:", "> variant fp8: ",
    ]  # fmt: skip


def test_offload_makes_room_where_host_memory_does() -> None:
    """LLaMA 70B on one node: 12 B of states a parameter do not fit beside the rest, on the GPU."""
    job = reference_job("llama-3-70b", nodes=1, global_batch=8, stack="torchtitan",
                        schedule=("1f1b",))  # fmt: skip
    with pytest.raises(InfeasibleError, match="however it is sharded"):
        search(job, reference_costs(job))
    choice = choosing(job, optimizer_offload=(False, True))
    chosen, _, result = search_variants(choice, reference_costs)
    assert chosen.stack.offloads_optimizer
    assert result.ranking[0].step.is_extrapolated
    assert [each.reason[:9] for each in result.variants] == ["no layout", ""]
    host = chosen.cluster.pools[0].host
    assert host is not None
    # Master copy, moments and a gradient of 70.6e9 parameters, shared by eight.
    for enough, scarce in ((True, 1.2e12), (False, 1.0e12)):
        cluster = with_host(job.cluster, replace(host, memory_bytes=round(scarce)))
        asked = replace(chosen, cluster=cluster)
        if enough:
            assert search(asked, reference_costs(asked)).ranking
        else:
            with pytest.raises(InfeasibleError):
                search(asked, reference_costs(asked))


def test_if_nothing_fits_every_variant_is_told() -> None:
    job = reference_job("llama-3.1-405b", nodes=1, global_batch=8, stack="torchtitan")
    with pytest.raises(InfeasibleError, match="none of 2 variants") as caught:
        search_variants(choosing(job, dtype=("bf16", "fp8")), reference_costs)
    assert "bf16: no layout" in str(caught.value)
    assert "fp8: no layout" in str(caught.value)


def test_each_gets_a_share_of_the_time_left_and_what_is_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Searches take seconds: of 1000 s the first of two may take 500, the second what is left."""
    asked: list[tuple[float, float]] = []

    def recorded(
        job: Job, costs: Costs, effort: Effort, progress: Progress, at_most: float
    ) -> SearchResult:
        asked.append((effort.budget_s or 0.0, at_most))
        return search(job, costs, effort, progress, at_most)

    monkeypatch.setattr(variants, "search", recorded)
    job = choosing(small_job(), dtype=("bf16", "fp32"))
    result = search_variants(job, reference_costs, Effort(budget_s=1000.0)).result
    (first_s, nothing), (second_s, reached) = asked
    assert first_s == pytest.approx(500, rel=0.1)
    assert second_s == pytest.approx(1000, rel=0.1)
    assert nothing == math.inf
    first = result.variants[0].best
    assert first is not None
    assert reached == first.step.p50_ns / 1e9


@pytest.mark.parametrize("stops_in", ["bf16", "fp8"])
def test_what_was_not_searched_bounds_nothing(stops_in: str) -> None:
    """Ctrl-C leaves the best so far; before there is any, it is an interruption."""
    job = choosing(small_job(), dtype=("bf16", "fp8", "fp16"))
    asked: list[Job] = []

    def costs_of(each: Job) -> Costs:
        asked.append(each)
        return reference_costs(each)

    def interrupt(_: float, what: str) -> None:
        if what.startswith(stops_in):
            raise KeyboardInterrupt

    if stops_in == "bf16":
        with pytest.raises(KeyboardInterrupt):
            search_variants(job, costs_of, progress=interrupt)
        return
    chosen, _, result = search_variants(job, costs_of, progress=interrupt)
    assert (chosen, len(asked)) == (job, 3)
    assert result.is_interrupted
    assert (result.certificate.lower_bound, result.certificate.gap) == (0.0, 1.0)
    assert [each.reason for each in result.variants[1:]] == ["not searched: interrupted"] * 2
