"""Links: groups of every shape, calls that move what they say, samples that all ranks agree on."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

import torch

from profiles.files import from_plain
from profiles.measure import host, interference, links
from profiles.measure.collectives import COLLECTIVES, MESSAGES, collective_call
from profiles.measure.interference import overlapping
from profiles.measure.links import group_shapes, link_points, link_sizes
from profiles.measure.ranks import launched
from profiles.profile import CollectiveSample, Interference

KIB, GIB = 1 << 10, 1 << 30


def found_by_ranks(what: tuple[str, ...], num_ranks: int, folder: Path) -> Any:
    """Return what the ranks of `tests.link_ranks` wrote, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
        with launched("tests.link_ranks", [str(folder / "found.json"), *what], num_ranks):
            pass
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return found_by_ranks(
        ("time_few", "time_nothing", "time_lame", "interfere", "meet"),
        2,
        tmp_path_factory.mktemp("ranks"),
    )


def samples_of(plain: Any) -> list[CollectiveSample]:
    return [from_plain(CollectiveSample, sample, "found", "run again") for sample in plain]


@given(num_ranks=st.integers(1, 64))
def test_groups_of_a_shape_split_the_ranks(num_ranks: int) -> None:
    shapes = group_shapes(num_ranks)
    assert len(set(shapes)) == len(shapes)
    for size, stride in shapes:
        firsts = [r for r in range(num_ranks) if r % (size * stride) < stride]
        members = [first + i * stride for first in firsts for i in range(size)]
        assert sorted(members) == list(range(num_ranks))


def test_shapes_of_eight_ranks_are_those_of_its_meshes() -> None:
    # tp innermost, dp outside of it: every (size, stride) of a mesh with powers of two.
    assert group_shapes(8) == ((2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1))


@given(num_ranks=st.integers(2, 24), quick=st.booleans(), free=st.integers(4 * KIB, 16 * GIB))
def test_points_have_every_kind_at_every_size_that_fits(
    num_ranks: int, quick: bool, free: int
) -> None:
    points = link_points(num_ranks, quick, free)
    assert len(set(points)) == len(points)
    sizes = link_sizes(quick, free)
    for point in points:
        assert point.size_bytes % (4 * point.group_size) == 0
    counts = Counter(point.kind for point in points)
    num_shapes = len(group_shapes(num_ranks))
    assert {counts[kind] for kind in COLLECTIVES} == {len(sizes) * num_shapes}
    num_pairs = max(1, sum(size == 2 for size, _ in group_shapes(num_ranks)))
    assert {counts[kind] for kind in MESSAGES} == {len(sizes) * num_pairs}


def test_sizes_go_from_a_kibibyte_to_a_gibibyte_and_keep_to_memory() -> None:
    full = link_sizes(False, 16 * GIB)
    assert (full[0], full[-1], len(full)) == (KIB, GIB, 21)
    assert {b // a for a, b in pairwise(full)} == {2}
    assert link_sizes(True, 16 * GIB)[-2:] == (16 << 20, 32 << 20)
    assert link_sizes(False, 4 * GIB - 1)[-1] == GIB // 2
    assert link_sizes(False, 4 * KIB - 1) == ()


def test_a_single_rank_has_no_links() -> None:
    assert link_points(1, True, GIB) == []


def test_three_ranks_have_pairs_of_neighbours() -> None:
    shapes = {(p.kind, p.group_size, p.stride) for p in link_points(3, True, GIB)}
    assert shapes == {(kind, 3, 1) for kind in COLLECTIVES} | {(kind, 2, 1) for kind in MESSAGES}


def test_a_rank_left_over_has_nothing_to_do() -> None:
    full, other = torch.ones(4), torch.ones(4)
    assert collective_call("all_reduce", None, full, other)() is None
    assert other.tolist() == [1.0] * 4


@given(st.lists(st.integers(1, 9), min_size=1), st.lists(st.integers(1, 9)), st.integers(0, 20))
def test_only_calls_within_the_other_side_count(
    own: list[int], others: list[int], offset: int
) -> None:
    def spans(lengths: list[int], begin: int) -> list[tuple[float, float]]:
        ends = [begin + sum(lengths[: i + 1]) for i in range(len(lengths))]
        return [(end - length, end) for end, length in zip(ends, lengths, strict=True)]

    mine, theirs = spans(own, 0), spans(others, offset)
    running = range(offset, offset + sum(others))
    for span in mine:
        is_covered = all(tick in running for tick in range(int(span[0]), int(span[1])))
        assert (span in overlapping(mine, theirs)) == is_covered


class Device:
    """A GPU that was made up: each stream has a clock of its own, and calls take what they say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = {"main": 0, "beside": 0}
        self.stream = "main"
        for module in (links, interference, host):
            monkeypatch.setattr(module, "cuda_events", self.events)
            monkeypatch.setattr(module, "cuda_head_start", self.call(2_000_000))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: self)
        monkeypatch.setattr(torch.cuda, "stream", self.within)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda _: self.call(700)())

    def call(self, duration_ns: int) -> Callable[[], None]:
        def run() -> None:
            self.now_ns[self.stream] += duration_ns

        return run

    def events(self, count: int) -> list["Event"]:
        return [Event(self) for _ in range(count)]

    @contextmanager
    def within(self, _: object) -> Iterator[None]:
        self.stream = "beside"
        yield
        self.stream = "main"

    def wait_event(self, event: "Event") -> None:
        self.now_ns["beside"] = max(self.now_ns["beside"], event.at_ns)


class Event:
    """An event of such a device."""

    def __init__(self, device: Device) -> None:
        self.device, self.at_ns = device, 0

    def record(self) -> None:
        self.at_ns = self.device.now_ns[self.device.stream]

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return (end.at_ns - self.at_ns) / 1e6


def test_both_streams_of_a_device_begin_together_on_one_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device(monkeypatch)
    kernel, link = device.call(3000), device.call(5000)
    spans = interference._cuda_spans(kernel, link, 4, 2)
    assert [round(end) for _, end in spans.kernel] == [3000, 6000, 9000, 12000]
    assert [(round(begin), round(end)) for begin, end in spans.link] == [(0, 5000), (5000, 10000)]
    assert len(overlapping(spans.kernel, spans.link)) == 3
    assert interference._cuda_spans(kernel, None, 2, 0).link == ()


def test_a_collective_on_a_device_is_the_mean_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    assert links._run_ns(device.call(5000), torch.device("cuda")) == 5000
    assert host.launch_gap(torch.device("cuda"), 4) == pytest.approx(700)


@pytest.mark.dist
@pytest.mark.slow
def test_every_collective_moves_what_it_says(tmp_path: Path) -> None:
    # Two shapes of pairs with eight kinds each, and six kinds over all four ranks.
    assert found_by_ranks(("check_calls",), 4, tmp_path) == {"check_calls": 2 * 8 + 6}


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timed
def test_ranks_agree_on_samples_and_name_what_is_refused(two_ranks: Any) -> None:
    found = two_ranks["time_few"]
    assert found["is_same"]
    plain, missing = found["timed"]
    samples = samples_of(plain)
    kinds = [kind for kind in COLLECTIVES + MESSAGES if kind != "all_to_all"]
    assert [(s.size_bytes, s.kind) for s in samples] == [
        (size, kind) for size in (1024, 4096, 16384) for kind in kinds
    ]
    assert found["kept"] == [len(kinds) * i for i in (1, 2, 3)]
    reason = "this backend does not support alltoall"
    assert missing == [f"all_to_all: gloo refuses it: {reason}"]
    for sample in samples:
        assert 0 < sample.p10_ns <= sample.p50_ns <= sample.p90_ns
        assert (sample.medians_ns, sample.band) == ((sample.p50_ns,), 0.0)
        assert 0 <= sample.num_outliers <= sample.num_samples // 2
        assert sample.num_samples >= 2


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timed
def test_a_clock_that_is_over_leaves_the_smallest_size_of_all_kinds(two_ranks: Any) -> None:
    plain, missing = two_ranks["time_nothing"]
    found = {(sample.kind, sample.size_bytes) for sample in samples_of(plain)}
    assert found == {(kind, 1024) for kind in COLLECTIVES + MESSAGES}
    assert missing == ["collectives and messages from 0.00391 MiB on: out of time"]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timed
def test_kernels_and_collectives_slow_each_other_down(two_ranks: Any) -> None:
    found = two_ranks["interfere"]
    samples = [from_plain(Interference, s, "found", "run again") for s in found["interference"]]
    assert found["odd"] == []
    assert {sample.op for sample in samples} == {"linear_forward", "add_forward"}
    assert {sample.kind for sample in samples} >= {"all_reduce"}
    assert len({sample.key for sample in samples}) == len(samples)
    for sample in samples:
        # How much is noise on a machine that others use; that both ran, and for how long, is not.
        assert 0.2 < sample.compute_slowdown < 50
        assert 0.1 < sample.communication_slowdown < 500
    assert 100 < found["host"]["launch"] < 1_000_000
    assert 100 < found["host"]["launch_gap"] < 1_000_000


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timed
def test_ranks_of_one_launch_are_on_one_node(two_ranks: Any) -> None:
    found = two_ranks["meet"]
    assert found["nodes"] == [0, 0]
    assert found["fabric"]["nodes"][0]["name"] == "node0"
    assert "network" not in [node["name"] for node in found["fabric"]["nodes"]]
    assert found["free_bytes"] > 0


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timed
def test_what_one_rank_cannot_do_no_rank_has(two_ranks: Any) -> None:
    first, second = two_ranks["time_lame"]
    assert first["samples"] == second["samples"]
    assert [sample["shape"] for sample in first["samples"]] == [[4096]]
    assert first["missing"] == ["add_forward fp32 (8192,): it did not run on another rank"]
    assert second["missing"] == ["add_forward fp32 (8192,): out of memory"]
