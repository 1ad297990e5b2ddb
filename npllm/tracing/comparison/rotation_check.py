"""Whether a wrong rotation did any harm: positions that are all shifted change q and k, and no
score.
"""

from typing import Any

from npllm.tracing.comparison.self_check import agrees, rotation_keys
from npllm.tracing.comparison.steps import key_of
from npllm.tracing.comparison.walking_row import layer_of

__all__ = ["after_rotation", "settle_tables"]

AFTER_ROTATION = ("heads", "attention", "o_proj", "residual")


def after_rotation(walk: Any, name: str, t: int) -> None:
    """Ask, at the first value behind the scores, whether a wrong rotation did any harm."""
    layer, leaf = layer_of(name), name.rsplit(".", 1)[-1]
    if layer is None or leaf not in AFTER_ROTATION:
        return
    front = name.removesuffix(leaf).removesuffix("self_attn.") + "self_attn."
    if any(walk.run.has(front + one, t) for one in AFTER_ROTATION[: AFTER_ROTATION.index(leaf)]):
        return
    keys = rotation_keys(layer, t)
    known = sorted(key for key in keys if key in walk.rows)
    if not any(walk.rows[key].status in ("wrong", "harmless") for key in known):
        return
    suspects = [key for key in known if key in walk.tainted and walk.rows[key].step == t]
    if not agrees(walk.run, name, t, keys):
        walk.table_votes.append(False)
        _did_harm(walk, known)
        return
    if walk.rows[key_of(name, t)].status in ("wrong", "wrong capture"):
        _never_flowed(walk, name, t, suspects)
        return
    walk.table_votes.append(True)
    others = [key_of(front + leaf, t) for leaf in ("q_proj", "k_proj", "v")]
    is_clean = not walk.tainted.intersection(others)
    for key in suspects:
        if ".rotary_emb." not in key and (is_clean or walk.rows[key].status == "wrong"):
            walk.rows[key].status = "harmless"
    if is_clean:
        freed = {key for key in suspects if ".rotary_emb." not in key}
        walk.tainted -= freed | {key_of(name, t)}
        if walk.rows[key_of(name, t)].status == "inherited":
            walk.rows[key_of(name, t)].status = "within"


def _did_harm(walk: Any, keys: list[str]) -> None:
    """Take back that values of an earlier step were harmless."""
    for key in keys:
        if walk.rows[key].status == "harmless":
            walk.rows[key].status = "wrong"
            walk.tainted.add(key)


def _never_flowed(walk: Any, name: str, t: int, suspects: list[str]) -> None:
    """Leave out rotated values that attention did not read, and judge attention again."""
    for key in suspects:
        plain, _, step = key.partition("@")
        if ".rotary_emb." not in key:
            walk.rows[key].status = "wrong capture"
            walk.tainted.discard(key)
            walk.run.replace(plain, int(step or 0))
    walk.tainted.discard(key_of(name, t))
    walk.visit(name, t)


def settle_tables(walk: Any) -> None:
    """Tables that did no harm in any layer are harmless."""
    if not walk.table_votes or not all(walk.table_votes):
        return
    for key, row in walk.rows.items():
        if ".rotary_emb." in key and row.status == "wrong":
            row.status = "harmless"
