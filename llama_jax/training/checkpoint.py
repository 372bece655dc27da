"""Checkpoints through Orbax: complete folders, written behind the training, verified bit by bit when read.

A checkpoint is `checkpoints/<step>/` with three items, `model` (parameters), `training` (optimizer and counters) and
`tokenizer`, and JSON metadata: the
architecture, the recipe, the data cursor, and a fingerprint of every array. Orbax notices a missing file but not a
changed byte; the fingerprints
notice both, and an array that was put back together wrongly on another mesh.
"""

import dataclasses
import logging
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from llama_jax.config import llama_config_from_json
from llama_jax.errors import UserError
from llama_jax.model import transformer
from llama_jax.model.lora import LoraConfig
from llama_jax.model.transformer import Transformer
from llama_jax.parallel.mesh import make_mesh
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training.step import TrainState

VERSIONED = ("llama_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece")

CHUNK_BYTES = 16 * 2**20

log = logging.getLogger(__name__)


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide a run's numbers and the form of its files."""
    return {name: version(name) for name in VERSIONED}


class Checkpoints:
    """The checkpoints of one run: saves without stalling the steps, keeps the last few and every so many, restores the
    newest whole one.
    """

    def __init__(self, folder: Path, keep_last: int = 3, keep_every: int | None = None):
        """Opens the folder, creating it.

        Args:
          folder: the run's `checkpoints/`.
          keep_last: newest checkpoints to keep.
          keep_every: also keep the checkpoints of steps divisible by this.
        """
        keep = ocp.training.preservation_policies
        policies = [keep.LatestN(keep_last), *([keep.EveryNSteps(keep_every)] if keep_every else [])]
        self.folder = folder
        self._orbax = ocp.training.Checkpointer(
            folder.resolve(), preservation_policy=keep.AnyPreservationPolicy(policies), cleanup_tmp_directories=True
        )
        self._saving: Any = None
        self._has_failed = False
        logging.getLogger("absl").addFilter(_is_news)

    def save(self, state: TrainState, metadata: dict, tokenizer: Tokenizer) -> None:
        """Starts to save `state`; returns as soon as the arrays are copied, and raises here what the previous save
        failed with. A whole model's architecture is added to the metadata; for adapters the caller gives it.
        """
        self.wait()
        items = {"model": flat(state.model), "training": flat(dataclasses.replace(state, model=None))}
        if isinstance(state.model, Transformer):
            metadata = metadata | {"model": dataclasses.asdict(state.model.config)}
        metadata = metadata | {
            "fingerprints": {name: _fingerprints(arrays) for name, arrays in items.items()},
            "versions": installed_versions(),
        }
        items["tokenizer"] = {"sentencepiece": np.frombuffer(tokenizer.model_bytes, np.uint8)}
        context = ocp.Context()
        context.array.saving.scoped_storage_options_creator = _in_chunks
        with context:
            self._saving = self._orbax.save_checkpointables_async(
                int(state.step), items, force=True, custom_metadata=metadata
            )

    def wait(self) -> None:
        """Blocks until the save under way is on disk.

        Raises:
          UserError: it could not be written, and is not there; those before it stand.
        """
        if self._saving is not None:
            saving, self._saving = self._saving, None
            try:
                saving.result()
            except Exception as error:  # Orbax, TensorStore and the file system each raise their own kinds
                self._has_failed = True
                raise UserError(
                    f"a checkpoint could not be written into {self.folder}: {_first_line(error)}; see that there is space, and that "
                    "it may be written to, then start the same command again: it goes on from the checkpoint before"
                ) from error

    def close(self) -> None:
        """Finishes what is under way."""
        self.wait()
        try:
            self._orbax.close()
        except Exception:
            if not self._has_failed:  # else it was raised before, and is raised once more
                raise

    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, oldest first."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def newest_metadata(self) -> dict | None:
        """Metadata of the newest checkpoint that has any, without reading arrays; None if there is no checkpoint."""
        for step in reversed(self.steps()):
            try:
                return read_metadata(self.folder / str(step))
            except UserError as error:
                log.warning("%s", error)
        return None

    def restore_newest(self, abstract: TrainState) -> tuple[TrainState, dict] | None:
        """Reads the newest whole checkpoint onto the shapes and shardings of `abstract`; None if there is none at all.

        A checkpoint that is not whole is reported, moved to `corrupt/` beside the checkpoints, and the one before it
        is tried.

        Raises:
          UserError: there are checkpoints, and none is whole.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self._restore(step, abstract)
            except UserError as error:
                self._set_aside(step)
                log.warning(
                    "%s; it was moved to %s and the one before it is tried", error, self.folder.parent / "corrupt"
                )
        if steps:
            raise UserError(
                f"{self.folder}: none of the checkpoints {steps} is whole; all were moved to corrupt/ beside it; "
                "the same command now begins anew"
            )
        return None

    def _restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict]:
        folder = self.folder / str(step)
        metadata = read_metadata(folder)
        rest = dataclasses.replace(abstract, model=None)
        loaded = _load_verified(folder, {"model": flat(abstract.model), "training": flat(rest)}, metadata)
        model = unflat(abstract.model, loaded["model"])
        return dataclasses.replace(unflat(rest, loaded["training"]), model=model), metadata

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            aside = self.folder.parent / "corrupt"
            aside.mkdir(exist_ok=True)
            shutil.rmtree(aside / str(step), ignore_errors=True)
            (self.folder / str(step)).rename(aside / str(step))
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"set aside checkpoint {step}")
        self._orbax.reload()


def adapters_metadata(lora: LoraConfig, base: Path) -> dict[str, Any]:
    """What a checkpoint of adapters says of them: their settings, and the model that they belong to."""
    return {"lora": dataclasses.asdict(lora), "base": str(base.resolve())}


def restore_model(
    path: str | Path, mesh: Mesh | None = None, dtype: Any = None
) -> tuple[Transformer, Tokenizer | None]:
    """Reads the parameters and the tokenizer of a checkpoint, for inference or as a beginning.

    Args:
      path: a run folder (its newest whole checkpoint is taken), or one `checkpoints/<step>` folder.
      mesh: where the parameters go; one device if none.
      dtype: what they are cast to; as saved if none.

    Raises:
      UserError: nothing there is a checkpoint, or none is whole.
    """
    folders = find_checkpoints(Path(path))
    mesh = mesh or make_mesh(devices=jax.local_devices()[:1])
    for folder in reversed(folders):
        try:
            metadata = read_metadata(folder)
            check_speaks(folder, metadata)
            abstract = transformer.abstract(llama_config_from_json(metadata["model"]), mesh)
            model = restore_tree(folder, abstract, metadata)
            return (model if dtype is None else jax.jit(lambda m: m.cast(dtype))(model)), load_tokenizer(folder)
        except UserError as error:
            if folder == folders[0]:
                raise
            log.warning("%s; the one before it is used", error)
    raise AssertionError("find_checkpoints returned an empty list")


def restore_tree(folder: Path, abstract: Any, metadata: dict) -> Any:
    """What was trained, of one checkpoint folder, verified: onto the shapes and shardings of `abstract`, as stored.

    Raises:
      UserError: it is not whole, or something else than `abstract`.
    """
    wanted = _as_stored(folder, flat(abstract))
    return unflat(abstract, _load_verified(folder, {"model": wanted}, metadata)["model"])


def find_checkpoints(path: Path) -> list[Path]:
    """The checkpoint folders that `path` names, oldest first: itself, or those of a run.

    Raises:
      UserError: there is none.
    """
    if (path / "_CHECKPOINT_METADATA").is_file():
        return [path]
    for folder in (path / "checkpoints", path):
        steps = sorted((p for p in folder.glob("*") if p.name.isdigit() and p.is_dir()), key=lambda p: int(p.name))
        if steps:
            return steps
    if not path.exists():
        found = "it does not exist"
    else:
        found = f"it holds {sorted(p.name for p in path.iterdir())[:8]}" if path.is_dir() else "it is a file"
    raise UserError(
        f"{path} is not a checkpoint: {found}; expected a run folder with checkpoints/, or one checkpoints/<step> folder"
    )


def newest_readable(path: Path) -> Path:
    """Of the checkpoint folders that `path` names the newest whose metadata can be read; the newest if none can.

    Raises:
      UserError: there is none.
    """
    folders = find_checkpoints(path)
    for folder in reversed(folders):
        try:
            read_metadata(folder)
            return folder
        except UserError:
            continue
    return folders[-1]  # whoever opens it says what is wrong


def read_metadata(folder: Path) -> dict:
    """The JSON metadata of one checkpoint folder.

    Raises:
      UserError: it cannot be read, or was not written by this program.
    """
    try:
        metadata = ocp.checkpointables_metadata(folder.resolve()).custom_metadata
    except Exception as error:
        raise UserError(f"checkpoint {folder} cannot be read: {_first_line(error)}") from error
    if not metadata or "fingerprints" not in metadata:
        raise UserError(f"checkpoint {folder} has no llama_jax metadata; expected one written by llama-jax pretrain")
    return metadata


def check_speaks(folder: Path, metadata: dict) -> None:
    """Raises UserError for the checkpoint of a reward model, which judges answers and cannot write any."""
    if "reward" in metadata:
        raise UserError(
            f"{folder} holds a reward model; expected a language model, such as the one it was trained from"
        )


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer that a checkpoint folder carries, if it does."""
    files = load_files(folder, "tokenizer")
    return Tokenizer(files["sentencepiece"]) if files else None


def load_files(folder: Path, item: str) -> dict[str, bytes]:
    """The small files that one item of a checkpoint folder holds, by name; none if it has no such item."""
    stored = ocp.checkpointables_metadata(folder.resolve()).metadata.get(item)
    if stored is None:
        return {}
    wanted = {name: np.empty(array.shape, np.uint8) for name, array in stored.items()}
    loaded = ocp.load_checkpointables(folder.resolve(), {item: wanted})[item]
    return {name: np.asarray(content).tobytes() for name, content in loaded.items()}


def _in_chunks(path: Any, array: Any) -> Any:
    """A layer's matrix to a chunk: conversion reads layer by layer, and a reader on another mesh what it needs."""
    if array.ndim < 3:  # what is not a stack of matrices is read whole
        return None
    return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,))


def _as_stored(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The wanted arrays in the dtypes they were saved in: a cast while reading would change the fingerprints."""
    try:
        stored = ocp.checkpointables_metadata(folder.resolve()).metadata["model"]
        return {name: like.update(dtype=stored[name].dtype) for name, like in wanted.items()}
    except Exception as error:  # as for `_load_verified`
        raise UserError(f"checkpoint {folder} cannot be read whole: {_first_line(error)}") from error


def _load_verified(folder: Path, wanted: dict[str, dict], metadata: dict) -> dict[str, dict]:
    for item, arrays in wanted.items():
        stored = metadata["fingerprints"].get(item, {})
        if stored.keys() != arrays.keys():
            missing, extra = sorted(arrays.keys() - stored.keys()), sorted(stored.keys() - arrays.keys())
            raise UserError(
                f"checkpoint {folder}: its {item} is another one's: it lacks {missing[:4]} and has {extra[:4]} too many"
            )
    try:
        loaded = ocp.load_checkpointables(folder.resolve(), wanted)
    except Exception as error:  # Orbax, TensorStore and the file system each raise their own kinds for a damaged folder
        raise UserError(f"checkpoint {folder} cannot be read whole: {_first_line(error)}") from error
    for item, arrays in loaded.items():
        found, stored = _fingerprints(arrays), metadata["fingerprints"][item]
        if changed := [name for name in stored if found[name] != stored[name]]:
            raise UserError(f"checkpoint {folder} is damaged: {item} arrays {changed[:4]} are not what was saved")
    return loaded


def _fingerprints(arrays: dict[str, jax.Array]) -> dict[str, int]:
    """A 32-bit sum of every array's bits, each weighted by its place: the same on every mesh, because integer sums do
    not round.
    """
    return {name: int(value) for name, value in jax.device_get(_sums_of_bits(arrays)).items()}


@jax.jit
def _sums_of_bits(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def one(x: jax.Array) -> jax.Array:
        x = jax.device_put(x, jax.memory.Space.Device)  # moments may lie on the host
        bits = jax.lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32).astype(jnp.uint32)
        place = jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape)
        return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

    return jax.tree.map(one, arrays)


def flat(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """A tree as {"layers.wq_DNH": leaf}: names that outlive the Python classes."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    }


def unflat(like: Any, flat: dict[str, Any]) -> Any:
    """The tree of `like`'s form with the leaves that `flat` has under their names."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: flat[jax.tree_util.keystr(path, simple=True, separator=".")], like
    )


def _is_news(record: logging.LogRecord) -> bool:
    """Whether it is no error of Orbax: each of its threads logs a traceback of what `Checkpoints.wait` raises."""
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error).strip() else ''}"
