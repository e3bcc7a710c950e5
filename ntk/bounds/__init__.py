"""Certified bounds on what fusing an MLP does to its outputs and to its neural tangent kernels.

There are three grades of bounds, which differ in the data that they use:

- ``"a priori"``: weights, norms of the inputs, and norms of what the original computes at each of
  them. The fused MLP is never run: if its rows are means of clusters, or units of the original, its
  values follow from the original's (`ntk.bounds.stand_ins`). `uniform_bound` uses no input at all
  and holds for every input of a given norm (`ntk.bounds.a_priori` has the theorems).
- ``"data"``: each input alone is run through both MLPs and reduced to a sketch of a few hundred
  numbers; the change at a pair of inputs is enclosed from two sketches (`ntk.bounds.enclosure`).
- ``"measured"``: the change itself, from both kernels.

All of them hold for the smaller MLP *as it is*, with any factors, and whether or not its rows are
means of clusters. If its kernel is near the original's, data-grade bounds are small. A priori
bounds grow with the distance of its rows from means and from units of the original, and those for
all inputs also if the factors do not make its kernel that of the wide copy (`ntk.bounds.norms`).

All bounds hold for the exact change, that of real numbers: they include their own rounding
(`ntk.bounds.balls`). In float32 this is at worst a few percent of |phi| |psi|, so that small
changes are better bounded in float64 (``jax_enable_x64``). A measured kernel has errors as well;
the grade ``"measured"`` says how large they can be.
"""

from ntk.bounds.certificates import Certificate as Certificate
from ntk.bounds.certificates import certify as certify
from ntk.bounds.changes import Change as Change
from ntk.bounds.changes import Sketch as Sketch
from ntk.bounds.changes import fit_sketch as fit_sketch
from ntk.bounds.changes import kernel_change as kernel_change
from ntk.bounds.changes import uniform_bound as uniform_bound
from ntk.bounds.norms import WeightNorms as WeightNorms
from ntk.bounds.norms import weight_norms as weight_norms
from ntk.bounds.outputs import output_change as output_change
from ntk.bounds.pairs import Pair as Pair
from ntk.bounds.pairs import pair as pair
