"""Make a pre-trained language model smaller in one shot; it fine-tunes like the original.

Exact kernels and bounds are in the package `ntk`.
"""

# By purpose, as in the documentation.
# isort: off

__version__ = "0.1.0"

# Load and save
from fusion_jax.checkpoint import load as load
from fusion_jax.checkpoint import save as save
from fusion_jax.checkpoint import load_into as load_into
from fusion_jax.checkpoint import export_hf as export_hf
from fusion_jax.checkpoint.masks import save_masks as save_masks
from fusion_jax.checkpoint.masks import rebase as rebase

# Compress
from fusion_jax.compression.mlps import compress as compress
from fusion_jax.compression.mlps import compress_mlp as compress_mlp
from fusion_jax.streaming.layerwise import compress_files as compress_files
from fusion_jax.compression.matrices import compress_matrices as compress_matrices
from fusion_jax.compression.allocation import allocate as allocate
from fusion_jax.compression.allocation import score_widths as score_widths
from fusion_jax.compression.width_scores import WidthScores as WidthScores
from fusion_jax.compression.budgets import Budget as Budget
from fusion_jax.compression.budgets import measure_latency as measure_latency
from fusion_jax.compression.budgets import Latency as Latency
from fusion_jax.report import Report as Report
from fusion_jax.nn.site import sites as sites
from fusion_jax.nn.site import Site as Site
from fusion_jax.nn.site import plain as plain

# Models of others
from fusion_jax.adoption.adopting import adopt as adopt
from fusion_jax.adoption.adopting import release as release
from fusion_jax.adoption.adopting import adoptions as adoptions
from fusion_jax.adoption.layers import MlpSpec as MlpSpec
from fusion_jax.adoption.linen import from_linen as from_linen

# Methods
from fusion_jax.methods.registry import METHODS as METHODS
from fusion_jax.methods.fusion import Fusion as Fusion
from fusion_jax.methods.clustering import Clustering as Clustering
from fusion_jax.methods.mmd import MMD as MMD
from fusion_jax.methods.sketch import Sketch as Sketch
from fusion_jax.methods.prune import Prune as Prune
from fusion_jax.methods.svd import Svd as Svd
from fusion_jax.methods.mpo import MPO as MPO
from fusion_jax.methods.mask_prune import MaskPrune as MaskPrune
from fusion_jax.methods.drop_experts import DropExperts as DropExperts

# Calibrate
from fusion_jax.calibration.calibrator import calibrate as calibrate
from fusion_jax.calibration.data import Calibration as Calibration

# Train
from fusion_jax.training import finetune as finetune
from fusion_jax.training import TrainConfig as TrainConfig
from fusion_jax.training import Recipe as Recipe
from fusion_jax.training import tune as tune
from fusion_jax.training import heal as heal
from fusion_jax.training import Healing as Healing
from fusion_jax.training import store_logits as store_logits
from fusion_jax.training import load_task as load_task
from fusion_jax.training import read_task as read_task
from fusion_jax.training import load_pairs as load_pairs
from fusion_jax.training import read_pairs as read_pairs
from fusion_jax.training import PlainText as PlainText
from fusion_jax.training import TokenClassification as TokenClassification
from fusion_jax.training import read_tagged_words as read_tagged_words
from fusion_jax.training import QuestionAnswering as QuestionAnswering
from fusion_jax.training import read_questions as read_questions
from fusion_jax.training import Arrays as Arrays
from fusion_jax.training import ArrayClassification as ArrayClassification
from fusion_jax.training import static_prune as static_prune
from fusion_jax.training import StaticPruning as StaticPruning
from fusion_jax.training import LABEL_WORDS as LABEL_WORDS
from fusion_jax.training import mean_gradients as mean_gradients

# Generate and measure
from fusion_jax.models.decoding import generate as generate
from fusion_jax.models.decoding import Sampling as Sampling
from fusion_jax.models.decoding import Beams as Beams
from fusion_jax.training import generate_texts as generate_texts
from fusion_jax.training import measure_texts as measure_texts

# MLPs as modules and as rows
from fusion_jax.nn.mlp import Mlp as Mlp
from fusion_jax.nn.mlp import GatedMlp as GatedMlp
from fusion_jax.nn.mlp import experts as experts
from fusion_jax.nn.fused import FusedMlp as FusedMlp
from fusion_jax.nn.fused import FusedGatedMlp as FusedGatedMlp
from fusion_jax.nn.linear_forms import Frozen as Frozen
from fusion_jax.nn.submlps import SubMLPs as SubMLPs

# Cluster
from fusion_jax.clustering.engine import kmeans as kmeans
from fusion_jax.clustering.engine import KMeansResult as KMeansResult

# Errors
from fusion_jax.errors import InputError as InputError
