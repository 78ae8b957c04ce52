"""Lower bounds of a step that no schedule can go below, for many layouts side by side.

A rank cannot begin before the first micro-batch has come through the stages in front of it, and has
all of its work to do; then its last gradient goes back through these stages, and the ranks that
hold them are not done before: the step takes at least head + work + tail of each rank. What follows
the pipeline comes behind the tail on the ranks that it reaches, behind the work on the rank itself.
A backward that is split into halves shortens the tail, since the weight halves can be done after
the gradient has gone back: then it is head + work without weight halves + tail. See docs/models.md.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from simulator.checks import Int64

Floats = npt.NDArray[np.float64]
KNEE = 12
"""How soft the change from host-bound to device-bound is: kernels of a layer are not alike."""


def elapsed(device: Floats, host: Floats) -> Floats:
    """Return the time of the slower of the two, which run ahead of each other.

    >>> elapsed(np.array([4.0]), np.array([0.0])).tolist()
    [4.0]
    """
    slow, fast = np.maximum(device, host), np.minimum(device, host)
    return np.asarray(slow * (1 + (fast / np.maximum(slow, 1.0)) ** KNEE) ** (1 / KNEE))


ROUNDING_NS = 4
"""What rounding to whole ns may take off the times of one stage."""


class Parts(NamedTuple):
    """What one micro-batch takes on a rank, in ns, device and host apart where both work.

    Of a layer, of what the first and the last stage do beside theirs, and of a message between
    stages: `send` on the link, `message_host` on the host; `step` is the host's work of a step,
    `again` what a layer's backward takes more when it recomputes. No
    layout of this work can do with less. What a layout adds to weight halves (the sum of gradients
    over micro-batches) is left out of the backwards as well, so that input halves are not too long.
    """

    layer_forward: float
    layer_forward_host: float
    layer_backward: float
    layer_backward_host: float
    layer_weight: float
    first_forward: float
    first_forward_host: float
    first_backward: float
    first_backward_host: float
    first_weight: float
    last_forward: float
    last_forward_host: float
    last_backward: float
    last_backward_host: float
    last_weight: float
    message_host: float
    send: float
    step: float
    again: float = 0.0
    again_host: float = 0.0


class Columns(NamedTuple):
    """What the stages of R layouts take at the median, in ns, int64 [R, S] each.

    The parts of `planner.plan.StageCost`, without their bands.
    """

    forward: Int64
    backward: Int64
    weight: Int64
    send_forward: Int64
    send_backward: Int64
    all_reduce: Int64
    optimizer: Int64
    other: Int64
    wait: Int64

    def row(self, layout: int) -> "Columns":
        """Return one layout alone, [1, S]."""
        return Columns(*(column[layout : layout + 1] for column in self))

    def bounds_ns(self, homes: Int64, num_microbatches: int, *, splits: bool) -> Floats:
        """Return times that the steps of the layouts do not go below under any schedule, [R].

        Of stages that live at `homes` [S]; `splits` says whether backwards may be split.
        """
        send = np.minimum(self.send_forward[:, :-1], self.send_backward[:, 1:])
        forward, backward, weight = (np.asarray(column, np.float64) for column in self[:3])
        least_send = send.min(axis=1, initial=int(send.max(initial=0))).astype(np.float64)
        stages = Pipelines(forward, backward, weight, least_send)
        m = np.full(len(self.forward), num_microbatches)
        ends = ranks_ns(homes, stages, m, splits=splits)
        is_home = (homes[:, None] == np.arange(ends.shape[1])).astype(np.float64)
        after = (self.all_reduce + self.optimizer + self.wait) @ is_home
        return np.asarray((ends + after).max(axis=1) + self.other.min(axis=1))


class Pipelines(NamedTuple):
    """Stages of R pipelines of one shape: `forward`, `backward` and its part `weight` are [R, S].

    All in ns, of one micro-batch; `send` [R] is the time of a message.
    """

    forward: Floats
    backward: Floats
    weight: Floats
    send: Floats


def pipelines(parts: Floats, layers: Int64, again: Int64 | int = 0) -> Pipelines:
    """Return the stages of R cases with `parts` [R, 20] (rows of `Parts`) and `layers` [R, S].

    Where stages lie on unlike GPUs `parts` is [R, S, 20]. So many layers of each stage recompute,
    `again` [R, S].
    """
    by_name = np.moveaxis(parts if parts.ndim == 3 else parts[:, None], 2, 0)
    of, send = Parts(*by_name), by_name[Parts._fields.index("send")]
    num_stages = layers.shape[1]
    is_first, is_last = np.arange(num_stages) == 0, np.arange(num_stages) == num_stages - 1
    messages = of.message_host * (2 - is_first - is_last) if num_stages > 1 else 0 * of.message_host
    forward = elapsed(
        layers * of.layer_forward + is_first * of.first_forward + is_last * of.last_forward,
        layers * of.layer_forward_host + is_first * of.first_forward_host
        + is_last * of.last_forward_host + messages,
    )  # fmt: skip
    backward = elapsed(
        layers * of.layer_backward + again * of.again + is_first * of.first_backward
        + is_last * of.last_backward,
        layers * of.layer_backward_host + again * of.again_host + is_first * of.first_backward_host
        + is_last * of.last_backward_host + messages,
    )  # fmt: skip
    weight = layers * of.layer_weight + is_first * of.first_weight + is_last * of.last_weight
    weight = np.minimum(weight, backward)
    return Pipelines(forward, backward, weight, send.min(axis=1))


def parts_of_stages(parts: Floats, homes: Int64) -> Floats:
    """Return `parts` of the pipeline ranks, [R, P, 20], as those of stages that live at `homes`.

    Where there is one for all ranks, [R, 1, 20], it stands for all stages too.
    """
    return parts if parts.shape[1] == 1 else parts[:, homes]


def ranks_ns(
    homes: Int64,
    stages: Pipelines,
    num_microbatches: npt.NDArray[np.int64],
    *,
    splits: bool,
) -> Floats:
    """Return when each rank is done with the pipeline at the earliest, [R, P].

    `homes` [S] says where the stages live, each rank's first stage behind that of the rank before
    it; `num_microbatches` is [R]; `splits` says whether backwards may be split. One stage on its
    own needs no bound: this is its time.

    >>> two = Pipelines(np.ones((1, 2)), 2 * np.ones((1, 2)), np.ones((1, 2)), np.zeros(1))
    >>> ranks_ns(np.arange(2), two, np.array([3]), splits=False).tolist()
    [[12.0, 10.0]]
    >>> ranks_ns(np.arange(2), two, np.array([3]), splits=True).tolist()
    [[9.0, 10.0]]
    """
    num_ranks = int(homes.max()) + 1
    crosses = np.concatenate(([0], homes[1:] != homes[:-1]))
    hop = stages.send[:, None] * crosses[None, :]
    back = stages.backward - stages.weight if splits else stages.backward
    first = np.array([int(np.argmax(homes == rank)) for rank in range(num_ranks)])
    ahead = (np.cumsum(stages.forward, axis=1) - stages.forward + np.cumsum(hop, axis=1))[:, first]
    behind = (np.cumsum(back, axis=1) - back + np.cumsum(hop, axis=1))[:, first]
    is_home = (homes[:, None] == np.arange(num_ranks)).astype(np.float64)
    m = num_microbatches[:, None]
    done = ahead + m * ((stages.forward + stages.backward) @ is_home)
    # When the last gradient of each rank, and of those behind it, has come to the first stage.
    through = ahead + m * ((stages.forward + back) @ is_home) + behind
    latest = np.maximum.accumulate(through[:, ::-1], axis=1)[:, ::-1]
    return np.asarray(np.maximum(done, latest - behind))
