"""From text to vectors, the parts of the model, and the loop."""

from typing import Any

import numpy as np

from npllm.analysis.cost import parameter_counts
from npllm.decoding.sampler_chain import next_token_distribution
from npllm.page.data.rounding import significant
from npllm.page.run import Run

__all__ = ["autoregression", "forward", "pipeline", "tokens", "tree"]

Data = dict[str, Any]

N_CHANNELS = 64  # of an embedding, as many as are shown


def pipeline(run: Run) -> Data:
    """Give the text that goes in, and the text that comes out."""
    new = _new_ids(run)
    tokenizer, config = run.model.tokenizer, run.model.config
    answer = tokenizer.decode(new) if tokenizer else " ".join(map(str, new))
    folder = run.model.folder
    return {
        "prompt": run.prompt,
        "answer": answer,
        "model": folder.name if folder else config.model_type,
        "n_seq": len(run.ids),
        "n_new": len(new),
    }


def autoregression(run: Run) -> Data:
    """Give each step of greedy decoding: the likeliest tokens, and the one that is appended."""
    steps = []
    for step in range(len(_new_ids(run))):
        p = next_token_distribution(run.logits(step))
        best = np.argsort(-p, kind="stable")[:5]
        steps.append([run.token(i) | {"p": significant(p[i])} for i in best])
    stop = run.model.generation_config.eos_token_id
    return {"prompt": [run.token(i) for i in run.ids], "steps": steps, "stop": list(stop)}


def _new_ids(run: Run) -> list[int]:
    """The tokens that were decoded greedily, up to a stop id."""
    new = []
    for step in range(run.n_new):
        new.append(int(run.logits(step).argmax()))
        if new[-1] in run.model.generation_config.eos_token_id:
            break
    return new


def forward(run: Run) -> Data:
    """Give the three parts of the model, with the shapes of what they hand on."""
    config, n = run.model.config, len(run.ids)
    counts = parameter_counts(config)
    shapes = [
        ("tokenizer", "text to ids", [1, n]),
        ("embedding", "ids to vectors", [1, n, config.hidden_size]),
        (f"{config.num_hidden_layers} blocks", "vectors to vectors", [1, n, config.hidden_size]),
        ("final norm", "scales each vector", list(run.trace["model.norm"].shape)),
        ("LM head", "vectors to logits", list(run.trace["lm_head"].shape)),
    ]
    return {
        "parts": [{"name": a, "does": b, "shape": c} for a, b, c in shapes],
        "parameters": counts,
        "total": sum(counts.values()),
    }


def tokens(run: Run) -> Data:
    """Give each token with its id and the first channels of its embedding."""
    vectors = run.value("model.embed_tokens")
    rows = [
        run.token(i)
        | {
            "utf8": run.text(i).encode("utf-8", "surrogatepass").hex(" "),
            "norm": significant(np.linalg.norm(x)),
            "vector": significant(x[:N_CHANNELS], 4),
        }
        for i, x in zip(run.ids, vectors, strict=True)
    ]
    config = run.model.config
    return {"tokens": rows, "n_vocab": config.vocab_size, "d_model": config.hidden_size}


def tree(run: Run) -> Data:
    """Give the tree of modules, and every tensor with its shape and bytes."""
    params = run.model.params
    n_layer = len(params.layers)
    rows = [_tensor("embed_tokens", params.embed_tokens, 1)]
    for name, x in params.layers[0]._asdict().items():
        if x is not None:
            rows.append(_tensor(f"layers.0-{n_layer - 1}.{name}", x, n_layer))
    rows.append(_tensor("norm", params.norm, 1))
    is_tied = params.lm_head is params.embed_tokens
    if params.lm_head is not None and not is_tied:
        rows.append(_tensor("lm_head", params.lm_head, 1))
    total = sum(row["bytes"] * row["count"] for row in rows)
    return {"text": str(run.model), "tensors": rows, "bytes": total, "tied": is_tied}


def _tensor(name: str, x: Any, count: int) -> Data:
    return {
        "name": name,
        "shape": list(x.shape),
        "dtype": str(x.dtype),
        "bytes": int(x.nbytes),
        "count": count,
    }
