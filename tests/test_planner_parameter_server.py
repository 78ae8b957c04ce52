"""Parameter servers: closed forms of each mode, what staleness promises, and the oracle's word."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.parameter_server import ServerGraph, server_graph
from simulator.engine import Simulation, simulate
from simulator.fabric import clos, star
from simulator.network import CapacityChange, Change, SpeedChange

MODES = (None, 0, 1, 2)
both = pytest.mark.parametrize("oracle", [False, True], ids=["loop", "oracle"])


def training(
    compute_ns: npt.ArrayLike,
    *,
    num_steps: int = 4,
    shard_bytes: tuple[int, ...] = (60,),
    update_ns: int = 5,
    latency_ns: int = 3,
    staleness: int | None = 0,
    nic_bytes_per_s: float = 1e9,
) -> ServerGraph:
    """Return training over one switch, every NIC alike; 1 byte/ns unless told otherwise."""
    num_ranks = np.shape(compute_ns)[-1] + len(shard_bytes)
    return server_graph(
        star([nic_bytes_per_s] * num_ranks),
        num_steps=num_steps,
        compute_ns=compute_ns,
        push_bytes=shard_bytes,
        pull_bytes=shard_bytes,
        update_ns=[update_ns] * len(shard_bytes),
        latency_ns=latency_ns,
        staleness=staleness,
    )


def run(of: ServerGraph, *changes: Change, oracle: bool = False) -> Simulation:
    return simulate(of.graph, of.costs, links=of.links, changes=changes, oracle=oracle)


@both
@pytest.mark.parametrize("staleness", MODES)
def test_one_worker_and_one_server_take_turns(staleness: int | None, oracle: bool) -> None:
    of = training([100], staleness=staleness)
    assert run(of, oracle=oracle).makespan_ns == 4 * (100 + (3 + 60) + 5 + (3 + 60))


@both
def test_bsp_with_equal_workers_is_incast_then_updates_then_the_way_back(oracle: bool) -> None:
    num_workers = 8
    of = training([100] * num_workers, staleness=0)
    incast_ns = 3 + num_workers * 60
    step_ns = 100 + incast_ns + num_workers * 5 + incast_ns
    assert run(of, oracle=oracle).makespan_ns == 4 * step_ns


@both
def test_servers_share_the_work_until_the_worker_nic_is_the_bottleneck(oracle: bool) -> None:
    # Four servers take 60 bytes each of four workers: 240 bytes at every NIC, each way.
    of = training([100] * 4, shard_bytes=(60,) * 4, staleness=0)
    assert run(of, oracle=oracle).makespan_ns == 4 * (100 + 243 + 4 * 5 + 243)


@both
def test_an_uneven_shard_is_the_tail_of_the_step(oracle: bool) -> None:
    # The worker's NIC gives both 0.5 until the small shard has passed; 120 bytes take 120 ns.
    of = training([100], shard_bytes=(100, 20), num_steps=1, staleness=None)
    assert run(of, oracle=oracle).makespan_ns == 100 + 123 + 5 + 103


@both
def test_a_straggler_holds_up_nobody_in_asp_and_everybody_in_bsp(oracle: bool) -> None:
    compute_ns = [1000, 1010, 1020, 5000]
    num_steps = 5

    def starts(staleness: int | None) -> npt.NDArray[np.int64]:
        # Messages are so short that those of different quick workers never meet.
        of = training(
            compute_ns, num_steps=num_steps, shard_bytes=(6,), update_ns=1, latency_ns=0,
            staleness=staleness,
        )  # fmt: skip
        return run(of, oracle=oracle).starts_ns[of.compute]

    steps = np.arange(num_steps)
    asp = starts(None)
    assert asp[:, :3].tolist() == np.outer(steps, [1013, 1023, 1033]).tolist()
    bsp = starts(0)
    assert (np.diff(bsp, axis=0) >= 5000 + 6 + 1 + 6).all()


@both
def test_ssp_runs_ahead_by_its_staleness_and_no_further(oracle: bool) -> None:
    of = training(
        [100, 10_000], num_steps=8, shard_bytes=(6,), update_ns=1, latency_ns=0, staleness=2
    )
    starts = run(of, oracle=oracle).starts_ns[of.compute]
    # Steps 0 to 2 are free, each of 100 + 6 + 1 + 6 ns; step 3 needs step 0 of the slow worker.
    assert starts[:3, 0].tolist() == [0, 113, 226]
    assert starts[3, 0] == 10_000 + 6 + 1 + 12  # both pull at once
    assert (starts[3:, 0] - starts[:-3, 1] >= 10_000).all()


@given(
    compute_ns=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    staleness=st.sampled_from(MODES),
    num_servers=st.integers(1, 3),
)
@settings(max_examples=50)
def test_no_worker_begins_a_step_before_its_bound(
    compute_ns: list[int], staleness: int | None, num_servers: int
) -> None:
    of = training(compute_ns, num_steps=6, shard_bytes=(20,) * num_servers, staleness=staleness)
    simulation = run(of)
    starts = simulation.starts_ns[of.compute]
    applied = simulation.ends_ns[of.updates].max(axis=2)
    assert (starts[1:] >= applied[:-1]).all()
    if staleness is not None:
        all_applied = applied.max(axis=1)
        lag = staleness + 1
        assert (starts[lag:] >= all_applied[:-lag, None]).all()


@given(data=st.data(), staleness=st.sampled_from(MODES))
@settings(max_examples=40)
def test_loop_equals_oracle_on_parameter_servers(
    data: st.DataObject, staleness: int | None
) -> None:
    """On two nodes to a leaf and an oversubscribed spine, with links that degrade and fail."""
    num_workers, num_servers = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    fabric = clos(
        num_nodes=4, gpus_per_node=2, nics_per_node=2, gpu_bytes_per_s=8e9, nic_bytes_per_s=1e9,
        nodes_per_leaf=2, oversubscription=3.0,
    )  # fmt: skip
    num_steps = 3

    def numbers(most: int, count: int) -> list[int]:
        return data.draw(st.lists(st.integers(0, most), min_size=count, max_size=count))

    of = server_graph(
        fabric,
        num_steps=num_steps,
        compute_ns=[numbers(300, num_workers) for _ in range(num_steps)],
        push_bytes=numbers(200, num_servers),
        pull_bytes=numbers(200, num_servers),
        update_ns=numbers(20, num_servers),
        latency_ns=data.draw(st.integers(0, 5)),
        staleness=staleness,
    )
    link = data.draw(st.integers(0, len(fabric.links) - 1))
    changes = (
        CapacityChange(at_ns=100, link=link, bytes_per_s=data.draw(st.sampled_from((0.0, 0.3e9)))),
        CapacityChange(at_ns=700, link=link, bytes_per_s=1e9),
        SpeedChange(at_ns=200, rank=0, speed=data.draw(st.sampled_from((0.0, 0.5, 2.0)))),
        SpeedChange(at_ns=900, rank=0, speed=1.0),
    )
    loop, oracle = run(of, *changes), run(of, *changes, oracle=True)
    assert loop.starts_ns.tolist() == oracle.starts_ns.tolist()
    assert loop.ends_ns.tolist() == oracle.ends_ns.tolist()


@pytest.mark.parametrize("staleness", [None, 2])
def test_names_and_labels_tell_who_moves_what(staleness: int | None) -> None:
    of = training([10, 20], num_steps=2, shard_bytes=(6, 6), staleness=staleness).graph
    half = len(of) // 2
    labels = [of.label(i) for i in range(half, len(of))]
    assert labels[:2] == ["step 1 (rank 0, compute)", "step 1 (rank 1, compute)"]
    assert labels[3] == "push 1 (rank 0, to 3)"
    assert labels[8] == "update 1 of 1 (rank 2, update)"
    assert labels[-1] == "pull 1 (rank 3, to 1)"
    applied = [label for label in labels if "applied" in label]
    assert (
        applied
        == (["applied 1 (rank 2, applied)", "applied 1 (rank 3, applied)"] * 1)[
            : 0 if staleness is None else 2
        ]
    )
    assert list(of.names) == [of.op(i).name for i in range(len(of))]


def test_work_and_bytes_add_up() -> None:
    of = training([100, 200], num_steps=3, shard_bytes=(60, 40), staleness=1)
    kinds = [of.graph.op(i).kind for i in range(len(of.graph))]
    moved = {
        kind: sum(int(of.costs.size_bytes[i]) for i, k in enumerate(kinds) if k == kind)
        for kind in set(kinds)
    }
    assert moved == {"backward": 0, "push": 600, "pull": 600, "optimizer": 0, "other": 0}
    assert of.costs.ns[of.compute].tolist() == [[100, 200]] * 3
    assert kinds.count("optimizer") == of.updates.size == 3 * 2 * 2


REFUSED: list[tuple[Mapping[str, object], str]] = [
    ({"num_steps": 0}, "num_steps is 0"),
    ({"num_steps": 10**9}, "1000000000 steps of 2 workers"),
    ({"staleness": -1}, "staleness is -1"),
    ({"compute_ns": 5}, r"compute_ns has shape \(\)"),
    ({"compute_ns": [[1, 2], [3, 4]]}, r"compute_ns has shape \(2, 2\).* 3 rows"),
    ({"compute_ns": [1, -2]}, r"op step 0 \(rank 1, compute\) takes -2 ns"),
    ({"compute_ns": [1, float("nan")]}, r"op step 0 \(rank 1, compute\) takes nan ns"),
    ({"push_bytes": [1, 2]}, r"push_bytes has shape \(2,\)"),
    ({"pull_bytes": [0.5]}, r"op pull 0 \(rank 2, to 0\) moves 0.5 bytes"),
    ({"update_ns": []}, r"update_ns has shape \(0,\)"),
    ({"compute_ns": [1, 2, 3]}, "rank 3 is not in the fabric"),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED)
def test_what_does_not_fit_together_is_refused(wrong: Mapping[str, object], message: str) -> None:
    arguments = {
        "num_steps": 3, "compute_ns": [1, 2], "push_bytes": [1], "pull_bytes": [1],
        "update_ns": [1], "latency_ns": 0, "staleness": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        server_graph(star([1e9] * 3), **{**arguments, **wrong})  # type: ignore[arg-type]
