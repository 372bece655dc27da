"""A tiny pretraining run: its corpus, its recipe, and how to start it in a process of its own."""

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import jax
import pytest

from llama_jax.errors import Preempted
from llama_jax.parallel.mesh import make_mesh
from llama_jax.training.checkpoint import read_metadata
from llama_jax.training.metrics import read_metrics
from llama_jax.training.preemption import StopSignal

WORDS = ("the", "plain", "rain", "in", "spain", "stays", "mainly", "on", "quick", "brown", "fox", "and", "lazy", "1984")
STEPS = 20

RECIPE = """
from llama_jax.config import Compute, LlamaConfig
from llama_jax.data.pipeline import DataConfig
from llama_jax.stages.pretrain import PretrainConfig
from llama_jax.training.loop import LoopConfig
from llama_jax.training.optimizer import OptimizerConfig

config = PretrainConfig(
    model=LlamaConfig(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, head_dim=8, vocab_size=304, context_length=16
    ),
    train_tokens={steps} * 8 * 16,
    batch_tokens=8 * 16,
    tokenizer={tokenizer!r},
    data=DataConfig(sources=({source!r},), held_out=0.1),
    optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=4),
    compute=Compute(dtype="float32", remat="none"),
    loop=LoopConfig(log_every=1, eval_every=10, save_every=5, keep_last=3),
    sample_prompts=(),
)
"""


def write_corpus(path: Path) -> Path:
    """60 documents of some words each."""
    generator = random.Random(0)
    texts = [f"{n}: " + " ".join(generator.choices(WORDS, k=generator.randint(1, 30))) + "\n" for n in range(60)]
    path.write_text("<|endoftext|>\n".join(texts))
    return path


def write_recipe(folder: Path, corpus: Path, tokenizer: Path | str = "", steps: int = STEPS) -> str:
    recipe = folder / "recipe.py"
    recipe.write_text(RECIPE.format(source=f"text:{corpus}", tokenizer=str(tokenizer), steps=steps))
    return str(recipe)


def start(arguments: list[str], devices: int = 1, **environment: str) -> subprocess.Popen:
    """Starts `llama-jax` with these arguments on so many fake devices."""
    return subprocess.Popen(
        [sys.executable, "-m", "llama_jax.cli", *arguments],
        env={
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
            **environment,
        },
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_address() -> str:
    """An address of this machine for the processes of a run to meet at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def finish(process: subprocess.Popen, seconds: float = 240) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, stdout, stderr


def learned(folder: Path) -> list[dict]:
    """A run's metrics without the times, in order."""
    clocks = {"train/tokens_per_s", "train/data_wait", "train/mfu"}
    return [
        {
            name: value
            for name, value in record.items()
            if name not in clocks and not name.startswith(("time/", "speed/"))
        }
        for record in read_metrics(folder)
    ]


def newest(folder: Path) -> dict:
    """What the newest checkpoint of a run says of itself: step, fingerprint of every array, data cursor."""
    step = max(int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit())
    metadata = read_metadata(folder / "checkpoints" / str(step))
    return {"step": step, "fingerprints": metadata["fingerprints"], "cursor": metadata["cursor"]}


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Equal to the bit: every logged number, every array of the last checkpoint, and the place in the data."""
    assert learned(ours) == learned(theirs)
    assert json.dumps(newest(ours), sort_keys=True) == json.dumps(newest(theirs), sort_keys=True)


def on_one_device(stage: ModuleType) -> Callable[[], Iterator[None]]:
    """A fixture: a module's runs of a stage take the first of the eight devices, and what they compile is kept."""

    @pytest.fixture(scope="module", autouse=True)
    def one_device():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage, "make_mesh", lambda text: make_mesh(text, jax.devices()[:1]))
            yield

    return one_device


@contextmanager
def stopped_at(place: int, saved: str) -> Iterator[None]:
    """SIGTERM comes where a run asks for the `place`-th time; then it ends, and says that it saved, for example, "step 7"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopSignal, "received", lambda self, asked: "SIGTERM" if asked == place else None)
        with pytest.raises(Preempted, match=f"{saved} is saved"):
            yield
