"""The fabric: which links join the ranks, and which of them a message from one to another crosses.

A fabric is drawn as a graph of ranks (whole numbers) and switches (names). An edge carries the
`bytes_per_s` of one direction, and becomes two links; an edge without it never limits anyone and
becomes none, such as the slot between a GPU and its own NIC.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import ceil

import networkx as nx

from simulator.graph import Crossing
from simulator.network import Link

Node = int | str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fabric:
    """`links` for `simulate`, and the way between any two ranks over them; see `fabric`."""

    links: tuple[Link, ...]
    neighbours: Mapping[Node, Mapping[Node, int]]
    """For each node the nodes beside it and the way's place in `links`, -1 where none limits."""

    def path(self, source_rank: int, target_rank: int, weight: int = 1) -> tuple[Crossing, ...]:
        """Return the links that a message crosses; `weight` equal messages cross them together.

        It takes the fewest hops. Of several such ways it takes, hop by hop, the one that the
        fabric's graph lists first. From a rank to itself it crosses nothing.

        Raises ValueError for a rank that is not there, and for two that nothing joins.
        """
        for rank in (source_rank, target_rank):
            if rank not in self.neighbours:
                known = sorted(node for node in self.neighbours if isinstance(node, int))
                raise ValueError(
                    f"rank {rank} is not in the fabric; its {len(known)} ranks go from "
                    f"{known[0]} to {known[-1]}"
                )
