"""Attention and a model compiled ahead of time for TPUs that are not there."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu, which compiles for TPU: pip install 'llama_jax[dev]'"
)


@pytest.fixture(scope="module")
def reports() -> dict[str, dict]:
    """What tests/model/aot_tpu.py prints; it runs in a process of its own, which alone loads libtpu."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
    }
    script = Path(__file__).with_name("aot_tpu.py")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", ["7B on v5e", "70B on v5p", "70B on v6e"])
def test_auto_is_the_splash_kernel_with_segments(reports, case):
    report = reports[case]
    assert report["kernels"] == 3  # forward; backward for queries; backward for keys and values
    assert report["segmented"]
    assert report["bytes"] < report["dense_bytes"] / 4


def test_the_xla_path_compiles_and_never_holds_all_scores(reports):
    report = reports["7B on v5e, xla"]
    assert report["kernels"] == 0
    assert report["bytes"] < report["dense_bytes"]


def test_a_block_that_keeps_its_attention_runs_the_forward_kernel_once(reports):
    # The scan over layers holds each kernel once; a fourth would be the forward pass again, inside the backward.
    assert reports["model"]["kernels"] == 3
    assert reports["model"]["segmented"]
