"""Fine-tuning and layer-wise tuning of models, compressed or not."""
# ruff: noqa: I001 - grouped by purpose

# Train
from fusion_jax.training.engine import losses as losses
from fusion_jax.training.engine.config import TrainConfig as TrainConfig
from fusion_jax.training.engine.growth import Growth as Growth
from fusion_jax.training.engine.optimizer import Multipliers as Multipliers
from fusion_jax.training.engine.partition import Trains as Trains
from fusion_jax.training.engine.recipe import Recipe as Recipe
from fusion_jax.training.engine.step import TrainState as TrainState
from fusion_jax.training.engine.step import VariableUpdate as VariableUpdate
from fusion_jax.training.engine.trainer import Fit as Fit
from fusion_jax.training.engine.trainer import fit as fit
from fusion_jax.training.methods.finetuning import finetune as finetune
from fusion_jax.training.methods.healing import Healing as Healing
from fusion_jax.training.methods.healing import heal as heal
from fusion_jax.training.methods.healing import heal_config as heal_config
from fusion_jax.training.methods.layerwise import tune as tune
from fusion_jax.training.methods.many import fit_many as fit_many
from fusion_jax.training.methods.many import tune_many as tune_many
from fusion_jax.training.methods.stored_logits import store_logits as store_logits

# Tasks
from fusion_jax.training.engine.arrays import Arrays as Arrays
from fusion_jax.training.engine.batches import Batches as Batches
from fusion_jax.training.engine.batches import BatchSource as BatchSource
from fusion_jax.training.engine.batches import Examples as Examples
from fusion_jax.training.tasks.array_classification import (
    ArrayClassification as ArrayClassification,
)
from fusion_jax.training.tasks.base import Prepared as Prepared
from fusion_jax.training.tasks.base import Task as Task
from fusion_jax.training.tasks.classification import Classification as Classification
from fusion_jax.training.tasks.classes import TaskSpec as TaskSpec
from fusion_jax.training.tasks.classification import Texts as Texts
from fusion_jax.training.tasks.generation import TextPairs as TextPairs
from fusion_jax.training.tasks.glue import GLUE as GLUE
from fusion_jax.training.tasks.glue import load_task as load_task
from fusion_jax.training.tasks.glue import read_task as read_task
from fusion_jax.training.tasks.pair_encoding import PairBatches as PairBatches
from fusion_jax.training.tasks.pair_encoding import Pairs as Pairs
from fusion_jax.training.tasks.pairs import load_pairs as load_pairs
from fusion_jax.training.tasks.pairs import read_pairs as read_pairs
from fusion_jax.training.tasks.plain_text import PlainText as PlainText
from fusion_jax.training.tasks.plain_text import Windows as Windows
from fusion_jax.training.tasks.question_answering import QuestionAnswering as QuestionAnswering
from fusion_jax.training.tasks.question_answering import read_questions as read_questions
from fusion_jax.training.tasks.questions import Answer as Answer
from fusion_jax.training.tasks.questions import Questions as Questions
from fusion_jax.training.tasks.tagged_words import TaggedWords as TaggedWords
from fusion_jax.training.tasks.token_classification import (
    TokenClassification as TokenClassification,
)
from fusion_jax.training.tasks.token_classification import (
    read_tagged_words as read_tagged_words,
)

# Use and measure
from fusion_jax.training.methods.importance import importance_by_gradient as importance_by_gradient
from fusion_jax.training.methods.importance import importance_by_removal as importance_by_removal
from fusion_jax.training.methods.importance import mean_gradients as mean_gradients
from fusion_jax.training.methods.importance import mean_loss as mean_loss
from fusion_jax.training.methods.importance import top_of_each_type as top_of_each_type
from fusion_jax.training.tasks.classes import measure as measure
from fusion_jax.training.tasks.classification import predict as predict
from fusion_jax.training.tasks.generation import generate_texts as generate_texts
from fusion_jax.training.tasks.generation import measure_pairs as measure_pairs
from fusion_jax.training.tasks.generation import measure_texts as measure_texts
from fusion_jax.training.tasks.plain_text import nats_per_token as nats_per_token
from fusion_jax.training.tasks.question_answering import answer_questions as answer_questions
from fusion_jax.training.tasks.questions import measure_answers as measure_answers
from fusion_jax.training.tasks.tagged_words import measure_tags as measure_tags
from fusion_jax.training.tasks.token_classification import tag_words as tag_words

# Methods
from fusion_jax.training.methods.lottery_tickets import lottery as lottery
from fusion_jax.training.methods.overparameterization import Chains as Chains
from fusion_jax.training.methods.overparameterization import overparameterize as overparameterize
from fusion_jax.training.methods.scores import with_masks as with_masks
from fusion_jax.training.methods.scores import with_scores as with_scores
from fusion_jax.training.methods.squeezing import lightweight as lightweight
from fusion_jax.training.methods.squeezing import squeeze as squeeze
from fusion_jax.training.methods.static_pruning import LABEL_WORDS as LABEL_WORDS
from fusion_jax.training.methods.static_pruning import SCORE_CONFIG as SCORE_CONFIG
from fusion_jax.training.methods.static_pruning import StaticPruning as StaticPruning
from fusion_jax.training.methods.static_pruning import static_prune as static_prune
