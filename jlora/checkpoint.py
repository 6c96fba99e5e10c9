"""Checkpoints of a run, by Orbax: trained parameters, optimizer state, step, RNG and data position.

Never holds the base. A state is stored as a flat dict from tree path to array, so what is in a
checkpoint can be listed by name and does not depend on Python classes.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from jlora.errors import ModelError

Tree = Any


@dataclass(frozen=True)
class Restored:
    """What a checkpoint holds beside the state."""

    step: int
    state: Tree
    data: dict[str, Any]
    identity: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run folder. Saves in the background; a failed save surfaces at the next call."""

    def __init__(self, folder: Path, keep: int, read_only: bool = False):
        """Args: keep: newest checkpoints kept, beside the one with the lowest held-out loss."""

        def score(metrics: dict[str, float]) -> float:
            return -metrics["eval_loss"]

        # By themselves, BestN keeps all that was never evaluated, and no metric is written unless best_fn is set.
        best = BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
                best_fn=score,
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                create=not read_only,
            ),
            item_names=("state", "data", "identity"),
        )

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, state: Tree, data: dict[str, Any], identity: dict[str, Any], eval_loss: float | None
    ) -> None:
        """Save in the background; returns once the state is copied from the devices."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(flatten(state)),
                data=ocp.args.JsonSave(data),
                identity=ocp.args.JsonSave(identity),
            ),
            metrics=None if eval_loss is None or not math.isfinite(eval_loss) else {"eval_loss": eval_loss},
        )

    def identity(self, step: int) -> dict[str, Any]:
        """The identity of the run that wrote a checkpoint."""
        return self._restore(step, identity=ocp.args.JsonRestore())["identity"]

    def restore(self, step: int, like: Tree) -> Restored:
        """Restore into the structure, dtypes and placement of `like`.

        Raises:
          ModelError: the checkpoint is damaged or belongs to another shape.
        """
        abstract = flatten(jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
        restored = self._restore(
            step,
            state=ocp.args.StandardRestore(abstract),
            data=ocp.args.JsonRestore(),
            identity=ocp.args.JsonRestore(),
        )
        flat = restored["state"]
        leaves = [flat[name] for name in abstract]
        state = jax.tree.unflatten(jax.tree.structure(like), leaves)
        return Restored(step, state, restored["data"], restored["identity"])

    def wait(self) -> None:
        """Until every save is committed; raises what a background save raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then let go of the folder."""
        self._manager.close()

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, TypeError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(
                f"{self._manager.directory}/{step}: the checkpoint can not be restored ({reason}); delete this "
                "step's folder to go on from an earlier one"
            ) from None


def flatten(tree: Tree) -> dict[str, Any]:
    """Leaves by path, such as `trained/adapter/q_proj/lora_a`, in tree order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
