"""Make a pre-trained language model smaller in one shot; it fine-tunes like the original."""

__version__ = "0.1.0"

from fusion_jax.allocation import allocate as allocate
from fusion_jax.calibration import calibrate as calibrate
from fusion_jax.checkpoint import export_hf as export_hf
from fusion_jax.checkpoint import load as load
from fusion_jax.checkpoint import save as save
from fusion_jax.compress import compress as compress
from fusion_jax.compress import compress_mlp as compress_mlp
from fusion_jax.errors import InputError as InputError
from fusion_jax.finetune import TrainConfig as TrainConfig
from fusion_jax.finetune import finetune as finetune
from fusion_jax.finetune import finetune_language as finetune_language
from fusion_jax.finetune import finetune_pairs as finetune_pairs
from fusion_jax.finetune import generate_texts as generate_texts
from fusion_jax.finetune import load_pairs as load_pairs
from fusion_jax.finetune import load_task as load_task
from fusion_jax.finetune import mean_gradients as mean_gradients
from fusion_jax.finetune import measure_texts as measure_texts
from fusion_jax.finetune import read_pairs as read_pairs
from fusion_jax.finetune import read_task as read_task
from fusion_jax.finetune import tune as tune
from fusion_jax.generate import Beams as Beams
from fusion_jax.generate import Sampling as Sampling
from fusion_jax.generate import generate as generate
from fusion_jax.geometry import Calibration as Calibration
from fusion_jax.kmeans import KMeansResult as KMeansResult
from fusion_jax.kmeans import kmeans as kmeans
from fusion_jax.matrices import compress_matrices as compress_matrices
from fusion_jax.methods import METHODS as METHODS
from fusion_jax.methods import MPO as MPO
from fusion_jax.methods import Fusion as Fusion
from fusion_jax.methods import MaskPrune as MaskPrune
from fusion_jax.methods import Svd as Svd
from fusion_jax.mlp import Frozen as Frozen
from fusion_jax.mlp import FusedGatedMlp as FusedGatedMlp
from fusion_jax.mlp import FusedMlp as FusedMlp
from fusion_jax.mlp import GatedMlp as GatedMlp
from fusion_jax.mlp import Mlp as Mlp
from fusion_jax.mlp import experts as experts
from fusion_jax.report import Report as Report
from fusion_jax.sites import Site as Site
from fusion_jax.sites import plain as plain
from fusion_jax.sites import sites as sites
from fusion_jax.submlps import SubMLPs as SubMLPs
