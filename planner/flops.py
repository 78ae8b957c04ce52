"""The flops of a step: one formula for MFU and HFU wherever they are printed."""

from planner.setup import Setup
from profiles.cluster import ClusterSpec
from profiles.workload import DType


def step_flops(setup: Setup, *, causal: bool, recomputed: bool) -> float:
    """Return the flops of one step of `setup` over all ranks.

    Three times the forward (itself and both halves of the backward): 2 for each matrix parameter a
    token meets, LM head in, embedding out, and 4 s a of attention, where s is the sequence length
    and a the width of all heads; half of that where only what is `causal` counts. `recomputed`
    adds what the backward computes again. With ffn = 4 h and all layers recomputed this is
    96 B s L h^2 (1 + s / 6h + V / 16Lh) of Megatron-LM (arXiv:2104.04473), which counts all of the
    attention.
    """
    model = setup.model
    head = 2.0 * model.vocab * model.hidden
    layers = model.train_flops_per_token(0) / 3 - head
    width = model.num_layers * model.num_heads * model.head_size
    attention = (2.0 if causal else 4.0) * setup.workload.seq_len * width
    flops = 3 * (layers + attention + head)
    if recomputed and setup.layout.recompute != "none":
        is_full = setup.layout.recompute == "full"
        again = layers + attention if is_full else _selected_again(setup, attention)
        flops += again * _recomputed_share(setup)
    return flops * setup.workload.tokens_per_step


def _selected_again(setup: Setup, attention: float) -> float:
    """Return the flops of a token that selective recomputation makes again.

    The attention, unless it is fused: such a one always makes its scores again, as part of its own
    backward. Or, of operators, the products of key, of the attention's output and into the MLP.
    """
    model, stack = setup.model, setup.stack
    if stack.selective == "scores":
        return attention if stack.attention == "unfused" else 0.0
    mlps = model.experts_per_token + model.num_shared_experts if model.num_experts else 1
    width = (model.num_heads + model.num_kv_heads) * model.head_size + mlps * model.ffn
    return 2.0 * model.num_layers * model.hidden * width


def _recomputed_share(setup: Setup) -> float:
    """Return the part of the layers in which something is recomputed."""
    layout = setup.layout
    if not layout.recompute_layers:
        return 1.0
    return sum(layout.recompute_layers) / setup.model.num_layers


def peak_flops_per_s(setup: Setup) -> float:
    """Return the dense peak of one GPU in the dtype of the run, the mean where they differ."""
    return mean_peak_flops_per_s(setup.cluster, setup.workload.dtype)


def mean_peak_flops_per_s(cluster: ClusterSpec, dtype: DType) -> float:
    """Return the dense peak of a GPU of `cluster`, on average.

    >>> from dataclasses import replace
    >>> from profiles.presets import cluster_preset
    >>> h100, a100 = (cluster_preset(name, num_nodes=2) for name in ("h100-sxm", "a100-sxm-80gb"))
    >>> both = replace(h100, pools=h100.pools + a100.pools)
    >>> [mean_peak_flops_per_s(each, "bf16") / 1e12 for each in (h100, a100, both)]
    [989.0, 312.0, 650.5]
    """
    peaks = [pool.gpu.peak_flops_per_s[dtype] for pool in cluster.pools]
    if len(set(peaks)) == 1:
        return peaks[0]
    each = zip(peaks, cluster.pools, strict=True)
    return sum(peak * pool.num_gpus for peak, pool in each) / cluster.num_ranks
