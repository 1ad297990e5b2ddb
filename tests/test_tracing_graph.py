"""The graph of a forward pass: every value that a tap sees, from values that came before it."""

import numpy as np
import pytest
import tiny

from npllm.errors import NpllmValueError
from npllm.models.taps import NAMES
from npllm.testing import conventions
from npllm.tracing.graph import NODES, graph


def test_there_is_a_node_for_each_value_that_a_tap_sees():
    assert list(NODES) == list(NAMES)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("n_layers", [1, 3])
def test_the_order_is_that_of_a_run_and_inputs_come_first(n_layers, cached):
    model = tiny.model(num_hidden_layers=n_layers)
    seen = []

    def tap(name, x):
        seen.append(name)
        return x

    model(np.array([[1, 2, 3]]), cache=model.new_cache(1) if cached else None, tap=tap)
    nodes = graph(n_layers, cached=cached)
    assert list(nodes) == seen
    for number, name in enumerate(seen):
        assert set(nodes[name].inputs) <= set(seen[:number]), name
        assert set(nodes[name].conventions) <= set(conventions), name


def test_a_graph_has_a_layer():
    with pytest.raises(NpllmValueError, match="at least 1, got 0"):
        graph(0)
