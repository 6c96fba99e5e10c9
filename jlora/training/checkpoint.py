"""Checkpoints of a run, by Orbax: trained parameters, optimizer state, step, RNG and data position.

Never holds the base. A state is stored as a flat dict from tree path to array, so what is in a
checkpoint can be listed by name and does not depend on Python classes.

Orbax writes `STEP.saving`; once all of it is on the disk, with a manifest of its files, it is renamed to `STEP`: that
is the commit. What another name than a step's is left by a process that was killed, and cleaned by the next.
"""

import math
import re
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import chex
import jax
import orbax.checkpoint as ocp

from jlora.errors import ConfigError, HostLost, ModelError, finding
from jlora.files import manifest
from jlora.runtime import distributed

Tree = Any

SAVING, DELETING = ".saving", ".deleting"
# What a save, or a deletion, that was cut short leaves; nothing of any other name is touched.
DEBRIS = re.compile(r"\d+(\.saving|\.deleting|(\.saving)?\.orbax-checkpoint-tmp.*)")
# Logs, the report and the file system's own needs, in a run folder.
SPARE_BYTES = 4 * 2**20


class Checkpoints:
    """The checkpoints of one run folder. Saves in the background; a failed save surfaces at the next call."""

    def __init__(self, folder: Path, keep: int, read_only: bool = False):
        """Open a run's checkpoints, and clean up what a killed process left.

        Args:
          keep: newest checkpoints kept, beside the one with the lowest held-out loss.
          read_only: True neither cleans nor moves anything.
        """
        self._folder, self._keep, self._read_only = folder.absolute(), keep, read_only
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler("state", "data", "identity"))
        self._background = ThreadPoolExecutor(1, "commit")
        self._pending: tuple[int, Future[None]] | None = None
        if not read_only and distributed.is_main():
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.iterdir():
                if DEBRIS.fullmatch(path.name) and path.is_dir():
                    shutil.rmtree(path)

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        if not self._folder.is_dir():
            return []
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdecimal() and path.is_dir())

    def fault(self, step: int) -> str | None:
        """What is wrong with the files of a checkpoint; None if it is whole.

        Raises:
          ConfigError: they cannot be read for the moment, so that nobody knows.
        """
        try:
            return self._fault(step)
        except OSError as error:
            raise ConfigError(
                f"{error.filename or self._folder / str(step)}: cannot be read ({error.strerror}); nothing was moved; "
                "let it be read, then run the same command again"
            ) from None

    def newest_whole(self) -> int:
        """The newest checkpoint whose files are as they were written, or 0 where none was ever committed.

        Newer ones are moved to the run's `quarantine` folder (where this is not read-only), each with a line on stderr.

        Raises:
          ModelError: there are checkpoints, and none is whole.
          ConfigError: one cannot be read for the moment.
        """
        faults: dict[int, str] = {}
        for step in reversed(self.steps()):
            found = self.fault(step)
            if found is None:
                for broken, reason in faults.items():
                    went = "passed over" if self._read_only else f"moved to {self._quarantine(broken)}"
                    print(
                        f"warning: {self._folder}/{broken}: the checkpoint is damaged ({reason}) and {went}; "
                        f"step {step} is taken",
                        file=sys.stderr,
                    )
                return step
            faults[step] = found
        if faults:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in faults.items())
            raise ModelError(
                f"{self._folder}: no checkpoint is whole ({reasons}); bring one back, or delete it to start anew"
            )
        return 0

    def best(self) -> int | None:
        """The checkpoint with the lowest held-out loss, of equal ones the newest; None where none was evaluated."""
        return self._best(self.steps())

    def require_room(self, state: Tree, saves: int) -> None:
        """Refuse a run whose checkpoints would not fit on the disk; asked by all processes, answered by the first.

        Args:
          saves: checkpoints that are still to be written. The exported adapter takes less than one of them.

        Raises:
          ConfigError: with what is needed and what is free.
        """
        if not distributed.is_main() or not saves:
            return
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        there = len(self.steps())
        # The newest, the best, and the one that is being written.
        more = max(1, min(there + saves, self._keep + 2) - there)
        need, free = (more + 1) * size + SPARE_BYTES, shutil.disk_usage(self._folder).free
        if need > free:
            raise ConfigError(
                f"output_dir {self._folder.parent}: {free / 2**20:,.0f} MiB are free, and {more} more checkpoints of "
                f"{size / 2**20:,.0f} MiB and the adapter may take {need / 2**20:,.0f} MiB; make room, lower "
                "training.keep_checkpoints, or set another"
            )

    def save(
        self, step: int, state: Tree, data: dict[str, Any], identity: dict[str, Any], eval_loss: float | None
    ) -> None:
        """Save in the background; returns once the state is copied from the devices.

        Raises:
          ConfigError: this save, or the one before, failed; see `wait`.
        """
        self.wait()
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(flatten(state)),
            data=ocp.args.JsonSave(data),
            identity=ocp.args.JsonSave(identity),
        )
        try:
            self._checkpointer.save(self._folder / f"{step}{SAVING}", args=items)
        except Exception as error:
            raise self._explain(step, error) from error
        facts = {"step": step, "eval_loss": eval_loss if eval_loss is None or math.isfinite(eval_loss) else None}
        self._pending = step, self._background.submit(self._commit, step, facts)

    def check(self) -> None:
        """Raise what a background save raised, if it is over; called after every step."""
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Until every save is committed.

        Raises:
          ConfigError: a background save failed; which, why, and which checkpoint stays.
          HostLost: it waited for a process of the job that is gone.
        """
        if self._pending is None:
            return
        step, saved = self._pending
        self._pending = None
        try:
            saved.result()
        except Exception as error:
            raise self._explain(step, error) from error

    def identity(self, step: int) -> dict[str, Any]:
        """The identity of the run that wrote a checkpoint."""
        return self._restore(step, {}, identity=ocp.args.JsonRestore())["identity"]

    def position(self, step: int) -> dict[str, Any]:
        """Where a checkpoint stands in its run's rows."""
        return self._restore(step, {}, data=ocp.args.JsonRestore())["data"]

    def restore(self, step: int, like: Tree) -> Tree:
        """The state, in the structure, dtypes and placement of `like`.

        Raises:
          ModelError: the checkpoint is damaged or belongs to another shape.
        """
        abstract = flatten(jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
        found = self._restore(step, abstract, state=ocp.args.StandardRestore(abstract))["state"]
        return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in abstract])

    def restore_trained(self, step: int, like: Tree) -> Tree:
        """The trained leaves alone, without the optimizer's, in the structure and placement of `like`.

        Raises:
          ModelError: as for `restore`.
        """
        abstract = flatten({"trained": jax.tree.map(ocp.utils.to_shape_dtype_struct, like)})
        arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
        part = ocp.args.PyTreeRestore(abstract, restore_args=arguments, partial_restore=True)
        found = self._restore(step, abstract, state=part)["state"]
        return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in abstract])

    def close(self) -> None:
        """Wait, then let go of the folder."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._checkpointer.close()

    def _commit(self, step: int, facts: dict[str, Any]) -> None:
        """In the background: what Orbax has written becomes a checkpoint, and older ones go."""
        self._checkpointer.wait_until_finished()
        if not distributed.is_main():
            return
        saving, final = self._folder / f"{step}{SAVING}", self._folder / str(step)
        manifest.write(saving, facts)
        saving.rename(final)
        manifest.sync_folder(self._folder)
        found = self._fault(step, cached=False)
        if found is not None:
            raise OSError(None, f"{found} on reading it back; moved to {self._quarantine(step)}")
        steps = [old for old in self.steps() if old <= step]
        kept = {*steps[-self._keep :], self._best(steps) or step}
        for old in self.steps():
            if old not in kept:  # a folder that is half deleted has another name than a checkpoint
                shutil.rmtree((self._folder / str(old)).rename(self._folder / f"{old}{DELETING}"))

    def _best(self, steps: list[int]) -> int | None:
        losses: dict[int, float] = {}
        for step in steps:
            with suppress(OSError, ValueError):  # damaged meanwhile; it goes when its turn comes
                loss = manifest.read(self._folder / str(step)).get("eval_loss")
                if isinstance(loss, int | float):
                    losses[step] = loss
        return min(reversed(losses), key=lambda step: losses[step], default=None)

    def _fault(self, step: int, cached: bool = True) -> str | None:
        folder = self._folder / str(step)
        found = manifest.fault(folder, cached)
        if found is None and (written := manifest.read(folder).get("step")) != step:
            found = f"it is that of step {written}"
        return found

    def _quarantine(self, step: int) -> Path:
        folder = self._folder.parent / "quarantine"
        folder.mkdir(exist_ok=True)
        taken = [path.name for path in folder.iterdir()]
        names = [str(step), *(f"{step}.{number}" for number in range(1, len(taken) + 1))]
        target = folder / next(name for name in names if name not in taken)
        # Its parent may be a file system of its own, which nothing can be renamed across.
        return Path(shutil.move(self._folder / str(step), target))

    def _restore(self, step: int, like: dict[str, Any], **items: Any) -> Any:
        """The items of a checkpoint.

        Args:
          like: shapes and dtypes of the leaves of the state that are wanted; Orbax would cast to them without a word.
        """
        path = self._folder / str(step)
        try:
            if like:
                stored = ocp.StandardCheckpointHandler().metadata(path / "state")
                if lacking := [name for name in like if name not in stored]:
                    raise ValueError(f"it holds no {lacking[0]}")
                found = {name: jax.ShapeDtypeStruct(stored[name].shape, stored[name].dtype) for name in like}
                chex.assert_trees_all_equal_shapes_and_dtypes(found, like)
            return self._checkpointer.restore(path, args=ocp.args.Composite(**items))
        except (AssertionError, ValueError, KeyError, TypeError, OSError) as error:
            raise ModelError(
                f"{path}: the checkpoint cannot be restored ({finding(error)}); delete this "
                "step's folder to resume from an earlier one"
            ) from None

    def _explain(self, step: int, error: Exception) -> Exception:
        """What a failed save is to a user; the error itself where it is a bug of ours."""
        reason = finding(error)
        if distributed.several() and isinstance(error, TimeoutError | jax.errors.JaxRuntimeError):
            return HostLost(
                f"checkpoint {step} could not be saved with all processes of the job ({reason}); run the same command "
                "again to resume from the last checkpoint"
            )
        # TensorStore's own are ValueErrors and RuntimeErrors.
        if not isinstance(error, OSError | ValueError | RuntimeError):
            return error
        if isinstance(error, OSError):
            reason = error.strerror or reason
        kept = [old for old in self.steps() if old != step]
        stays = f"checkpoint {kept[-1]} stays" if kept else "there is no earlier one"
        return ConfigError(
            f"{self._folder}/{step}: the checkpoint could not be saved ({reason}); {stays}; make room or way there, "
            "then run the same command again to resume"
        )


def flatten(tree: Tree) -> dict[str, Any]:
    """Leaves by path, such as `trained/adapter/q_proj/lora_a`, in tree order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
