"""The scores of published runs against closed forms: exact, off by a factor, or wrong in order."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.flops import peak_flops_per_s, step_flops
from planner.layout import Layout
from planner.plan import PeakMemory
from planner.predict import Prediction, likeliest
from planner.published.metric import Measured
from planner.published.runs import PublishedRun, UnreadRun
from planner.setup import Setup
from profiles.errors import UnsupportedError
from profiles.presets import cluster_preset, model_preset, stack_preset
from profiles.profile import Cost
from profiles.workload import Workload
from reports.accuracy import HEADINGS, accuracy_page, accuracy_rows, accuracy_text
from reports.accuracy_figure import accuracy_figure
from reports.validation import (
    Outcome,
    Predict,
    Scored,
    group_json,
    quantile,
    row_json,
    score,
    validation_json,
)

GIB = 2**30
KEYS = {"n", "scored", "median_abs_rel_err", "p90_abs_rel_err", "mem_median_abs_rel_err",
        "coverage_p10_p90"}  # fmt: skip
ROW_KEYS = {"id", "group", "status", "reason", "measured", "predicted", "unit", "predicted_p10",
            "predicted_p90", "rel_err", "measured_peak_mem_gb", "predicted_peak_mem_gb",
            "fits"}  # fmt: skip


def a_run(
    step_ns: int, *, tp: int = 1, peak_gib: float = 0, ran_out: bool = False, number: int = 1
) -> PublishedRun:
    model = model_preset("llama-3-8b")
    layout = Layout(
        dp=8 // tp, tp=tp, pp=1, micro_batch=1, num_microbatches=4 * tp, stage_layers=(32,)
    )
    setup = Setup(
        model=model, workload=Workload(seq_len=8192, global_batch=32, dtype="bf16"), layout=layout,
        cluster=cluster_preset("h100-sxm"), stack=stack_preset("layline-nccl"),
    )  # fmt: skip
    measured = Measured(1000.0, "tokens/s", step_ns, is_rate=True)
    if ran_out:
        measured = Measured(1.0, "bool", ran_out_of_memory=True)
    return PublishedRun(
        id=f"lab-{number}", group="lab", framework="ours", setups=(setup,), measured=measured,
        peak_bytes=round(peak_gib * GIB), memory_log="device", remarks=(),
    )  # fmt: skip


def predicting(
    step_ns: Callable[[Setup], float], total_gib: Callable[[Setup], float] = lambda _: 10
) -> Predict:
    def predict(setup: Setup) -> Prediction:
        ns = step_ns(setup)
        memory = PeakMemory(
            parameters=round(total_gib(setup) * GIB), gradients=0, optimizer=0, activations=0,
            temporary=0, context=0,
        )  # fmt: skip
        cost = Cost(p10_ns=round(0.9 * ns), p50_ns=round(ns), p90_ns=round(1.1 * ns))
        return Prediction(step=cost, memory=(memory,), parts={})

    return predict


def scored(runs: list[PublishedRun], predict: Predict) -> list[Outcome]:
    return [score(run, predict) for run in runs]


def flops_over_peak_ns(setup: Setup, share: float) -> float:
    flops = step_flops(setup, causal=True, recomputed=True)
    return 1e9 * flops / (share * setup.layout.num_ranks * peak_flops_per_s(setup))


def test_a_perfect_model_has_no_error() -> None:
    outcomes = scored([a_run(10**9, peak_gib=10)] * 3, predicting(lambda _: 1e9))
    scores = group_json(outcomes)
    assert scores.keys() > KEYS
    assert [scores[key] for key in sorted(KEYS)] == [1.0, 0.0, 0.0, 3, 0.0, 3]


def test_errors_are_of_the_step_whatever_the_unit() -> None:
    runs = [a_run(step_ns) for step_ns in (500_000_000, 800_000_000, 1_000_000_000)]
    scores = group_json(scored(runs, predicting(lambda _: 1e9)))
    assert scores["median_abs_rel_err"] == 0.25
    assert scores["p90_abs_rel_err"] == pytest.approx(0.25 + 0.8 * 0.75)
    assert scores["coverage_p10_p90"] == pytest.approx(1 / 3, abs=1e-5)


def test_a_row_keeps_its_unit_and_its_band_the_right_way_round() -> None:
    row = row_json(score(a_run(10**9, peak_gib=8), predicting(lambda _: 2e9)))
    assert row.keys() == ROW_KEYS
    assert (row["measured"], row["predicted"], row["unit"]) == (1000.0, 500.0, "tokens/s")
    assert row["predicted_p10"] == pytest.approx(500 / 1.1)
    assert row["predicted_p90"] == pytest.approx(500 / 0.9)
    assert (row["rel_err"], row["status"], row["fits"]) == (1.0, "scored", True)
    assert (row["measured_peak_mem_gb"], row["predicted_peak_mem_gb"]) == (8, 10)


def test_the_null_model_is_perfect_where_efficiency_is_constant() -> None:
    setup = a_run(1).setups[0]
    runs = [a_run(round(flops_over_peak_ns(setup, 0.4)))] * 4
    assert group_json(scored(runs, predicting(lambda _: 1e9)))["null_model"] == {
        "median": 0, "p90": 0,
    }  # fmt: skip


def test_the_null_model_errs_by_the_spread_of_efficiency() -> None:
    setup = a_run(1).setups[0]
    runs = [a_run(round(flops_over_peak_ns(setup, share))) for share in (0.3, 0.4, 0.5)]
    null = group_json(scored(runs, predicting(lambda _: 1e9)))["null_model"]
    assert null["median"] == pytest.approx(0.25, abs=1e-4)


def test_regret_is_what_following_the_prediction_costs() -> None:
    runs = [a_run(ns, tp=tp) for tp, ns in ((1, 10**9), (2, 1_200_000_000), (4, 3 * 10**9))]
    right = predicting(lambda setup: setup.layout.tp * 1e9)
    assert group_json(scored(runs, right))["regret"] == {"sets": 1, "mean": 0, "worst": 0}
    wrong = predicting(lambda setup: 5e9 - setup.layout.tp * 1e9)
    assert group_json(scored(runs, wrong))["regret"] == {"sets": 1, "mean": 2, "worst": 2}


def test_no_credit_for_the_order_of_a_file() -> None:
    runs = [a_run(10**9, tp=1), a_run(2 * 10**9, tp=2)]
    assert group_json(scored(runs, predicting(lambda _: 1e9)))["regret"]["worst"] == 1


def test_one_layout_alone_has_no_regret() -> None:
    runs = [a_run(10**9), a_run(2 * 10**9)]
    assert group_json(scored(runs, predicting(lambda _: 1e9)))["regret"] is None


def test_runs_that_fit_are_told_from_those_that_do_not() -> None:
    runs = [a_run(10**9, tp=tp, ran_out=ran_out)
            for tp, ran_out in ((1, True), (2, True), (4, False), (8, False))]  # fmt: skip
    predict = predicting(lambda _: 1e9, lambda setup: 100 / setup.layout.tp)
    outcomes = scored(runs, predict)
    assert validation_json(outcomes)["out_of_memory"] == {
        "ran": 2, "ran_told": 2, "ran_out": 2, "ran_out_told": 1, "accuracy": 0.75,
    }  # fmt: skip
    row = row_json(outcomes[0])
    assert (row["measured"], row["predicted"], row["rel_err"], row["fits"]) == (1, 1, None, False)


def test_the_recompute_mode_that_was_assumed_is_said() -> None:
    run = a_run(10**9)
    modes = [replace(run.setups[0], layout=replace(run.setups[0].layout, recompute=mode))
             for mode in ("none", "selective", "full")]  # fmt: skip
    outcome = score(replace(run, setups=tuple(modes)), predicting(lambda _: 1e9))
    assert isinstance(outcome, Scored)
    assert outcome.setup == likeliest(modes)
    mode = outcome.setup.layout.recompute
    assert row_json(outcome)["reason"] == f"recompute not stated: {mode} assumed"


@pytest.mark.parametrize("error", [UnsupportedError("no such thing"), ZeroDivisionError("x")])
def test_a_model_that_fails_costs_one_row(error: Exception) -> None:
    def failing(_: Setup) -> Prediction:
        raise error

    row = row_json(score(a_run(10**9), failing))
    assert row.keys() == ROW_KEYS
    assert row["status"] == "unsupported"
    assert str(error) in row["reason"]
    assert row["predicted"] is None


def test_runs_of_low_utilization_are_reported_apart() -> None:
    setup = a_run(1).setups[0]
    runs = [a_run(round(flops_over_peak_ns(setup, share))) for share in (0.4, 0.4, 0.01)]
    outcomes = scored(runs, predicting(lambda one: flops_over_peak_ns(one, 0.4)))
    scores = group_json(outcomes)
    assert (scores["mfu_below_5_percent"]["n"], scores["mfu_from_5_percent"]["n"]) == (1, 2)
    assert scores["mfu_from_5_percent"]["p90_abs_rel_err"] == pytest.approx(0, abs=1e-4)
    assert len(accuracy_rows({"lab": scores})) == 3


@given(values=st.lists(st.floats(0, 1e6), min_size=1, max_size=30), share=st.floats(0, 1))
def test_quantiles_are_those_of_numpy(values: list[float], share: float) -> None:
    assert quantile(values, share) == pytest.approx(float(np.quantile(values, share)))


def outcomes_of_all_kinds() -> list[Outcome]:
    runs = [a_run(10**9, peak_gib=12), a_run(2 * 10**9, tp=2), a_run(1, ran_out=True)]
    unread = UnreadRun(id="odd-1", group="odd", reason='gpu is "a | <b>\n"')
    return [*scored(runs, predicting(lambda _: 1e9)), unread]


def test_groups_without_anything_to_score_have_no_scores() -> None:
    scores = validation_json(outcomes_of_all_kinds())["groups"]["odd"]
    assert (scores["n"], scores["scored"]) == (1, 0)
    assert all(scores[key] is None for key in KEYS - {"n", "scored"})


def test_table_and_page_hold_every_group() -> None:
    outcomes = outcomes_of_all_kinds()
    text = accuracy_text(outcomes)
    assert text.splitlines()[0].split("  ")[0] == "group"
    assert 'unsupported: 1 x gpu is "a | <b>' in text
    page = accuracy_page(outcomes, "layline validate x.csv --page docs", "accuracy.svg")
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.count(" |") for line in table} == {len(HEADINGS)}
    assert '* 1 x gpu is "a \\| &lt;b> "' in page
    assert page == accuracy_page(outcomes, "layline validate x.csv --page docs", "accuracy.svg")


def test_the_figure_has_a_panel_a_group_and_is_repeatable() -> None:
    outcomes = outcomes_of_all_kinds()
    figure = accuracy_figure(outcomes)
    assert figure.startswith("<svg")
    assert "lab  (2)" in figure
    assert "odd" not in figure
    assert figure == accuracy_figure(outcomes)
    assert accuracy_figure([]).startswith("<svg")
