"""TPU slices and GPUs by name: how many chips there are, how they are linked, and which exist.

`v5p:4x4x4` names a shape of chips. `v5p-128` is the cloud's name of the same slice: for v4 and v5p it counts cores, two a
chip, for v5e (`v5e-16`, `v5litepod-16`) and v6e chips. `h100:8` names GPUs of one host, `h100:32` four hosts of eight.
"""

import math
import re
from dataclasses import dataclass

from llama_jax.errors import UserError
from llama_jax.planning.hardware import CHIPS, V4, V5E, V5P, V6E, Chip

# The shapes that Google lists, smallest first. Those of whole cubes are the usual ones; others of multiples of 4 exist.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4"),
    *("4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16"),
)
SHAPES = {"v4": _DEEP, "v5e": _FLAT, "v5p": (*_DEEP, "16x16x24"), "v6e": _FLAT}
_CHIPS: dict[str, Chip] = {chip.name: chip for chip in (V4, V5E, V5P, V6E)}
_CORES_IN_NAME = {"v4": 2, "v5p": 2}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e", "a100": "a100-80gb"}

GPUS: dict[str, Chip] = {chip.slug: chip for chip in CHIPS if chip.is_gpu}
GPUS_OF_HOST = 8
"""At most. Our choice: as NVIDIA's own hosts and most clouds' largest have it."""


@dataclass(frozen=True)
class Topology:
    """One or several slices of the same shape, or GPUs of one or several hosts."""

    chip: Chip
    shape: tuple[int, ...]
    """Chips along each dimension of a slice; GPUs of a host."""
    slices: int = 1
    """Of TPUs; the mesh axis `data` spans them."""
    hosts: int = 1
    """Of GPUs, whose mesh axes may all go over the network between hosts."""

    @property
    def name(self) -> str:
        """As it is asked for: v5p:4x4x4, or h100:32."""
        return f"{self.chip.slug}:{self.chips if self.chip.is_gpu else 'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """In all slices or hosts."""
        return math.prod(self.shape) * self.slices * self.hosts

    @property
    def closes(self) -> tuple[bool, ...]:
        """Which dimensions are rings, whose last chip is linked to the first, instead of lines.

        v5e and v6e close at 16 chips, v4 and v5p where a slice is made of whole cubes of 4x4x4; GPUs have a switch instead.
        """
        if self.chip.is_gpu:
            return (False,)
        if len(self.shape) == 2:
            return tuple(size == 16 for size in self.shape)
        return (all(size % 4 == 0 for size in self.shape),) * len(self.shape)

    def __str__(self) -> str:
        several = f"{self.slices} slices of " if self.slices > 1 else ""
        hosts = f" of {self.hosts} hosts" if self.hosts > 1 else ""
        return f"{several}{self.name}, {self.chips} chip{'s' * (self.chips > 1)}{hosts}"


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Reads `v5p:4x4x4`, a cloud name such as `v5p-128`, or `h100:8`, for one or several slices.

    Raises:
      UserError: there is no such chip, shape or count; lists those that there are.
    """
    if slices < 1:
        raise UserError(f"--slices is {slices}; it must be 1 or more")
    chip, _, count = text.strip().lower().partition(":")
    if (gpu := _ALIASES.get(chip, chip)) in GPUS:
        return _gpus(text, gpu, count, slices)
    match = re.fullmatch(r"([a-z]\w*)(?:-(\d+)|:(\d+(?:x\d+)*))", text.strip().lower())
    name = _ALIASES.get(match[1], match[1]) if match else ""
    if match is None or name not in _CHIPS:
        raise UserError(f"--topology {text!r} is not known; {_known()}")
    found = _of_count(name, int(match[2])) if match[2] else _of_shape(name, match[3])
    if found is None:
        raise UserError(f"--topology {text!r} is no shape of {name}; {_known((name,))}")
    return Topology(_CHIPS[name], found, slices)


def _gpus(text: str, name: str, count: str, slices: int) -> Topology:
    """So many GPUs. Raises UserError: that is no number of them that hosts have."""
    chip, number = GPUS[name], int(count) if count.isdigit() else 0
    hosts, rest = divmod(number, GPUS_OF_HOST)
    if slices > 1:
        raise UserError(f"--slices is for TPUs; --topology {name}:{slices * GPUS_OF_HOST} are GPUs of {slices} hosts")
    if 0 < number <= GPUS_OF_HOST:
        return Topology(chip, (number,))
    if not hosts or rest or not chip.network_bytes_per_s:
        several = f", or a multiple of {GPUS_OF_HOST} for several hosts" * bool(chip.network_bytes_per_s)
        raise UserError(f"--topology {text!r}: expected {name}:N with N of 1 to {GPUS_OF_HOST} GPUs of a host{several}")
    return Topology(chip, (GPUS_OF_HOST,), hosts=hosts)


def _of_count(name: str, count: int) -> tuple[int, ...] | None:
    chips, rest = divmod(count, _CORES_IN_NAME.get(name, 1))
    shapes = (tuple(map(int, shape.split("x"))) for shape in SHAPES[name])
    return next((shape for shape in shapes if math.prod(shape) == chips and not rest), None)


def _of_shape(name: str, text: str) -> tuple[int, ...] | None:
    shape = tuple(map(int, text.split("x")))
    largest = tuple(map(int, SHAPES[name][-1].split("x")))
    whole_cubes = len(shape) == 3 and all(size and size % 4 == 0 for size in shape) and list(shape) == sorted(shape)
    if text in SHAPES[name] or (len(largest) == 3 and whole_cubes and math.prod(shape) <= math.prod(largest)):
        return shape
    return None


def _cloud_name(name: str, shape: str) -> str:
    return f"{name}-{math.prod(map(int, shape.split('x'))) * _CORES_IN_NAME.get(name, 1)}"


def _known(names: tuple[str, ...] = tuple(SHAPES)) -> str:
    listed = (
        f"{name}: {', '.join(f'{shape} ({_cloud_name(name, shape)})' for shape in SHAPES[name])}" for name in names
    )
    gpus = f"; GPUs, CHIP:COUNT: {', '.join(GPUS)}" if len(names) > 1 else ""
    return "known are CHIP:SHAPE or the name behind it. " + "; ".join(listed) + gpus
