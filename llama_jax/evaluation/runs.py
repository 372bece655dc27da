"""What a run's folder says of it, as a value: its recipe, what it logged, and how long it took on what."""

import dataclasses
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from llama_jax.errors import UserError
from llama_jax.training.metrics import read_metrics
from llama_jax.training.run_folder import differences

RESULTS = "results.json"  # of an evaluation
CARD = "MODEL_CARD.md"

# What a stage is called on a page, and the config that its recipes derive from.
STAGES = {
    "pretrain": ("Pretraining (paper 2.2)", "pretrain.PretrainConfig"),
    "sft": ("Supervised fine-tuning (paper 3.1)", "sft.SFTConfig"),
    "reward": ("Reward models (paper 3.2.2)", "reward.RewardConfig"),
    "dpo": ("Direct preference optimisation", "dpo.DPOConfig"),
    "rejection": ("Rejection sampling (paper 3.2.3)", "rejection.RejectionConfig"),
    "ppo": ("PPO (paper 3.2.3)", "ppo_config.PPOConfig"),
    "rlhf": ("Versions of a chat model (paper 3.2.3)", "rlhf_config.RLHFConfig"),
    "ghost_attention": ("Ghost Attention (paper 3.3)", "ghost_attention.GhostAttentionConfig"),
    "distillation": ("Safety context distillation (paper 4.2.4)", "distillation.DistillationConfig"),
}
VERSION = "rlhf version"  # a stage whose recipe is the recipes of the runs in its folder


@dataclass(frozen=True)
class Spell:
    """From a start of a run's loop to its last log."""

    began: datetime
    ended: datetime
    device: str
    """As jax calls it; empty if the run does not say."""
    devices: int
    """How many; 0 if the run does not say."""

    @property
    def device_hours(self) -> float:
        """Of all devices together."""
        return (self.ended - self.began).total_seconds() / 3600 * self.devices


@dataclass(frozen=True)
class Run:
    """One run of one stage."""

    folder: Path
    name: str
    """What it is called beside the others."""
    stage: str
    config: dict[str, Any]
    versions: dict[str, str]
    records: list[dict[str, Any]]
    """Of metrics.jsonl; none of a stage that logs nothing, or before the first."""
    spells: tuple[Spell, ...]
    """None of a stage that logs nothing."""

    @property
    def steps(self) -> int | None:
        """The last one that was logged; None of a stage that logs nothing."""
        return self.records[-1]["step"] if self.records else None

    @property
    def planned(self) -> int | None:
        """Steps that the recipe asks for, where it says so itself."""
        if self.stage == "pretrain":
            return -(-self.config["train_tokens"] // self.config["batch_tokens"])
        return self.config["iterations"] if self.stage == "ppo" else None

    @property
    def parent(self) -> str:
        """The checkpoint that it began with; empty if with random weights."""
        return self.config.get("checkpoint") or self.config.get("init_from") or ""


def run_folder(path: Path) -> Path | None:
    """The folder of the run that a path is, or that it is a checkpoint of; None if it is neither."""
    own = path.parent.parent if path.parent.name in ("checkpoints", "best") else path
    own = own.parent if own.name in ("checkpoints", "best") else own
    try:
        return own if "stage" in json.loads((own / "config.json").read_bytes()) else None
    except (OSError, ValueError, TypeError):
        return None


def find_runs(paths: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """The runs and the evaluations that a command names, each once; the runs of an rlhf are all within it.

    Raises:
      UserError: there is nothing, or something else.
    """
    runs: dict[Path, None] = {}
    evaluations: dict[Path, None] = {}
    for name in paths:
        path = Path(name).resolve()
        if not path.exists():
            raise UserError(f"there is no run at {name}; a run is the folder that --out named when it was started")
        if (folder := run_folder(path)) is not None:
            runs |= dict.fromkeys([folder, *(_runs_within(folder) if _is_composed(folder) else [])])
        elif (path / RESULTS).is_file():
            evaluations[path] = None
        else:
            within = [folder for folder in _runs_within(path) if not any(_is_composed(up) for up in folder.parents)]
            hint = f"; runs in it: llama-jax report {' '.join(map(str, within))}" if within else ""
            raise UserError(
                f"{name} is no run; expected a folder with the config.json of a stage, or with an evaluation's {RESULTS}{hint}"
            )
    return [folder for folder in runs if _stage(folder) != VERSION], list(evaluations)


def _runs_within(folder: Path) -> list[Path]:
    inner = sorted(path.parent for path in folder.glob("**/config.json") if path.parent != folder)
    return [path for path in inner if run_folder(path) == path and _stage(path) != VERSION]


def _stage(folder: Path) -> str:
    return json.loads((folder / "config.json").read_bytes())["stage"]


def _is_composed(folder: Path) -> bool:
    return run_folder(folder) == folder and _stage(folder) in ("rlhf", VERSION)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, named by as many parts of their paths as tell them apart.

    Raises:
      UserError: one cannot be read.
    """
    return [read_run(folder, _shortest_name(folder, folders)) for folder in folders]


def _shortest_name(folder: Path, among: Sequence[Path]) -> str:
    depth = 1
    while sum(other.parts[-depth:] == folder.parts[-depth:] for other in among) > 1:
        depth += 1
    return "/".join(folder.parts[-depth:])


def read_run(folder: Path, name: str) -> Run:
    """The run in a folder.

    Raises:
      UserError: it cannot be read.
    """
    known = json.loads((folder / "config.json").read_bytes())
    try:
        stage, config, versions = known["stage"], known["config"], known["versions"]
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'} has no {error}; a run's has stage, config and versions") from error
    records = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    return Run(folder, name, stage, config, versions, records, read_spells(folder, known.get("starts", [])))


def read_spells(folder: Path, starts: Sequence[dict[str, Any]]) -> tuple[Spell, ...]:
    """When a run was running, by the clock in its tensorboard/, which has a file for each start; what a killed process did
    and lost is in there too.
    """
    times = filter(None, map(_first_and_last, (folder / "tensorboard").glob("events.out.tfevents.*")))
    spells = []
    for began, ended in sorted(times):
        before = [one for one in starts if datetime.fromisoformat(one["at"]).timestamp() <= began]
        on = before[-1] if before else {"device": "", "devices": 0}
        when = (datetime.fromtimestamp(time, UTC) for time in (began, ended))
        spells.append(Spell(*when, on["device"], on["devices"]))
    return tuple(spells)


def _first_and_last(path: Path) -> tuple[float, float] | None:
    """Wall times, in seconds, of the first and the last whole event of a file: records of length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    first = last = None
    size = path.stat().st_size
    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            (length,) = struct.unpack_from("<Q", head)
            if file.tell() + length + 4 > size:  # a killed process did not finish it
                break
            last = file.read(length)
            first = first or last
            file.seek(4, 1)
    return None if first is None else (Event.FromString(first).wall_time, Event.FromString(last).wall_time)


def from_base(run: Run) -> list[tuple[str, Any, Any]] | None:
    """In what a run's recipe differs from its stage's defaults, which are the paper's: dotted name, default, own value.

    None for a stage that is not known. What has no default differs always; where the run is and how it was started does not
    count.
    """
    if run.stage not in STAGES:
        return None
    module, name = STAGES[run.stage][1].split(".")
    config_class = getattr(import_module(f"llama_jax.stages.{module}"), name)
    base = json.loads(json.dumps(_defaults(config_class), default=dataclasses.asdict))
    own = without_place(run.config)
    return differences(_fields_of(own, base), own)


def without_place(config: dict[str, Any]) -> dict[str, Any]:
    """A recipe without where the run is and how it was started."""
    return {key: value for key, value in config.items() if key not in ("out", "resume", "dry_run", "json")}


def _fields_of(own: Any, base: Any) -> Any:
    """Of a base what a recipe has a field for: one of an earlier version may lack some."""
    if not isinstance(own, dict):
        return base
    base = base if isinstance(base, dict) else {}
    return {key: _fields_of(value, base.get(key)) for key, value in own.items()}


def _defaults(config_class: type) -> dict[str, Any]:
    defaults = {}
    for field in dataclasses.fields(config_class):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    return defaults


def by_stage(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs of the same kind together, the kinds in the order in which a model goes through them."""
    groups: dict[str, list[Run]] = {stage: [] for stage in STAGES}
    for run in runs:
        groups.setdefault(run.stage, []).append(run)
    return {stage: own for stage, own in groups.items() if own}
