"""What this machine has, what is missing or wrong, and the command that repairs it."""

import importlib.metadata
import json
import operator
import os
import re
import shlex
import shutil
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "info", "warn", "wrong"]

# Read by jax and its plugins; a run that behaves oddly is often explained by one of them.
_ALWAYS_SHOWN = ("JAX_PLATFORMS", "XLA_FLAGS", "LIBTPU_INIT_ARGS")
_SHOWN_IF_SET = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_ENABLE_X64",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_NUM_CPU_DEVICES",
    "CUDA_VISIBLE_DEVICES",
    "TPU_VISIBLE_DEVICES",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
)
_COMPARE = {">=": operator.ge, "<=": operator.le, "<": operator.lt, ">": operator.gt, "==": operator.eq}


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    section: str
    name: str
    text: str
    """What a reader sees."""
    value: Any
    """The same for programs: numbers in bytes, FLOP/s or counts."""
    status: Status = "info"
    remedy: str = ""
    """What repairs it or adds it, as a command where there is one."""


def run(as_json: bool) -> int:
    """Prints the report, a table in a terminal and lines on a pipe; returns 0, or 2 if something required is wrong."""
    checks = list(examine())
    ok = all(check.status != "wrong" for check in checks)
    if as_json:
        print(json.dumps({"ok": ok, "checks": [asdict(check) for check in checks]}, indent=2))
    elif sys.stdout.isatty():
        _print_table(checks)
    else:
        for c in checks:
            print(f"{c.section:<9} {c.name:<20} {c.status:<6} {c.text}" + (f"  -> {c.remedy}" if c.remedy else ""))
    return 0 if ok else 2


def examine() -> Iterator[Check]:
    """Looks at everything, in the order in which one thing needs the other; jax is imported only if it is there."""
    yield python_check(sys.version_info[:3])
    requirements = _requirements()
    missing = []
    for requirement, extra in requirements:
        if extra is None:
            check = package_check(requirement)
            missing += [requirement] if check.status == "wrong" else []
            yield check
    yield from _extras(requirements)
    yield from _host()
    yield from _environment()
    if any(name_of(requirement) in ("jax", "numpy") for requirement in missing):
        yield Check("devices", "jax", "not looked for: jax or numpy is missing", None, "wrong")
    else:
        yield from _devices()


def python_check(version: tuple[int, int, int]) -> Check:
    """Whether the running Python is one that the project supports."""
    text = ".".join(map(str, version))
    if (3, 11) <= version < (3, 14):
        return Check("software", "python", text, text, "ok")
    return Check("software", "python", f"{text}, needs 3.11 to 3.13", text, "wrong", "make PYTHON=python3.11 venv")


def package_check(requirement: str) -> Check:
    """Whether a package is installed in the range that `requirement` ("flax>=0.12.8,<0.13") allows."""
    name = name_of(requirement)
    version = _version(name)
    if version is None:
        return Check("software", name, "missing", None, "wrong", pip_install([requirement]))
    if satisfies(version, requirement):
        return Check("software", name, version, version, "ok")
    text = f"{version}, needs {requirement[len(name) :]}"
    return Check("software", name, text, version, "wrong", pip_install([requirement]))


def satisfies(version: str, requirement: str) -> bool:
    """Whether a version lies in the range of a requirement; suffixes such as rc1 and +cpu are not looked at."""
    bounds = re.findall(r"(>=|<=|==|<|>)\s*([0-9][0-9.]*)", requirement)
    # 0.13 and 0.13.0 are the same version: compare without trailing zeros.
    return all(_COMPARE[sign](_release(version), _release(bound)) for sign, bound in bounds)


def name_of(requirement: str) -> str:
    """The package's name in a requirement: "jax" of "jax[tpu]>=0.10"."""
    return re.match(r"[A-Za-z0-9._-]+", requirement).group()


def pip_install(requirements: list[str]) -> str:
    """The command that installs requirements into the Python that runs this."""
    inside = Path(sys.executable).absolute().is_relative_to(Path.cwd())
    python = os.path.relpath(sys.executable) if inside else sys.executable
    return shlex.join([python, "-m", "pip", "install", *requirements])


def matmul_flops_per_s(device: Any, size: int, dtype: Any, chained: int = 8) -> float:
    """Measured FLOP/s of `size`-cubed matmuls on one device, the best of three timings of `chained` of them."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def chain(x_DD, w_DD):
        return jax.lax.fori_loop(0, chained, lambda _, y_DD: y_DD @ w_DD, x_DD)

    # Random signs over sqrt(size) keep the norm of a row, so that the chain neither overflows nor vanishes.
    signs_DD = jax.random.rademacher(jax.random.key(0), (size, size), dtype=jnp.float32)
    x_DD = jax.device_put((signs_DD / size**0.5).astype(dtype), device)
    chain(x_DD, x_DD).block_until_ready()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        chain(x_DD, x_DD).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 * chained / min(seconds)


def matmul_is_exact(device: Any) -> bool:
    """Whether a device multiplies small integers in bf16 with fp32 sums exactly as the host does in int64."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    random = np.random.default_rng(0)
    # |entries| <= 8 and 256 terms: every product and partial sum is an integer that fp32 holds exactly.
    a_TD, b_DF = random.integers(-8, 9, (64, 256)), random.integers(-8, 9, (256, 128))
    a, b = (jax.device_put(jnp.asarray(m, jnp.bfloat16), device) for m in (a_TD, b_DF))
    return bool(np.array_equal(np.asarray(jnp.matmul(a, b, preferred_element_type=jnp.float32)), a_TD @ b_DF))


def _extras(requirements: list[tuple[str, str | None]]) -> Iterator[Check]:
    hardware = {"cuda": ("an NVIDIA GPU", _has_nvidia_gpu()), "tpu": ("a TPU", _has_tpu())}
    for extra in dict.fromkeys(extra for _, extra in requirements if extra):
        absent = [requirement for requirement, of in requirements if of == extra and not _is_installed(requirement)]
        if not absent:
            yield Check("extras", extra, "installed", True, "ok")
            continue
        what, present = hardware.get(extra, ("", False))
        unused = present and any(requirement.startswith("jax[") for requirement in absent)
        text = f"not installed: {', '.join(absent)}" + (
            f"; jax does not use this machine's device, {what}" if unused else ""
        )
        yield Check("extras", extra, text, False, "warn" if unused else "info", pip_install(absent))


def _host() -> Iterator[Check]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("host", "cpu cores", f"{usable} usable of {os.cpu_count()}", usable)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit_file = Path("/sys/fs/cgroup/memory.max")  # what a container may use
    limit = limit_file.read_text().strip() if limit_file.is_file() else "max"
    total = total if limit == "max" else min(total, int(limit))
    yield Check("host", "memory", f"{total / 1e9:.1f} GB", total)
    free = shutil.disk_usage(os.getcwd()).free
    yield Check("host", "disk free here", f"{free / 1e9:.1f} GB in {os.getcwd()}", free)


def _environment() -> Iterator[Check]:
    for name in _ALWAYS_SHOWN + tuple(name for name in _SHOWN_IF_SET if name in os.environ):
        yield Check("flags", name, os.environ.get(name, "not set"), os.environ.get(name))


def _devices() -> Iterator[Check]:
    import jax
    import jax.numpy as jnp

    from llama_jax.planning.hardware import detect

    try:
        devices = jax.local_devices()
    except RuntimeError as error:  # jax found a plugin but not its device, or JAX_PLATFORMS names one that is not here
        text = str(error).splitlines()[0]
        yield Check("devices", "jax", text, None, "wrong", "JAX_PLATFORMS=cpu llama-jax doctor, to see the rest")
        return
    cache = jax.config.jax_compilation_cache_dir
    yield Check(
        "devices", "compile cache", cache or "off (JAX_COMPILATION_CACHE_DIR=DIR keeps compiled programs)", cache
    )
    yield Check("devices", "count", f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})", len(devices))
    for device in devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            limit, used = stats["bytes_limit"], stats["bytes_in_use"]
            yield Check("devices", f"memory {device.id}", f"{limit / 1e9:.1f} GB, {used / 1e9:.1f} in use", limit)
        exact = matmul_is_exact(device)
        text = "exact" if exact else "WRONG: small integers do not multiply exactly"
        remedy = "" if exact else "leave this device out, or update its driver and jax"
        yield Check("devices", f"matmul {device.id}", text, exact, "ok" if exact else "wrong", remedy)
    first, chip = devices[0], detect(devices[0])
    on_cpu = first.platform == "cpu"
    speed = matmul_flops_per_s(first, 1024 if on_cpu else 8192, jnp.float32 if on_cpu else jnp.bfloat16)
    share = f", {speed / chip.device_peak_bf16_flops:.0%} of its {chip.name} peak" if chip else ""
    kind = "fp32" if on_cpu else "bf16"
    yield Check("devices", f"matmul speed {first.id}", f"{speed / 1e12:.3g} TFLOP/s {kind}{share}", speed)


def _requirements() -> list[tuple[str, str | None]]:
    """Every dependency with its extra, None for the required ones; the checkout's, else the installed package's."""
    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text())["project"]
        extras = project["optional-dependencies"].items()
        return [(r, None) for r in project["dependencies"]] + [(r, extra) for extra, members in extras for r in members]
    found = []
    for line in importlib.metadata.requires("llama_jax") or []:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra == ['\"](\w+)['\"]", marker)
        found.append((requirement.strip(), extra and extra.group(1)))
    return found


def _is_installed(requirement: str) -> bool:
    # The extras of jax are plugins of other names, which jax itself holds to its own version.
    plugins = {"jax[tpu]": ("libtpu",), "jax[cuda12]": ("jax-cuda12-plugin", "jax-cuda13-plugin")}.get(requirement)
    if plugins:
        return any(_version(plugin) for plugin in plugins)
    version = _version(name_of(requirement))
    return version is not None and satisfies(version, requirement)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _has_nvidia_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _has_tpu() -> bool:
    # Up to v4 the driver makes /dev/accel*; later chips hang on vfio, so they are known by Google's PCI ids.
    later = {"0x0062", "0x0063", "0x006f", "0x0076"}
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            ids = (device / "vendor").read_text().strip(), (device / "device").read_text().strip()
        except OSError:
            continue
        if ids[0] == "0x1ae0" and ids[1] in later:
            return True
    return any(Path("/dev").glob("accel[0-9]*"))


def _release(version: str) -> tuple[int, ...]:
    numbers = [int(n) for n in re.match(r"[0-9.]*", version).group().split(".") if n]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _print_table(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table("", "", "", box=None, show_header=False)
    colour = {"ok": "green", "info": "default", "warn": "yellow", "wrong": "bold red"}
    section = None
    for check in checks:
        heading = f"[bold]{check.section}[/]" if check.section != section else ""
        section = check.section
        table.add_row(heading, check.name, f"[{colour[check.status]}]{escape(check.text)}[/]")
    console.print(table)
    for check in checks:
        if check.remedy:
            # Unwrapped, so that the command can be copied.
            console.print(f"  {escape(check.name)}: [bold]{escape(check.remedy)}[/]", soft_wrap=True, highlight=False)
