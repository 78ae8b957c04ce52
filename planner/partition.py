"""Which layers go to which pipeline stage."""


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
