"""The compiled loops of tier 1: one candidate walked, and many of one shape followed.

Callers check everything; nothing here does.
"""

import numpy as np
import numpy.typing as npt

from simulator.checks import Int64
from simulator.compiled import compiled, inlined

Int32 = npt.NDArray[np.int32]

UNKNOWN = -1


@inlined
def draw(key: int, microbatch: int) -> int:
    """Return the table place of one micro-batch; the same lines as `jitter.mix`."""
    x = key ^ (microbatch & 0xFFFFFFFF)
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x45D9F3B) & 0xFFFFFFFF
    return int((x ^ (x >> 16)) >> 20)


@inlined
def jittered(ns: int, table: Int64, key: int, microbatch: int) -> int:
    """Return `ns` times its factor / 2^20, rounded down."""
    factor = table[draw(key, microbatch)]
    return int((ns >> 20) * factor + (((ns & 0xFFFFF) * factor) >> 20))


@compiled
def walk(
    codes: Int64, offsets: Int64, homes: Int32, m: int, times: Int64, keys: Int64,
    tables: Int64, clock: Int64, arrivals: Int64, ends: Int64, sequence: Int32, reads: Int64,
    senders: Int64, posts: Int64, turns: Int64,
) -> int:  # fmt: skip
    """Walk all ranks' orders of one candidate; return how many actions were done.

    codes [A]; offsets [p + 1]; homes [S]; times and keys [6, S]; clock [p], in: when each rank
    begins, out: when it is done; arrivals [2 * S * m], forward and then backward, stage by stage,
    in: UNKNOWN but for inputs that are there from the start, out: the end of each message; ends
    [A]; sequence [A], out: the actions in an order in which each comes after all that it waits
    for. `ends` and `sequence` are empty where nobody wants them, `tables` [2, 4096] is [2, 0] where
    nothing is drawn. Fewer than A: the ranks block each other.

    In a rendezvous, messages stand link by link in the order of their sends: reads [A] is the
    message that an action reads (-1: none), senders and posts [M] as in `Dataflow`, turns [p * p]
    the first message of each link. When messages are eager, reads is empty.
    """
    num_ranks, num_stages, draws = len(clock), times.shape[1], tables.shape[1] > 0
    # A link is an ordered pair of ranks.
    link_free, begin = np.zeros(num_ranks * num_ranks, np.int64), clock.copy()
    is_eager, is_kept = len(reads) == 0, len(ends) > 0
    cursor, num_done, num_before = offsets[:-1].copy(), 0, -1
    while num_done > num_before:
        num_before = num_done
        # Down the ranks, as forwards go, and up again, as gradients do.
        for visit in range(2 * num_ranks):
            rank = visit if visit < num_ranks else 2 * num_ranks - 1 - visit
            now, place = clock[rank], cursor[rank]
            while place < offsets[rank + 1]:
                code = codes[place]
                kind, stage, microbatch = code & 3, (code >> 2) & 0x3FFFFF, code >> 24
                way = 0 if kind == 0 else 1
                slot = (way * num_stages + stage) * m + microbatch
                if kind != 3:
                    if arrivals[slot] < 0:
                        break
                    if not is_eager and reads[place] >= 0:
                        link = homes[stage - 1 + 2 * way] * num_ranks + rank
                        while turns[link] <= reads[place]:
                            turn = turns[link]
                            sender, post = senders[turn], posts[turn]
                            posted = ends[post - 1] if post > offsets[rank] else begin[rank]
                            start = max(ends[sender], posted, link_free[link])
                            link_free[link] = receive(
                                codes[sender], start, m, times, keys, tables[1], draws, arrivals
                            )
                            turns[link] = turn + 1
                    now = max(now, arrivals[slot])
                now += duration_of(kind, stage, microbatch, times, keys, tables[0], draws)
                reader = stage + 1 - 2 * way
                if kind != 3 and 0 <= reader < num_stages:
                    link, arrival = rank * num_ranks + homes[reader], now
                    if is_eager and homes[reader] != rank:
                        send = duration_of(
                            4 + way, stage, microbatch, times, keys, tables[1], draws
                        )
                        arrival = link_free[link] = max(now, link_free[link]) + send
                    arrivals[slot + m - 2 * way * m] = arrival
                if is_kept:
                    ends[place] = now
                    sequence[num_done] = place
                num_done += 1
                place += 1
            clock[rank], cursor[rank] = now, place
    return num_done


@inlined
def receive(
    code: int, start: int, m: int, times: Int64, keys: Int64, table: Int64, draws: bool,
    arrivals: Int64,
) -> int:  # fmt: skip
    """Note when the message of the action `code`, begun at `start`, has arrived; return that."""
    kind, stage, microbatch = code & 3, (code >> 2) & 0x3FFFFF, code >> 24
    way = 0 if kind == 0 else 1
    end = start + duration_of(4 + way, stage, microbatch, times, keys, table, draws)
    arrivals[(way * times.shape[1] + stage + 1 - 2 * way) * m + microbatch] = end
    return end


@inlined
def duration_of(
    part: int, stage: int, microbatch: int, times: Int64, keys: Int64, table: Int64, draws: bool
) -> int:
    """Return the time of one part, drawn where `draws`."""
    if draws:
        return jittered(times[part, stage], table, keys[part, stage], microbatch)
    return int(times[part, stage])


@compiled
def follow(
    codes: Int64, sequence: Int32, homes: Int32, m: int, times: Int64, clock: Int64,
    arrivals: Int64,
) -> None:  # fmt: skip
    """Time L candidates of one shape, messages eager, action by action in the order of a `walk`.

    times [6, S, L]; clock [p, L], in: when each rank begins, out: when it is done; arrivals
    [2, S * m, L], all 0. The rest as in `walk`.
    """
    num_stages, num_lanes = times.shape[1], times.shape[2]
    num_ranks = len(clock)
    link_free = np.zeros((num_ranks * num_ranks, num_lanes), np.int64)
    for place in sequence:
        code = codes[place]
        kind, stage, microbatch = code & 3, (code >> 2) & 0x3FFFFF, code >> 24
        now, work = clock[homes[stage]], times[kind, stage]
        if kind == 3:
            for lane in range(num_lanes):
                now[lane] += work[lane]
            continue
        way = 0 if kind == 0 else 1
        reader = stage + 1 - 2 * way
        arrival = arrivals[way, stage * m + microbatch]
        for lane in range(num_lanes):
            now[lane] = max(now[lane], arrival[lane]) + work[lane]
        if 0 <= reader < num_stages:
            arrival = arrivals[way, reader * m + microbatch]
            if homes[reader] == homes[stage]:
                for lane in range(num_lanes):
                    arrival[lane] = now[lane]
            else:
                link = homes[stage] * num_ranks + homes[reader]
                free, send = link_free[link], times[4 + way, stage]
                for lane in range(num_lanes):
                    free[lane] = max(now[lane], free[lane]) + send[lane]
                    arrival[lane] = free[lane]
