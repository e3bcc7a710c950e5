"""Two-way rules between our names of parameters and those in Hugging Face checkpoints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Leaf(NamedTuple):
    """How one variable of a layer is called and laid out in a checkpoint.

    Args:
        names: Its name there; further names are accepted when reading.
        transposed: Whether the matrix is (out, in) there.
    """

    names: tuple[str, ...]
    transposed: bool = False


LINEAR = {"kernel": Leaf(("weight",), transposed=True), "bias": Leaf(("bias",))}
"""`nnx.Linear` and torch's Linear."""

CONV1D = {"kernel": Leaf(("weight",)), "bias": Leaf(("bias",))}
"""`nnx.Linear` and GPT-2's Conv1D, whose matrices are (in, out) too."""

NORM = {"scale": Leaf(("weight", "gamma")), "bias": Leaf(("bias", "beta"))}
"""`nnx.LayerNorm`; gamma and beta are names from TensorFlow that old checkpoints still have."""

EMBED = {"embedding": Leaf(("weight",))}
"""`nnx.Embed`."""


@dataclass(frozen=True)
class Rule:
    """Where a layer of ours is in a checkpoint.

    Args:
        ours: Path of the layer, with ``{name}`` for each index.
        theirs: Its name in the checkpoint, with the same placeholders. ``{e}`` besides stands for
            the number of an expert: our arrays have the experts along axis 0, a checkpoint has
            one tensor for each.
        leaves: Its variables. With the key ``""`` the path is that of a variable itself.
        in_base: Whether it belongs to the base model, whose names may have a prefix.
    """

    ours: str
    theirs: str
    leaves: dict[str, Leaf]
    in_base: bool = True


class Source(NamedTuple):
    """Where one variable is in a checkpoint.

    Args:
        names: Names to look for, first the one to write.
        transposed: Whether the matrix is (out, in) there.
        stacked: Whether there is a tensor for each expert; names have ``{e}`` for its number.
    """

    names: tuple[str, ...]
    transposed: bool
    stacked: bool = False

    def tensors(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """The tensors that make up a variable.

        Args:
            name: One of the names.
            shape: The variable's shape.

        Returns:
            Their names: one, or one for each expert.
        """
        return [name.format(e=e) for e in range(shape[0])] if self.stacked else [name]


@dataclass(frozen=True)
class KeyRules:
    """The rules of one architecture with one head.

    Args:
        rules: One per kind of layer; they match whole paths.
        prefix: What checkpoints with a head put before the names of the base model. Read with and
            without.
        write_prefix: Whether it is written.
        ignored: Patterns of whole names that may be in a checkpoint without a place in the model:
            buffers, tied copies, and heads that were not asked for.
    """

    rules: Sequence[Rule]
    prefix: str
    write_prefix: bool
    ignored: Sequence[str]

    def source(self, path: str) -> Source:
        """Where a variable is in a checkpoint.

        Args:
            path: Our path, such as ``"layers.3.mlp.up.kernel"``.

        Returns:
            The names and the layout.

        Raises:
            KeyError: No rule matches; a mistake in the architecture's file.

        Example:
            >>> rule = Rule("layers.{l}.up", "encoder.layer.{l}.dense", LINEAR)
            >>> KeyRules([rule], "bert.", True, []).source("layers.3.up.kernel").names[0]
            'bert.encoder.layer.3.dense.weight'
        """
        for rule in self.rules:
            for name, leaf in rule.leaves.items():
                ours = f"{rule.ours}.{name}" if name else rule.ours
                pattern = re.escape(ours).replace(r"\{", "(?P<").replace(r"\}", r">\d+)")
                match = re.fullmatch(pattern, path)
                if match is None:
                    continue
                base = rule.theirs.format(**{"e": "{e}", **match.groupdict()})
                stacked = "{e}" in base
                full = [f"{base}.{n}" if name else base for n in leaf.names]
                if not rule.in_base:
                    return Source(tuple(full), leaf.transposed, stacked)
                prefixed = [self.prefix + n for n in full]
                both = prefixed + full if self.write_prefix else full + prefixed
                return Source(tuple(dict.fromkeys(both)), leaf.transposed, stacked)
        raise KeyError(f"no key rule matches {path}")

    def ignores(self, name: str) -> bool:
        """Whether a checkpoint's tensor may be left out."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)
