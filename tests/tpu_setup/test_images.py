"""The images of TPU and CUDA: built by users, so what can be known without building is checked here."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kind", ["tpu", "cuda"])
def test_an_image_installs_this_project_for_its_devices(kind):
    text = (ROOT / "tpu_setup" / f"{kind}.Dockerfile").read_text()
    steps = dict(line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = tuple(map(int, re.fullmatch(r"python:(\d+)\.(\d+)-slim", steps["FROM"]).groups()))
    low, high = (tuple(map(int, one.split("."))) for one in re.findall(r"\d+\.\d+", project["requires-python"]))
    assert low <= version < high
    (extra,) = re.findall(r"-e '\.\[(\w+)\]'", steps["RUN"])
    assert extra == kind and any(f"jax[{kind}" in one for one in project["optional-dependencies"][extra])
    assert "-c requirements.lock" in steps["RUN"] and steps["COPY"] == ". ."
    assert steps["ENV"] == f"JAX_PLATFORMS={kind},cpu", "without its device it fails, instead of training on a CPU"


def test_what_need_not_be_in_an_image_is_left_out():
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv*", "runs"} <= set(ignored)
    kept = {"pyproject.toml", "requirements.lock", "README.md", "LICENSE", "llama_jax", "experiments", "tpu_setup"}
    assert not kept & set(ignored)
