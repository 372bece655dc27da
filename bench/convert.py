"""How fast checkpoints are converted, against `cp` of the same bytes on the same disk.

    python bench/convert.py                       # a 7B with 4 layers, 2.2 GB
    python bench/convert.py --layers 8 --folder /mnt/disk

Every direction and every copy ends with its bytes on the disk (fsync). The model's weights are random bits: no disk and no
compression can cheat on them. Each is run `--repeats` times and the best counts; the source is in the page cache for
all of them.
"""

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import replace
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


def best_seconds(repeats: int, action, dst: Path) -> float:
    """The shortest of several runs, each into a new folder that is removed again."""
    times = []
    for _ in range(repeats):
        shutil.rmtree(dst, ignore_errors=True)
        began = time.monotonic()
        action()
        times.append(time.monotonic() - began)
    return min(times)


def main() -> None:
    """Prints a line for each direction."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="layers of the 7B model")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; the temporary folder if none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folders = {form: Path(scratch) / form for form in ("hf", "meta", "ours")}
        size = make_model(folders["hf"], args.layers)
        convert(folders["hf"], folders["meta"], "meta")
        convert(folders["hf"], folders["ours"], "ours")
        out = Path(scratch) / "out"
        peer = size / best_seconds(args.repeats, lambda: copy(folders["hf"], out), out) / 1e6
        results = {"bytes": size, "cp": peer}
        if not args.json:
            print(f"{size / 1e9:.2f} GB; cp -r and fsync: {peer:.0f} MB/s")
        for src, dst in DIRECTIONS:
            seconds = best_seconds(args.repeats, lambda src=src, dst=dst: convert(folders[src], out, dst), out)
            rate = results[f"{src} to {dst}"] = size / seconds / 1e6
            if not args.json:
                print(f"{src:>5} to {dst:<5} {rate:6.0f} MB/s   {rate / peer:.2f} of cp")
        if args.json:
            print(json.dumps(results))


if __name__ == "__main__":
    main()
