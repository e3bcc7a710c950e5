"""What a smaller model may cost, and what the units of its MLPs cost: numbers, memory, time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fusion_jax.errors import InputError, check_at_least
from fusion_jax.nn.mlp import AnyMlp, GatedMlp, Mlp
from fusion_jax.nn.site import sites
from fusion_jax.progress import show_progress
from fusion_jax.report import num_params

SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
"""The shares of the original width at which an MLP is timed."""
REPEATS = 10


class UnitCost(NamedTuple):
    """What one hidden unit of a site costs; of all experts together, if the site has experts.

    Args:
        params: Parameters.
        bytes: Bytes of the parameters.
        flops: Operations of matrix products for one token.
        kind: What MLPs with equal times have in common, see `Latency`.
    """

    params: int
    bytes: int
    flops: float
    kind: str

    @classmethod
    def of(cls, mlp: AnyMlp) -> UnitCost:
        """Returns the cost of a unit of an MLP."""
        bias = mlp.out_bias()
        params = (num_params(mlp) - (0 if bias is None else bias.size)) // mlp.width
        return cls(params, params * mlp.dtype.itemsize, mlp.flops / mlp.width, kind_of(mlp))


def kind_of(mlp: AnyMlp) -> str:
    """Returns what an MLP has in common with those that take the same time at the same width."""
    shape = "x".join(map(str, (*mlp.stack, mlp.d_in, mlp.d_out)))
    gate = "gated " if "gate" in mlp.linears() else ""
    return f"{gate}{mlp.act if isinstance(mlp.act, str) else 'function'} {shape} {mlp.dtype}"


@dataclass(frozen=True, kw_only=True)
class Latency:
    """The time of MLPs on a device, at a few widths; between them it is interpolated.

    Args:
        device: The device.
        tokens: The number of tokens that an MLP gets at once.
        seconds: (width, seconds) at rising widths, by the kind of the MLP, see `kind_of`.
    """

    device: str
    tokens: int
    seconds: Mapping[str, Sequence[tuple[int, float]]]

    def at(self, kind: str, widths: np.ndarray) -> np.ndarray:
        """Returns the seconds of an MLP at some widths.

        Raises:
            InputError: No MLP of this kind was timed.
        """
        if kind not in self.seconds:
            known = ", ".join(self.seconds)
            raise InputError(
                f"the latency table has no MLP {kind}, but {known}; measure this model"
            )
        tried, seconds = zip(*self.seconds[kind], strict=True)
        return np.interp(widths, tried, np.maximum.accumulate(seconds))

    def to_json(self) -> dict[str, Any]:
        """Returns the table as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Latency:
        """Returns the table of JSON values.

        Raises:
            InputError: They are not a table.
        """
        try:
            seconds = {
                str(kind): [(int(w), float(s)) for w, s in rows]
                for kind, rows in fields["seconds"].items()
            }
            made = cls(device=str(fields["device"]), tokens=int(fields["tokens"]), seconds=seconds)
            assert all(rows == sorted(rows) and rows for rows in seconds.values())
        except (LookupError, TypeError, ValueError, AttributeError, AssertionError):
            raise InputError("this is not a table of latencies") from None
        return made


def measure_latency(
    model: nnx.Module, *, tokens: int = 512, progress: bool | None = None
) -> Latency:
    """Measures how long the MLPs of a model take on this device, at a few widths.

    MLPs of the same shape are timed once, with random inputs: the shortest of some runs.

    Args:
        model: The model.
        tokens: The number of tokens that an MLP gets at once: 1 for generating text, more for
            reading it.
        progress: As for `compress`.

    Returns:
        The table.

    Example:
        >>> mlp = Mlp(4, 16, act="relu", rngs=nnx.Rngs(0))
        >>> table = measure_latency(mlp, tokens=8)
        >>> [width for width, _ in table.seconds["relu 4x4 float32"]]
        [2, 4, 8, 12, 16]
    """
    check_at_least(1, tokens=tokens)
    found: dict[str, AnyMlp] = {}
    for site in sites(model):
        found.setdefault(kind_of(site.mlp), site.mlp)
    table: dict[str, list[tuple[int, float]]] = {}
    with show_progress(
        "Timing MLPs", len(found) * len(SHARES), progress, first="compiling"
    ) as advance:
        for kind, mlp in found.items():
            widths = sorted({max(1, round(share * mlp.width)) for share in SHARES})
            table[kind] = []
            for width in widths:
                table[kind].append((width, _seconds(mlp, width, tokens)))
                advance(f"{kind} at {width}")
    device = jax.devices()[0]
    return Latency(device=device.device_kind, tokens=tokens, seconds=table)


def _seconds(mlp: AnyMlp, width: int, tokens: int) -> float:
    """Returns the time of an MLP of one width; experts share the tokens evenly."""
    plain = mlp.plain()
    abstract = plain.abstract(GatedMlp if isinstance(plain, GatedMlp) else Mlp, width)
    graph, state = nnx.split(abstract)
    draw = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: jnp.asarray(draw.standard_normal(x.shape, np.float32) * 0.02, x.dtype), state
    )
    rows = tokens if not mlp.stack else -(-tokens * plain.top_k // mlp.stack[0])
    x = jnp.asarray(draw.standard_normal((*mlp.stack, rows, mlp.d_in), np.float32), mlp.dtype)
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    jax.block_until_ready(run(state, x))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run(state, x))
        times.append(time.perf_counter() - start)
    return min(times)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a smaller model may cost: one of these limits.

    A float up to 1 is a fraction of the original.

    Args:
        width: Hidden units of the chosen MLPs together.
        params: Parameters of the whole model.
        megabytes: Megabytes (1e6 bytes) of the parameters of the whole model.
        flops: Operations of the matrix products of all MLPs for one token.
        latency: The time of the chosen MLPs, as a fraction of the original's.
        table: The times, from `measure_latency`; needed with ``latency``.

    Example:
        >>> Budget(megabytes=300).limit
        ('megabytes', 300)
    """

    width: int | float | None = None
    params: int | float | None = None
    megabytes: int | float | None = None
    flops: int | float | None = None
    latency: float | None = None
    table: Latency | None = field(default=None, repr=False)

    def __post_init__(self):
        given = self._given()
        if len(given) != 1:
            raise InputError(
                "a budget is one of width, params, megabytes, flops and latency; got "
                f"{' and '.join(given) or 'none'}"
            )
        name, value = self.limit
        if not value > 0 or not np.isfinite(value) or isinstance(value, bool):
            raise InputError(f"a budget of {name} must be above 0; got {value}")
        if name == "latency" and (not value <= 1 or self.table is None):
            raise InputError(
                "a budget of latency is a fraction in (0, 1], with a table from measure_latency"
            )

    def _given(self) -> dict[str, int | float]:
        names = ("width", "params", "megabytes", "flops", "latency")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def limit(self) -> tuple[str, int | float]:
        """What is limited, and the limit."""
        return next(iter(self._given().items()))

    def costs(self, unit: UnitCost, widths: np.ndarray) -> np.ndarray:
        """Returns what the units of a site cost at some widths, in what is limited."""
        name, _ = self.limit
        if name == "latency":
            assert self.table is not None
            return self.table.at(unit.kind, widths)
        of_one = {
            "width": 1,
            "params": unit.params,
            "megabytes": unit.bytes / 1e6,
            "flops": unit.flops,
        }
        return of_one[name] * widths
