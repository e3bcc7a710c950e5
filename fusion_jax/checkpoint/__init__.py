"""Loads models from Hugging Face checkpoints and artefacts; saves and exports them.

An artefact is a folder with ``model.safetensors`` under this library's own names, the base model's
``config.json`` verbatim, ``fusion.json``, and the tokenizer's files.
"""

from fusion_jax.checkpoint.any_module import load_into as load_into
from fusion_jax.checkpoint.masks import rebase as rebase
from fusion_jax.checkpoint.masks import save_masks as save_masks
from fusion_jax.checkpoint.opening import load as load
from fusion_jax.checkpoint.opening import open_checkpoint as open_checkpoint
from fusion_jax.checkpoint.writing import dtype_name as dtype_name
from fusion_jax.checkpoint.writing import export_hf as export_hf
from fusion_jax.checkpoint.writing import save as save
