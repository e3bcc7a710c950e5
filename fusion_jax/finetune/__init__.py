"""Fine-tuning and layer-wise tuning of models, compressed or not."""

from fusion_jax.finetune.classify import finetune as finetune
from fusion_jax.finetune.classify import measure as measure
from fusion_jax.finetune.classify import predict as predict
from fusion_jax.finetune.config import TrainConfig as TrainConfig
from fusion_jax.finetune.language import Windows as Windows
from fusion_jax.finetune.language import finetune_language as finetune_language
from fusion_jax.finetune.language import nats_per_token as nats_per_token
from fusion_jax.finetune.tasks import GLUE as GLUE
from fusion_jax.finetune.tasks import Task as Task
from fusion_jax.finetune.tasks import TaskData as TaskData
from fusion_jax.finetune.tasks import Texts as Texts
from fusion_jax.finetune.tasks import load_task as load_task
from fusion_jax.finetune.tasks import read_task as read_task
from fusion_jax.finetune.trainer import Fit as Fit
from fusion_jax.finetune.trainer import TrainState as TrainState
from fusion_jax.finetune.trainer import fit as fit
from fusion_jax.finetune.tune import tune as tune
