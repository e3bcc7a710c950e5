"""Options that the commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, arg

from fusion_jax.training.engine.config import TrainConfig

Name = Annotated[str, arg(metavar="MODEL")]
TaskName = Annotated[
    str | None,
    arg(
        metavar="TASK",
        help="A GLUE task (sst2, cola, mrpc, stsb, qqp, mnli, qnli, rte, wnli); webnlg or e2e, to "
        "generate text; or text, to model plain text.",
        help_behavior_hint="(or give a file of your own)",
    ),
]
Data = Annotated[
    str | None,
    arg(
        metavar="DIR|FILE|hub",
        help="Folder with the task's files; hub for GLUE from there; for text, a text file.",
        help_behavior_hint="(with --task)",
    ),
]
File = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]
Source = Annotated[
    str,
    arg(
        metavar="COLUMN",
        help="Column with the texts to generate from.",
        help_behavior_hint="(default: source)",
    ),
]
Target = Annotated[
    str | None,
    arg(
        metavar="COLUMN",
        help="Column with the texts to generate; says that the file has sources and targets, not "
        "labels. Rows with the same source are several references.",
        help_behavior_hint="(such as target)",
    ),
]
Context = Annotated[
    int | None,
    arg(
        metavar="N",
        help="With --task text: tokens that the model sees at a time.",
        help_behavior_hint="(default: 512, or as the run was trained)",
    ),
]
Columns = Annotated[
    tuple[str, ...],
    arg(
        metavar="COLUMN",
        help="Column with the text, or two where labels are of two texts.",
        help_behavior_hint="(default: text)",
    ),
]
Length = Annotated[
    int | None,
    arg(
        metavar="N",
        help="Longest text in tokens; of a pair, with its target.",
        help_behavior_hint="(default: as the run was trained)",
    ),
]
MeshText = Annotated[
    str | None,
    arg(
        metavar="MESH",
        help="How devices are used, such as data=4,model=2: data splits batches, fsdp batches and "
        "parameters, model the widths of MLPs.",
        help_behavior_hint="(default: all on data)",
    ),
]
Settings = OmitArgPrefixes[TrainConfig]
