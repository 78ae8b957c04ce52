"""Every op of the table in `profiles.profile`, as a call over operands of an arena.

The calls are what PyTorch's autograd runs for `executor.model`: a backward is that of its forward.
"""

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.adamw import adamw

from profiles.measure.buffers import Arena
from profiles.measure.timing import Call
from profiles.surface import Shape

Builder = Callable[[Arena, Shape], Call]
Function = Callable[..., Tensor]
# How a function is made into what is called: itself, or compiled.
Form = Callable[[Function], Function]

BACKENDS: Mapping[str, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_CPU_BACKENDS = ("flash", "math")
_FP8_CAPABILITY = (8, 9)
_BETAS, _EPS = (0.9, 0.95), 1e-8


def _eager(function: Function) -> Function:
    return function


def _compiled(function: Function) -> Function:
    return torch.compile(function, fullgraph=True, dynamic=False)


def _backward(output: Tensor, inputs: Sequence[Tensor], gradient: Tensor) -> Call:
    """Return a call of the backward alone, over a graph that stays."""
    return lambda: torch.autograd.grad(output, inputs, gradient, retain_graph=True)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _scaled(left: Tensor, right: Tensor, *, is_gradient: bool) -> Call:
    """Return left [a, b] right [b, c] of fp8 operands into bf16, one scale for each operand.

    Gradients are E5M2 and the rest E4M3, and only the forward accumulates fast. Source:
    Micikevicius et al., "FP8 formats for deep learning" (arXiv:2209.05433), section 3, and the
    HYBRID recipe of NVIDIA's Transformer Engine.
    """
    left = left.view(torch.float8_e5m2) if is_gradient else left
    one = torch.ones((), dtype=torch.float32, device=left.device)
    return lambda: torch._scaled_mm(
        left, right, one, one, out_dtype=torch.bfloat16, use_fast_accum=not is_gradient
    )


def _linear_forward(arena: Arena, shape: Shape) -> Call:
    m, n, k = shape
    x, w = arena.take(m, k), arena.take(n, k)
    if arena.dtype.itemsize == 1:
        return _scaled(x, w.t(), is_gradient=False)
    return lambda: F.linear(x, w)


def _linear_dgrad(arena: Arena, shape: Shape) -> Call:
    m, n, k = shape
    dy = arena.take(m, n)
    if arena.dtype.itemsize == 1:
        # Tensor cores take fp8 only with the summed dim of both innermost: w is kept transposed.
        return _scaled(dy, arena.take(k, n).t(), is_gradient=True)
    w = arena.take(n, k)
    return lambda: dy @ w


def _linear_wgrad(arena: Arena, shape: Shape) -> Call:
    m, n, k = shape
    if arena.dtype.itemsize == 1:
        return _scaled(arena.take(n, m), arena.take(k, m).t(), is_gradient=True)
    dy, x = arena.take(m, n), arena.take(m, k)
    return lambda: dy.t() @ x


def _heads(arena: Arena, batch: int, heads: int, seq: int, head: int) -> Tensor:
    """Return [batch, heads, seq, head], strided as a projection's output is."""
    return arena.take(batch, seq, heads, head).transpose(1, 2)


def _attention(arena: Arena, shape: Shape) -> tuple[tuple[Tensor, Tensor, Tensor], Call]:
    batch, heads, kv_heads, seq, head = shape
    q = _leaf(_heads(arena, batch, heads, seq, head))
    k, v = (_leaf(_heads(arena, batch, kv_heads, seq, head)) for _ in range(2))
    has_groups = kv_heads < heads
    return (q, k, v), lambda: F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=has_groups
    )


def _attention_forward(arena: Arena, shape: Shape) -> Call:
    return _attention(arena, shape)[1]


def _attention_backward(arena: Arena, shape: Shape) -> Call:
    operands, forward = _attention(arena, shape)
    batch, heads, _, seq, head = shape
    out = forward()
    assert isinstance(out, Tensor)
    return _backward(out, operands, _heads(arena, batch, heads, seq, head))


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-5)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `x` [..., head] rotated by position, as the executor does it."""
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets)


def _norm_operands(arena: Arena, shape: Shape) -> tuple[Tensor, ...]:
    return _leaf(arena.take(*shape)), _leaf(arena.take(shape[1]))


def _rope_operands(arena: Arena, shape: Shape) -> tuple[Tensor, ...]:
    seq, heads, head = shape[0] // 512, 8, 64
    x = _leaf(arena.take(seq, heads, head))
    return x, arena.take(seq, 1, head // 2), arena.take(seq, 1, head // 2)


def _swiglu_operands(arena: Arena, shape: Shape) -> tuple[Tensor, ...]:
    return _leaf(arena.take(*shape)), _leaf(arena.take(*shape))


def _loss_operands(arena: Arena, shape: Shape) -> tuple[Tensor, ...]:
    return _leaf(arena.take(*shape)), arena.integers(shape[1], shape[0])


def _embedding_operands(arena: Arena, shape: Shape) -> tuple[Tensor, ...]:
    rows, width, vocab = shape
    return arena.integers(vocab, rows), _leaf(arena.take(vocab, width))


# A function and its operands: those that need gradients are what its backward is of.
_DIFFERENTIABLE: Mapping[str, tuple[Function, Callable[[Arena, Shape], tuple[Tensor, ...]]]] = {
    "norm": (_norm, _norm_operands),
    "rope": (rotate, _rope_operands),
    "swiglu": (_swiglu, _swiglu_operands),
    "embedding": (F.embedding, _embedding_operands),
    "cross_entropy": (_loss, _loss_operands),
}
_COMPILED = ("norm", "rope", "swiglu", "cross_entropy")


def _forward_of(family: str, arena: Arena, shape: Shape, form: Form = _eager) -> Call:
    function, operands_of = _DIFFERENTIABLE[family]
    formed, operands = form(function), operands_of(arena, shape)
    return lambda: formed(*operands)


def _backward_of(family: str, arena: Arena, shape: Shape, form: Form = _eager) -> Call:
    function, operands_of = _DIFFERENTIABLE[family]
    operands = operands_of(arena, shape)
    output = form(function)(*operands)
    gradient = torch.ones_like(output) if output.dim() == 0 else arena.take(*output.shape)
    return _backward(output, [operand for operand in operands if operand.requires_grad], gradient)


def _add(arena: Arena, shape: Shape) -> Call:
    """Forward adds two branches, backward the gradients of two branches: one kernel."""
    left, right = arena.take(*shape), arena.take(*shape)
    return lambda: left + right


def _adamw(arena: Arena, shape: Shape, is_fused: bool = True) -> Call:
    """The kernel without the optimizer object, whose cost is `host_ns["step"]`."""
    weight, gradient, mean, square = (arena.fresh(*shape) for _ in range(4))
    square.abs_()
    # The fused kernel counts steps where the weights are; the other one on the host.
    count = torch.ones((), dtype=torch.float32, device=arena.device if is_fused else "cpu")
    beta1, beta2 = _BETAS

    def call() -> None:
        adamw(
            [weight], [gradient], [mean], [square], [], [count], fused=is_fused,
            foreach=not is_fused, amsgrad=False, beta1=beta1, beta2=beta2, lr=1e-5,
            weight_decay=0.1, eps=_EPS, maximize=False,
        )  # fmt: skip

    return call


def _clip(arena: Arena, shape: Shape) -> Call:
    weight = torch.nn.Parameter(arena.take(*shape))
    weight.grad = arena.fresh(*shape)
    return lambda: torch.nn.utils.clip_grad_norm_([weight], 1.0)


def _copy(arena: Arena, shape: Shape) -> Call:
    source, target = arena.take(*shape), arena.fresh(*shape)
    return lambda: target.copy_(source)


def _cast(arena: Arena, shape: Shape) -> Call:
    other = torch.bfloat16 if arena.dtype == torch.float32 else torch.float32
    source, dtype = arena.take(*shape).to(other), arena.dtype
    arena.taken_bytes += source.nbytes
    return lambda: source.to(dtype)


def _pinned(arena: Arena, shape: Shape) -> Tensor:
    return torch.empty(*shape, dtype=arena.dtype, pin_memory=True)


def _to_host(arena: Arena, shape: Shape) -> Call:
    source, target = arena.take(*shape), _pinned(arena, shape)
    return lambda: target.copy_(source, non_blocking=True)


def _from_host(arena: Arena, shape: Shape) -> Call:
    source, target = _pinned(arena, shape).copy_(arena.take(*shape)), arena.fresh(*shape)
    return lambda: target.copy_(source, non_blocking=True)


OPS: Mapping[str, Builder] = {
    "linear_forward": _linear_forward,
    "linear_dgrad": _linear_dgrad,
    "linear_wgrad": _linear_wgrad,
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
    **{f"{family}_forward": partial(_forward_of, family) for family in _DIFFERENTIABLE},
    **{f"{family}_backward": partial(_backward_of, family) for family in _DIFFERENTIABLE},
    "add_forward": _add,
    "add_backward": _add,
    "adamw": _adamw,
    "clip": _clip,
    "copy": _copy,
    "cast": _cast,
    "to_host": _to_host,
    "from_host": _from_host,
}
_CUDA_ONLY = ("to_host", "from_host")


def ops_of(device_kind: str, dtype: str) -> tuple[str, ...]:
    """Return the ops that a device of this kind is measured for: in fp8 only matrix products.

    >>> ops_of("cuda", "fp8")
    ('linear_forward', 'linear_dgrad', 'linear_wgrad')
    """
    return tuple(
        op
        for op in OPS
        if (dtype != "fp8" or op.startswith("linear_"))
        and (device_kind == "cuda" or op not in _CUDA_ONLY)
    )


def variants(op: str, device_kind: str) -> tuple[str, ...]:
    """Return the variants of `op` that a device of this kind may know, the default one first.

    >>> variants("attention_forward", "cpu")
    ('', 'flash', 'math')
    """
    if op.startswith("attention_"):
        return ("", *(_CPU_BACKENDS if device_kind == "cpu" else BACKENDS))
    if op.rpartition("_")[0] in _COMPILED:
        return ("", "compiled")
    return ("", "foreach") if op == "adamw" else ("",)


def builder(op: str, variant: str = "") -> Builder:
    """Return what builds calls of one variant of `op`; it is to be used within `selected`."""
    if variant == "compiled":
        family, _, direction = op.rpartition("_")
        build = _forward_of if direction == "forward" else _backward_of
        return partial(build, family, form=_compiled)
    return partial(_adamw, is_fused=False) if variant == "foreach" else OPS[op]


@contextmanager
def selected(variant: str) -> Iterator[None]:
    """Have PyTorch take the kernels of `variant` while calls are built and made."""
    with ExitStack() as stack:
        if variant in BACKENDS:
            # Beside its error, PyTorch warns of each reason why it refuses a backend.
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(sdpa_kernel(BACKENDS[variant]))
        if variant == "compiled":
            stack.enter_context(_compiling())
        yield


@contextmanager
def _compiling() -> Iterator[None]:
    """Compile in this process, and keep the buffers of a backward that is called again and again.

    What was compiled is forgotten in the end: there is a limit to the shapes of one function.
    """
    from torch._functorch import config as autograd_config
    from torch._inductor import config as inductor_config

    with (
        warnings.catch_warnings(),
        inductor_config.patch(compile_threads=1),
        autograd_config.patch(donated_buffer=False),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            torch._dynamo.reset()


def refusal(variant: str, dtype: str, device: torch.device) -> str:
    """Return why `device` cannot run this at any shape, empty if it may."""
    if dtype == "fp8":
        if device.type != "cuda":
            return "fp8 products need a GPU"
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < _FP8_CAPABILITY:
            return f"fp8 products need compute capability 8.9, this is {major}.{minor}"
    if variant == "compiled":
        if device.type == "cuda":
            from torch.utils._triton import has_triton

            return "" if has_triton() else "torch.compile needs triton"
        if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
            return "torch.compile needs a C++ compiler (g++ or clang++)"
    return ""
