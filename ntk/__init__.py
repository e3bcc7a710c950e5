"""Exact neural tangent kernels of any JAX function and of Flax models."""

from ntk.empirical import kernel as kernel
from ntk.errors import InputError as InputError
from ntk.functional import functional as functional
from ntk.functional import probability as probability
from ntk.functional import token as token
