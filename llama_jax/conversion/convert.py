"""One form of checkpoint to another, an array at a time: memory does not grow with the model.

Adapters are read as the model that they make, merged; into PEFT's form they are written as they are.
"""

import dataclasses
import errno
import math
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from llama_jax.config import LlamaConfig
from llama_jax.conversion import layout, peft, source
from llama_jax.conversion.adapted import AdaptedSource, read_adapters
from llama_jax.conversion.huggingface import HuggingFaceSink, HuggingFaceSource, read_json
from llama_jax.conversion.llama2c import Llama2cSink, Llama2cSource
from llama_jax.conversion.meta import MetaSink, MetaSource
from llama_jax.conversion.ours import OurSink, OurSource
from llama_jax.conversion.source import TOKENIZER, Overrides, Source
from llama_jax.errors import UserError
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training.checkpoint import find_checkpoints, newest_readable

Form = Literal["hf", "meta", "ours", "llama2c", "peft"]
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SOURCES = {"hf": HuggingFaceSource, "meta": MetaSource, "ours": OurSource, "llama2c": Llama2cSource}


@dataclass(frozen=True)
class Output:
    """How the destination is written, where its form leaves a choice."""

    shards: int = 1
    """Files of a Meta folder, as model parallelism splits the weights: 1 for 7B, 2 for 13B, 8 for 70B as released."""
    llama2c_version: int = 1
    """0, or 1 with its 256-byte header."""
    dtype: str | None = None
    """float16, bfloat16 or float32; each parameter's own if none."""
    tokenizer: str | None = None
    """A tokenizer.model to write instead of the source's."""


def locate(path: str | Path) -> Path:
    """Where a checkpoint lies on this machine; one named hub:ID is fetched into a folder of its name first.

    Raises:
      UserError: the hub does not give it.
    """
    repo_id = str(path).removeprefix("hub:")
    if repo_id == str(path):
        return Path(path)
    from llama_jax.conversion.download import download

    return download(repo_id)


def pinned(path: str | Path) -> Path:
    """Where a checkpoint lies; of a run its newest that can be read, so that the same is meant when the run has gone on.

    Raises:
      UserError: there is no checkpoint.
    """
    path = locate(path)
    return newest_readable(path) if recognise(path) == "ours" else path


def open_pinned(path: str | Path) -> tuple[Path, LlamaConfig, Tokenizer]:
    """Where a checkpoint lies, see `pinned`, its architecture and its tokenizer, before any weight is read.

    Raises:
      UserError: it is no whole checkpoint, or has no tokenizer.
    """
    checkpoint = pinned(path)
    opened = open_source(checkpoint)
    if TOKENIZER not in opened.assets:
        raise UserError(f"{path} has no {TOKENIZER}; copy the model's own beside its weights")
    return checkpoint, opened.config, Tokenizer(opened.assets[TOKENIZER], f"{path}/{TOKENIZER}")


def recognise(path: Path) -> Form:
    """The form of a checkpoint, from what its folder holds.

    Raises:
      UserError: nothing there is one of the four forms, or more than one is.
    """
    if path.is_file():
        if path.suffix == ".bin":
            return "llama2c"
        raise UserError(f"{path} is a file; expected a checkpoint's folder, or a llama2.c file that ends in .bin")
    marks: dict[Form, bool] = {
        "ours": (path / "_CHECKPOINT_METADATA").is_file() or (path / "checkpoints").is_dir(),
        "meta": (path / "params.json").is_file(),
        "hf": (path / "config.json").is_file() and not (path / "checkpoints").is_dir(),
        "llama2c": (path / "model.bin").is_file(),
        "peft": (path / peft.CONFIG).is_file(),
    }
    forms = [form for form, found in marks.items() if found]
    if len(forms) == 1:
        return forms[0]
    if forms:
        raise UserError(f"{path} could be {' or '.join(forms)}; say which with --from")
    if path.is_dir() and any(p.name.isdigit() for p in path.iterdir()):
        return "ours"
    found = f"it holds {sorted(p.name for p in path.iterdir())[:8]}" if path.is_dir() else "it does not exist"
    raise UserError(
        f"{path} is not a checkpoint: {found}; expected a run or its checkpoints/<step>, a Hugging Face folder with "
        "config.json, a Meta folder with params.json, llama2.c's model.bin, or a PEFT folder with adapter_config.json"
    )


def open_source(path: str | Path, form: Form | None = None, overrides: Overrides = Overrides()) -> Source:
    """Opens a checkpoint of any form, checked for names, shapes and dtypes.

    Args:
      path: a folder, a llama2.c file, or hub:ID.
      form: hf, meta, ours or llama2c; recognised if none.
      overrides: what its files leave out or have wrong.

    Raises:
      UserError: it is not a whole checkpoint of that form.
    """
    path = locate(path)
    form = form or recognise(path)
    if form == "llama2c" and path.is_dir():
        path = path / "model.bin"
    if not path.exists():
        raise UserError(f"{path} does not exist; name a checkpoint's folder")
    try:
        if form == "ours" and (found := read_adapters(find_checkpoints(path)[-1])):
            adapters, lora, base = found
            return AdaptedSource(form, open_source(base, overrides=overrides), adapters, lora, base)
        if form == "peft":
            return _open_peft(path, overrides)
        return _SOURCES[form](path, overrides)
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:  # a field of a JSON file that is not what it should be
        raise UserError(
            f"{path} cannot be read as {form}: {type(error).__name__}: {error}; is it another form?"
        ) from error


def _open_peft(folder: Path, overrides: Overrides) -> AdaptedSource:
    base = read_json(folder / peft.CONFIG).get("base_model_name_or_path") or ""
    if not base or not Path(base).exists():
        raise UserError(
            f"{folder} holds adapters for the model {base!r}, which is not here; fetch it (llama-jax download) and write "
            f"its folder as base_model_name_or_path into {peft.CONFIG}"
        )
    opened = open_source(base, overrides=overrides)
    adapters, lora = peft.read_peft(folder, opened.config)
    return AdaptedSource("peft", opened, adapters, lora, base)


def convert(
    src: str | Path,
    dst: str | Path,
    to: Form,
    *,
    form: Form | None = None,
    output: Output = Output(),
    overrides: Overrides = Overrides(),
    dry_run: bool = False,
) -> dict[str, Any]:
    """Converts a checkpoint; the destination appears whole, under its name, or not at all.

    Args:
      src: the checkpoint.
      dst: a folder that does not exist yet.
      to: the form to write.
      form: that of `src`; recognised if none.
      output: how to write.
      overrides: how to read.
      dry_run: check the source, and write nothing.

    Returns:
      what was done, or would be: forms, parameters, bytes, dtypes, and notes.

    Raises:
      UserError: the source is not whole, the destination exists, or its form cannot hold the model.
    """
    report, opened, dtypes = _prepare(src, dst, to, form, output, overrides)
    if dry_run:
        return report | {"written": False}
    if to == "peft":
        with _whole(Path(dst), report["bytes"]) as folder:
            peft.write_peft(folder, opened.adapters, opened.lora, opened.config, opened.base_path)
        return report | {"written": True}
    sizes = {name: math.prod(layout.shape(opened.config, name)) * dtypes[name].itemsize for name in dtypes}
    with (
        _whole(Path(dst), report["bytes"]) as folder,
        _sink(to, folder, opened, dtypes, output) as sink,
        _progress(report["bytes"], f"{opened.form} to {to}") as advance,
    ):
        for name, layer, weight in _read_ahead(opened, sink.order):
            sink.write(name, layer, cast(weight, dtypes[name], layout.title(name, layer)))
            del weight  # before the next but one is read
            advance(sizes[name])
        opened.finish()
    return report | {"written": True}


def _prepare(
    src: str | Path, dst: str | Path, to: Form, form: Form | None, output: Output, overrides: Overrides
) -> tuple[dict[str, Any], Source, dict[str, np.dtype]]:
    dst = Path(dst)
    if dst.name in ("", ".."):
        raise UserError(f"{dst} has no name of its own, under which to appear when it is whole; name a new folder")
    opened = open_source(src, form, overrides)
    dtypes = _dtypes(opened, output.dtype)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise UserError(f"{dst} exists already; name another folder, or remove it first")
    if to == "peft" and not isinstance(opened, AdaptedSource):
        raise UserError(
            f"{src} holds a whole model and no adapters, which are all that peft's form holds; take --to hf"
        )
    declared = layout.parameters(opened.config)
    size = sum(math.prod(p.shape) * dtypes[name].itemsize for name, p in declared.items())
    names = {dtype.name for dtype in dtypes.values()}
    if to == "peft":
        leaves = jax.tree.leaves(opened.adapters)
        size, names = sum(leaf.nbytes for leaf in leaves), {leaf.dtype.name for leaf in leaves}
    report = {
        "from": opened.form,
        "to": to,
        "folder": str(dst),
        "config": dataclasses.asdict(opened.config),
        "parameters": opened.config.n_params,
        "bytes": size,
        "dtypes": sorted(names),
        "tokenizer": source.TOKENIZER in opened.assets or output.tokenizer is not None,
        "notes": opened.notes,
    }
    return report, opened, dtypes


def _read_ahead(opened: Source, order: list[layout.Weight]) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """The weights in order; the next is read while the caller works on one, so that two are in memory."""
    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(opened.read, *order[0])
        for i, (name, layer) in enumerate(order):
            weight = reading.result()
            if i + 1 < len(order):
                reading = reader.submit(opened.read, *order[i + 1])
            yield name, layer, weight
            del weight


def cast(weight: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
    """The weight in another dtype; itself if it has it.

    Raises:
      UserError: a finite weight is too large for the dtype.
    """
    if weight.dtype == dtype:
        return weight
    narrow = np.asarray(jnp.asarray(weight).astype(dtype))
    fits = np.isfinite(narrow)
    if not fits.all() and np.isfinite(weight[~fits]).any():
        raise UserError(f"{what} holds numbers that {dtype.name} cannot; take --dtype bfloat16 or float32")
    return narrow


def _dtypes(opened: Source, asked: str | None) -> dict[str, np.dtype]:
    if asked is None:
        return opened.dtypes
    if asked not in source.WEIGHT_DTYPES:
        raise UserError(f"--dtype is {asked!r}; it is one of {', '.join(source.WEIGHT_DTYPES)}")
    return dict.fromkeys(opened.dtypes, source.WEIGHT_DTYPES[asked])


def _sink(to: Form, folder: Path, opened: Source, dtypes: dict[str, np.dtype], output: Output) -> Any:
    assets = dict(opened.assets)
    if output.tokenizer is not None:
        from llama_jax.text.tokenizer import Tokenizer

        # What came along describes the other tokenizer.
        assets = {name: content for name, content in assets.items() if name not in source.TOKENIZER_FILES}
        assets[source.TOKENIZER] = Tokenizer.load(output.tokenizer).model_bytes
    if to == "hf":
        return HuggingFaceSink(folder, opened.config, dtypes, assets)
    if to == "meta":
        return MetaSink(folder, opened.config, dtypes, assets.get(source.TOKENIZER), output.shards)
    if to == "llama2c":
        return Llama2cSink(folder, opened.config, dtypes, assets.get(source.TOKENIZER), output.llama2c_version)
    return OurSink(folder, opened.config, dtypes, assets)


@contextmanager
def _whole(dst: Path, size: int) -> Iterator[Path]:
    """A temporary folder beside the destination that takes its name if all goes well, and goes away if not."""
    temporary = dst.with_name(f"{dst.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    if temporary.exists():
        raise UserError(f"{temporary}, which {dst} is called while it is made, is there already; remove it")
    temporary.mkdir(parents=True)
    try:
        if (free := shutil.disk_usage(temporary).free) < size:
            raise UserError(
                f"{dst} will take {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free there; "
                "free some space, or name a folder on another disk"
            )
        yield temporary
        if dst.exists():
            dst.rmdir()
        temporary.rename(dst)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # By text, because TensorStore and Orbax wrap what the system said in exceptions of their own.
        refused = [reason for reason in map(os.strerror, _NO_ROOM) if reason in str(error)]
        if refused and not isinstance(error, UserError):
            raise UserError(
                f"{dst} could not be written ({refused[0]}), and nothing of it is left; it takes {size / 1e9:.1f} GB: "
                "free some space, or name a folder on another disk"
            ) from error
        raise


@contextmanager
def _progress(total: int, what: str) -> Iterator[Any]:
    """A bar with bytes, rate and time left on stderr; on a pipe or in a file, its last state alone."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda size: bar.advance(task, size)


def summary(report: dict[str, Any]) -> str:
    """What was done, or would be, for people."""
    lines = [f"note: {note}" for note in report["notes"]]
    if not report["tokenizer"]:
        lines.append("note: no tokenizer.model came with it; --tokenizer names one")
    n_bytes = f"{report['bytes'] / 1e6:.1f} MB" if report["bytes"] < 1e8 else f"{report['bytes'] / 1e9:.2f} GB"
    size = f"a model of {report['parameters']:,} parameters, {n_bytes} of {', '.join(report['dtypes'])}"
    would = "" if report["written"] else "would be written: "
    return "\n".join([*lines, f"{report['folder']}: {would}{report['from']} to {report['to']}, {size}"])
