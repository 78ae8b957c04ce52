"""One self-contained HTML page about a profile: what was measured, and how sure it is."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from profiles.difference import difference
from profiles.lookup import CostTable
from profiles.roofline import link_bytes_per_s
from profiles.summary import Summary, summarize
from profiles.validity import ERRORS
from reports import profile_tables as tables
from reports.document import Block, Drawing, Section, Text
from reports.profile_figures import (
    MOST_GROUPS,
    bandwidth,
    changes,
    repeatability,
    roofline,
    uncertainty,
)
from reports.profile_maps import drawn_fabric, efficiency, first_nodes
from reports.words import count

_TEMPLATES = Path(__file__).parent / "templates"
MOST_CHANGES, MOST_NODES = 40, 3

_FABRIC = (
    "How the devices are wired, as the operating system and the driver tell it; nothing here was "
    "timed."
)
_ROOFLINE = (
    "Each mark is one measured shape, at the least flops and bytes that it needs: every operand "
    "read and every result written once. The full lines are measured ceilings, the best product "
    "of the dtype and the largest copy. Marks above the slope found their data in a cache."
)
_EFFICIENCY = (
    "The interpolated rate of products of n = k, as a share of the best product in the same dtype; "
    "the dots are the shapes that were measured. Rows are tokens, sqrt(n k) the side of the weight."
)
_BANDWIDTH = (
    "Marks are medians, shades P10 to P90, lines the fitted law latency + size / rate. Bus "
    "bandwidth is the rate of one rank's link that a ring would need (of an exchange, one "
    "way), so that kinds and groups can be compared. Groups of ranks are told by size, and "
    "members that are not neighbours by how many ranks they are apart."
)
_UNCERTAINTY = (
    "Each entry is left out of the fit in turn and foretold by the others: its absolute relative "
    "error over its time. The full line is the median and the dashed one P90 of the entries of "
    "about the same time; the titles give both over all of them."
)
_REPEATABILITY = (
    "Each pass ran in processes of its own. Left: of each entry, the pass furthest from the "
    "entry's median, with the median (long) and P90 (short) of each row. Right: how all entries "
    "of a pass lie to their medians (P10 to P90, the middle half, the median); a machine that "
    "warms up or slows down shows as a slope."
)
_SURENESS = (
    "band: in 95 of 100 cases a second profile of this machine is this near. error, P90: each "
    "shape foretold by the others, median and P90 of the absolute relative error. stated: the "
    "standard deviation that the others state for it; a look-up between shapes carries it."
)


def build_profile_page(names: Sequence[str], profiles: Sequence[CostTable]) -> str:
    """Return the page about the first of `profiles`, read from `names`, and about what changed.

    The same input gives the same bytes. Raises ValueError without a profile, or for names that are
    not as many.
    """
    if not profiles or len(names) != len(profiles):
        raise ValueError(
            f"a page has {len(profiles)} profiles and {len(names)} names; it needs a profile at "
            "least, and a name for each"
        )
    # A file name may hold anything but a slash; a page is UTF-8 that a person reads.
    shown = ["".join(letter if letter.isprintable() else "?" for letter in name) for name in names]
    summary = summarize(profiles[0])
    sections = [_measured(summary, profiles[0])]
    sections += [
        _changed(number, (shown[0], shown[number]), (profiles[0], profile))
        for number, profile in enumerate(profiles)
        if number
    ]
    sections += [
        _arithmetic(summary, profiles[0]),
        _links(summary, profiles[0]),
        _sure(summary, profiles[0]),
        _host(summary),
        _findings(summary),
    ]
    environment = Environment(
        autoescape=True,
        loader=FileSystemLoader(_TEMPLATES),
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(
        title=f"{summary.device.name}, as measured",
        eyebrow=f"layline profile: {', '.join(shown)}",
        sections=[section for section in sections if section.blocks],
        footer=(
            "All numbers follow from the files named above.",
            f"Profile {summary.digest}, measured {summary.measured_at}",
        ),
    )


def _drawn(svg: str, caption: str) -> list[Block]:
    return [Drawing(svg=svg, caption=caption)] if svg else []


def _measured(summary: Summary, table: CostTable) -> Section:
    blocks: list[Block] = [tables.facts(summary)]
    fabric, num_left = first_nodes(table.profile.fabric, MOST_NODES)
    more = f" {count(num_left)} more nodes are not drawn." if num_left else ""
    blocks += _drawn(drawn_fabric("fabric", fabric), _FABRIC + more)
    return Section(question="What was measured?", anchor="measured", blocks=tuple(blocks))


def _changed(number: int, names: tuple[str, str], pair: tuple[CostTable, CostTable]) -> Section:
    told = difference(pair[0].profile, pair[1].profile)
    blocks: list[Block] = [Text(text=tables.moved_text(told), role="lead")]
    if differing := tables.differing_text(told):
        blocks.append(Text(text=differing))
    blocks += _drawn(
        changes(f"changes{number}", told),
        f"Each mark is an entry of {names[0]} (first) and {names[1]} (second): how far its median "
        "moved, over the band that the first states. The line is where both are equal.",
    )
    if told.beyond:
        blocks.append(tables.moved(told, MOST_CHANGES))
    if (left := len(told.beyond) - MOST_CHANGES) > 0:
        blocks.append(Text(text=f"And {count(left)} more, all in --json.", role="note"))
    return Section(question=f"What changed in {names[1]}?", anchor=f"changed{number}",
                   blocks=tuple(blocks))  # fmt: skip


def _arithmetic(summary: Summary, table: CostTable) -> Section:
    blocks: list[Block] = [tables.ceilings(summary)] if summary.ceilings else []
    has_sheet = any(ceiling.sheet_per_s for ceiling in summary.ceilings)
    sheet = " The dotted lines are the data sheet's peaks, dense." if has_sheet else ""
    blocks += _drawn(roofline("roofline", table.profile, summary.ceilings), _ROOFLINE + sheet)
    blocks += _drawn(efficiency("efficiency", table, summary.ceilings), _EFFICIENCY)
    return Section(question="How fast is it at best?", anchor="compute", blocks=tuple(blocks))


def _links(summary: Summary, table: CostTable) -> Section:
    blocks: list[Block] = []
    groups = {(sample.group_size, sample.stride) for sample in table.profile.collectives}
    left = len(groups) - MOST_GROUPS
    note = f" {count(left)} more groups are in the table alone." if left > 0 else ""
    if link_bytes_per_s(table.profile.device):
        note += " The dotted line is the rate of the link by its data sheet."
    blocks += _drawn(bandwidth("bandwidth", table), _BANDWIDTH + note)
    if summary.collectives:
        blocks.append(tables.collectives(summary))
    if summary.interference:
        blocks.append(Text(text="Compute and communication at once", role="heading"))
        blocks.append(tables.interference(summary))
    return Section(question="How fast are the links?", anchor="links", blocks=tuple(blocks))


def _sure(summary: Summary, table: CostTable) -> Section:
    blocks = _drawn(uncertainty("uncertainty", table), _UNCERTAINTY)
    blocks += _drawn(repeatability("repeatability", table.profile), _REPEATABILITY)
    if summary.kernels:
        blocks += [tables.kernels(summary), Text(text=_SURENESS, role="note")]
    return Section(question="How sure are the times?", anchor="sure", blocks=tuple(blocks))


def _host(summary: Summary) -> Section:
    blocks = (tables.host(summary),) if summary.host_ns else ()
    return Section(question="What does the host cost?", anchor="host", blocks=blocks)


def _findings(summary: Summary) -> Section:
    question = "What should a reader know?"
    if not summary.findings:
        text = f"Nothing was found: none of {len(ERRORS)} kinds of errors, and no warning."
        return Section(question=question, anchor="findings", blocks=(Text(text=text),))
    return Section(question=question, anchor="findings", blocks=(tables.found(summary.findings),))
