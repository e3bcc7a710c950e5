"""Options that the commands for models share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

ModelName = Annotated[str, arg(metavar="MODEL")]
Artefact = Annotated[str, arg(metavar="ARTEFACT")]
NewFolder = Annotated[Path, arg(metavar="OUT")]
TextFile = Annotated[
    Path | None,
    arg(
        metavar="FILE", help_behavior_hint="(default: English sentences that come with fusion-jax)"
    ),
]
DType = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    arg(
        metavar="DTYPE",
        help="Type of the parameters: float32, bfloat16 or float16.",
        help_behavior_hint="(default: that of the files)",
    ),
]
