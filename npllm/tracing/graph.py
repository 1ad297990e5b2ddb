"""The values of a forward pass as a graph: which operation makes each, from which values and
weights, and which conventions show there.
"""

from typing import NamedTuple

from npllm.errors import NpllmValueError

__all__ = ["NODES", "Node", "graph"]


class Node(NamedTuple):
    """How a value is made.

    Parameters
    ----------
    op : str
        "embed", "rms_norm", "linear", "rope", "attention", "swiglu" or "add", as in
        `npllm.testing.budget`; "tables" makes cos and sin; "view" takes a part of its input, or
        orders it otherwise; "cache" puts what is new behind what the cache holds.
    inputs : tuple of str
        Names of the values that go in, in the order of the operation's parameters.
    weights : tuple of str
        Names of its parameters in the checkpoint, without ".weight" and ".bias".
    conventions : tuple of str
        Identifiers of `npllm.testing.conventions` that a wrong value may come from.
    """

    op: str
    inputs: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    conventions: tuple[str, ...] = ()


# N is the number of the layer, "model.layers.P" the output of the one before: `model.embed_tokens`
# for layer 0.  The order is that of execution.  Without a cache, `heads` reads k and v.
NODES = {
    "model.rotary_emb.cos": Node("tables", conventions=("C2", "C3", "C4", "C5", "C18", "C25")),
    "model.rotary_emb.sin": Node("tables", conventions=("C2", "C3", "C4", "C5", "C18", "C25")),
    "model.embed_tokens": Node("embed", weights=("model.embed_tokens",), conventions=("C33",)),
    "model.layers.N.input_layernorm": Node(
        "rms_norm",
        ("model.layers.P",),
        ("model.layers.N.input_layernorm",),
        ("C13", "C28", "C29", "C30"),
    ),
    "model.layers.N.self_attn.qkv_proj": Node(
        "linear",
        ("model.layers.N.input_layernorm",),
        ("model.layers.N.self_attn.qkv_proj",),
        ("C6", "C30", "C31"),
    ),
    "model.layers.N.self_attn.q_proj": Node(
        "view", ("model.layers.N.self_attn.qkv_proj",), (), ("C6", "C31")
    ),
    "model.layers.N.self_attn.k_proj": Node(
        "view", ("model.layers.N.self_attn.qkv_proj",), (), ("C6", "C31")
    ),
    "model.layers.N.self_attn.v": Node(
        "view", ("model.layers.N.self_attn.qkv_proj",), (), ("C6", "C22", "C31")
    ),
    "model.layers.N.self_attn.q": Node(
        "rope",
        ("model.layers.N.self_attn.q_proj", "model.rotary_emb.cos", "model.rotary_emb.sin"),
        (),
        ("C1", "C2", "C3", "C4", "C5", "C18", "C25", "C26", "C27", "C34"),
    ),
    "model.layers.N.self_attn.k": Node(
        "rope",
        ("model.layers.N.self_attn.k_proj", "model.rotary_emb.cos", "model.rotary_emb.sin"),
        (),
        ("C1", "C2", "C3", "C4", "C5", "C18", "C25", "C26", "C27", "C34"),
    ),
    "model.layers.N.self_attn.cached_k": Node(
        "cache", ("model.layers.N.self_attn.k",), (), ("C32",)
    ),
    "model.layers.N.self_attn.cached_v": Node(
        "cache", ("model.layers.N.self_attn.v",), (), ("C32",)
    ),
    "model.layers.N.self_attn.heads": Node(
        "attention",
        (
            "model.layers.N.self_attn.q",
            "model.layers.N.self_attn.cached_k",
            "model.layers.N.self_attn.cached_v",
        ),
        (),
        ("C8", "C9", "C10", "C11", "C12", "C14", "C19", "C21", "C22", "C23", "C32"),
    ),
    "model.layers.N.self_attn.attention": Node(
        "view", ("model.layers.N.self_attn.heads",), (), ("C31",)
    ),
    "model.layers.N.self_attn.o_proj": Node(
        "linear",
        ("model.layers.N.self_attn.attention",),
        ("model.layers.N.self_attn.o_proj",),
        ("C30", "C31"),
    ),
    "model.layers.N.residual": Node("add", ("model.layers.P", "model.layers.N.self_attn.o_proj")),
    "model.layers.N.post_attention_layernorm": Node(
        "rms_norm",
        ("model.layers.N.residual",),
        ("model.layers.N.post_attention_layernorm",),
        ("C13", "C28", "C29", "C30"),
    ),
    "model.layers.N.mlp.gate_up_proj": Node(
        "linear",
        ("model.layers.N.post_attention_layernorm",),
        ("model.layers.N.mlp.gate_up_proj",),
        ("C7", "C30", "C31"),
    ),
    "model.layers.N.mlp.gate": Node("view", ("model.layers.N.mlp.gate_up_proj",), (), ("C7",)),
    "model.layers.N.mlp.up": Node("view", ("model.layers.N.mlp.gate_up_proj",), (), ("C7",)),
    "model.layers.N.mlp.swiglu": Node(
        "swiglu", ("model.layers.N.mlp.gate", "model.layers.N.mlp.up"), (), ("C7",)
    ),
    "model.layers.N.mlp.down_proj": Node(
        "linear",
        ("model.layers.N.mlp.swiglu",),
        ("model.layers.N.mlp.down_proj",),
        ("C30", "C31"),
    ),
    "model.layers.N": Node("add", ("model.layers.N.residual", "model.layers.N.mlp.down_proj")),
    "model.norm": Node(
        "rms_norm", ("model.layers.P",), ("model.norm",), ("C13", "C28", "C29", "C30")
    ),
    "lm_head.input": Node("view", ("model.norm",)),
    "lm_head": Node("linear", ("lm_head.input",), ("lm_head",), ("C30", "C31", "C33")),
}


def graph(n_layers: int, *, cached: bool = False) -> dict[str, Node]:
    """Write the graph out for a number of layers, in the order of execution.

    Parameters
    ----------
    n_layers : int
    cached : bool
        Whether the pass appended to a cache: attention then reads `cached_k` and `cached_v`, which
        do not exist otherwise.

    Returns
    -------
    nodes : dict of Node
        By the name of the value.

    Raises
    ------
    NpllmValueError
        For less than one layer.
    """
    if n_layers < 1:
        raise NpllmValueError(f"n_layers must be at least 1, got {n_layers}")
    names = [name for name in NODES if cached or not name.endswith((".cached_k", ".cached_v"))]
    inside = [name for name in names if name.startswith("model.layers.N")]
    first, last = names.index(inside[0]), names.index(inside[-1]) + 1
    order = [(name, 0) for name in names[:first]]
    order += [(name, number) for number in range(n_layers) for name in inside]
    order += [(name, n_layers) for name in names[last:]]
    return {_numbered(name, n): _node(NODES[name], n, cached) for name, n in order}


def _node(node: Node, number: int, cached: bool) -> Node:
    """A node of layer `number`; with what attention reads without a cache."""
    inputs = node.inputs
    if not cached:
        inputs = tuple(name.replace(".cached_", ".") for name in inputs)
    return node._replace(
        inputs=tuple(_numbered(name, number) for name in inputs),
        weights=tuple(_numbered(name, number) for name in node.weights),
    )


def _numbered(name: str, number: int) -> str:
    """Fill in the number of the layer, and the name of what comes before it."""
    before = f"model.layers.{number - 1}" if number else "model.embed_tokens"
    return before if name == "model.layers.P" else name.replace(".N", f".{number}")
