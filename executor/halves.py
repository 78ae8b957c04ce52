"""A backward in two halves: the gradients of matrices wait until the schedule asks for them.

PyTorch's pipeline runtime can split any backward by itself: it walks the autograd graph of every
micro-batch in Python, keeps all of it until the weight half, and does the first stage's input half
within its weight half. Here the linears split themselves, which is what a schedule means by `I` and
`W`: the weight half is the weight GEMMs and nothing else.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from executor.shards import as_parameter_shard, local


class _Product(NamedTuple):
    """What one gradient will be made of: that of `weight` [N, K] is gradient [M, N]^T x [M, K]."""

    weight: Tensor
    x: Tensor
    gradient: Tensor


class WeightHalf:
    """What the input half of a backward leaves for the weight half, in one stage.

    `on_gradient` is told of every parameter whose gradient has been added to here: PyTorch's own
    hooks see only what autograd adds.
    """

    def __init__(self) -> None:
        self.on_gradient: Callable[[Tensor], None] = lambda _: None
        self._waiting: deque[_Product] = deque()

    def put(self, weight: Tensor, x: Tensor, gradient: Tensor) -> None:
        """Leave what the gradient of `weight` [N, K] needs: input [.., K], output gradient [.., N].

        Of DTensors the shards do: tensor parallelism cuts N or K, and the tokens stay whole.
        """
        product = _Product(weight, local(x).flatten(0, -2), local(gradient).flatten(0, -2))
        self._waiting.append(product)

    def take(self) -> Callable[[], None]:
        """Return what does the weight half of the backward that has just ended."""
        waiting, self._waiting = self._waiting, deque()
        return partial(self._add, waiting)

    @torch.no_grad()
    def _add(self, waiting: deque[_Product]) -> None:
        while waiting:
            weight, x, gradient = waiting.popleft()  # so that they go as soon as they are used
            if weight.grad is None:
                weight.grad = as_parameter_shard(gradient.T @ x, weight)
            else:
                local(weight.grad).addmm_(gradient.T, x)
            self.on_gradient(weight)


class Linear(nn.Linear):
    """A linear without bias; where `weight_half` is set, its weight gradient waits there."""

    weight_half: WeightHalf | None = None

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__(num_inputs, num_outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T [.., N] for `x` [.., K]."""
        if self.weight_half is None:
            return super().forward(x)
        return _InputHalf.apply(x, self)  # type: ignore[no-any-return, no-untyped-call]


class _InputHalf(torch.autograd.Function):
    """A linear whose backward makes the gradient of its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Linear) -> Tensor:
        """Return x W^T [.., N]."""
        ctx.save_for_backward(x)
        ctx.linear = linear
        return F.linear(x, linear.weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient [.., K] of the input."""
        (x,) = ctx.saved_tensors
        linear: Linear = ctx.linear
        assert linear.weight_half is not None
        linear.weight_half.put(linear.weight, x, gradient)
        return gradient @ linear.weight, None
