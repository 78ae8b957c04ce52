"""The compiled loops of tier 1: one candidate walked, and many of one shape followed.

Callers check everything; nothing here does.
"""

import numpy as np

from simulator.compiled import compiled

NO_LINK, UNKNOWN = -1, -1


@compiled
def draw(key, microbatch):
    """Return the table place of one micro-batch; the same lines as `jitter.mix`."""
    x = key ^ (microbatch & 0xFFFFFFFF)
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x45D9F3B) & 0xFFFFFFFF
    return (x ^ (x >> 16)) >> 20


@compiled
def jittered(ns, table, key, microbatch):
    """Return `ns` times its factor / 2^20, rounded down."""
    factor = table[draw(key, microbatch)]
    return (ns >> 20) * factor + (((ns & 0xFFFFF) * factor) >> 20)


@compiled
def walk(codes, offsets, m, times, keys, tables, link_of, num_links, rendezvous, clock, arrivals,
         ends, sequence):  # fmt: skip
    """Walk all ranks' orders of one candidate; return how many actions were done.

    codes [A]; offsets [p + 1]; times and keys [6, S]; link_of [2, S]; clock [p], in: when each
    rank begins, out: when it is done; arrivals [2, S * m], in: UNKNOWN but for inputs that are
    there from the start, out: the end of each message; ends [A]; sequence [A], out: the actions in
    an order in which each comes after all that it waits for. `tables` [2, 4096] is [2, 0] where
    nothing is drawn. Fewer than A: the ranks block each other.
    """
    num_ranks, num_stages, draws = len(clock), times.shape[1], tables.shape[1] > 0
    link_free = np.zeros(num_links, np.int64)
    # In a rendezvous messages must be received in the order in which they were sent.
    num_sent, num_received = np.zeros(num_links, np.int64), np.zeros(num_links, np.int64)
    turn = np.zeros((2, arrivals.shape[1] if rendezvous else 0), np.int64)
    cursor = offsets[:-1].copy()
    num_done, num_before = 0, -1
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
                if kind != 3:
                    slot, source = stage * m + microbatch, stage - 1 + 2 * way
                    arrival = arrivals[way, slot]
                    link = link_of[way, source] if 0 <= source < num_stages else NO_LINK
                    if arrival < 0 or (
                        rendezvous and link >= 0 and turn[way, slot] != num_received[link]
                    ):
                        break
                    if rendezvous and link >= 0:
                        num_received[link] += 1
                        send = duration_of(
                            4 + way, source, microbatch, times, keys, tables[1], draws
                        )
                        arrival = max(arrival, now, link_free[link]) + send
                        link_free[link] = arrivals[way, slot] = arrival
                    now = max(now, arrival)
                now += duration_of(kind, stage, microbatch, times, keys, tables[0], draws)
                reader = stage + 1 - 2 * way
                if kind != 3 and 0 <= reader < num_stages:
                    link, slot, arrival = link_of[way, stage], reader * m + microbatch, now
                    if rendezvous and link >= 0:
                        turn[way, slot] = num_sent[link]
                        num_sent[link] += 1
                    elif link >= 0:
                        send = duration_of(
                            4 + way, stage, microbatch, times, keys, tables[1], draws
                        )
                        arrival = link_free[link] = max(now, link_free[link]) + send
                    arrivals[way, slot] = arrival
                ends[place] = now
                sequence[num_done] = place
                num_done += 1
                place += 1
            clock[rank], cursor[rank] = now, place
    return num_done


@compiled
def duration_of(part, stage, microbatch, times, keys, table, draws):
    """Return the time of one part, drawn where `draws`."""
    if draws:
        return jittered(times[part, stage], table, keys[part, stage], microbatch)
    return times[part, stage]


@compiled
def follow(codes, sequence, homes, m, times, link_of, num_links, rendezvous, clock, arrivals):
    """Time L candidates of one shape side by side, action by action in the order of a `walk`.

    times [6, S, L]; clock [p, L], in: when each rank begins, out: when it is done; arrivals
    [2, S * m, L], all 0. The rest as in `walk`.
    """
    num_stages, num_lanes = times.shape[1], times.shape[2]
    link_free = np.zeros((num_links, num_lanes), np.int64)
    for place in sequence:
        code = codes[place]
        kind, stage, microbatch = code & 3, (code >> 2) & 0x3FFFFF, code >> 24
        now, work = clock[homes[stage]], times[kind, stage]
        if kind == 3:
            for lane in range(num_lanes):
                now[lane] += work[lane]
            continue
        way = 0 if kind == 0 else 1
        source, reader = stage - 1 + 2 * way, stage + 1 - 2 * way
        arrival = arrivals[way, stage * m + microbatch]
        if rendezvous and 0 <= source < num_stages and link_of[way, source] >= 0:
            free, send = link_free[link_of[way, source]], times[4 + way, source]
            for lane in range(num_lanes):
                arrival[lane] = max(arrival[lane], now[lane], free[lane]) + send[lane]
                free[lane] = arrival[lane]
        for lane in range(num_lanes):
            now[lane] = max(now[lane], arrival[lane]) + work[lane]
        if 0 <= reader < num_stages:
            arrival, link = arrivals[way, reader * m + microbatch], link_of[way, stage]
            if link < 0 or rendezvous:
                for lane in range(num_lanes):
                    arrival[lane] = now[lane]
            else:
                free, send = link_free[link], times[4 + way, stage]
                for lane in range(num_lanes):
                    free[lane] = max(now[lane], free[lane]) + send[lane]
                    arrival[lane] = free[lane]
