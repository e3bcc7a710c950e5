"""Matrix product operators: a matrix as a chain of small tensors, and products with it.

A matrix of d = i_1 ... i_m rows and o = j_1 ... j_m columns is the product of cores T_k of shape
(b_{k-1}, i_k, j_k, b_k), summed over the bonds b_1 to b_{m-1}; b_0 = b_m = 1.
"""

from fusion_jax.mpo.bounds import check_bound as check_bound
from fusion_jax.mpo.bounds import excess as excess
from fusion_jax.mpo.cores import TensorTrain as TensorTrain
from fusion_jax.mpo.cores import decompose as decompose
from fusion_jax.mpo.cores import entropies as entropies
from fusion_jax.mpo.cores import recompressed as recompressed
from fusion_jax.mpo.cores import spectra_of as spectra_of
from fusion_jax.mpo.layouts import Layout as Layout
from fusion_jax.mpo.layouts import balanced as balanced
from fusion_jax.mpo.layouts import chain as chain
from fusion_jax.mpo.layouts import full_bonds as full_bonds
from fusion_jax.mpo.layouts import layout_of as layout_of
from fusion_jax.mpo.layouts import within_share as within_share
from fusion_jax.mpo.modules import AnyEmbed as AnyEmbed
from fusion_jax.mpo.modules import Mpo as Mpo
from fusion_jax.mpo.modules import MpoEmbed as MpoEmbed
from fusion_jax.mpo.products import WRITE as WRITE
from fusion_jax.mpo.products import ContractionPlan as ContractionPlan
from fusion_jax.mpo.products import contract as contract
from fusion_jax.mpo.products import looks_up as looks_up
from fusion_jax.mpo.products import plan as plan
from fusion_jax.mpo.products import product as product
from fusion_jax.mpo.products import rebuilding as rebuilding
from fusion_jax.mpo.products import rows as rows
