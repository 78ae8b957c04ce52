"""`Layout`: how a model is laid out over ranks, and which rank sits where on the mesh."""

from dataclasses import dataclass
from typing import NamedTuple

LOCAL_SCHEDULES = ("1f1b", "gpipe")
"""What is searched on this machine unless the job asks for others, all of which can be run too.

Few, so that the best of each kind, trained in turn by the demo, differ in more than their order.
"""


class MeshPlace(NamedTuple):
    """The place of a rank on the (pp, dp, tp) mesh."""

    pp: int
    dp: int
    tp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Degrees per axis, the micro-batch in sequences, and the layers of each pipeline stage.

    A pipeline rank holds `stages_per_rank` stages; which ones, the schedule says. Ranks are
    numbered with tp innermost and pp outermost, so that tensor-parallel groups are neighbours:
    rank = (pp_index * dp + dp_index) * tp + tp_index.

    >>> layout = Layout(dp=2, tp=2, pp=2, micro_batch=1, num_microbatches=4, stage_layers=(3, 3))
    >>> layout.place(5), layout.num_ranks, str(layout)
    (MeshPlace(pp=1, dp=0, tp=1), 8, 'dp=2,tp=2,pp=2,1f1b,mb=1x4')
    """

    dp: int
    tp: int
    pp: int
    micro_batch: int
    num_microbatches: int
    stage_layers: tuple[int, ...]
    schedule: str = "1f1b"
    stages_per_rank: int = 1

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "pp", "micro_batch", "num_microbatches", "stages_per_rank"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"layout.{name} is {value}; it must be at least 1")
        if len(self.stage_layers) != self.num_stages or min(self.stage_layers) < 1:
            raise ValueError(
                f"layout.stage_layers is {self.stage_layers}; "
                f"it needs one positive count for each of {self.num_stages} stages"
            )

    @property
    def num_ranks(self) -> int:
        """Ranks that the layout occupies."""
        return self.dp * self.tp * self.pp

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline, on all of its ranks."""
        return self.pp * self.stages_per_rank

    @property
    def global_batch(self) -> int:
        """Sequences in one optimizer step."""
        return self.dp * self.micro_batch * self.num_microbatches

    def place(self, rank: int) -> MeshPlace:
        """Return where `rank` sits on the mesh."""
        rest, tp = divmod(rank, self.tp)
        pp, dp = divmod(rest, self.dp)
        return MeshPlace(pp, dp, tp)

    def __str__(self) -> str:
        """Return the layout in the words of `layline plan`."""
        stages = f"v={self.stages_per_rank}," if self.stages_per_rank > 1 else ""
        schedule = f"{self.schedule}," if self.pp > 1 else ""
        return (
            f"dp={self.dp},tp={self.tp},pp={self.pp},{stages}{schedule}"
            f"mb={self.micro_batch}x{self.num_microbatches}"
        )
