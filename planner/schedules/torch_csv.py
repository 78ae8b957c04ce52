"""Schedules that PyTorch wrote: its pipeline CSV has more words than the schedule language."""

import re

from simulator.schedule import Schedule, parse_schedule

_OVERLAPPED = re.compile(r"\(([^();,]*);([^();,]*)\)OVERLAP_F_B")
_MOVES_DATA = re.compile(r"\d+(?:UNSHARD|RESHARD|REDUCE_GRAD|(?:SEND|RECV)_[FB])\d*(?=[,\r\n]|$)")


def from_torch_csv(text: str, name: str = "custom") -> Schedule:
    """Return the schedule that PyTorch dumped as `text`, as `compute_only` or `compute_comms`.

    Idle slots are empty cells and mean nothing here. An overlapped pair is its forward, then its
    backward. What moves data is left out: messages follow from the computations, and gathering
    and reducing weights belongs to the step around the schedule. Raises ValueError as
    `parse_schedule` does, which reads everything else. `Schedule.to_csv` is the way back.

    >>> print(from_torch_csv(",0F0,0SEND_F0,0F1,,,0RECV_B0,0B0,0B1,0REDUCE_GRAD"))
    0F0 0F1 0B0 0B1
    >>> print(from_torch_csv("0F0,(0F1;0B0)OVERLAP_F_B,0B1"))
    0F0 0F1 0B0 0B1
    """
    return parse_schedule(_MOVES_DATA.sub("", _OVERLAPPED.sub(r"\1,\2", text)), name)
