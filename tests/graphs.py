"""Random task graphs, drawn so that much happens at the same instant: small numbers, many ties."""

from dataclasses import dataclass

from hypothesis import strategies as st

from simulator.graph import Crossing, Op, OpCosts, TaskGraph, op_costs, task_graph
from simulator.network import CapacityChange, Change, Link, SpeedChange

NUM_RANKS = 3
LAST_CHANGE_NS = 80
RATES_PER_S = (0.3e9, 0.5e9, 1e9, 2e9, 3e9, 7e9)
BACK = st.lists(st.integers(0, 29), max_size=3)
SPEEDS = (0.1, 0.5, 0.75, 1.0, 1.0, 3.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What `simulate` takes."""

    graph: TaskGraph
    costs: OpCosts
    links: tuple[Link, ...] = ()
    changes: tuple[Change, ...] = ()


@st.composite
def graphs(
    draw: st.DrawFn,
    *,
    can_block: bool = False,
    flows: bool = False,
    queues: bool = False,
    changes: bool = False,
) -> Drawn:
    """Draw a graph of up to 30 ops.

    Without `can_block` every dependency and every meet looks back, and whatever stands still goes
    on in the end; with it ops may wait for each other, and links and ranks may stay dead. `flows`
    brings links and ops that cross them, `queues` a queue on each rank, `changes` slow ranks and,
    where there are links, degraded ones.
    """
    num_ops = draw(st.integers(1, 30))
    rates = draw(st.lists(st.sampled_from(RATES_PER_S), min_size=1, max_size=4)) if flows else []
    links = tuple(Link(name=f"link {i}", bytes_per_s=rate) for i, rate in enumerate(rates))
    places = draw(st.lists(st.sampled_from(_streams(queues)), min_size=num_ops, max_size=num_ops))
    meets = _meets(draw, places, can_block)
    back = draw(st.lists(BACK, min_size=num_ops, max_size=num_ops))
    path = _paths(len(links)) if flows else st.just(())
    paths = draw(st.lists(path, min_size=num_ops, max_size=num_ops))
    ops = []
    for op_id, (rank, stream) in enumerate(places):
        lowest_of_meet = meets.index(meets[op_id]) if meets[op_id] >= 0 else op_id
        last = num_ops - 1 if can_block and _rarely(draw) else lowest_of_meet - 1
        deps = {last - steps % (last + 1) for steps in back[op_id]} if last >= 0 else set()
        ops.append(
            Op(
                id=op_id,
                rank=rank,
                stream=stream,
                name=f"op{op_id}",
                kind="other",
                deps=tuple(sorted(deps - {op_id})),
                meet=meets[op_id],
                path=paths[op_id],
                is_queued=stream == "queue",
            )
        )
    graph = task_graph(ops)
    ns = draw(st.lists(st.integers(0, 20), min_size=num_ops, max_size=num_ops))
    sizes = draw(st.lists(st.integers(0, 60), min_size=num_ops, max_size=num_ops))
    costs = op_costs(graph, ns, [s if op.path else 0 for s, op in zip(sizes, ops, strict=True)])
    ranks = sorted({op.rank for op in ops})
    drawn = draw(_changes(ranks, len(links), can_block)) if changes else ()
    return Drawn(graph=graph, costs=costs, links=links, changes=drawn)


def _streams(queues: bool) -> list[tuple[int, str]]:
    names = ["compute", "link", *(["queue"] * queues)]
    return [(rank, name) for rank in range(NUM_RANKS) for name in names]


def _rarely(draw: st.DrawFn) -> bool:
    return draw(st.integers(0, 15)) == 15


def _meets(draw: st.DrawFn, places: list[tuple[int, str]], can_block: bool) -> list[int]:
    """Let some neighbours meet, by two or three; on one stream they would wait for ever."""
    meets = [-1] * len(places)
    first = 0
    while first < len(places) - 1:
        members = range(first, min(first + draw(st.integers(1, 3)), len(places)))
        streams = [places[i] for i in members]
        is_clear = len(set(streams)) == len(streams) or (can_block and _rarely(draw))
        if len(members) > 1 and is_clear and not any(name == "queue" for _, name in streams):
            for i in members:
                meets[i] = first
        first = members.stop
    return meets


def _paths(num_links: int) -> st.SearchStrategy[tuple[Crossing, ...]]:
    crossings = st.builds(Crossing, st.integers(0, num_links - 1), st.sampled_from((1, 1, 2, 8)))
    return st.lists(crossings, max_size=3, unique_by=lambda c: c.link).map(tuple)


@st.composite
def _changes(
    draw: st.DrawFn, ranks: list[int], num_links: int, can_block: bool
) -> tuple[Change, ...]:
    """Draw changes in any order, several at one instant; at last all is well again or dead."""
    moments = st.integers(0, LAST_CHANGE_NS)
    speeds = st.builds(
        SpeedChange,
        at_ns=moments,
        rank=st.sampled_from(ranks),
        speed=st.sampled_from((0.0, *SPEEDS)),
    )
    capacities = st.builds(
        CapacityChange,
        at_ns=moments,
        link=st.integers(0, num_links - 1),
        bytes_per_s=st.sampled_from((0.0, *RATES_PER_S)),
    )
    changes: list[Change] = draw(
        st.lists(st.one_of(speeds, capacities) if num_links else speeds, max_size=8)
    )
    if can_block and draw(st.booleans()):
        return tuple(changes)
    after = LAST_CHANGE_NS + 1
    woken = [
        SpeedChange(at_ns=after, rank=rank, speed=draw(st.sampled_from(SPEEDS))) for rank in ranks
    ]
    healed = [
        CapacityChange(at_ns=after, link=link, bytes_per_s=draw(st.sampled_from(RATES_PER_S)))
        for link in range(num_links)
    ]
    return (*changes, *woken, *healed)
