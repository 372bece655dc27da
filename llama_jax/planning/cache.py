"""Plans kept on disk: compiling one takes minutes, and the same question has the same answer."""

import dataclasses
import hashlib
import json
import os
from functools import cache
from pathlib import Path

from llama_jax.parallel.mesh import mesh_sizes_of
from llama_jax.planning.plan import Plan, from_json, to_json, versions
from llama_jax.planning.programs import Job
from llama_jax.planning.topology import Topology

PACKAGE = Path(__file__).resolve().parent.parent
# Where a run writes and how often it logs is not in the compiled step.
_NOT_COMPILED = (
    "out",
    "resume",
    "dry_run",
    "json",
    "loop",
    "data",
    "tokenizer",
    "sample_prompts",
    "init_from",
    "checkpoint",
)
_ENVIRONMENT = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")


def cache_folder() -> Path:
    """Where plans are kept: llama_jax/plans in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama_jax" / "plans"


def key_of(job: Job, topology: Topology) -> str:
    """What a plan depends on: the resolved recipe, the topology, the compiler's version and flags, and this package's code."""
    recipe = {name: value for name, value in dataclasses.asdict(job.config).items() if name not in _NOT_COMPILED}
    recipe["mesh"] = mesh_sizes_of(job.config.mesh, topology.chips, topology.slices)
    parts = {
        "stage": job.stage,
        "recipe": recipe,
        "model": dataclasses.asdict(job.model),
        "topology": str(topology),
        "versions": versions(topology),
        "environment": {name: os.environ.get(name, "") for name in _ENVIRONMENT},
        "source": _source(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def read(key: str) -> Plan | None:
    """The plan kept under a key; None where there is none, or none that can be read."""
    try:
        return from_json(json.loads((cache_folder() / f"{key}.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(key: str, plan: Plan) -> None:
    """Keeps a plan; a folder that cannot be written to costs the next call its minutes, and nothing else."""
    path = cache_folder() / f"{key}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")  # two plans at once may write the same one
        temporary.write_text(json.dumps(to_json(plan)))
        temporary.replace(path)
    except OSError:
        pass


@cache
def _source() -> str:
    """A fingerprint of the package's code."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
