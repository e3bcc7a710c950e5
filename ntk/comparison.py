"""Compares two kernels: how far they are apart, and what that means for training.

Everything is computed in float64 on the host, whatever the kernels' dtype. A kernel with outputs,
(n, n, o, o), is treated as one matrix (n o, n o).

Adam's kernel <g(x), sign g(z)> is not symmetric. Norms, singular values and the cosine of two Adam
kernels are defined; eigenvalues may be complex and are not computed. Its linearized dynamics are
known only for steps on one example at a time, where the sign of the loss's gradient is the sign of
the residual times that of g(z) (Malladi et al., 2023, A Kernel-Based View of Language Model
Fine-Tuning, section 3). These dynamics are predicted for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from ntk.arrays import host_float64
from ntk.errors import InputError, check_at_least
from ntk.tables import table

Dynamics = Literal["gradient flow", "gradient descent", "sign descent"]

_ASYMMETRIC = 1e-3
"""A kernel that is further from symmetric than this, relative to its norm, is not symmetric."""


@dataclass(frozen=True, kw_only=True)
class TrainingPrediction:
    """The linearized training on the same targets that each of two kernels predicts.

    Args:
        dynamics: ``"gradient flow"`` or ``"gradient descent"`` of half the sum of squared
            residuals, or ``"sign descent"`` on one example after another.
        times: (t,) times; for descent, the number of steps times the learning rate.
        outputs: (2, t, n) or (2, t, n, o), the outputs at the kernels' examples, by kernel.
        losses: (2, t) sums of squared residuals, relative to the start.
        apart: (t,) distance of the two outputs, relative to the residual at the start.
    """

    dynamics: Dynamics
    times: Float[np.ndarray, " t"]
    outputs: Float[np.ndarray, "2 t *n"]
    losses: Float[np.ndarray, "2 t"]
    apart: Float[np.ndarray, " t"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The difference of a kernel K2 from a kernel K; ``str()`` is a table.

    Args:
        frobenius: ``|K - K2|_F / |K|_F``.
        spectral: ``|K - K2|_2 / |K|_2``.
        alignment: Cosine of the centered kernels; for symmetric kernels, CKA, from 0 to 1.
        symmetric: Whether both kernels are symmetric up to rounding.
        spectra: (2, n o) eigenvalues, or singular values of kernels that are not symmetric, in
            falling order.
        effective_ranks: exp of the entropy of each spectrum as a distribution, 1 to n o.
        training: The training that each kernel predicts, or None without targets.

    References:
        Cortes, Mohri and Rostamizadeh (2012), Kornblith et al. (2019) for the alignment; Roy and
        Vetterli (2007) for the effective rank.
    """

    frobenius: float
    spectral: float
    alignment: float
    symmetric: bool
    spectra: Float[np.ndarray, "2 n"] = field(repr=False)
    effective_ranks: tuple[float, float]
    training: TrainingPrediction | None

    def __str__(self) -> str:
        kind = "eigenvalue" if self.symmetric else "singular value"
        rows = [["", "first", "second", "difference"]]
        for i in range(min(3, self.spectra.shape[1])):
            a, b = self.spectra[:, i]
            rows.append([f"{kind} {i + 1}", f"{a:.4g}", f"{b:.4g}", _percent(b - a, a)])
        a, b = self.effective_ranks
        rows.append(["effective rank", f"{a:.2f}", f"{b:.2f}", _percent(b - a, a)])
        rows.append(["Frobenius norm", "", "", f"{100 * self.frobenius:.2f} %"])
        rows.append(["spectral norm", "", "", f"{100 * self.spectral:.2f} %"])
        rows.append(["centered alignment", "", "", f"{self.alignment:.4f}"])
        text = table(rows)
        if self.training is None:
            return text
        t = self.training
        steps = np.unique(np.linspace(0, len(t.times) - 1, 6).astype(int))
        rows = [[f"{t.dynamics} to time", "loss, first", "loss, second", "outputs apart"]]
        rows += [
            [f"{t.times[i]:.4g}", *(f"{x:.4f}" for x in t.losses[:, i]), f"{t.apart[i]:.4f}"]
            for i in steps
        ]
        return f"{text}\n\n{table(rows)}"


def compare(
    kernel: npt.ArrayLike,
    kernel2: npt.ArrayLike,
    *,
    targets: npt.ArrayLike | None = None,
    outputs: npt.ArrayLike | None = None,
    times: npt.ArrayLike | None = None,
    learning_rate: float | None = None,
    steps: int | None = None,
) -> Comparison:
    """Returns the difference of two kernels of the same examples.

    Args:
        kernel: K, (n, n) or (n, n, o, o), the kernel to compare with.
        kernel2: K2, of the same shape.
        targets: (n,) or (n, o), targets of a training to predict; None for no prediction.
        outputs: The outputs of the model before training, shaped like the targets; None for zeros.
        times: (t,) times for gradient flow; None for 33 times from 0.1 to 1,000, divided by the
            largest eigenvalue of K.
        learning_rate: For symmetric kernels, replaces gradient flow by gradient descent; for
            others, the learning rate of sign descent, with None for steps of a twentieth of a
            typical residual.
        steps: The number of steps; None for 100, or 10 n for sign descent.

    Raises:
        InputError: Shapes do not fit, a value is not finite, an option does not belong to the
            dynamics, or targets are given for a symmetric kernel with negative eigenvalues or for
            a kernel with outputs that is not symmetric.

    Example:
        >>> k = np.array([[2.0, 1.0], [1.0, 2.0]])
        >>> result = compare(k, 1.1 * k, targets=[1.0, -1.0], times=[0.0, 1.0])
        >>> round(result.frobenius, 3), round(result.alignment, 3)
        (0.1, 1.0)
        >>> print(result)
                            first  second  difference
        ------------------  -----  ------  ----------
        eigenvalue 1            3     3.3    +10.00 %
        eigenvalue 2            1     1.1    +10.00 %
        effective rank       1.75    1.75     +0.00 %
        Frobenius norm                        10.00 %
        spectral norm                         10.00 %
        centered alignment                     1.0000
        <BLANKLINE>
        gradient flow to time  loss, first  loss, second  outputs apart
        ---------------------  -----------  ------------  -------------
        0                           1.0000        1.0000         0.0000
        1                           0.1353        0.1108         0.0350
    """
    k, n, o = _matrix("kernel", kernel)
    k2, *shape2 = _matrix("kernel2", kernel2)
    if [n, o] != shape2:
        raise InputError(f"kernels of shapes {np.shape(kernel)} and {np.shape(kernel2)}")
    norm = np.linalg.norm(k)
    if norm == 0:
        raise InputError("kernel is zero")
    symmetric = all(np.linalg.norm(a - a.T) <= _ASYMMETRIC * np.linalg.norm(a) for a in (k, k2))
    if symmetric:
        k, k2 = (k + k.T) / 2, (k2 + k2.T) / 2
        spectra = np.stack([np.linalg.eigvalsh(a)[::-1] for a in (k, k2)])
    else:
        spectra = np.stack([np.linalg.svd(a, compute_uv=False) for a in (k, k2)])
    centered = [_centered(a, n, o) for a in (k, k2)]
    sizes = [float(np.linalg.norm(a)) for a in centered]
    inner = float((centered[0] * centered[1]).sum())
    training = None
    if targets is not None:
        training = _training(
            (k, k2), symmetric, n, o, targets, outputs, times, learning_rate, steps
        )
    elif any(a is not None for a in (outputs, times, learning_rate, steps)):
        raise InputError("outputs, times, learning_rate and steps need targets")
    return Comparison(
        frobenius=float(np.linalg.norm(k - k2) / norm),
        spectral=float(np.linalg.norm(k - k2, 2) / np.linalg.norm(k, 2)),
        alignment=inner / (sizes[0] * sizes[1]) if min(sizes) > 0 else float("nan"),
        symmetric=symmetric,
        spectra=spectra,
        effective_ranks=(_effective_rank(spectra[0]), _effective_rank(spectra[1])),
        training=training,
    )


def apart_bound(change: float, times: npt.ArrayLike) -> Float[np.ndarray, " t"]:
    """Returns bounds on the distance of the outputs of two kernels in gradient flow.

    Args:
        change: A bound on ``|K - K2|_2``, such as ``ntk.bounds.Change.spectral``.
        times: (t,) times.

    Returns:
        Bounds on `TrainingPrediction.apart` for gradient flow, and for gradient descent with a
        learning rate of at most one over the largest eigenvalue of both kernels.

    Proof: The residuals are A_t r with A_t = exp(-K t), or (1 - a K)^(t / a). exp(-K t) -
    exp(-K2 t) is the integral over s in [0, t] of exp(-K s) (K2 - K) exp(-K2 (t - s)), where both
    exponentials have norms of at most 1, as kernels are positive semi-definite; with steps it is a
    telescoping sum of the same form. It cannot exceed 1 either, as both A_t are between 0 and 1.

    Example:
        >>> apart_bound(0.1, [0.0, 1.0, 100.0]).tolist()
        [0.0, 0.1, 1.0]
    """
    return np.minimum(change * np.asarray(times, np.float64), 1.0)


def _matrix(name: str, kernel: npt.ArrayLike) -> tuple[np.ndarray, int, int]:
    """Returns a kernel as a matrix (n o, n o), and n and o."""
    k = host_float64(kernel)
    square = k.ndim in (2, 4) and k.shape[0] == k.shape[1] and k.shape[2:3] == k.shape[3:4]
    if not square or 0 in k.shape:
        raise InputError(f"{name} must be (n, n) or (n, n, o, o), not empty; got {k.shape}")
    if not np.isfinite(k).all():
        raise InputError(f"{name} holds NaN or infinite values")
    n, o = k.shape[0], 1 if k.ndim == 2 else k.shape[2]
    return (k if k.ndim == 2 else k.transpose(0, 2, 1, 3).reshape(n * o, n * o)), n, o


def _centered(k: np.ndarray, n: int, o: int) -> np.ndarray:
    """Returns the kernel of features minus their mean over examples, output by output."""
    k = k.reshape(n, o, n, o)
    k = k - k.mean(0, keepdims=True)
    return (k - k.mean(2, keepdims=True)).reshape(n * o, n * o)


def _effective_rank(spectrum: np.ndarray) -> float:
    p = np.clip(spectrum, 0, None)
    if p.sum() == 0:
        return 0.0
    p = p[p > 0] / p.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def _percent(change: float, of: float) -> str:
    return f"{100 * change / of:+.2f} %" if of else "-"


def _training(
    kernels: tuple[np.ndarray, np.ndarray],
    symmetric: bool,
    n: int,
    o: int,
    targets: npt.ArrayLike,
    outputs: npt.ArrayLike | None,
    times: npt.ArrayLike | None,
    learning_rate: float | None,
    steps: int | None,
) -> TrainingPrediction:
    y = host_float64(targets)
    residual = (y - _start(y, outputs, n, o)).ravel()
    if not residual.any():
        raise InputError("the outputs are the targets already: there is nothing to train")
    if learning_rate is not None and not (np.isfinite(learning_rate) and learning_rate > 0):
        raise InputError(f"learning_rate must be positive; got {learning_rate}")
    check_at_least(1, steps=steps)
    if symmetric and learning_rate is None:
        if steps is not None:
            raise InputError("steps need a learning_rate; gradient flow has times")
        dynamics: Dynamics = "gradient flow"
        top = np.linalg.norm(kernels[0], 2)
        t = np.logspace(-1, 3, 33) / top if times is None else np.asarray(times, np.float64)
        if t.ndim != 1 or t.size == 0 or not np.isfinite(t).all() or (t < 0).any():
            raise InputError("times must be (t,), finite and not negative")
        left = np.stack([_flow(k, residual, t) for k in kernels])
    else:
        if times is not None:
            raise InputError("times are for gradient flow; steps have a learning_rate")
        if symmetric:
            assert learning_rate is not None
            dynamics, steps = "gradient descent", steps or 100
            left = np.stack([_descent(k, residual, learning_rate, steps) for k in kernels])
        else:
            if o != 1:
                raise InputError(
                    "the training of a kernel that is not symmetric is defined for one output"
                )
            dynamics, steps = "sign descent", steps or 10 * n
            typical = np.abs(np.diagonal(kernels[0])).mean()
            if learning_rate is None:
                learning_rate = float(np.abs(residual).mean() / (20 * typical or 1.0))
            left = np.stack([_sign_descent(k, residual, learning_rate, steps) for k in kernels])
        t = np.arange(steps + 1) * learning_rate
    size = np.linalg.norm(residual)
    return TrainingPrediction(
        dynamics=dynamics,
        times=t,
        outputs=(y.ravel() - left).reshape(2, len(t), *y.shape),
        losses=np.square(left).sum(-1) / size**2,
        apart=np.linalg.norm(left[0] - left[1], axis=-1) / size,
    )


def _start(targets: np.ndarray, outputs: npt.ArrayLike | None, n: int, o: int) -> np.ndarray:
    """Returns the outputs before training, after checking that they and the targets fit."""
    start = np.zeros_like(targets) if outputs is None else host_float64(outputs)
    shapes = [(n,), (n, 1)] if o == 1 else [(n, o)]
    for name, a in (("targets", targets), ("outputs", start)):
        if a.shape not in shapes or a.shape != targets.shape:
            raise InputError(f"{name} must be {' or '.join(map(str, shapes))}; got {a.shape}")
        if not np.isfinite(a).all():
            raise InputError(f"{name} hold NaN or infinite values")
    return start


def _modes(k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, vectors = np.linalg.eigh(k)
    if values[0] < -_ASYMMETRIC * values[-1]:
        raise InputError(f"a kernel has a negative eigenvalue, {values[0]:.3g}: training diverges")
    return np.clip(values, 0, None), vectors


def _flow(k: np.ndarray, residual: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Returns residuals (t, n) of gradient flow, exp(-K t) r."""
    values, vectors = _modes(k)
    return (np.exp(-np.outer(times, values)) * (vectors.T @ residual)) @ vectors.T


def _descent(k: np.ndarray, residual: np.ndarray, rate: float, steps: int) -> np.ndarray:
    """Returns residuals (steps + 1, n) of gradient descent, (1 - a K)^s r."""
    values, vectors = _modes(k)
    if rate * values[-1] > 2:
        raise InputError(
            f"gradient descent diverges: learning_rate {rate:.3g} is above two over the "
            f"largest eigenvalue, {2 / values[-1]:.3g}"
        )
    factors = (1 - rate * values) ** np.arange(steps + 1)[:, None]
    return (factors * (vectors.T @ residual)) @ vectors.T


def _sign_descent(k: np.ndarray, residual: np.ndarray, rate: float, steps: int) -> np.ndarray:
    """Returns residuals (steps + 1, n) of steps on one example each, r - a K[:, j] sign r_j."""
    result = [residual]
    for step in range(steps):
        j = step % len(residual)
        result.append(result[-1] - rate * k[:, j] * np.sign(result[-1][j]))
    return np.stack(result)
