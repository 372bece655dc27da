"""Chips: each jax device kind maps to its chip, and the numbers are the published ones."""

from types import SimpleNamespace

import jax
import pytest

from llama_jax.planning import hardware

# peak bf16 TFLOP/s, memory in GB, memory in TB/s, per chip
PUBLISHED = {
    "v4": (275, 32, 1.2),
    "v5e": (197, 16, 0.82),
    "v5p": (459, 95, 2.77),
    "v6e": (918, 32, 1.64),
    "v7x": (2307, 192, 7.4),
    "T4": (8.1, 16, 0.32),
    "L4": (121, 24, 0.3),
    "A100 40GB": (312, 40, 1.555),
    "A100 80GB": (312, 80, 2.039),
    "H100": (989, 80, 3.35),
    "H100 PCIe": (756, 80, 2.0),
    "H200": (989, 141, 4.8),
}

KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "v7x",
    "Tesla T4": "T4",
    "NVIDIA L4": "L4",
    "NVIDIA A100-SXM4-40GB": "A100 40GB",
    "NVIDIA A100-PCIE-40GB": "A100 40GB",
    "NVIDIA A100-SXM4-80GB": "A100 80GB",
    "NVIDIA A100 80GB PCIe": "A100 80GB",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H200": "H200",
}
UNKNOWN = [
    "cpu",
    "TPU v2",
    "TPU v3",
    "TPU v4 lite",
    "NVIDIA L40",
    "NVIDIA L40S",
    "NVIDIA H100 NVL",
    "NVIDIA GeForce RTX 4090",
]


def test_the_table_holds_the_published_numbers():
    table = {c.name: (c.peak_bf16_flops / 1e12, c.hbm_bytes / 1e9, c.hbm_bytes_per_s / 1e12) for c in hardware.CHIPS}
    assert table.keys() == PUBLISHED.keys()
    for name, numbers in PUBLISHED.items():
        assert table[name] == pytest.approx(numbers, rel=1e-12), name


@pytest.mark.parametrize("kind", KINDS)
def test_device_kind_names_its_chip(kind):
    platform = "tpu" if "TPU" in kind else "gpu"
    assert hardware.detect(SimpleNamespace(platform=platform, device_kind=kind)).name == KINDS[kind]


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_unlisted_kind_is_unknown_rather_than_a_neighbour(kind):
    assert hardware.chip_of_kind(kind) is None


def test_a_cpu_has_no_peak():
    assert hardware.detect(jax.devices("cpu")[0]) is None


def test_two_devices_share_a_v7x_chip():
    assert hardware.V7X.device_peak_bf16_flops == 2307e12 / 2
    assert all(chip.devices == 1 for chip in hardware.CHIPS if chip is not hardware.V7X)


# Both directions of all links, GB/s; the network between slices, Gbit/s a chip; matrix units of 128 x 128, or their equal.
LINKS = {"v4": (600, 6, 50, 8), "v5e": (400, 4, 25, 4), "v5p": (1200, 6, 50, 8), "v6e": (800, 4, 100, 16)}


@pytest.mark.parametrize("chip", [hardware.V4, hardware.V5E, hardware.V5P, hardware.V6E], ids=lambda chip: chip.name)
def test_links_network_and_clock_follow_from_what_is_published(chip):
    links, count, network, units = LINKS[chip.name]
    assert chip.link_bytes_per_s == links * 1e9 / count / 2
    assert chip.network_bytes_per_s == network * 1e9 / 8
    assert chip.clock_hz == pytest.approx(chip.peak_bf16_flops / (units * 2 * 128**2), rel=5e-3)
    assert 0.95 * chip.hbm_bytes < chip.usable_bytes < 1.1 * chip.hbm_bytes


# Both directions of NVLink, GB/s, or None for PCIe; the port of each GPU of a host of eight, Gbit/s; memory as CUDA counts it, GiB.
GPU_LINKS = {
    "T4": (None, 0, 14.56),
    "L4": (None, 0, 22.0),
    "A100 40GB": (600, 200, 39.4),
    "A100 80GB": (600, 200, 79.1),
    "H100": (900, 400, 79.1),
    "H100 PCIe": (None, 0, 79.1),
    "H200": (900, 400, 139.8),
}


@pytest.mark.parametrize("chip", [chip for chip in hardware.CHIPS if chip.is_gpu], ids=lambda chip: chip.name)
def test_a_gpus_links_and_memory_follow_from_what_is_published(chip):
    links, port, memory = GPU_LINKS[chip.name]
    assert links is None or chip.link_bytes_per_s == links * 1e9 / 2
    assert chip.network_bytes_per_s == port * 1e9 / 8
    assert chip.usable_bytes == pytest.approx(0.92 * memory * 2**30)
    assert chip.watts > 0 or chip is hardware.A100_40GB


def test_no_tpu_has_a_compute_capability():
    assert not any(chip.is_gpu for chip in (hardware.V4, hardware.V5E, hardware.V5P, hardware.V6E, hardware.V7X))
