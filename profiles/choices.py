"""`Choices`: what of a job's numerics and of its software the search may choose."""

from dataclasses import dataclass

from profiles.stack import GradientDType
from profiles.workload import DType


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """The values that are searched in turn; with an empty tuple only what the job itself says.

    Another dtype trains another model, and another place for the optimizer is another way to run
    it: whether that will do is for the user to say, so nothing is tried that was not asked for. A
    list holds what the job itself says. Gradients in another dtype are reduced in it as well.
    """

    dtype: tuple[DType, ...] = ()
    gradient_dtype: tuple[GradientDType, ...] = ()
    optimizer_offload: tuple[bool, ...] = ()


AS_SAID = Choices()
"""Those of a job that leaves none: it is planned for as it is."""
