"""Vision transformers: the layers of encoders on patches of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key, Shaped

from fusion_jax.errors import InputError
from fusion_jax.models.base import EncoderOutput, Head, Model
from fusion_jax.models.bert_config import EncoderConfig
from fusion_jax.models.bert_layers import Layer, LayerFactory, SelfAttention, Shared
from fusion_jax.models.layers import ArrayLike, Dropout, split_key
from fusion_jax.models.rules import LINEAR, NORM, KeyRule, Leaf
from fusion_jax.nn.linear_forms import Frozen
from fusion_jax.nn.submlps import activation


@dataclass(frozen=True, kw_only=True)
class VisionConfig(EncoderConfig):
    """The fields of the ``config.json`` of a vision transformer that the model uses.

    The last ones are not in the file, but say what a family has of its own.
    """

    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    image_size: int | tuple[int, ...] = 224
    patch_size: int | tuple[int, ...] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    head_dim: int = 0
    pooler_output_size: int = 0
    """The number of outputs of the pooler; 0 for ``hidden_size``."""
    pooler_act: str = "tanh"
    use_mask_token: bool = False
    """Whether checkpoints have an embedding of masked patches, which is only kept."""
    pooling: Literal["dense", "first", "mean", "attention", "none"] = "dense"
    """What is pooled: a linear layer of the first state, or this state itself, or what a learned
    query attends to. A head reads the first state for ``"dense"``, this and the mean of patches for
    ``"mean"``, and otherwise this mean alone."""
    class_token: bool = True
    """Whether there is a token before the patches."""
    patch_bias: bool = True
    """Whether the linear layer on patches has a bias."""
    input_norm: bool = False
    """Whether the input of the first layer is normalized."""
    norm_pooled: bool = False
    """Whether the norm after the last layer is that of the pooled state alone."""
    flat: bool = False
    """Whether checkpoints have the token and the positions without leading axes of size 1."""

    @property
    def image(self) -> tuple[int, int]:
        """The height and the width of images."""
        return _pair("image_size", self.image_size)

    @property
    def patch(self) -> tuple[int, int]:
        """The height and the width of patches."""
        return _pair("patch_size", self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """The number of rows and of columns of patches."""
        (height, width), (rows, columns) = self.image, self.patch
        return height // rows, width // columns

    def check(self) -> VisionConfig:
        """Returns itself; raises `InputError` for sizes that do not fit."""
        self.check_layers(self.pooler_act)
        if 0 in self.grid:
            raise InputError(f"patch_size {self.patch} is larger than image_size {self.image}")
        return self


def _pair(name: str, value: int | tuple[int, ...]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    if len(pair) != 2 or not all(1 <= n < 2**16 for n in pair):
        raise InputError(f"{name} must be a number from 1 to 65535, or two; got {value}")
    return pair[0], pair[1]


class PatchEmbedding(nnx.Module):
    """A linear layer on the pixels of each patch; its matrix has the axes of a convolution's."""

    def __init__(self, config: VisionConfig, make: LayerFactory):
        shape = (config.hidden_size, config.num_channels, *config.patch)
        rows = make.linear(int(np.prod(shape[1:])), shape[0])
        self.kernel = nnx.Param(rows.kernel[...].T.reshape(shape))
        zeros = jnp.zeros(shape[0], make.param_dtype)
        self.bias = nnx.Param(zeros) if config.patch_bias else None
        self.patch, self.grid = config.patch, config.grid

    def __call__(self, pixels: Float[Array, "b c y x"]) -> Float[Array, "b n d"]:
        """Returns the embeddings of the patches, row by row; what is beside them is left out."""
        (p, q), (rows, columns) = self.patch, self.grid
        b, c = pixels.shape[:2]
        pixels = pixels[:, :, : rows * p, : columns * q]
        patches = pixels.reshape(b, c, rows, p, columns, q).transpose(0, 2, 4, 1, 3, 5)
        kernel = self.kernel[...]
        y = patches.reshape(b, rows * columns, -1) @ kernel.reshape(len(kernel), -1).T
        return y if self.bias is None else y + self.bias[...][None, None]


class AttentionPooler(nnx.Module):
    """Pools states by attention from a learned query, with an MLP behind it, as SigLIP does."""

    def __init__(self, config: VisionConfig, make: LayerFactory):
        d = config.hidden_size
        self.query = nnx.Param(make.embed(1, d).embedding[...][None])
        self.attention = SelfAttention(config, 0, make)
        self.norm = make.norm(d)
        self.mlp = make.mlp(d, config.intermediate_size)

    def __call__(self, x: Float[Array, "b t d"], shared: Shared) -> Float[Array, "b d"]:
        """Returns the pooled states."""
        query = jnp.broadcast_to(self.query[...], (len(x), 1, x.shape[-1]))
        y = self.attention(query, shared, None, x)
        return (y + self.mlp(self.norm(y)))[:, 0]


class VisionTransformer(Model):
    """A vision transformer such as ViT and DINOv2.

    Args:
        pooler: Whether there is a pooler, in a model without a head.
        mask_token: Whether the checkpoint has an embedding of masked patches.

    Example:
        >>> config = VisionConfig(model_type="vit", hidden_size=8, num_attention_heads=2,
        ...                       intermediate_size=32, image_size=8, patch_size=4)
        >>> model = VisionTransformer(config, rngs=nnx.Rngs(0))
        >>> model(pixel_values=jnp.zeros((1, 3, 8, 8))).last_hidden_state.shape
        (1, 5, 8)
    """

    takes = "images"

    def __init__(
        self,
        config: VisionConfig,
        *,
        head: Head | None = None,
        pooler: bool = True,
        mask_token: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        make = LayerFactory(config, param_dtype, rngs)
        self.config = config
        d = config.hidden_size
        self.patches = PatchEmbedding(config, make)
        rows = config.class_token + config.grid[0] * config.grid[1]
        lead = () if config.flat else (1, 1)
        first = make.embed(1, d).embedding[...].reshape(*lead, d)
        self.cls_token = nnx.Param(first) if config.class_token else None
        position = make.embed(rows, d).embedding[...]
        self.position = nnx.Param(position.reshape(*lead[1:], rows, d))
        self.input_norm = make.norm(d) if config.input_norm else None
        masked = mask_token and config.use_mask_token
        self.mask_token = Frozen(jnp.zeros((1, d), param_dtype)) if masked else None
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.layers = nnx.List([Layer(config, i, make) for i in range(config.num_hidden_layers)])
        self.norm = make.norm(d)
        pooled: nnx.Module | None = None
        if config.pooling == "attention" and head is None:
            pooled = AttentionPooler(config, make)
        elif config.pooling == "dense" and head is None and pooler:
            pooled = make.linear(d, config.pooler_output_size or d)
        self.pooler: Any = pooled
        features = 2 * d if config.pooling == "mean" else d
        self.head = None if head is None else make.linear(features, config.num_labels)

    def __call__(
        self,
        pixel_values: Shaped[ArrayLike, "*n"] | None = None,
        *,
        output_hidden_states: bool = False,
        key: Key[Array, ""] | None = None,
        **others: Any,
    ) -> EncoderOutput:
        """Encodes a batch of images.

        Args:
            pixel_values: (b, channels, height, width) floats, as image processors return them.
            output_hidden_states: Whether to return the hidden states of all layers.
            key: Random key of dropout; None for no dropout.
            **others: Nothing else is taken; tokens raise an error.

        Returns:
            Hidden states of the class token and of the patches, row by row, pooled output and
            logits, in the dtype of the parameters.

        Raises:
            InputError: There are no images, or not of the size and the channels of the model.
        """
        if others or pixel_values is None:
            given = ", ".join(others) or "nothing"
            raise InputError(f"{self.config.model_type} takes pixel_values, images; got {given}")
        pixels = self._checked(jnp.asarray(pixel_values))
        *keys, embed_key = split_key(key, len(self.layers) + 1)
        x = self.patches(pixels)
        if self.cls_token is not None:
            first = self.cls_token[...].reshape(1, 1, -1)
            first = jnp.broadcast_to(first, (len(x), 1, x.shape[-1]))
            x = jnp.concatenate([first, x], axis=1)
        x = self.dropout(x + self.position[...].reshape(1, *x.shape[1:]), embed_key)
        x = x if self.input_norm is None else self.input_norm(x)
        everywhere = jnp.ones((len(x), 1, 1, x.shape[1]), bool)
        shared = Shared({None: everywhere}, None, {}, None)
        states = [x]
        for layer, layer_key in zip(self.layers, keys, strict=True):
            x = layer(x, shared, layer_key)
            states.append(x)
        x = x if self.config.norm_pooled else self.norm(x)
        pooled = logits = None
        if isinstance(self.pooler, AttentionPooler):
            pooled = self.pooler(x, shared)
        elif self.pooler is not None:
            pooled = activation(self.config.pooler_act)(self.pooler(x[:, 0]))
        elif self.config.pooling in ("first", "mean"):
            pooled = self.norm(x[:, 0]) if self.config.norm_pooled else x[:, 0]
        if self.head is not None:
            first, mean = x[:, 0], x[:, int(self.config.class_token) :].mean(1)
            read = {"dense": [first], "mean": [first, mean]}.get(self.config.pooling, [mean])
            logits = self.head(jnp.concatenate(read, axis=-1))
        return EncoderOutput(x, tuple(states) if output_hidden_states else None, pooled, logits)

    def _checked(self, pixels: Shaped[Array, "*n"]) -> Float[Array, "b c y x"]:
        """Returns images in the dtype of the parameters."""
        want = (self.config.num_channels, *self.config.image)
        if pixels.ndim != 4 or pixels.shape[1:] != want:
            raise InputError(
                f"pixel_values must be (images, {', '.join(map(str, want))}): channels, height and "
                f"width; got {pixels.shape}; resize images, as positions are not interpolated"
            )
        if not jnp.issubdtype(pixels.dtype, jnp.floating):
            raise InputError(
                f"pixel_values must be floats, normalized as by the image processor; got "
                f"{pixels.dtype}"
            )
        return pixels.astype(self.patches.kernel[...].dtype)


PATCHES = {"kernel": Leaf(("weight",)), "bias": Leaf(("bias",))}
"""A linear layer on patches, as a convolution."""
WHOLE = {"": Leaf(("",))}
"""A variable that is not part of a layer."""
_THEIRS = "encoder.layer.{l}"
BASE = (
    KeyRule("patches", "embeddings.patch_embeddings.projection", PATCHES),
    KeyRule("cls_token", "embeddings.cls_token", WHOLE),
    KeyRule("position", "embeddings.position_embeddings", WHOLE),
    *(
        KeyRule(f"layers.{{l}}.attention.{part}", f"{_THEIRS}.attention.attention.{part}", LINEAR)
        for part in ("query", "key", "value")
    ),
    KeyRule("layers.{l}.attention.out", f"{_THEIRS}.attention.output.dense", LINEAR),
    KeyRule("norm", "layernorm", NORM),
)
"""The rules that ViT and DINOv2 share."""
CLASSIFIER = KeyRule("head", "classifier", LINEAR, in_base=False)
