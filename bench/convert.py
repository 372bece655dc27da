"""How fast checkpoints are converted, against `cp` of the same bytes on the same disk.

    python bench/convert.py                       # a 7B with 4 layers, 2.2 GB
    python bench/convert.py --layers 8 --folder /mnt/disk

Every direction and every copy ends with its bytes on the disk (fsync). The model's weights are random bits: no disk and no
compression can cheat on them. The runs alternate, because what a disk gives varies from minute to minute, and medians
are compared; the source is in the page cache for all of them.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from llama_jax.config import LLAMA2_7B
from llama_jax.conversion import layout
from llama_jax.conversion.convert import convert
from llama_jax.conversion.huggingface import HuggingFaceSink

DIRECTIONS = [("hf", "ours"), ("ours", "hf"), ("hf", "meta"), ("meta", "hf"), ("meta", "ours"), ("ours", "meta")]


def make_model(folder: Path, layers: int) -> int:
    """Writes a random float16 checkpoint in Hugging Face's form and returns its bytes."""
    config = replace(LLAMA2_7B, n_layers=layers)
    dtypes = dict.fromkeys(layout.parameters(config), np.dtype(np.float16))
    folder.mkdir()
    rng = np.random.default_rng(0)
    with HuggingFaceSink(folder, config, dtypes, {}) as sink:
        for name, layer in sink.order:
            shape = layout.shape(config, name)
            sink.write(name, layer, rng.integers(0, 2**15, shape, np.uint16).view(np.float16))
    return config.n_params * 2


def copy(src: Path, dst: Path) -> None:
    """`cp -r`, then every file to the disk."""
    subprocess.run(["cp", "-r", src, dst], check=True)
    for path in dst.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def seconds(action: Callable[[], object], dst: Path) -> float:
    """How long an action takes that makes a folder; the folder is removed again."""
    began = time.monotonic()
    action()
    taken = time.monotonic() - began
    shutil.rmtree(dst)
    return taken


def main() -> None:
    """Prints a line for each direction."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="layers of the 7B model")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; the temporary folder if none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folders = {form: Path(scratch) / form for form in ("hf", "meta", "ours")}
        size, out = make_model(folders["hf"], args.layers), Path(scratch) / "out"
        convert(folders["hf"], folders["meta"], "meta")
        convert(folders["hf"], folders["ours"], "ours")
        tasks = {"cp": partial(copy, folders["hf"], out)}
        tasks |= {f"{src} to {dst}": partial(convert, folders[src], out, dst) for src, dst in DIRECTIONS}
        times: dict[str, list[float]] = {name: [] for name in tasks}
        for _ in range(args.repeats):
            for name, task in tasks.items():
                times[name].append(seconds(task, out))
    rates = {name: size / statistics.median(taken) / 1e6 for name, taken in times.items()}
    if args.json:
        print(json.dumps({"bytes": size, "MB/s": rates}))
        return
    print(f"{size / 1e9:.2f} GB, medians of {args.repeats}")
    for name, rate in rates.items():
        print(f"{name:<14} {rate:6.0f} MB/s   {rate / rates['cp']:.2f} of cp")


if __name__ == "__main__":
    main()
