"""Every test process plays a host with eight devices, and computes in full float32."""

import atexit
import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")

# Most tests run a small program a few times, so what LLVM's optimisations take is more than they give. XLA's own passes stay.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# Compiling is most of what tests wait for, and many compile the same, so all processes of a run keep what they compile in one
# folder. jax locks the folder only where its size has a limit; without, one process reads what another has half written.
if "PYTEST_XDIST_WORKER" not in os.environ:
    COMPILED = tempfile.mkdtemp(prefix="llama_jax-compiled-")
    atexit.register(shutil.rmtree, COMPILED, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**33)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

from pathlib import Path

import pytest

SHARED = Path(os.environ.get("LLAMA_JAX_SHARED", Path(__file__).parents[2] / "shared")) / "data"


# Files that take minutes, and what would else be the last: a worker that is given a long file at the end is alone with it.
FIRST = (
    "test_readme.py",
    "test_demo.py",
    "multi_process/test_drill.py",
    "stages/test_sft.py",
    "stages/test_ppo.py",
    "training/test_step.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]):
    """Puts the longest files first; xdist gives out files in this order."""
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(FIRST)}
    assert all(path.is_file() for path in ranks), FIRST
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED}; set LLAMA_JAX_SHARED to the folder that holds data/")
    return SHARED


@pytest.fixture(scope="module", autouse=True)
def _programs_of_other_modules():
    """Forgets what was compiled before once it fills a part of the memory: two workers otherwise come to hold most of it."""
    yield
    import jax

    if int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > 4 * 2**30:
        jax.clear_caches()
