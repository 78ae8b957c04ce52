"""Which layers go to which pipeline stage."""

from profiles.model import ModelSpec
from profiles.stack import Partition


def balanced_stages(
    num_layers: int, num_stages: int, layer_ns: int, first_ns: int, last_ns: int
) -> tuple[int, ...]:
    """Return the layers of each stage so that the slowest stage is as fast as it can be.

    All layers cost `layer_ns`; the first stage also pays `first_ns` (embedding), the last
    `last_ns` (LM head and loss). Every stage has a layer, and each further one goes where the
    stage stays fastest, which is optimal since layers are equal: an exchange of two of them
    changes nothing. Ties go to the later stage, which keeps fewer micro-batches alive under 1F1B.

    >>> balanced_stages(8, 4, 10, 0, 0), balanced_stages(9, 4, 10, 0, 12)
    ((2, 2, 2, 2), (2, 3, 3, 1))
    """
    layers = [1] * num_stages
    cost_ns = [layer_ns] * num_stages
    cost_ns[0] += first_ns
    cost_ns[-1] += last_ns
    for _ in range(num_layers - num_stages):
        stage = min(range(num_stages), key=lambda s: (cost_ns[s] + layer_ns, -s))
        layers[stage] += 1
        cost_ns[stage] += layer_ns
    return tuple(layers)


def stages_by_rule(model: ModelSpec, num_stages: int, rule: Partition) -> tuple[int, ...]:
    """Return the layers of each stage as software that follows `rule` splits them.

    `even` gives the first stages one more where the layers do not divide; `slots` counts the
    embedding and the head as a layer each (Megatron-Core's account_for_embedding_in_pipeline_split,
    DeepSpeed's `type:transformer|embedding`); `cost` fills stage after stage until its share of all
    matrix parameters, the head's included, is reached (nanotron's build_model).

    >>> from profiles.presets import model_preset
    >>> model = model_preset("llama-3.1-405b")
    >>> stages_by_rule(model, 64, "slots")[:2], stages_by_rule(model, 64, "slots")[-1]
    ((1, 2), 1)
    """
    if num_stages == 1:
        return (model.num_layers,)
    if rule == "slots":
        base, more = divmod(model.num_layers + 2, num_stages)
        slots = [base + (stage < more) for stage in range(num_stages)]
        return (slots[0] - 1, *slots[1:-1], slots[-1] - 1)
    if rule == "cost":
        return _filled(model, num_stages)
    base, more = divmod(model.num_layers, num_stages)
    return tuple(base + (stage < more) for stage in range(num_stages))


def _filled(model: ModelSpec, num_stages: int) -> tuple[int, ...]:
    attention = 4 * model.num_heads * model.head_size * model.hidden
    layer = attention + model.num_mlp_parameters
    whole = model.num_layers * layer + model.vocab * model.hidden
    counts, stage, passed = [0] * num_stages, 0, 0
    for _ in range(model.num_layers):
        counts[stage] += 1
        passed += layer
        if passed * num_stages >= whole * (stage + 1) and stage < num_stages - 1:
            stage += 1
    return tuple(counts)
