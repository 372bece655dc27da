"""Peak memory of conversion and of loading does not grow with the model: a checkpoint of several GB, measured by the kernel."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llama_jax.config import LLAMA2_7B
from llama_jax.conversion import layout
from llama_jax.conversion.huggingface import config_to_hf

CONFIG = replace(LLAMA2_7B, n_layers=5)
BYTES = 2 * CONFIG.n_params
LARGEST = 2 * CONFIG.vocab_size * CONFIG.dim
GIB = 2**30

MEASURE = """
import re
from pathlib import Path
from llama_jax.conversion.convert import convert
from llama_jax.conversion.load import place
from llama_jax.conversion.convert import open_source
from llama_jax.parallel.mesh import make_mesh
import jax
{work}
# Not ru_maxrss, which a process inherits from the one that started it: pytest's own may be larger than what is measured.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A 2.5 GB Hugging Face folder that is a hole on the disk but for its header; removed when the tests are done."""
    root = tmp_path_factory.mktemp("memory")
    if shutil.disk_usage(root).free < 3 * BYTES:
        pytest.skip(f"{3 * BYTES / 1e9:.0f} GB of disk are needed")
    hf = root / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(config_to_hf(CONFIG, np.dtype(np.float16))))
    header, at = {}, 0
    for name, layer in layout.weights(CONFIG):
        shape = layout.matrix_shape(CONFIG, name)
        end = at + 2 * math.prod(shape)
        header[layout.PLACES[name].hf.format(layer)] = {"dtype": "F16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (hf / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    yield root
    shutil.rmtree(root)


def peak(work: str) -> int:
    """The largest resident size in bytes of a process that does this."""
    command = [sys.executable, "-c", MEASURE.format(work=work)]
    optimised = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # what goes over gigabytes gains by it
    return int(subprocess.run(command, env=optimised, check=True, capture_output=True, text=True).stdout)


def test_there_and_back(folder: Path):
    assert BYTES > 1.5 * (2 * LARGEST + GIB)
    there = peak(f"convert({str(folder / 'hf')!r}, {str(folder / 'ours')!r}, 'ours')")
    back = peak(f"convert({str(folder / 'ours')!r}, {str(folder / 'meta')!r}, 'meta')")
    assert max(there, back) < 2 * LARGEST + GIB, f"{there / GIB:.2f} and {back / GIB:.2f} GiB"


@pytest.mark.parametrize(("int8", "held"), [(False, BYTES), (True, 0.58 * BYTES)])
def test_loading_needs_little_beside_the_model(folder: Path, int8: bool, held: float):
    """On a CPU the devices' memory is the host's, so the model itself counts; in 8 bits it is half, the embedding aside."""
    work = f"model = place(open_source({str(folder / 'hf')!r}), make_mesh(devices=jax.devices()[:1]), int8={int8})"
    used = peak(work + "; jax.block_until_ready(model)")
    assert used < held + 2 * LARGEST + GIB, f"{used / GIB:.2f} GiB for {held / GIB:.2f}"
