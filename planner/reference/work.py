"""The work of one rank for one micro-batch: the programs of a layer, of the embedding, of the head.

Legend: m tokens of a micro-batch on this rank (over cp); h hidden; q and kv the local widths of the
query and of the key/value heads; f the local inner width of the MLP; v the local vocabulary. With
sequence parallelism a rank holds m / tp tokens between the tensor-parallel blocks.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import final

import numpy as np

from planner.reference.passes import CAST_BYTES, LAYER_CALLS, PASSES, RECOMPUTE_CALLS
from planner.reference.places import Places
from planner.reference.program import (
    ATTENTION,
    MATMUL,
    MEMORY,
    Block,
    Duration,
    Floats,
    Lanes,
    Program,
)
from planner.setup import Setup
from profiles.kernel_curves import Estimate, attention, matmul, memory_pass
from profiles.workload import DTYPE_BYTES

ALIGNED = 8
"""Elements of two bytes that tensor cores want in a row: 16 bytes, says cuBLAS."""
MISALIGNED_HEADS, MISALIGNED_VOCAB = 8.0, 2.0
"""How much longer the batched products of heads take whose size is not aligned (BLOOM's log, heads
of 150 against 144), and those of an odd vocabulary (vTrain's runs, 50257 rows against 50304).
"""


@final
class RankWork:
    """The work of each rank of a setup for one micro-batch, timed by published curves."""

    def __init__(self, setup: Setup) -> None:
        self.model, self.workload, self.layout = setup.model, setup.workload, setup.layout
        self.stack, cluster = setup.stack, setup.cluster
        model, layout = setup.model, setup.layout
        self.places = Places(layout=layout, cluster=cluster)
        self.gpu = cluster.pools[0].gpu.name
        self.element = DTYPE_BYTES[setup.workload.dtype]
        tp = layout.tp
        self.m = layout.micro_batch * setup.workload.seq_len // layout.cp
        self.between = self.m // tp if layout.sequence_parallel else self.m
        self.h = model.hidden
        self.q = model.num_heads * model.head_size // tp
        self.kv = max(model.num_kv_heads // tp, 1) * model.head_size
        self.f = model.ffn // tp
        self.v = -(-model.vocab // tp)
        self.fan_in = (2 if model.mlp == "swiglu" else 1) * self.f
        self._timed: tuple[Lanes, dict[str, Duration]] | None = None

    @cached_property
    def blocks(self) -> dict[str, Block]:
        """The programs: `layer`, `embedding` and `head`, each `_forward` and `_backward`.

        `layer_again` is the backward of a layer in which something is recomputed.
        """
        found = {
            f"{part}_{direction}": self._block(getattr(self, f"_{part}_{direction}"))
            for part in ("layer", "embedding", "head")
            for direction in ("forward", "backward")
        }
        if self.layout.recompute != "none":
            found["layer_again"] = self._block(self._layer_again)
        return found

    def timed(self, lanes: Lanes) -> dict[str, Duration]:
        """Return what the programs take; the last answer is kept, for layouts that share it."""
        if self._timed is None or self._timed[0] is not lanes:
            call_ns = self._tensor_call_ns(lanes)
            parts = {name: block.timed(lanes, call_ns) for name, block in self.blocks.items()}
            self._timed = lanes, parts
        return self._timed[1]

    def _tensor_call_ns(self, lanes: Lanes) -> Floats:
        """Return what a tensor-parallel collective costs the host, beside its launch.

        It grows with the members where they are not in one node; and where the host's cores also
        move the bytes of the network, every collective of the job waits for them.
        """
        tp, inter = self.layout.tp, self.places.cluster.inter_node
        uses_host = inter is not None and inter.uses_host
        each = lanes.crossing * uses_host + lanes.spanning * self.places.tensor_crosses
        return np.asarray(tp * each)

    def _block(self, write: Callable[[Program], None]) -> Block:
        program = Program()
        write(program)
        if self.stack.uses_cuda_graphs:
            program.calls, program.tensor_calls = 1.0, 0
        return program.block()

    # The layer, in the order in which its kernels run.

    def _layer_forward(self, program: Program) -> None:
        program.calls += LAYER_CALLS[self.stack.fusion]
        self._norm(program, "forward")
        with_rope = self.model.positions == "rope"
        self._column(program, self.m, self.q + 2 * self.kv, self.h)
        if with_rope:
            self._pass(program, "rope", "forward", self.m * (self.q + self.kv))
        self._attention(program, "forward")
        self._row(program, self.m, self.h, self.q)
        self._pass(program, "residual", "forward", self.between * self.h)
        self._norm(program, "forward")
        self._mlp_forward(program)
        self._pass(program, "residual", "forward", self.between * self.h)

    def _layer_again(self, program: Program) -> None:
        if self.layout.recompute == "full":
            program.calls += RECOMPUTE_CALLS
            self._layer_forward(program)
        else:
            self._selected_again(program)
        self._layer_backward(program)

    def _layer_backward(self, program: Program) -> None:
        program.calls += LAYER_CALLS[self.stack.fusion]
        self._pass(program, "residual", "backward", self.between * self.h)
        self._mlp_backward(program)
        self._norm(program, "backward")
        self._pass(program, "residual", "backward", self.between * self.h)
        self._row_backward(program, self.m, self.h, self.q)
        self._attention(program, "backward")
        if self.model.positions == "rope":
            self._pass(program, "rope", "backward", self.m * (self.q + self.kv))
        self._column_backward(program, self.m, self.q + 2 * self.kv, self.h)
        self._norm(program, "backward")

    def _selected_again(self, program: Program) -> None:
        """Make again what selective recomputation did not keep.

        Unfused scores; or everything but the attention and the products of query, value, gate and
        output of the MLP, the first, third, fifth and seventh of a layer.
        """
        if self.stack.selective == "scores":
            if self.stack.attention == "unfused":
                self._attention(program, "forward")
            return
        program.calls += RECOMPUTE_CALLS
        self._norm(program, "forward")
        self._product(program, self.m, self.kv, self.h, 1)
        if self.model.positions == "rope":
            self._pass(program, "rope", "forward", self.m * (self.q + self.kv))
        self._product(program, self.m, self.h, self.q, 1)
        self._pass(program, "residual", "forward", self.between * self.h)
        self._norm(program, "forward")
        for rows, count in self._experts():
            self._product(program, rows, self.f, self.h, count)
            self._pass(program, self.model.mlp, "forward", count * rows * self.f)

    def _mlp_forward(self, program: Program) -> None:
        self._dispatch(program)
        for rows, count in self._experts():
            self._column(program, rows, self.fan_in, self.h, count)
            self._pass(program, self.model.mlp, "forward", count * rows * self.f)
            self._row(program, rows, self.h, self.f, count)
        self._dispatch(program)

    def _mlp_backward(self, program: Program) -> None:
        self._dispatch(program)
        for rows, count in self._experts():
            self._row_backward(program, rows, self.h, self.f, count)
            self._pass(program, self.model.mlp, "backward", count * rows * self.f)
            self._column_backward(program, rows, self.fan_in, self.h, count)
        self._dispatch(program)

    def _experts(self) -> Iterator[tuple[int, int]]:
        """Yield tokens and number of the MLPs on this rank; routed tokens are taken as balanced."""
        model = self.model
        if not model.num_experts:
            yield self.m, 1
            return
        here = max(1, model.num_experts // self.layout.ep)
        yield max(1, self.m * model.experts_per_token // here), here
        if model.num_shared_experts:
            yield self.m, model.num_shared_experts

    def _dispatch(self, program: Program) -> None:
        """Send tokens to the ranks of their experts, or bring them back: permute and exchange."""
        if not self.model.num_experts:
            return
        size_bytes = self.m * self.model.experts_per_token * self.h * self.element
        program.compute(MEMORY, memory_pass(self.gpu, 3 * size_bytes), calls=6)
        program.exchange(*self.places.experts("all_to_all", size_bytes))
        program.wait()

    def _attention(self, program: Program, direction: str) -> None:
        """Add the attention core; context ranks pass keys and values on, balanced over the cut."""
        layout, model, kernel = self.layout, self.model, self.stack.attention
        time = attention(
            self.gpu,
            kernel,
            direction,
            batch=layout.micro_batch,
            heads=max(1, model.num_heads // layout.tp),
            kv_heads=max(1, model.num_kv_heads // layout.tp),
            queries=self.workload.seq_len // layout.cp,
            keys=self.workload.seq_len,
            head_size=model.head_size,
            causal=True,
        )
        if kernel == "unfused" and model.head_size % ALIGNED:
            time = time._replace(ns=MISALIGNED_HEADS * time.ns)
        if layout.cp > 1:
            size_bytes = 2 * self.m * self.kv * self.element
            category, hop = self.places.context("send_recv", size_bytes)
            hops = (layout.cp - 1) * (2 if direction == "backward" else 1)
            program.exchange(category, hop._replace(ns=hops * hop.ns), calls=hops)
        program.compute(ATTENTION, time, calls=(6 if kernel == "unfused" else 2) * layout.cp)
        if layout.cp > 1:
            program.wait()

    # Edges of the model.

    def _embedding_forward(self, program: Program) -> None:
        size_bytes = 2 * self.m * self.h * self.element
        program.compute(MEMORY, memory_pass(self.gpu, size_bytes), calls=3)
        self._tensor(program, "reduce_scatter" if self.layout.sequence_parallel else "all_reduce")

    def _embedding_backward(self, program: Program) -> None:
        if self.layout.sequence_parallel:
            self._tensor(program, "all_gather")
        size_bytes = (self.v + 3 * self.m) * self.h * self.element
        program.compute(MEMORY, memory_pass(self.gpu, size_bytes), calls=3)

    def _head_forward(self, program: Program) -> None:
        self._norm(program, "forward")
        if self.layout.sequence_parallel:
            self._tensor(program, "all_gather")
        program.compute(MATMUL, self._vocab_product(self.m, self.v, self.h))
        self._pass(program, "loss", "forward", self.m * self.v)
        # The sharded loss: largest logit, sum of exponentials and the target's logit of each token.
        category, values = self.places.tensor("all_reduce", 4 * self.m)
        program.exchange(category, values._replace(ns=3 * values.ns), calls=3)
        program.wait()

    def _head_backward(self, program: Program) -> None:
        self._pass(program, "loss", "backward", self.m * self.v)
        program.compute(MATMUL, self._vocab_product(self.m, self.h, self.v))
        self._tensor(program, "reduce_scatter" if self.layout.sequence_parallel else "all_reduce")
        weight = self._vocab_product(self.v, self.h, self.m)
        program.compute(MATMUL, weight)
        program.weight_ns += weight.ns
        self._norm(program, "backward")

    def _vocab_product(self, m: int, n: int, k: int) -> Estimate:
        """Return the time of a product with the vocabulary, which is not made in fp8."""
        dtype = "bf16" if self.workload.dtype == "fp8" else self.workload.dtype
        time = matmul(self.gpu, dtype, m, n, k)
        return time._replace(ns=MISALIGNED_VOCAB * time.ns) if self.v % ALIGNED else time

    # Linears: columns of the weight over tp, or rows of it.

    def _column(self, program: Program, m: int, n: int, k: int, count: int = 1) -> None:
        """Add y[m, n] = x[m, k] w, whose input is gathered where it was sharded by sequence."""
        hides = self.stack.tensor_overlap == "all"
        if self.layout.sequence_parallel:
            self._tensor(program, "all_gather", waits=not hides)
        self._product(program, m, n, k, count)
        program.wait()

    def _row(self, program: Program, m: int, n: int, k: int, count: int = 1) -> None:
        """Add y[m, n] = x[m, k] w, whose output is summed over tp."""
        self._product(program, m, n, k, count)
        self._tensor(program, "reduce_scatter" if self.layout.sequence_parallel else "all_reduce")

    def _column_backward(self, program: Program, m: int, n: int, k: int, count: int = 1) -> None:
        """Add both products of a column linear; its input gradient is summed over tp."""
        hides, is_sharded = self.stack.tensor_overlap != "none", self.layout.sequence_parallel
        if is_sharded:
            self._tensor(program, "all_gather", waits=not hides)
        self._product(program, m, k, n, count)
        if hides:
            program.wait()
        self._tensor(program, "reduce_scatter" if is_sharded else "all_reduce", waits=not hides)
        self._weight(program, n, k, m, count)
        if hides:
            program.wait()

    def _row_backward(self, program: Program, m: int, n: int, k: int, count: int = 1) -> None:
        """Add both products of a row linear; its output gradient is gathered if sharded."""
        if self.layout.sequence_parallel:
            self._tensor(program, "all_gather")
        self._product(program, m, k, n, count)
        self._weight(program, n, k, m, count)

    def _product(self, program: Program, m: int, n: int, k: int, count: int) -> None:
        self._cast(program, count * m * k)
        time = matmul(self.gpu, self.workload.dtype, m, n, k)
        program.compute(MATMUL, time._replace(ns=count * time.ns))

    def _weight(self, program: Program, m: int, n: int, k: int, count: int) -> None:
        time = matmul(self.gpu, self.workload.dtype, m, n, k)
        program.compute(MATMUL, time._replace(ns=count * time.ns))
        program.weight_ns += count * time.ns

    # What lies between.

    def _cast(self, program: Program, elements: int) -> None:
        if self.workload.dtype == "fp8":
            time = memory_pass(self.gpu, int(CAST_BYTES * elements))
            program.compute(MEMORY, time, calls=2)

    def _norm(self, program: Program, direction: str) -> None:
        self._pass(program, "norm", direction, self.between * self.h)

    def _pass(self, program: Program, what: str, direction: str, elements: int) -> None:
        fusion = self.stack.fusion
        if what == "norm" and self.stack.fuses_norms and fusion == "eager":
            fusion = "fused"
        bytes_each, calls = getattr(PASSES[what][fusion], direction)
        size_bytes = int(bytes_each * elements * self.element / 2)
        program.compute(MEMORY, memory_pass(self.gpu, size_bytes), calls)

    def _tensor(self, program: Program, kind: str, *, waits: bool = True) -> None:
        """Add a collective of the activations over the tensor-parallel group."""
        if self.layout.tp == 1:
            return
        program.tensor_calls += 1
        program.exchange(*self.places.tensor(kind, self.m * self.h * self.element))
        if waits:
            program.wait()
