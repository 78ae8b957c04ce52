"""The work of a rank: flops and bytes by hand, exchanges by count, and what every axis divides."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.flops import step_flops
from planner.reference import work
from planner.reference.passes import PASSES
from planner.reference.program import ATTENTION, EXCHANGE, INTER, INTRA, MATMUL, MEMORY, Block
from planner.reference.work import RankWork
from planner.setup import Setup
from profiles.collective_curves import Group, collective
from profiles.kernel_curves import Estimate, attention, matmul
from profiles.model import ModelSpec
from profiles.stack import Recompute
from tests.setups import GPT, MOE, SMALL, STACK, model_of, setup_of

PLAIN_GPT = replace(GPT, has_biases=False)
UNFUSED = replace(STACK, attention="unfused")
MODES: tuple[Recompute, ...] = ("none", "selective", "full")


@pytest.fixture
def counted() -> Iterator[None]:
    """Let each product and attention take one ns a flop, and each pass one ns a byte.

    A causal attention has half of 4 s a flops, and twice that in its backward.
    """

    def scores(_gpu: str, _kernel: str, direction: str, **of: Any) -> Estimate:
        pairs = of["batch"] * of["heads"] * of["queries"] * of["keys"]
        return Estimate(pairs * of["head_size"] * (4.0 if direction == "backward" else 2.0))

    with (
        patch.object(work, "matmul", lambda _gpu, _dtype, m, n, k: Estimate(2.0 * m * n * k)),
        patch.object(work, "attention", scores),
        patch.object(work, "memory_pass", lambda _gpu, size_bytes: Estimate(size_bytes)),
    ):
        yield


def blocks(setup: Setup) -> dict[str, Block]:
    """Return the programs of a setup in which all layers recompute, or none does."""
    found = dict(RankWork(setup).blocks)
    found["layer_backward"] = found.pop("layer_again", found["layer_backward"])
    return found


def of(block: Block, *categories: int) -> float:
    """Return the time alone of all ops of these categories."""
    return float(block.ns[np.isin(block.category, categories)].sum())


def both(found: dict[str, Block], part: str, *categories: int) -> float:
    return sum(of(found[f"{part}_{way}"], *categories) for way in ("forward", "backward"))


def computed_flops(setup: Setup) -> float:
    """Return the flops that the kernels of all ranks do in a step."""
    found, layout = blocks(setup), setup.layout
    a_rank = setup.model.num_layers * both(found, "layer", MATMUL, ATTENTION)
    a_rank += both(found, "head", MATMUL, ATTENTION)
    return a_rank * layout.num_microbatches * layout.num_ranks


def elapsed(block: Block, setup: Setup) -> float:
    _, lanes = model_of(setup)
    return float(block.timed(lanes, np.zeros(1)).device[0])


# Closed forms.


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("stack", [STACK, UNFUSED, replace(STACK, selective="operators")])
@pytest.mark.parametrize("axes", [{}, {"tp": 4}, {"cp": 8}, {"dp": 3, "tp": 2, "cp": 2}])
@pytest.mark.parametrize("model", [SMALL, PLAIN_GPT])
def test_the_kernels_of_all_ranks_do_the_flops_that_hfu_counts(
    model: ModelSpec, axes: dict[str, Any], stack: Any, recompute: Recompute
) -> None:
    setup = setup_of(model, stack=stack, recompute=recompute, **axes)
    counted = step_flops(setup, causal=True, recomputed=True)
    assert computed_flops(setup) == pytest.approx(counted, rel=1e-12)


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("model", [SMALL, MOE])
def test_a_third_of_the_products_makes_weight_gradients(
    model: ModelSpec, recompute: Recompute
) -> None:
    found = blocks(setup_of(model, stack=UNFUSED, recompute=recompute, tp=2))
    for part in ("layer", "head"):
        assert found[f"{part}_backward"].weight_ns == of(found[f"{part}_forward"], MATMUL)
    assert found["embedding_backward"].weight_ns == 0


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("ep", [1, 2, 8])
def test_ranks_do_as_much_however_the_experts_are_shared(ep: int) -> None:
    """Two experts a token of eight; the router's product is too small to be timed."""
    setup = setup_of(MOE, dp=8, ep=ep)
    counted = step_flops(setup, causal=True, recomputed=False)
    router = 6 * MOE.num_layers * MOE.hidden * MOE.num_experts * setup.workload.tokens_per_step
    assert computed_flops(setup) == pytest.approx(counted - router, rel=1e-12)


@pytest.mark.usefixtures("counted")
def test_every_token_meets_the_shared_experts() -> None:
    one, two = (blocks(setup_of(replace(MOE, num_shared_experts=n))) for n in (1, 2))
    shared = 2 * 3 * 3 * 4096 * MOE.hidden * MOE.ffn
    assert both(two, "layer", MATMUL) - both(one, "layer", MATMUL) == shared


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_bytes_of_a_fused_forward_by_hand(tp: int, is_sharded: bool) -> None:
    """Two norms of 4 bytes and two residuals of 6 between the blocks; RoPE 4, SwiGLU 6 in them."""
    found = blocks(setup_of(tp=tp, sequence_parallel=is_sharded))["layer_forward"]
    m, between = 4096, 4096 // tp if is_sharded else 4096
    inside = m * (4 * (SMALL.hidden + 1024) + 6 * SMALL.ffn) // tp
    assert of(found, MEMORY) == between * SMALL.hidden * (2 * 4 + 2 * 6) + inside
    # GELU has 4 bytes, and learned positions nothing in a layer.
    found = blocks(setup_of(GPT, tp=tp, sequence_parallel=is_sharded))["layer_forward"]
    inside = m * 4 * GPT.ffn // tp
    assert of(found, MEMORY) == between * GPT.hidden * (2 * 4 + 2 * 6) + inside


@pytest.mark.usefixtures("counted")
def test_tokens_are_permuted_on_their_way_to_experts_and_back() -> None:
    """Read, written and read again, two copies of each, both times."""
    dense = replace(MOE, num_experts=0, experts_per_token=0, ffn=2 * MOE.ffn)
    routed, plain = (blocks(setup_of(model))["layer_forward"] for model in (MOE, dense))
    moved = 2 * 3 * (4096 * 2 * MOE.hidden * 2)
    assert of(routed, MEMORY) - of(plain, MEMORY) == moved


@pytest.mark.usefixtures("counted")
def test_only_fp8_casts_the_inputs_of_products() -> None:
    """Four bytes an element: of both linears' inputs in the attention and in the MLP."""
    plain, cast = (blocks(setup_of(dtype=dtype))["layer_forward"] for dtype in ("bf16", "fp8"))
    inputs = 4096 * (SMALL.hidden + SMALL.hidden + SMALL.hidden + SMALL.ffn)
    assert of(cast, MEMORY) - of(plain, MEMORY) == 4 * inputs
    assert of(cast, MATMUL) == of(plain, MATMUL)


@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("axes", [{}, {"tp": 4}, {"tp": 16, "sequence_parallel": True}])
def test_without_overlap_everything_stands_in_a_row(
    axes: dict[str, Any], recompute: Recompute
) -> None:
    setup = setup_of(stack=UNFUSED, recompute=recompute, **axes)
    for block in blocks(setup).values():
        assert elapsed(block, setup) == np.rint(block.ns).sum()


@pytest.mark.parametrize("cp", [2, 8, 32])
def test_keys_and_values_travel_behind_the_attention(cp: int) -> None:
    setup = setup_of(cp=cp, seq_len=32768, stack=replace(STACK, attention="flash3"))
    block = blocks(setup)["layer_forward"]
    ns = np.rint(block.ns)
    core, ring = (ns[block.category == ATTENTION], ns[np.isin(block.category, (INTRA, INTER))])
    assert (len(core), len(ring)) == (1, 1)
    hidden = min(core[0], ring[0])
    assert elapsed(block, setup) == ns.sum() - hidden


def test_a_ring_passes_keys_and_values_once_forward_and_twice_backward() -> None:
    def ring(cp: int, way: str) -> float:
        return of(blocks(setup_of(cp=cp, seq_len=cp * 4096))[f"layer_{way}"], INTRA)

    # As many tokens a rank, their keys and values in bf16: one, three and seven hops.
    node = setup_of().cluster.pools[0]
    hop = collective("send_recv", Group(2, 8), 2 * 4096 * 1024 * 2, node.intra_node, None)
    assert ring(2, "forward") == pytest.approx(hop.ns)
    assert ring(4, "forward") == pytest.approx(3 * ring(2, "forward"))
    assert ring(8, "forward") == pytest.approx(7 * ring(2, "forward"))
    assert ring(8, "backward") == pytest.approx(2 * ring(8, "forward"))


@pytest.mark.parametrize(("tp", "cp", "crosses"), [(1, 8, False), (1, 16, True), (8, 2, True)])
def test_a_ring_that_leaves_the_node_takes_the_fabric(tp: int, cp: int, crosses: bool) -> None:
    """One hop of it does, and the others wait for that."""
    found = blocks(setup_of(tp=tp, cp=cp, seq_len=32768))["layer_forward"]
    assert (of(found, INTER) > 0) == crosses


@pytest.mark.parametrize(("is_sharded", "counts"), [(False, (2, 2, 1, 0)), (True, (4, 6, 1, 1))])
def test_tensor_parallel_collectives_by_count(
    is_sharded: bool, counts: tuple[int, int, int, int]
) -> None:
    """All-reduces: two each way (Megatron-LM, arXiv:1909.08053, figure 3). With sequence
    parallelism four in the forward, and two more in the backward, which gathers again what the
    forward did not keep (arXiv:2205.05198, section 4.2.2).
    """
    found = blocks(setup_of(tp=8, sequence_parallel=is_sharded))
    names = ("layer_forward", "layer_backward", "embedding_forward", "embedding_backward")
    assert tuple(found[name].tensor_calls for name in names) == counts
    assert [block.tensor_calls for block in blocks(setup_of()).values()] == [0] * 6
    exchanges = [int((found[name].stream == EXCHANGE).sum()) for name in names]
    assert tuple(exchanges) == counts


# What axes and habits divide, add and hide.


@given(
    st.sampled_from((2048, 4096, 8192, 32768)),
    st.sampled_from((2, 4, 8)),
    st.sampled_from(("flash2", "flash3")),
)
def test_cp_divides_the_attention_of_each_rank(seq_len: int, cp: int, kernel: Any) -> None:
    """By cp, but for the launch and for processors that fewer blocks of queries leave idle."""
    stack = replace(STACK, attention=kernel)
    one, cut = (blocks(setup_of(stack=stack, seq_len=seq_len, cp=n)) for n in (1, cp))
    whole, part = (both(found, "layer", ATTENTION) for found in (one, cut))
    assert whole / cp <= part < whole
    queries = {"queries": seq_len // cp, "keys": seq_len}
    ways = [attention("h100-sxm", kernel, way, batch=1, heads=16, kv_heads=8, head_size=128,
                      causal=True, **queries).ns for way in ("forward", "backward")]  # fmt: skip
    assert part == pytest.approx(sum(ways))


@given(st.sampled_from((1, 2, 4)), st.sampled_from((4096, 8192, 12288)), st.integers(1, 16))
def test_fp8_is_never_slower_where_products_are_large(tp: int, hidden: int, halves: int) -> None:
    model = replace(SMALL, hidden=hidden, num_heads=hidden // 128, ffn=4 * hidden)
    bf16, fp8 = (
        sum(elapsed(blocks(setup)[f"layer_{way}"], setup) for way in ("forward", "backward"))
        for dtype in ("bf16", "fp8")
        for setup in [setup_of(model, dtype=dtype, seq_len=512 * halves, tp=tp,
                               sequence_parallel=tp > 1)]
    )  # fmt: skip
    assert fp8 < bf16


def test_casts_cost_more_than_fp8_saves_where_products_are_small() -> None:
    """A cast moves 4 m k bytes for a product of 2 m n k flops: below n of about 1000 it loses."""
    model = replace(SMALL, hidden=512, num_heads=4, num_kv_heads=4, ffn=2048)
    bf16, fp8 = (setup_of(model, dtype=dtype) for dtype in ("bf16", "fp8"))
    block = {setup.workload.dtype: blocks(setup)["layer_forward"] for setup in (bf16, fp8)}
    assert elapsed(block["fp8"], fp8) > elapsed(block["bf16"], bf16)
    assert of(block["fp8"], MATMUL) <= of(block["bf16"], MATMUL)


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("node", ["h100-sxm", "a100-sxm-80gb", "l40s"])
def test_more_overlap_is_never_slower_and_hides_no_more_than_the_products(
    node: str, is_sharded: bool
) -> None:
    found = []
    for overlap in ("none", "backward", "all"):
        setup = setup_of(tp=8, sequence_parallel=is_sharded, node=node,
                         stack=replace(STACK, tensor_overlap=overlap))  # fmt: skip
        parts = blocks(setup)
        times = [elapsed(parts[f"layer_{way}"], setup) for way in ("forward", "backward")]
        assert sum(times) >= both(parts, "layer", MATMUL, ATTENTION, MEMORY) - 20
        found.append(times)
    (_, none), (forward, backward), (_, every) = found
    assert none > backward >= every
    assert forward == found[0][0]
    assert (found[2][0] < forward) == is_sharded


@pytest.mark.parametrize("name", sorted(PASSES))
def test_fusing_never_moves_more_bytes_nor_launches_more(name: str) -> None:
    eager, fused, compiled = (PASSES[name][fusion] for fusion in ("eager", "fused", "compiled"))
    for way in ("forward", "backward"):
        ends = [getattr(each, way) for each in (eager, fused, compiled)]
        assert ends == sorted(ends, reverse=True)
        assert all(later[1] <= sooner[1] for sooner, later in pairwise(ends))


def test_the_vocabulary_is_divided_and_an_odd_one_is_slow() -> None:
    """50304 rows are 50257 padded to a multiple of 128, as Megatron does."""

    def head(vocab: int, tp: int = 1) -> float:
        return both(blocks(setup_of(replace(SMALL, vocab=vocab), tp=tp)), "head", MATMUL)

    h, v, m = SMALL.hidden, 50304, 4096
    for tp in (1, 2, 8):
        products = ((m, v // tp, h), (m, h, v // tp), (v // tp, h, m))
        assert head(v, tp) == sum(matmul("h100-sxm", "bf16", *sizes).ns for sizes in products)
    assert head(50257) > 1.5 * head(50304)


def test_unfused_heads_of_odd_sizes_are_slow() -> None:
    """BLOOM's log: heads of 150 against 144 or 160; a fused kernel pads them."""

    def core(head_size: int, kernel: Any) -> float:
        model = replace(SMALL, head_size=head_size)
        return both(blocks(setup_of(model, stack=replace(STACK, attention=kernel))), "layer",
                    ATTENTION)  # fmt: skip

    assert core(150, "unfused") > 4 * core(160, "unfused")
    assert core(150, "flash2") == core(160, "flash2")


def test_experts_are_sent_to_where_they_are() -> None:
    alone, inside, across = (blocks(setup_of(MOE, dp=16, ep=ep)) for ep in (1, 8, 16))
    for way in ("forward", "backward"):
        ways = [found[f"layer_{way}"] for found in (alone, inside, across)]
        assert [of(block, INTRA) > 0 for block in ways] == [False, True, False]
        assert [of(block, INTER) > 0 for block in ways] == [False, False, True]
        assert len({of(block, MEMORY) for block in ways}) == 1 or way == "forward"
    # There and back, forward and backward: as many ops of each.
    assert sum(inside["layer_forward"].category == INTRA) == 2
    assert sum(inside["layer_backward"].category == INTRA) == 2
