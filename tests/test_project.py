"""The project's files agree with each other: dependencies, reasons, pins, version."""

import itertools
import re
import tomllib
from pathlib import Path

import llama_jax
from llama_jax.doctor import name_of, satisfies

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_requirements_txt_is_the_same_set():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == PROJECT["dependencies"]


def test_every_dependency_has_its_reason():
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    for requirement in itertools.chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        (line, *_) = (line for line in lines if f'"{requirement}",' in line)
        assert len(line.partition("#")[2].split()) >= 2, f"{requirement} has no reason"


def test_the_lock_pins_what_the_project_allows():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.lock").read_text(), re.M))
    pins = {normal(name): version for name, version in pins.items()}
    extras = PROJECT["optional-dependencies"]
    for requirement in [*PROJECT["dependencies"], *extras["dev"], *extras["torch"]]:
        assert satisfies(pins[normal(name_of(requirement))], requirement), requirement
    assert "libtpu" in pins and not any("+" in version for version in pins.values())


def test_the_version_is_one():
    assert PROJECT["version"] == llama_jax.__version__
