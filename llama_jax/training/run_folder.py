"""A run is a folder: what it holds, and whether a command may go on with what an earlier one left there."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from llama_jax.errors import UserError
from llama_jax.text.tokenizer import FILE_NAME, Tokenizer
from llama_jax.training.checkpoint import Checkpoints, installed_versions
from llama_jax.training.run_config import RunConfig


@contextmanager
def run_checkpoints(config: RunConfig) -> Iterator[Checkpoints]:
    """The checkpoints of a run in its folder, which is created; what is under way is finished in the end.

    Raises:
      UserError: the folder cannot be written to.
    """
    make_folder(Path(config.out))
    checkpoints = Checkpoints(Path(config.out) / "checkpoints", config.loop.keep_last, config.loop.keep_every or None)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def open_run(
    folder: Path,
    stage: str,
    config: Any,
    decisive: dict[str, Any],
    tokenizer: Tokenizer,
    checkpoints: Checkpoints,
    resume: Literal["auto", "never", "must"],
) -> None:
    """Checks what an earlier run left in the folder, and writes config.json and tokenizer.model.

    Args:
      folder: of the run.
      stage: its name, such as "pretrain".
      config: the stage's config.
      decisive: what of the recipe must not change when the run goes on; see `without`.
      tokenizer: of the run.
      checkpoints: those in the folder.
      resume: whether to go on with what is there: if there is something; never; or fail without it.

    Raises:
      UserError: what is there goes against `resume`, or was begun with another recipe.
    """
    found = checkpoints.newest_metadata()
    if resume == "never" and found:
        raise UserError(
            f"{folder} holds a run at step {checkpoints.steps()[-1]}; name another --out, or go on with --resume auto"
        )
    if resume == "must" and not found:
        raise UserError(f"--resume must, but {checkpoints.folder} holds no checkpoint; --resume auto begins one")
    if found and (changes := differences(found["recipe"], decisive)):
        raise UserError(
            f"the run in {folder} was begun with another recipe:\n"
            + "\n".join(f"  {name}: {was} there, {now} here" for name, was, now in changes)
            + "\nrestore these values to go on with it, or begin another run with --out"
        )
    if jax.process_index() == 0:
        resolved = {"stage": stage, "config": dataclasses.asdict(config), "versions": installed_versions()}
        resolved |= {"starts": _starts(folder)}
        write_whole(folder / FILE_NAME, tokenizer.model_bytes)
        write_whole(folder / "config.json", json.dumps(resolved, indent=2).encode())


def find_recipe(folder: Path, stage: str, resume: Literal["auto", "never", "must"]) -> dict[str, Any] | None:
    """The recipe of what an earlier run of a stage without checkpoints left in the folder; None if there is none.

    Raises:
      UserError: another stage's run is there, or what is there goes against `resume`.
    """
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        found = None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read ({error}); name another --out") from error
    if found is not None and (not isinstance(found, dict) or found.get("stage") != stage):
        raise UserError(f"{folder} holds something else than a run of the stage {stage}; name another --out")
    if resume == "never" and found:
        raise UserError(f"{folder} holds a run already; name another --out, or go on with --resume auto")
    if resume == "must" and not found:
        raise UserError(f"--resume must, but {folder} holds no run; --resume auto begins one")
    return found and found["recipe"]


def write_recipe(folder: Path, stage: str, config: Any, recipe: dict[str, Any], earlier: dict[str, Any] | None) -> None:
    """Writes config.json, with what decides the run's results as its recipe.

    Raises:
      UserError: the recipe is not as it was in an earlier run, which `find_recipe` found.
    """
    recipe = json.loads(json.dumps(recipe))
    if earlier is not None and (changes := differences(earlier, recipe)):
        raise UserError(
            f"the run in {folder} was begun with another recipe:\n"
            + "\n".join(f"  {name}: {was} there, {now} here" for name, was, now in changes)
            + "\nrestore these values to go on with it, or begin another run with --out"
        )
    resolved = {"stage": stage, "config": dataclasses.asdict(config), "recipe": recipe}
    resolved |= {"versions": installed_versions(), "starts": _starts(folder)}
    write_whole(folder / "config.json", json.dumps(resolved, indent=2).encode())


def _starts(folder: Path) -> list[dict[str, Any]]:
    """When and on what the run was started, this time last: a run may go on elsewhere, and its energy is of all of them."""
    try:
        earlier = json.loads((folder / "config.json").read_bytes())["starts"]
    except (OSError, ValueError, KeyError, TypeError):  # the first start
        earlier = []
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return [*earlier, {"at": now, "device": jax.devices()[0].device_kind, "devices": jax.device_count()}]


def digest_of(value: Any) -> str:
    """A fingerprint of what JSON can hold, for a recipe that would be too long with the thing itself."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()


def make_folder(folder: Path) -> None:
    """Creates a run's folder and checks that it can be written to.

    Raises:
      UserError: it cannot.
    """
    try:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        probe = folder / f"writable.{jax.process_index()}"
        write_whole(probe, b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written to ({error.strerror}); name another with --out") from error


def fingerprint(*arrays: np.ndarray) -> str:
    """A number, in hexadecimal, that depends on every element of the arrays and on their order: what was trained on."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it, so that it is never seen half-written."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes JSON lines, whole."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def without(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """A config as JSON, without the fields of these dotted names."""
    fields = json.loads(json.dumps(dataclasses.asdict(config)))
    for name in names:
        *parents, last = name.split(".")
        inner = fields
        for parent in parents:
            inner = inner[parent]
        del inner[last]
    return fields


def differences(was: Any, now: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """The (dotted name, old value, new value) of everything in which two JSON values differ."""
    if isinstance(was, dict) and isinstance(now, dict):
        return [
            change
            for key in sorted(was.keys() | now.keys())
            for change in differences(was.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if was == now else [(name, was, now)]
