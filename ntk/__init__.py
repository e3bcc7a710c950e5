"""Exact neural tangent kernels of any JAX function and of Flax models."""

from ntk import bounds as bounds
from ntk import mlp as mlp
from ntk.comparison import Comparison as Comparison
from ntk.comparison import TrainingPrediction as TrainingPrediction
from ntk.comparison import apart_bound as apart_bound
from ntk.comparison import compare as compare
from ntk.compiler import avoid_wrong_numbers as _avoid_wrong_numbers
from ntk.empirical import kernel as kernel
from ntk.errors import InputError as InputError
from ntk.functions import functional as functional
from ntk.functions import probability as probability
from ntk.functions import token as token
from ntk.kinds import KernelKind as KernelKind

_avoid_wrong_numbers()
