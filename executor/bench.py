"""The executor's speed beside a training loop that one would write by hand, in the same process."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from executor.data import TokenStream, load_stream
from executor.recipe import Recipe
from executor.train import Trainer, run_steps
from planner.layout import Layout
from planner.schedules.flush import one_f_one_b
from profiles.model import ModelSpec
from profiles.stack import StackSpec
from profiles.workload import Workload

MODEL = ModelSpec(
    name="bench", num_layers=4, hidden=256, num_heads=8, num_kv_heads=4, head_size=32, ffn=704,
    vocab=256, max_seq_len=256,
)  # fmt: skip
_BLOCK_STEPS = 1


def bench_executor(num_steps: int = 48) -> dict[str, float | int | str]:
    """Return the throughput of the executor on one rank, that of a hand-written loop, the ratio.

    Both train the same model on the same text, a step each in turn, `num_steps` each in all; rates
    are tokens per second by the median step.
    """
    layout = Layout(dp=1, tp=1, pp=1, micro_batch=4, num_microbatches=2, stage_layers=(4,))
    workload = Workload(seq_len=256, global_batch=layout.global_batch)
    stack = StackSpec(
        name="torch", overlaps_gradients=False, gradient_bucket_bytes=1 << 25, fuses_norms=False,
        source="not used by one rank", date="2026-01-01",
    )  # fmt: skip
    recipe = Recipe(
        model=MODEL, workload=workload, layout=layout, schedule=one_f_one_b(1, 2), stack=stack,
        seed=0,
    )  # fmt: skip
    stream = load_stream(None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer(recipe, stream, device, rank=0)
    by_hand = _HandWritten(recipe, stream, device)
    loops: dict[str, Callable[[], object]] = {
        "executor": lambda: run_steps(trainer, _BLOCK_STEPS),
        "by_hand": lambda: by_hand.run(_BLOCK_STEPS),
    }
    times = _take_turns(loops, max(1, num_steps // _BLOCK_STEPS), device)
    tokens = _BLOCK_STEPS * workload.tokens_per_step
    ratios = [hand / ours for ours, hand in zip(times["executor"], times["by_hand"], strict=True)]
    return {
        "executor_tokens_per_s": round(tokens / median(times["executor"]), 1),
        "by_hand_tokens_per_s": round(tokens / median(times["by_hand"]), 1),
        "ratio": round(median(ratios), 4),
        "num_steps": _BLOCK_STEPS * len(ratios),
        "num_parameters": MODEL.num_parameters,
        "num_threads": torch.get_num_threads(),
        "device": device.type,
        "torch": torch.__version__,
    }


def bench_text(figures: Mapping[str, float | int | str]) -> str:
    """Return the figures of `bench_executor` in two lines."""
    return (
        f"executor {figures['executor_tokens_per_s']} tokens/s, "
        f"hand-written loop {figures['by_hand_tokens_per_s']} tokens/s\n"
        f"ratio {figures['ratio']} (median of blocks in turn, {figures['num_steps']} steps each, "
        f"{figures['num_parameters']} parameters, {figures['device']}, "
        f"torch {figures['torch']}, {figures['num_threads']} threads)"
    )


def _take_turns(
    loops: Mapping[str, Callable[[], object]], num_blocks: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of every block by loop, after one block of each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for block in range(num_blocks + 1):
        # Who goes first changes, so that neither always finds the other's cache.
        for name in sorted(loops, reverse=block % 2 == 1):
            start = time.perf_counter()
            loops[name]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if block:
                times[name].append(time.perf_counter() - start)
    return times


class _HandLayer(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        q_width = spec.num_heads * spec.head_size
        kv_width = spec.num_kv_heads * spec.head_size
        self.attention_norm = nn.Parameter(torch.ones(spec.hidden))
        self.mlp_norm = nn.Parameter(torch.ones(spec.hidden))
        self.wq = nn.Linear(spec.hidden, q_width, bias=False)
        self.wk = nn.Linear(spec.hidden, kv_width, bias=False)
        self.wv = nn.Linear(spec.hidden, kv_width, bias=False)
        self.wo = nn.Linear(q_width, spec.hidden, bias=False)
        self.w1 = nn.Linear(spec.hidden, spec.ffn, bias=False)
        self.w2 = nn.Linear(spec.ffn, spec.hidden, bias=False)
        self.w3 = nn.Linear(spec.hidden, spec.ffn, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the hidden states [B, S, D] after this layer."""
        batch, seq_len, hidden = x.shape
        y = F.rms_norm(x, (hidden,), self.attention_norm, self.spec.norm_eps)
        q = self.wq(y).view(batch, seq_len, self.spec.num_heads, self.spec.head_size)
        k = self.wk(y).view(batch, seq_len, self.spec.num_kv_heads, self.spec.head_size)
        v = self.wv(y).view(batch, seq_len, self.spec.num_kv_heads, self.spec.head_size)
        q, k = _turn(q, cos, sin), _turn(k, cos, sin)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        x = x + self.wo(y.transpose(1, 2).reshape(batch, seq_len, -1))
        y = F.rms_norm(x, (hidden,), self.mlp_norm, self.spec.norm_eps)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))  # type: ignore[no-any-return]


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


class _HandModel(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocab, spec.hidden)
        self.layers = nn.ModuleList(_HandLayer(spec) for _ in range(spec.num_layers))
        self.norm = nn.Parameter(torch.ones(spec.hidden))
        self.head = nn.Linear(spec.hidden, spec.vocab, bias=False)

    def forward(self, ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return logits [B, S, V] for `ids` [B, S]."""
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        x = F.rms_norm(x, (self.spec.hidden,), self.norm, self.spec.norm_eps)
        return self.head(x)  # type: ignore[no-any-return]


class _HandWritten:
    """The yardstick: a plain model and a plain loop that know nothing of plans or layouts."""

    def __init__(self, recipe: Recipe, stream: TokenStream, device: torch.device) -> None:
        self.device, self.tokens = device, stream.tokens
        self.seq_len, self.batch = recipe.workload.seq_len, recipe.layout.micro_batch
        self.num_microbatches = recipe.layout.num_microbatches
        self.model = _HandModel(recipe.model).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=True)
        self.generator = np.random.default_rng(0)
        size = recipe.model.head_size
        frequencies = recipe.model.rope_theta ** -(torch.arange(0, size, 2) / size)
        angles = torch.outer(torch.arange(self.seq_len), frequencies).unsqueeze(1)
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)

    def run(self, num_steps: int) -> list[float]:
        """Train; return the losses."""
        losses = []
        for _ in range(num_steps):
            self.optimizer.zero_grad()
            total = torch.zeros((), device=self.device)
            for _ in range(self.num_microbatches):
                starts = self.generator.integers(
                    len(self.tokens) - self.seq_len - 1, size=self.batch
                )
                windows = np.stack([self.tokens[s : s + self.seq_len + 1] for s in starts])
                ids = torch.from_numpy(windows.astype(np.int64)).to(self.device)
                logits = self.model(ids[:, :-1], self.cos, self.sin)
                loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
                (loss / self.num_microbatches).backward()  # type: ignore[no-untyped-call]
                total += loss.detach() / self.num_microbatches
            self.optimizer.step()
            losses.append(total.item())
        return losses
