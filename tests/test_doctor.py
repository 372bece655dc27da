"""The doctor: right about versions, exact about devices, and it ends with 2 when something required is missing."""

import json

import jax
import jax.numpy as jnp
import pytest

from llama_jax import cli, doctor


@pytest.mark.parametrize(
    ("version", "requirement", "expected"),
    [
        ("0.10.0", "jax>=0.10,<0.13", True),
        ("0.12.0.1", "jax>=0.10,<0.13", True),
        ("0.13.0", "jax>=0.10,<0.13", False),
        ("0.9.2", "jax>=0.10,<0.13", False),
        ("0.12.10", "flax>=0.12.8,<0.13", True),
        ("2.13.0+cpu", "torch==2.13", True),
        ("1.0.17", "tyro>=1.0", True),
        ("5.0", "jax[tpu]", True),
    ],
)
def test_versions_are_numbers_not_text(version, requirement, expected):
    assert doctor.satisfies(version, requirement) is expected


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10, 9), "wrong"), ((3, 11, 0), "ok"), ((3, 13, 9), "ok"), ((3, 14, 0), "wrong")]
)
def test_supported_pythons(version, status):
    assert doctor.python_check(version).status == status


def test_json_describes_this_machine(capfd):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    checks = {(check["section"], check["name"]): check for check in report["checks"]}
    assert report["ok"] is True
    assert checks["devices", "count"]["value"] == len(jax.devices())
    assert all(checks["devices", f"matmul {device.id}"]["value"] is True for device in jax.devices())
    assert checks["software", "jax"]["value"] == jax.__version__
    assert 1e8 < checks["devices", "matmul speed 0"]["value"] < 1e16
    assert checks["host", "memory"]["value"] > 1e9


def test_lines_on_a_pipe(capfd):
    assert cli.main(["doctor"]) == 0
    out = capfd.readouterr().out
    assert "\x1b" not in out and "╭" not in out
    assert any(line.split()[:3] == ["software", "jax", "ok"] for line in out.splitlines())


@pytest.mark.parametrize("requirement", ["not-a-package-of-ours>=1.0", "numpy>=999"])
def test_a_missing_requirement_ends_with_2_and_its_command(capfd, monkeypatch, requirement):
    monkeypatch.setattr(doctor, "_requirements", lambda: [(requirement, None)])
    assert cli.main(["doctor"]) == 2
    line = next(line for line in capfd.readouterr().out.splitlines() if requirement.split(">=")[0] in line)
    assert " wrong " in line and f"-m pip install '{requirement}'" in line


def test_an_unused_gpu_is_a_warning_with_the_command(monkeypatch):
    monkeypatch.setattr(doctor, "_has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    (check,) = doctor._extras([("jax[cuda12]", "cuda")])
    assert check.status == "warn" and "NVIDIA GPU" in check.text and check.remedy.endswith("pip install 'jax[cuda12]'")
    monkeypatch.setattr(doctor, "_version", lambda name: "0.10.2" if name == "jax-cuda13-plugin" else None)
    (check,) = doctor._extras([("jax[cuda12]", "cuda")])
    assert check.status == "ok"


def test_a_device_that_multiplies_wrongly_is_found(capfd, monkeypatch):
    exact = jnp.matmul

    def slightly_wrong(a, b, **options):
        return exact(a, b, **options).at[3, 5].add(1.0)

    monkeypatch.setattr(jnp, "matmul", slightly_wrong)
    assert not doctor.matmul_is_exact(jax.devices()[0])
    assert cli.main(["doctor"]) == 2
    assert "WRONG" in capfd.readouterr().out


def test_no_backend_is_reported_not_raised(capfd, monkeypatch):
    def no_backend():
        raise RuntimeError("Unable to initialize backend 'tpu': no chips\nmore")

    monkeypatch.setattr(jax, "local_devices", no_backend)
    assert cli.main(["doctor"]) == 2
    out = capfd.readouterr().out
    assert "Unable to initialize backend 'tpu': no chips" in out and "JAX_PLATFORMS=cpu" in out
