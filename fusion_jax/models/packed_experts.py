"""The key rules of experts that are one tensor in a checkpoint, with gate and up side by side."""

from __future__ import annotations

from fusion_jax.models.rules import KeyRule, Leaf


def packed_rules(
    theirs: str,
    *,
    interleaved: bool,
    biases: bool,
    ours: str = "mlp.experts",
    transposed: bool = False,
) -> tuple[KeyRule, ...]:
    """Returns the rules of the experts in every layer, whose matrices are (e, in, out).

    Args:
        theirs: The name of the experts in a layer of the checkpoint.
        interleaved: Whether the outputs of gate and up take turns; else those of gate come first.
        biases: Whether there are biases.
        ours: Their path in a layer.
        transposed: Whether matrices are (e, out, in) in the checkpoint.
    """
    whole = {"": Leaf(("",), transposed)}  # the name in a checkpoint is that of the rule
    ours, theirs = f"layers.{{l}}.{ours}", f"layers.{{l}}.{theirs}"
    rules = []
    for leaf, end in {"kernel": "", **({"bias": "_bias"} if biases else {})}.items():
        both = tuple(f"{ours}.{part}.{leaf}" for part in ("gate", "up"))
        rules += [
            KeyRule(
                path,
                f"{theirs}.gate_up_proj{end}",
                whole,
                joined=both,
                packed=True,
                interleaved=interleaved,
            )
            for path in both
        ]
        rules.append(KeyRule(f"{ours}.down.{leaf}", f"{theirs}.down_proj{end}", whole, packed=True))
    return tuple(rules)
