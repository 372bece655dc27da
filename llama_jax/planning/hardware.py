"""Chips as data: the peaks that MFU, rooflines and memory plans are measured against.

TPU figures are Google's published specifications, GPU figures NVIDIA's data sheets: dense bf16 (no sparsity), memory in
units of 1e9 bytes.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One accelerator chip; jax may show it as several devices."""

    name: str
    """Common name, such as "v5e" or "H100"."""
    peak_bf16_flops: float
    """Dense bf16 matmul peak of the chip, in FLOP/s."""
    hbm_bytes: float
    """Memory of the chip in bytes; the runtime reserves a little of it."""
    hbm_bytes_per_s: float
    """Memory bandwidth of the chip in bytes/s."""
    devices: int = 1
    """How many jax devices share the chip."""
    link_bytes_per_s: float = 0.0
    """Bandwidth in one direction, in bytes/s, of one link to a neighbouring TPU chip, or of a GPU to the others of its host;
    0: not known.
    """
    network_bytes_per_s: float = 0.0
    """The chip's share of its host's network to other slices or hosts, in one direction, in bytes/s; 0: not known."""
    clock_hz: float = 0.0
    """What the compiler's cycle estimates are counted in, in 1/s; 0: it makes none, or not known."""
    usable_bytes: float = 0.0
    """Of the memory, what a program can have, in bytes; 0: not known."""
    watts: float = 0.0
    """Published power of the chip under load, in watts; 0: none is published."""
    compute_capability: float = 0.0
    """NVIDIA's number of a GPU's generation; 0: no GPU of NVIDIA."""

    @property
    def slug(self) -> str:
        """Its name as a topology has it, such as h100 or a100-80gb."""
        return self.name.lower().replace(" ", "-")

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU, whose hosts are linked by a network alone."""
        return self.compute_capability > 0

    @property
    def device_peak_bf16_flops(self) -> float:
        """The peak of one jax device, in FLOP/s: what MFU divides by."""
        return self.peak_bf16_flops / self.devices


# Links: Google gives the bandwidth of a chip, both directions of its 6 (v4, v5p) or 4 (v5e, v6e) links together: 600, 400,
# 1200 and 800 GB/s. Network: 25, 50 and 100 Gbit/s a chip (v5e and v6e as a pod's over 256); v4 as v5p, our assumption. Clock:
# the peak over the FLOPs of a cycle, 32768 for each of a chip's 128 x 128 matrix units (8, 4, 8; v6e: 4 x 131072). Usable:
# what libtpu 0.0.42 says is there when a program does not fit. Power: v4 in Jouppi et al. 2023, the most that they measured;
# none is published for the other TPUs.
V4 = Chip(
    *("v4", 275e12, 32e9, 1.2e12),
    link_bytes_per_s=50e9,
    network_bytes_per_s=6.25e9,
    clock_hz=1.05e9,
    usable_bytes=30.75 * 2**30,
    watts=192.0,
)
V5E = Chip(
    *("v5e", 197e12, 16e9, 0.82e12),
    link_bytes_per_s=50e9,
    network_bytes_per_s=3.125e9,
    clock_hz=1.5e9,
    usable_bytes=15.75 * 2**30,
)
V5P = Chip(
    *("v5p", 459e12, 95e9, 2.77e12),
    link_bytes_per_s=100e9,
    network_bytes_per_s=6.25e9,
    clock_hz=1.75e9,
    usable_bytes=95.74 * 2**30,
)
V6E = Chip(
    *("v6e", 918e12, 32e9, 1.64e12),
    link_bytes_per_s=100e9,
    network_bytes_per_s=12.5e9,
    clock_hz=1.75e9,
    usable_bytes=31.25 * 2**30,
)
V7X = Chip("v7x", 2307e12, 192e9, 7.4e12, devices=2)

GPU_MEMORY_SHARE = 0.92
"""Of a GPU's memory, what verbs and experiments let XLA have; the rest is for CUDA, cuBLAS and NCCL. Our choice: XLA's own is 0.75,
with which a 7B does not train on an H200.
"""


# GPUs' power is the most that their data sheets let them draw; 80 GB A100s and H200s as SXM modules, cards draw less.
# Links are NVLink's (600 and 900 GB/s in both directions), or PCIe's 16 lanes of their generation where there is none. The
# network is that of NVIDIA's own hosts of eight: a port of 200 or 400 Gbit/s for each GPU. Usable: our share of what CUDA counts.
# The T4 has no bf16 units, and XLA computes such matmuls there in float32: the figure is that peak (fp16: 65 TFLOP/s).
def _usable(gib: float) -> float:
    return GPU_MEMORY_SHARE * gib * 2**30


_T4 = {"link_bytes_per_s": 16e9, "usable_bytes": _usable(14.56), "watts": 70.0, "compute_capability": 7.5}
_L4 = {"link_bytes_per_s": 32e9, "usable_bytes": _usable(22.0), "watts": 72.0, "compute_capability": 8.9}
_A100 = {"link_bytes_per_s": 300e9, "network_bytes_per_s": 25e9, "compute_capability": 8.0}
_H100 = {"link_bytes_per_s": 450e9, "network_bytes_per_s": 50e9, "compute_capability": 9.0}
T4 = Chip("T4", 8.1e12, 16e9, 0.32e12, **_T4)
L4 = Chip("L4", 121e12, 24e9, 0.3e12, **_L4)
A100_40GB = Chip("A100 40GB", 312e12, 40e9, 1.555e12, usable_bytes=_usable(39.4), **_A100)
A100_80GB = Chip("A100 80GB", 312e12, 80e9, 2.039e12, usable_bytes=_usable(79.1), watts=400.0, **_A100)
H100 = Chip("H100", 989e12, 80e9, 3.35e12, usable_bytes=_usable(79.1), watts=700.0, **_H100)
_PCIE = _H100 | {"link_bytes_per_s": 64e9, "network_bytes_per_s": 0.0}
H100_PCIE = Chip("H100 PCIe", 756e12, 80e9, 2.0e12, usable_bytes=_usable(79.1), watts=350.0, **_PCIE)
H200 = Chip("H200", 989e12, 141e9, 4.8e12, usable_bytes=_usable(139.8), watts=700.0, **_H100)

CHIPS = (V4, V5E, V5P, V6E, V7X, T4, L4, A100_40GB, A100_80GB, H100, H100_PCIE, H200)

# Part of jax's `device_kind` -> chip. The first match counts, so the longer of two names stands first.
_DEVICE_KINDS = (
    ("TPU v4 lite", None),  # v4i, an inference chip with other figures
    ("TPU v4", V4),
    ("TPU v5 lite", V5E),
    ("TPU v5e", V5E),
    ("TPU v5", V5P),  # jax says "TPU v5" or "TPU v5p"
    ("TPU v6", V6E),  # "TPU v6 lite" or "TPU v6e"
    ("TPU7x", V7X),
    ("TPU v7x", V7X),
    ("Tesla T4", T4),
    ("NVIDIA L4", L4),
    ("A100-SXM4-40GB", A100_40GB),
    ("A100-PCIE-40GB", A100_40GB),
    ("A100", A100_80GB),
    ("H100 PCIe", H100_PCIE),
    ("H100 NVL", None),  # 94 GB and a lower clock than the SXM part
    ("H100", H100),
    ("H200", H200),
)


def chip_of_kind(device_kind: str) -> Chip | None:
    """The chip that jax calls `device_kind`, or None where its peaks are not known (a CPU, an unlisted GPU)."""
    for part, chip in _DEVICE_KINDS:
        # "L40S" is no L4: after the part the name must end or go on with something that is no digit.
        at = device_kind.find(part)
        if at >= 0 and not device_kind[at + len(part) : at + len(part) + 1].isdigit():
            return chip
    return None


def detect(device) -> Chip | None:
    """The chip under a `jax.Device`, or None where its peaks are not known; MFU is not shown then."""
    return None if device.platform == "cpu" else chip_of_kind(device.device_kind)
