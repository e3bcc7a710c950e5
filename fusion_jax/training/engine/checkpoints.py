"""Checkpoints of a run, written by Orbax: asynchronous, and whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


class Checkpoints:
    """The checkpoints in a folder.

    Args:
        folder: Where; made if it does not exist.
        keep: How many to keep.
    """

    def __init__(self, folder: Path, keep: int):
        # Orbax takes a second to import.
        import orbax.checkpoint as ocp

        self._args = ocp.args
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=options, item_names=("state", "meta")
        )

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts writing; `wait` waits for the end.

        Args:
            step: The steps done.
            state: A pytree of arrays.
            meta: JSON values.
        """
        leaves = jax.tree.leaves(state)
        if jax.default_backend() == "cpu":
            # Orbax writes in the background from buffers that the next step would overwrite.
            leaves = [jnp.array(x) for x in leaves]
        self._manager.save(
            step,
            args=self._args.Composite(
                state=self._args.StandardSave(_named(leaves)), meta=self._args.JsonSave(meta)
            ),
        )

    def meta(self) -> dict[str, Any]:
        """The JSON values of the newest checkpoint."""
        restore = self._args.Composite(meta=self._args.JsonRestore())
        return self._manager.restore(self.latest, args=restore)["meta"]

    def restore(self, like: Any) -> Any:
        """The newest checkpoint.

        Args:
            like: A state of the same structure, whose arrays say shapes, dtypes and shardings.

        Returns:
            The state.
        """
        leaves, tree = jax.tree.flatten(like)
        abstract = _named(
            [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves]
        )
        restore = self._args.Composite(state=self._args.StandardRestore(abstract))
        named = self._manager.restore(self.latest, args=restore)["state"]
        return jax.tree.unflatten(tree, [named[name] for name in abstract])

    def wait(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and closes."""
        self._manager.close()


def _named(leaves: list[Any]) -> dict[str, Any]:
    return {str(i): leaf for i, leaf in enumerate(leaves)}
