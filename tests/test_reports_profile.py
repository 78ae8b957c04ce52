"""The page, the tables and the commands about a profile: whole, self-contained, the same bytes."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from layline.cli import main
from profiles.difference import difference
from profiles.fabric import Fabric, FabricLink, FabricNode, graph, merged, ordered
from profiles.files import canonical_json, digest
from profiles.kernel_curves import matmul, memory_pass
from profiles.lookup import CostTable
from profiles.merge import with_bands
from profiles.profile import CollectiveSample, Interference, KernelSample, Profile
from profiles.roofline import kernel_need
from profiles.summary import summarize
from reports import profile_tables
from reports.profile_axes import FAMILIES, family
from reports.profile_figures import (
    MOST_GROUPS,
    bandwidth,
    changes,
    repeatability,
    roofline,
    shown_groups,
    uncertainty,
)
from reports.profile_maps import drawn_fabric, efficiency, fabric_places, first_nodes
from reports.profile_page import build_profile_page
from tests.machine import made_up_profile
from tests.test_layline_house import ROOT

HOSTILE = "<script>alert(1)</script>"


def wiggle(number: int) -> float:
    """A factor near one that differs from entry to entry, and is always the same."""
    return 1 + 0.05 * math.sin(12.9898 * number)


def kernel(op: str, dtype: str, shape: tuple[int, ...], ns: float, number: int) -> KernelSample:
    medians = tuple(round(ns * wiggle(number) * wiggle(number * k) ** 0.3) for k in (3, 5, 7))
    middle = sorted(medians)[1]
    return KernelSample(op=op, dtype=dtype, shape=shape, p10_ns=round(0.97 * middle),
                        p50_ns=middle, p90_ns=round(1.06 * middle), num_samples=30,
                        medians_ns=medians)  # fmt: skip


def kernels() -> list[KernelSample]:
    found: list[KernelSample] = []
    for dtype in ("bf16", "fp8"):
        for m in (64, 1024, 16384):
            for n in (1024, 8192):
                for k in (1024, 8192):
                    ns = matmul("h100-sxm", dtype, m, n, k).ns
                    for op in ("linear_forward", "linear_dgrad", "linear_wgrad"):
                        found.append(kernel(op, dtype, (m, n, k), ns, len(found)))
    for op in ("norm_forward", "add_forward", "copy", "adamw"):
        for power in range(12, 29, 4):
            shape = (1 << power - 10, 1024) if op == "norm_forward" else (1 << power,)
            need = kernel_need(op, "bf16", shape)
            assert need is not None
            ns = memory_pass("h100-sxm", round(need.size_bytes)).ns
            found.append(kernel(op, "bf16", shape, ns, len(found)))
    return found


def collectives() -> list[CollectiveSample]:
    found = []
    for kind, groups in (("all_reduce", ((2, 1), (2, 4), (8, 1))), ("send_recv", ((2, 1),))):
        for group, stride in groups:
            for power in range(10, 31, 4):
                ns = round((20_000 + (1 << power) / 200) * wiggle(power + group + stride))
                found.append(
                    CollectiveSample(kind=kind, group_size=group, stride=stride,
                                     size_bytes=1 << power, p10_ns=round(0.9 * ns), p50_ns=ns,
                                     p90_ns=round(1.2 * ns), num_samples=30,
                                     medians_ns=(ns, ns + 100, ns - 100))
                )  # fmt: skip
    return found


def fabric(num_nodes: int = 1) -> Fabric:
    """Nodes of two GPUs joined by NVLink, with a NIC beside the second, in one network."""
    return merged([_node(f"node{number}") for number in range(num_nodes)])


def _node(node: str) -> Fabric:
    labels = {"": ("node", HOSTILE), "/gpu0": ("gpu", "H100"), "/gpu1": ("gpu", "H100"),
              "/nic": ("nic", "")}  # fmt: skip
    wires = (("/gpu0", "/gpu1", "NV18"), ("/gpu1", "/nic", "PIX"), ("", "/nic", "PCIe"),
             ("", "/gpu0", "made up"))  # fmt: skip
    return ordered(
        [FabricNode(name=node + name, kind=kind, label=label)
         for name, (kind, label) in labels.items()],
        [FabricLink(first=node + first, second=node + second, kind=kind)
         for first, second, kind in wires],
    )  # fmt: skip


def gpu_profile() -> Profile:
    made_up = made_up_profile(num_ranks=8)
    return replace(
        made_up,
        device=replace(made_up.device, kind="cuda", name="NVIDIA H100 80GB HBM3", backend="nccl"),
        kernels=with_bands(kernels()),
        collectives=with_bands(collectives()),
        interference=(
            Interference(op="linear_forward", dtype="bf16", shape=(64, 64, 64), kind="all_reduce",
                         group_size=8, size_bytes=1 << 20, compute_slowdown=1.125,
                         communication_slowdown=1.5),
        ),
        fabric=fabric(),
        missing=("fp16: not asked for",),
    )  # fmt: skip


PROFILE = gpu_profile()
TABLE = CostTable(PROFILE)
SUMMARY = summarize(TABLE)
SLOWER = replace(
    PROFILE,
    kernels=tuple(replace(k, p50_ns=2 * k.p50_ns, p90_ns=3 * k.p50_ns) for k in PROFILE.kernels),
)
MADE_UP = CostTable(made_up_profile(num_ranks=4))
FIGURES: dict[str, Callable[[], str]] = {
    "roofline": lambda: roofline("a", PROFILE, SUMMARY.ceilings),
    "roofline of a CPU": lambda: roofline("a", MADE_UP.profile, summarize(MADE_UP).ceilings),
    "efficiency": lambda: efficiency("a", TABLE, SUMMARY.ceilings),
    "bandwidth": lambda: bandwidth("a", TABLE),
    "uncertainty": lambda: uncertainty("a", TABLE),
    "uncertainty of exact laws": lambda: uncertainty("a", MADE_UP),
    "repeatability": lambda: repeatability("a", PROFILE),
    "changes": lambda: changes("a", difference(PROFILE, SLOWER)),
    "no changes": lambda: changes("a", difference(PROFILE, PROFILE)),
    "fabric": lambda: drawn_fabric("a", fabric()),
    "fabric of nodes": lambda: drawn_fabric("a", fabric(3)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_the_same_valid_self_contained_bytes(name: str) -> None:
    svg = FIGURES[name]()
    assert svg == FIGURES[name]()
    root = ElementTree.fromstring(svg)
    assert root.attrib["aria-label"]
    assert not re.findall(r'(?:href="|url\()(?!#)', svg)
    # A tick that was rounded to nothing would be a lie.
    assert ">0.00<" not in svg
    numbers = re.findall(r"[ML]\s*(-?[\d.]+|nan|inf)", svg)
    assert numbers
    assert all(math.isfinite(float(number)) for number in numbers)


def test_nothing_measured_is_nothing_drawn() -> None:
    empty = replace(PROFILE, kernels=(), collectives=(), fabric=Fabric())
    table = CostTable(empty)
    assert roofline("a", empty, ()) == efficiency("a", table, ()) == bandwidth("a", table) == ""
    assert uncertainty("a", table) == repeatability("a", empty) == ""
    assert drawn_fabric("a", empty.fabric) == changes("a", difference(empty, empty)) == ""
    assert "What was measured?" in build_profile_page(["empty.json"], [table])


def test_the_roofline_has_a_mark_for_each_kernel_with_flops() -> None:
    """In the colour of its family, and one more in the legend."""
    svg = FIGURES["roofline"]()
    for each in FAMILIES:
        needs = [
            kernel_need(sample.op, sample.dtype, sample.shape)
            for sample in PROFILE.kernels
            if family(sample) is each
        ]
        count = sum(need is not None and need.flops > 0 for need in needs)
        marks = len(re.findall(rf"<use [^>]*{each.colour}", svg))
        assert marks == (count + 1 if count else 0)
        assert bool(count) == (f">{each.word}<" in svg)


def test_a_fabric_has_its_nodes_apart_and_its_vertices_nowhere_twice() -> None:
    whole = graph(fabric(3))
    places = fabric_places(whole)
    assert places.keys() == set(whole)
    assert places == fabric_places(graph(fabric(3)))
    apart = [abs(a - b) for i, a in enumerate(places.values()) for b in list(places.values())[:i]]
    assert min(apart) > 0.5
    # A NIC is nearer to the GPU that it shares a bridge with.
    nic, near, far = (places[f"node1/{name}"] for name in ("nic", "gpu1", "gpu0"))
    assert abs(nic - near) < abs(nic - far)


def test_of_many_nodes_the_first_are_drawn() -> None:
    assert first_nodes(fabric(3), 3) == (fabric(3), 0)
    assert first_nodes(fabric(1), 3) == (fabric(1), 0)
    kept, num_left = first_nodes(fabric(5), 3)
    assert (kept, num_left) == (fabric(3), 2)


def test_of_many_groups_the_largest_are_drawn() -> None:
    sample = collectives()[0]
    many = [replace(sample, group_size=1 << power, stride=stride)
            for power in range(1, 6) for stride in (1, 2)]  # fmt: skip
    shown = shown_groups(many)
    assert len(shown) == len(set(shown.values())) == MOST_GROUPS
    assert (32, 2) in shown
    assert (2, 1) not in shown


def test_the_page_is_the_same_bytes_and_needs_nothing_outside() -> None:
    page = build_profile_page(["h100.json"], [TABLE])
    assert build_profile_page(["h100.json"], [CostTable(gpu_profile())]) == page
    assert "default-src 'none'" in page
    assert not re.findall(r'(?:src|href)="(?!#)|url\((?!#)|@import', page)
    for figure in ("Roofline", "Efficiency of", "Bus bandwidth", "Error of", "Spread of", "fabric"):
        assert len(re.findall(rf'aria-label="[^"]*{figure}', page)) == 1
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert HOSTILE not in page
    assert digest(PROFILE) in page
    assert "fp16: not asked for" in page


def test_the_page_says_what_changed() -> None:
    page = build_profile_page(["a.json", HOSTILE], [TABLE, CostTable(SLOWER)])
    count = len(PROFILE.kernels)
    assert f"{count} of {count + len(PROFILE.collectives)} common entries moved" in page
    assert "+100.0 %" in page
    assert HOSTILE not in page
    with pytest.raises(ValueError, match="a name for each"):
        build_profile_page(["a.json"], [TABLE, TABLE])


def test_tables_hold_the_numbers_of_the_summary() -> None:
    rows = {row[0]: row for row in profile_tables.ceilings(SUMMARY).rows}
    peak = next(each for each in SUMMARY.ceilings if each.what == "bf16")
    assert rows["bf16"][2:4] == ("989.0 TFLOP/s", f"{100 * (peak.share or 0):.0f} %")
    assert {row[0] for row in profile_tables.collectives(SUMMARY).rows} == {"all-reduce", "message"}
    assert profile_tables.interference(SUMMARY).rows[0][2:] == ("1.12 x", "1.50 x")
    assert len(profile_tables.kernels(SUMMARY).rows) == len(SUMMARY.kernels)


def test_many_findings_of_a_kind_are_some_and_a_count() -> None:
    single = [replace(sample, num_samples=1) for sample in PROFILE.kernels]
    told = summarize(CostTable(replace(PROFILE, kernels=tuple(single)))).findings
    alike = [row for row in profile_tables.found(told).rows if row[0] == "a single call"]
    assert len(alike) == profile_tables.MOST_SHOWN
    assert alike[-1][1] == f"and {len(single) - profile_tables.MOST_SHOWN + 1} more"


Call = Callable[..., Result]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """A command in a folder that holds two profiles of one GPU, and a broken one."""
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text(canonical_json(PROFILE))
    Path("b.json").write_text(canonical_json(SLOWER))
    bad = replace(PROFILE.kernels[0], p10_ns=0)
    Path("bad.json").write_text(canonical_json(replace(PROFILE, kernels=(bad,))))

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["profile", *arguments], catch_exceptions=False)

    return run


def test_show_prints_and_writes_a_page(call: Call) -> None:
    shown = call("--show", "a.json", "-o", "page.html")
    assert shown.exit_code == 0, shown.output
    for words in ("NVIDIA H100 80GB HBM3", "989.0 TFLOP/s", "linear_wgrad", "all-reduce",
                  digest(PROFILE), "asked for and not measured", "wrote page.html"):  # fmt: skip
        assert words in shown.stdout
    assert Path("page.html").read_text().startswith("<!doctype html>")


def test_show_as_json_holds_the_summary(call: Call) -> None:
    shown = call("--show", "a.json", "--json")
    told = json.loads(shown.stdout)
    assert told["differences"] == []
    (one,) = told["profiles"]
    assert one["path"] == "a.json"
    assert one["summary"]["digest"] == digest(PROFILE)
    assert one["summary"]["num_kernels"] == len(PROFILE.kernels)
    assert shown.stdout == call("--show", "a.json", "--json").stdout


def test_show_compares(call: Call) -> None:
    text = call("--show", "a.json", "--show", "b.json").stdout
    count = len(PROFILE.kernels)
    assert f"{count} of {count + len(PROFILE.collectives)} common entries moved" in text
    assert f"and {count - 20} more, all in --json" in text
    told = json.loads(call("--show", "a.json", "--show", "b.json", "--json").stdout)
    (changed,) = told["differences"]
    assert len(changed["beyond"]) == changed["num_beyond"] == count
    assert {each["ratio"] for each in changed["beyond"]} == {2.0}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--show", "bad.json"), 3, "p10_ns is 0; it must be above 0; measure it again"),
        (("--show", "none.json"), 3, "none.json: no such file"),
        (("--show", "a.json", "-o", "a.json"), 3, "is also read"),
        (("--show", "a.json", "-o", "none/page.html"), 3, "no such file or directory"),
        (("--show", "a.json", "--quick"), 2, "measure nothing"),
        (("--quick",), 2, "-o FILE"),
        (("--json", "-o", "new.json"), 2, "without --json"),
    ],
)
def test_bad_use_is_told(call: Call, arguments: tuple[str, ...], code: int, words: str) -> None:
    result = call(*arguments)
    assert result.exit_code == code
    assert words in result.stderr
    assert not Path("new.json").exists()


def test_the_page_loads_no_script_by_its_template() -> None:
    template = (ROOT / "reports" / "templates" / "report.html.j2").read_text(encoding="utf-8")
    assert "<script" not in template
