"""Certified bounds on what fusing an MLP does to its outputs and its neural tangent kernels."""

from ntk.bounds.certificates import Certificate as Certificate
from ntk.bounds.certificates import certify as certify
from ntk.bounds.changes import Change as Change
from ntk.bounds.changes import Sketch as Sketch
from ntk.bounds.changes import fit_sketch as fit_sketch
from ntk.bounds.changes import kernel_change as kernel_change
from ntk.bounds.changes import output_change as output_change
from ntk.bounds.changes import uniform_bound as uniform_bound
from ntk.bounds.pairs import Pair as Pair
from ntk.bounds.pairs import pair as pair
