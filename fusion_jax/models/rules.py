"""Two-way rules between the parameter names of this library and of Hugging Face checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Leaf(NamedTuple):
    """The name and layout of one variable of a layer in a checkpoint.

    Args:
        names: The name that is written, and further names that are read.
        transposed: Whether the matrix is (out, in) in the checkpoint.
    """

    names: tuple[str, ...]
    transposed: bool = False


LINEAR = {"kernel": Leaf(("weight",), transposed=True), "bias": Leaf(("bias",))}
"""`nnx.Linear` as torch's Linear."""

CONV1D = {"kernel": Leaf(("weight",)), "bias": Leaf(("bias",))}
"""`nnx.Linear` as GPT-2's Conv1D, whose matrices are (in, out) as well."""

NORM = {"scale": Leaf(("weight", "gamma")), "bias": Leaf(("bias", "beta"))}
"""`nnx.LayerNorm`; old checkpoints have the names gamma and beta, from TensorFlow."""

EMBED = {"embedding": Leaf(("weight",))}
"""`nnx.Embed`."""


@dataclass(frozen=True)
class KeyRule:
    """The name of a layer in a checkpoint.

    Args:
        ours: The path of the layer in the model, with a placeholder such as ``{l}`` for each index.
        theirs: The name of the layer in the checkpoint, with the same placeholders. An additional
            ``{e}`` stands for the number of an expert: a checkpoint has one tensor for each expert,
            an array of the model holds all experts along axis 0.
        leaves: The variables of the layer. The key ``""`` means that ``ours`` is a variable, not a
            layer.
        in_base: Whether the layer belongs to the base model, whose names may have a prefix.
        joined: The paths of linear layers that are one layer in a checkpoint, in the order of their
            outputs; ``ours`` is one of them.
        groups: The number of groups of such a layer's outputs. Each group has a part of the outputs
            of every layer that is joined.
        packed: Whether one tensor of the checkpoint has all experts along axis 0, as ours has.
        interleaved: Whether the outputs of joined layers take turns in the checkpoint.
    """

    ours: str
    theirs: str
    leaves: dict[str, Leaf]
    in_base: bool = True
    joined: tuple[str, ...] = ()
    groups: int = 1
    packed: bool = False
    interleaved: bool = False


class TensorLocation(NamedTuple):
    """Where one variable of the model is in a checkpoint.

    Args:
        names: The possible names, the one to write first.
        transposed: Whether the matrix is (out, in) in the checkpoint.
        stacked: Whether there is one tensor for each expert; the names contain ``{e}``.
        joined: The paths of the variables that are one tensor in the checkpoint, one after the
            other along the last axis of ours; empty if the variable has a tensor of its own.
        groups: The number of groups of the outputs of such a tensor, see `KeyRule`.
        packed: Whether the tensor has all experts along axis 0; only the other axes are transposed.
        interleaved: Whether joined variables take turns along that axis.
    """

    names: tuple[str, ...]
    transposed: bool
    stacked: bool = False
    joined: tuple[str, ...] = ()
    groups: int = 1
    packed: bool = False
    interleaved: bool = False

    def axes(self, rank: int) -> tuple[int, ...]:
        """Returns which of the axes of our array each axis of a tensor of the checkpoint is."""
        if not self.transposed:
            return tuple(range(rank))
        return (0, *range(rank - 1, 0, -1)) if self.packed else tuple(range(rank)[::-1])

    def tensors(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """Returns the names of the tensors that make up the variable."""
        return [name.format(e=e) for e in range(shape[0])] if self.stacked else [name]


@dataclass(frozen=True)
class KeyRules:
    """The rules of one architecture with one head.

    Args:
        rules: A rule for each kind of layer; a rule matches whole paths. Where several rules match,
            the first says what is written, the others what is read besides.
        prefix: The prefix that checkpoints with a head put before the names of the base model.
            Names are read with and without it.
        write_prefix: Whether the prefix is written.
        ignored: Regular expressions for whole names of tensors that the model does not need:
            buffers, tied copies, and heads that were not asked for.
        twins: The names of tied copies, with the path of the variable that each is a copy of. A
            copy stands in for a variable that a checkpoint lacks.
        decisive: The twins that are used, instead of the variable, where both are there and differ.
        copies: The twins that are written as well, by the path of the variable.
        other_prefixes: Further prefixes with which the names of the base model are read.
    """

    rules: Sequence[KeyRule]
    prefix: str
    write_prefix: bool
    ignored: Sequence[str]
    twins: Mapping[str, str] = field(default_factory=dict)
    decisive: Sequence[str] = ()
    copies: Mapping[str, Sequence[str]] = field(default_factory=dict)
    other_prefixes: Sequence[str] = ()

    def locate(self, path: str) -> TensorLocation:
        """Returns where a variable, such as ``"layers.3.mlp.up.kernel"``, is in a checkpoint.

        Raises:
            KeyError: No rule matches: a mistake in the architecture's file.

        Example:
            >>> rule = KeyRule("layers.{l}.up", "encoder.layer.{l}.dense", LINEAR)
            >>> KeyRules([rule], "bert.", True, []).locate("layers.3.up.kernel").names[0]
            'bert.encoder.layer.3.dense.weight'
        """
        for location in self.locations(path):
            return location
        raise KeyError(f"no key rule matches {path}")

    def locations(self, path: str) -> Iterator[TensorLocation]:
        """Yields where a variable can be in a checkpoint, beginning with where it is written."""
        for rule in self.rules:
            for name, leaf in rule.leaves.items():
                ours = f"{rule.ours}.{name}" if name else rule.ours
                pattern = re.escape(ours).replace(r"\{", "(?P<").replace(r"\}", r">\d+)")
                match = re.fullmatch(pattern, path)
                if match is None:
                    continue
                indices = {"e": "{e}", **match.groupdict()}
                base = rule.theirs.format(**indices)
                stacked = "{e}" in base
                full = [f"{base}.{n}" if name else base for n in leaf.names]
                if rule.in_base:
                    prefixed = [self.prefix + n for n in full]
                    others = [p + n for p in self.other_prefixes for n in full]
                    full = prefixed + full if self.write_prefix else full + prefixed
                    full += others
                full += [twin for twin, original in self.twins.items() if original == path]
                end = f".{name}" if name else ""
                joined = tuple(other.format(**indices) + end for other in rule.joined)
                names = tuple(dict.fromkeys(full))
                yield TensorLocation(
                    names,
                    leaf.transposed,
                    stacked,
                    joined,
                    rule.groups,
                    rule.packed,
                    rule.interleaved,
                )

    def ignores(self, name: str) -> bool:
        """Returns whether the model does not need a tensor of a checkpoint."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)
