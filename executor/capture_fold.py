"""As few micro-batches of a schedule as show all that one rank does, and holds at once."""

import re
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from executor.pipeline import actions_with_messages
from executor.recipe import Recipe
from simulator.schedule import MICROBATCH_SHIFT, ActionKind, Schedule, decode


def folded(recipe: Recipe, pp_index: int) -> Recipe:
    """Return `recipe` with its first micro-batches alone, as few as show all that the rank does.

    What an action does, and what is alive meanwhile, depends on the actions that the rank has done
    before, and on those by counts alone, since all micro-batches have one shape: how many
    micro-batches are between their forward and their backward on each of its stages, how many
    between the halves of it, how many have a buffer for what an action of it is going to read, and
    whether a gradient is there to add to or still to come (it is made by the first, and reduced
    after the last). Call these counts in front of an action, with the
    action but for its micro-batch, its situation. The schedule without the last micro-batches is a
    schedule; where it has the same set of situations as the whole, it has the same peak and the
    same list of ops for each of them. What is held for all micro-batches through the whole step is
    not in these counts, and is the same for each: tokens, and losses on the last stage. The tokens
    are scaled up; the losses, 4 bytes each, are left out.
    """
    whole = set(situations(recipe.schedule, pp_index))
    total = recipe.layout.num_microbatches
    few = next(
        (
            n
            for n in range(1, total)
            if set(situations(_first(recipe.schedule, n), pp_index)) == whole
        ),
        total,
    )
    return _with_microbatches(recipe, few)


def _with_microbatches(recipe: Recipe, few: int) -> Recipe:
    """Return `recipe` with its first micro-batches alone."""
    layout = replace(recipe.layout, num_microbatches=few)
    return replace(
        recipe,
        layout=layout,
        workload=replace(recipe.workload, global_batch=layout.global_batch),
        schedule=_first(recipe.schedule, few),
    )


def _first(schedule: Schedule, num_microbatches: int) -> Schedule:
    """Return `schedule` without all but its first micro-batches."""
    return Schedule(
        name=schedule.name,
        num_stages=schedule.num_stages,
        num_microbatches=num_microbatches,
        orders=tuple(
            order[order >> MICROBATCH_SHIFT < num_microbatches] for order in schedule.orders
        ),
    )


class Situation(NamedTuple):
    """An action but for its micro-batch, and what was there in front of it (see `folded`).

    By stage of the rank: how many micro-batches are `alive`, how many between their `halves`; of
    input gradients and of weight gradients whether there are some and whether two, one or none are
    left (`gradients`); how many inputs, and gradients of outputs, have a buffer and are not read
    yet (`received`).
    """

    stage: int
    kind: ActionKind
    gradients: tuple[tuple[bool, int, bool, int], ...]
    alive: tuple[int, ...]
    halves: tuple[int, ...]
    received: tuple[tuple[int, int], ...]

    @property
    def list_key(self) -> tuple[object, ...]:
        """What the list of ops depends on."""
        return self[:3]


def situations(schedule: Schedule, pp_index: int) -> list[Situation]:
    """Return the situation of each action of a rank, in order."""
    total = schedule.num_microbatches
    done = {stage: Counter[str]() for stage in np.flatnonzero(schedule.homes == pp_index).tolist()}
    came = {stage: Counter[str]() for stage in done}
    actions, found = iter(decode(schedule.orders[pp_index])), []
    for text in actions_with_messages(schedule)[pp_index]:
        stage, is_message, kind = re.split("(RECV_|SEND_|$)", text, maxsplit=1)
        if is_message:
            if is_message == "RECV_":
                came[int(stage)][kind[0]] += 1
            continue
        action = next(actions)
        counts = [(of["F"], of["B"] + of["I"], of["B"] + of["W"]) for of in done.values()]
        found.append(
            Situation(
                stage=action.stage,
                kind=action.kind,
                gradients=tuple(
                    (i > 0, min(total - i, 2), w > 0, min(total - w, 2)) for _, i, w in counts
                ),
                alive=tuple(f - i for f, i, _ in counts),
                halves=tuple(i - w for _, i, w in counts),
                received=tuple(
                    (max(of["F"] - f, 0), max(of["B"] - i, 0))
                    for of, (f, i, _) in zip(came.values(), counts, strict=True)
                ),
            )
        )
        done[action.stage][action.kind] += 1
        # A neighbour on the same rank gets it without a message.
        reader, what = (1, "F") if action.kind == "F" else (-1, "B")
        if action.kind != "W" and action.stage + reader in came:
            came[action.stage + reader][what] += 1
    return found
