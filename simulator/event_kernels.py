"""The compiled event loop of tier 2: streams, queues, meets, fair flows, changes.

The clock is whole nanoseconds. At one instant, in this order: changes of capacity and speed; all
ends of ops, and all starts that they allow, until nothing more happens; then every idle queue
takes its next op, and ends and starts follow again; last, rates of flows. `loop.py` prepares the
tables and checks everything; nothing here does.

Tables are arrays of records, so that what belongs to one op, stream or link stands together in
memory, and a call passes few of them. A stream runs at most one op: `slot` is its number.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from simulator.checks import Int64
from simulator.compiled import NEVER, compiled, inlined

Int32 = npt.NDArray[np.int32]
Table = np.recarray[Any, Any]

ROUNDING, SLACK_NS = 1.0 - 1e-12, 1e-6
"""Predicted ends are rounded up to whole ns; these keep an end that is whole from going one up, by
the error of one division and by that of a remainder that many changes of rate have worn.
"""

OP = np.dtype(
    [("ns", np.int64), ("start_ns", np.int64), ("end_ns", np.int64), ("slot", np.int32),
     ("next_op", np.int32), ("waiting", np.int32), ("first_follower", np.int32),
     ("path", np.int32), ("meet", np.int32)], align=True,
)  # fmt: skip
"""One op: `waiting` counts what it still waits for; its followers stand from `first_follower` up
to that of the next op. A search holds millions of these, so places are used twice: until an op
ends, `end_ns` holds the bytes that it has to move, and while it queues, `start_ns` the time since
which it has been ready.
"""
SLOT = np.dtype(
    [("since_ns", np.int64), ("left", np.float64), ("rate", np.float64),
     ("new_rate", np.float64), ("speed", np.float64), ("stamp", np.int64), ("op", np.int32),
     ("place", np.int32), ("rank", np.int32), ("first_queued", np.int32),
     ("num_queued", np.int32), ("first_crossing", np.int32), ("end_crossing", np.int32),
     ("is_queue", np.int8), ("is_flowing", np.int8), ("is_marked", np.int8)], align=True,
)  # fmt: skip
"""One stream: the op that it runs (-1: idle), and its place in the heap of what runs.

At `since_ns`, `left` bytes (or ns of work) were left, and go at `rate` (or `speed`) from then on.
"""
RUNNING_OP = np.dtype([("due_ns", np.int64), ("slot", np.int32)], align=True)
"""One entry of the heap of what runs: when a stream's op is due, as far as is known."""
LINK = np.dtype(
    [("capacity", np.float64), ("room", np.float64), ("weight", np.float64), ("stamp", np.int64),
     ("first_flow", np.int32), ("num_flows", np.int32), ("num_open", np.int32),
     ("is_marked", np.int8)], align=True,
)  # fmt: skip
"""One link; rates in bytes per ns. Its flows stand in `flows` from `first_flow` on."""
FLOW = np.dtype([("weight", np.float64), ("slot", np.int32)], align=True)
CROSSING = np.dtype([("weight", np.float64), ("link", np.int32)], align=True)
MEET = np.dtype([("first_member", np.int32), ("num_members", np.int32), ("missing", np.int32)])
CHANGE = np.dtype(
    [("at_ns", np.int64), ("value", np.float64), ("target", np.int32), ("is_speed", np.int8)],
    align=True,
)

RUNNING, AGENDA, MARKED, DIRTY, STAMP, NUM_COUNTS = range(6)
"""Places in `counts`: lengths of the heap, the agenda, the marked queues and links; last stamp."""


@compiled
def run(
    ops: Table, followers: Int32, meets: Table, members: Int32, slots: Table, heap: Table,
    agenda: Int32, queues: Int32, marked: Int32, links: Table, flows: Table, dirty: Int32,
    crossings: Table, paths: Int32, near_links: Int32, near_slots: Int32, changes: Table,
    counts: Int64,
) -> None:  # fmt: skip
    """Run until nothing more happens; `changes` are sorted by time.

    What must be looked at next stands on `agenda`: op i for one that is ready, ~i for one to start.
    """
    now, change, scanned = 0, 0, 0
    while True:
        if change < len(changes) and changes[change].at_ns == now:
            apply(slots, heap, links, dirty, changes[change], counts, now)
            change += 1
        elif counts[AGENDA] > 0:
            counts[AGENDA] -= 1
            op = agenda[counts[AGENDA]]
            if op < 0:
                start(ops, slots, heap, paths, counts, ~op, now)
            elif ops[op].meet < 0 and not slots[ops[op].slot].is_queue:
                start(ops, slots, heap, paths, counts, op, now)
            else:
                gather_or_queue(ops, meets, members, slots, queues, marked, agenda, counts, op, now)
        elif scanned < len(ops) - 1:
            if ops[scanned].waiting == 0:
                agenda[counts[AGENDA]] = scanned
                counts[AGENDA] += 1
            scanned += 1
        elif counts[RUNNING] > 0 and heap[0].due_ns == now:
            slot = heap[0].slot
            if slots[slot].end_crossing > slots[slot].first_crossing:
                if slots[slot].is_flowing:
                    leave_links(slots, links, flows, dirty, crossings, counts, slot)
                elif ops[slots[slot].op].end_ns > 0:
                    size_bytes = ops[slots[slot].op].end_ns
                    enter_links(
                        slots, heap, links, flows, dirty, crossings, counts, slot, size_bytes, now
                    )
                    continue
            finish(ops, followers, slots, heap, agenda, marked, counts, slot, now)
        elif counts[MARKED] > 0:
            serve_queues(ops, slots, queues, marked, agenda, counts)
        elif counts[DIRTY] > 0:
            num_links, num_slots = collect(
                slots, links, flows, dirty, crossings, near_links, near_slots, counts
            )
            fill(slots, links, flows, crossings, near_links, num_links, num_slots)
            change_rates(slots, heap, near_slots, counts, num_slots, now)
        else:
            now = heap[0].due_ns if counts[RUNNING] > 0 else NEVER
            if change < len(changes) and changes[change].at_ns < now:
                now = changes[change].at_ns
            if now == NEVER:
                return


@inlined
def start(
    ops: Table, slots: Table, heap: Table, paths: Int32, counts: Int64, op: int, now: int
) -> None:
    """Start `op` on its idle stream."""
    slot = ops[op].slot
    duration, path = ops[op].ns, ops[op].path
    ops[op].start_ns = now
    slots[slot].op = op
    due_ns = now + duration
    if path >= 0:
        slots[slot].is_flowing = 0
        slots[slot].first_crossing, slots[slot].end_crossing = paths[path], paths[path + 1]
    else:
        slots[slot].first_crossing = slots[slot].end_crossing = 0
        slots[slot].since_ns, slots[slot].left = now, duration
        if slots[slot].speed != 1.0:
            due_ns = predict(now, float(duration), slots[slot].speed)
    counts[RUNNING] += 1
    rise(slots, heap, slot, counts[RUNNING] - 1, due_ns)


@inlined
def predict(now: int, left: float, rate: float) -> int:
    """Return the first whole nanosecond by which `left` is done at `rate`."""
    if left <= 0.0:
        return now
    if rate <= 0.0:
        return NEVER
    took = np.ceil(left / rate * ROUNDING - SLACK_NS)
    return now + int(took) if took < 4e18 else NEVER


@inlined
def finish(
    ops: Table, followers: Int32, slots: Table, heap: Table, agenda: Int32, marked: Int32,
    counts: Int64, slot: int, now: int,
) -> None:  # fmt: skip
    """End the op of a stream and note who may go on."""
    op = slots[slot].op
    ops[op].end_ns = now
    slots[slot].op = -1
    counts[RUNNING] -= 1
    last = heap[counts[RUNNING]]
    if last.slot != slot:
        sink(slots, heap, counts[RUNNING], last.slot, slots[slot].place, last.due_ns)
    num, follower = counts[AGENDA], ops[op].next_op
    if follower >= 0:
        ops[follower].waiting -= 1
        if ops[follower].waiting == 0:
            agenda[num] = follower
            num += 1
    elif slots[slot].is_queue:
        mark_queue(slots, marked, counts, slot)
    for place in range(ops[op].first_follower, ops[op + 1].first_follower):
        follower = followers[place]
        ops[follower].waiting -= 1
        if ops[follower].waiting == 0:
            agenda[num] = follower
            num += 1
    counts[AGENDA] = num


@inlined
def gather_or_queue(
    ops: Table, meets: Table, members: Int32, slots: Table, queues: Int32, marked: Int32,
    agenda: Int32, counts: Int64, op: int, now: int,
) -> None:  # fmt: skip
    """Let a ready op wait for its meet, or start all of it; or let it queue."""
    meet, slot = ops[op].meet, ops[op].slot
    if meet >= 0:
        meets[meet].missing -= 1
        if meets[meet].missing == 0:
            first = meets[meet].first_member
            for place in range(first, first + meets[meet].num_members):
                agenda[counts[AGENDA]] = ~members[place]
                counts[AGENDA] += 1
        return
    ops[op].start_ns = now
    enqueue(ops, queues, slots[slot].first_queued, slots[slot].num_queued, op)
    slots[slot].num_queued += 1
    mark_queue(slots, marked, counts, slot)


@inlined
def apply(
    slots: Table, heap: Table, links: Table, dirty: Int32, change: Any, counts: Int64, now: int
) -> None:
    """Apply one change: of the capacity of a link, or of the speed of a rank."""
    if not change.is_speed:
        links[change.target].capacity = change.value
        mark_link(links, dirty, counts, change.target)
        return
    for slot in range(len(slots)):
        if slots[slot].rank != change.target:
            continue
        if slots[slot].op >= 0 and slots[slot].end_crossing == slots[slot].first_crossing:
            slots[slot].left -= slots[slot].speed * (now - slots[slot].since_ns)
            slots[slot].since_ns = now
            due_ns = predict(now, slots[slot].left, change.value)
            move(slots, heap, counts[RUNNING], slot, due_ns)
        slots[slot].speed = change.value


# Queues: a heap of the ready ops of each, by the time since which they are ready, then by id.


@inlined
def enqueue(ops: Table, queues: Int32, base: int, place: int, op: int) -> None:
    """Put `op` into the heap of `place` ops that begins at `base`."""
    while place > 0:
        parent = (place - 1) // 2
        other = queues[base + parent]
        if not comes_first(ops, op, other):
            break
        queues[base + place] = other
        place = parent
    queues[base + place] = op


@inlined
def dequeue(ops: Table, queues: Int32, base: int, length: int) -> int:
    """Take the first op out of the heap of `length` ops that begins at `base`."""
    first, op, place = queues[base], queues[base + length - 1], 0
    while 2 * place + 1 < length - 1:
        child = 2 * place + 1
        if child + 1 < length - 1 and comes_first(
            ops, queues[base + child + 1], queues[base + child]
        ):
            child += 1
        if comes_first(ops, op, queues[base + child]):
            break
        queues[base + place] = queues[base + child]
        place = child
    queues[base + place] = op
    return int(first)


@inlined
def comes_first(ops: Table, op: int, other: int) -> bool:
    """Return whether a queue serves `op` before `other`."""
    a, b = ops[op].start_ns, ops[other].start_ns
    return a < b or (a == b and op < other)


@inlined
def mark_queue(slots: Table, marked: Int32, counts: Int64, slot: int) -> None:
    """Look at a queue once the ends of this instant are done."""
    if not slots[slot].is_marked:
        slots[slot].is_marked = 1
        marked[counts[MARKED]] = slot
        counts[MARKED] += 1


@inlined
def serve_queues(
    ops: Table, slots: Table, queues: Int32, marked: Int32, agenda: Int32, counts: Int64
) -> None:
    """Let every idle queue that has someone waiting take its next op."""
    for place in range(counts[MARKED]):
        slot = marked[place]
        slots[slot].is_marked = 0
        length = slots[slot].num_queued
        if slots[slot].op < 0 and length > 0:
            op = dequeue(ops, queues, slots[slot].first_queued, length)
            slots[slot].num_queued = length - 1
            agenda[counts[AGENDA]] = ~op
            counts[AGENDA] += 1
    counts[MARKED] = 0


# Flows: rates are max-min fair, found again for what hangs together with the links that changed.


@inlined
def enter_links(
    slots: Table, heap: Table, links: Table, flows: Table, dirty: Int32, crossings: Table,
    counts: Int64, slot: int, size_bytes: int, now: int,
) -> None:  # fmt: skip
    """Let the bytes of a stream's op flow; alone on all its links it needs no sharing."""
    is_alone, rate = True, np.inf
    first, end = slots[slot].first_crossing, slots[slot].end_crossing
    for crossing in range(first, end):
        link, weight = crossings[crossing].link, crossings[crossing].weight
        num = links[link].num_flows
        flows[links[link].first_flow + num].slot = slot
        flows[links[link].first_flow + num].weight = weight
        links[link].num_flows = num + 1
        is_alone = is_alone and num == 0
        rate = min(rate, links[link].capacity / weight)
    slots[slot].is_flowing = 1
    slots[slot].since_ns, slots[slot].left = now, size_bytes
    slots[slot].rate = rate if is_alone else 0.0
    due_ns = predict(now, float(size_bytes), slots[slot].rate)
    move(slots, heap, counts[RUNNING], slot, due_ns)
    if not is_alone:
        for crossing in range(first, end):
            mark_link(links, dirty, counts, crossings[crossing].link)


@inlined
def leave_links(
    slots: Table, links: Table, flows: Table, dirty: Int32, crossings: Table, counts: Int64,
    slot: int,
) -> None:  # fmt: skip
    """Take the flow of a stream off its links; the last flow of each fills its place there."""
    for crossing in range(slots[slot].first_crossing, slots[slot].end_crossing):
        link = crossings[crossing].link
        place = links[link].first_flow
        last = place + links[link].num_flows - 1
        while flows[place].slot != slot:
            place += 1
        flows[place].slot, flows[place].weight = flows[last].slot, flows[last].weight
        links[link].num_flows -= 1
        if links[link].num_flows > 0:
            mark_link(links, dirty, counts, link)


@inlined
def mark_link(links: Table, dirty: Int32, counts: Int64, link: int) -> None:
    """Share `link` anew at the end of this instant."""
    if not links[link].is_marked:
        links[link].is_marked = 1
        dirty[counts[DIRTY]] = link
        counts[DIRTY] += 1


@inlined
def collect(
    slots: Table, links: Table, flows: Table, dirty: Int32, crossings: Table, near_links: Int32,
    near_slots: Int32, counts: Int64,
) -> tuple[int, int]:  # fmt: skip
    """Collect links and flows that hang together with the marked links; return their numbers."""
    counts[STAMP] += 1
    stamp, num_links, num_slots, seen = counts[STAMP], counts[DIRTY], 0, 0
    for place in range(num_links):
        link = dirty[place]
        links[link].is_marked, links[link].stamp = 0, stamp
        near_links[place] = link
    counts[DIRTY] = 0
    while seen < num_links:
        link = near_links[seen]
        seen += 1
        weight = 0.0
        first, num = links[link].first_flow, links[link].num_flows
        for place in range(first, first + num):
            weight += flows[place].weight
            slot = flows[place].slot
            if slots[slot].stamp == stamp:
                continue
            slots[slot].stamp = stamp
            near_slots[num_slots] = slot
            num_slots += 1
            for crossing in range(slots[slot].first_crossing, slots[slot].end_crossing):
                other = crossings[crossing].link
                if links[other].stamp != stamp:
                    links[other].stamp = stamp
                    near_links[num_links] = other
                    num_links += 1
        links[link].room, links[link].weight = links[link].capacity, weight
        links[link].num_open = num
    return num_links, num_slots


@inlined
def fill(
    slots: Table, links: Table, flows: Table, crossings: Table, near_links: Int32, num_links:
    int, num_left: int,
) -> None:  # fmt: skip
    """Raise all rates together; the links that fill up first fix the rates of their flows."""
    while num_left > 0:
        tightest, share, place = -1, np.inf, 0
        while place < num_links:
            link = near_links[place]
            if links[link].num_open == 0:
                num_links -= 1
                near_links[place] = near_links[num_links]
                continue
            if links[link].room < share * links[link].weight:
                tightest, share = link, links[link].room / links[link].weight
            place += 1
        share = max(share, 0.0)
        first = links[tightest].first_flow
        for place in range(first, first + links[tightest].num_flows):
            slot = flows[place].slot
            # A negative stamp says that the rate of the flow is fixed already.
            if slots[slot].stamp < 0:
                continue
            slots[slot].stamp = -slots[slot].stamp
            slots[slot].new_rate = share
            num_left -= 1
            for crossing in range(slots[slot].first_crossing, slots[slot].end_crossing):
                link, weight = crossings[crossing].link, crossings[crossing].weight
                links[link].room -= share * weight
                links[link].weight -= weight
                links[link].num_open -= 1


@inlined
def change_rates(
    slots: Table, heap: Table, near_slots: Int32, counts: Int64, num_slots: int, now: int
) -> None:
    """Let flows whose rate has changed go on at the new one."""
    for place in range(num_slots):
        slot = near_slots[place]
        rate = slots[slot].new_rate
        if rate != slots[slot].rate:
            slots[slot].left -= slots[slot].rate * (now - slots[slot].since_ns)
            slots[slot].since_ns, slots[slot].rate = now, rate
            due_ns = predict(now, slots[slot].left, rate)
            move(slots, heap, counts[RUNNING], slot, due_ns)


# What runs: a heap of slots by due time. Ties need no order: all ends of an instant are done before
# anything is decided on them.


@inlined
def move(slots: Table, heap: Table, size: int, slot: int, due_ns: int) -> None:
    """Put a slot where it belongs now that it is due at another time."""
    place = slots[slot].place
    if place > 0 and due_ns < heap[(place - 1) // 2].due_ns:
        rise(slots, heap, slot, place, due_ns)
    else:
        sink(slots, heap, size, slot, place, due_ns)


@inlined
def rise(slots: Table, heap: Table, slot: int, place: int, due_ns: int) -> None:
    """Let a slot rise from `place`."""
    while place > 0:
        parent = (place - 1) // 2
        if heap[parent].due_ns <= due_ns:
            break
        put(slots, heap, place, heap[parent].slot, heap[parent].due_ns)
        place = parent
    put(slots, heap, place, slot, due_ns)


@inlined
def sink(slots: Table, heap: Table, size: int, slot: int, place: int, due_ns: int) -> None:
    """Let a slot sink from `place`; it is not smaller than what stands above."""
    while 2 * place + 1 < size:
        child = 2 * place + 1
        if child + 1 < size and heap[child + 1].due_ns < heap[child].due_ns:
            child += 1
        if due_ns <= heap[child].due_ns:
            break
        put(slots, heap, place, heap[child].slot, heap[child].due_ns)
        place = child
    put(slots, heap, place, slot, due_ns)


@inlined
def put(slots: Table, heap: Table, place: int, slot: int, due_ns: int) -> None:
    """Let a slot stand at `place`."""
    heap[place].slot, heap[place].due_ns = slot, due_ns
    slots[slot].place = place


@compiled
def reach(ops: Table, followers: Int32, meets: Table, members: Int32) -> None:
    """Start whatever can ever start, without times: `start_ns` is 0 there, -1 in a circle.

    Takes `waiting` and `missing` down as `run` does.
    """
    stack, size = np.empty(len(ops), np.int32), 0
    for first in range(len(ops) - 1):
        if ops[first].waiting == 0:
            size = list_ready(ops, meets, members, stack, size, first)
    while size > 0:
        size -= 1
        op = stack[size]
        for place in range(ops[op].first_follower - 1, ops[op + 1].first_follower):
            is_next = place < ops[op].first_follower
            follower = ops[op].next_op if is_next else followers[place]
            if follower >= 0:
                ops[follower].waiting -= 1
                if ops[follower].waiting == 0:
                    size = list_ready(ops, meets, members, stack, size, follower)


@inlined
def list_ready(ops: Table, meets: Table, members: Int32, stack: Int32, size: int, op: int) -> int:
    """Put `op`, or all of its meet once the last member is there, on the stack."""
    meet = ops[op].meet
    if meet < 0:
        stack[size], ops[op].start_ns = op, 0
        return size + 1
    meets[meet].missing -= 1
    if meets[meet].missing == 0:
        first = meets[meet].first_member
        for place in range(first, first + meets[meet].num_members):
            stack[size], ops[members[place]].start_ns = members[place], 0
            size += 1
    return size
