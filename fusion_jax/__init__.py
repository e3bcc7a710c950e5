"""Make a pre-trained language model smaller in one shot; it fine-tunes like the original."""

__version__ = "0.1.0"

from fusion_jax.checkpoint import export_hf as export_hf
from fusion_jax.checkpoint import load as load
from fusion_jax.checkpoint import save as save
from fusion_jax.compress import Site as Site
from fusion_jax.compress import compress as compress
from fusion_jax.compress import compress_mlp as compress_mlp
from fusion_jax.compress import sites as sites
from fusion_jax.errors import InputError as InputError
from fusion_jax.kmeans import KMeansResult as KMeansResult
from fusion_jax.kmeans import kmeans as kmeans
from fusion_jax.methods import METHODS as METHODS
from fusion_jax.methods import Fusion as Fusion
from fusion_jax.mlp import Frozen as Frozen
from fusion_jax.mlp import FusedGatedMlp as FusedGatedMlp
from fusion_jax.mlp import FusedMlp as FusedMlp
from fusion_jax.mlp import GatedMlp as GatedMlp
from fusion_jax.mlp import Mlp as Mlp
from fusion_jax.mlp import SubMLPs as SubMLPs
from fusion_jax.report import Report as Report
