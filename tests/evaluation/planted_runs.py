"""Folders of runs and evaluations with known numbers, and pages that are read back."""

import dataclasses
import json
import struct
from html.parser import HTMLParser
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event

from llama_jax import cli
from llama_jax.config import LlamaConfig
from llama_jax.stages.distillation import DistillationConfig
from llama_jax.stages.dpo import DPOConfig
from llama_jax.stages.ghost_attention import GhostAttentionConfig
from llama_jax.stages.ppo_config import PPOConfig
from llama_jax.stages.pretrain import PretrainConfig
from llama_jax.stages.rejection import RejectionConfig
from llama_jax.stages.reward import RewardConfig
from llama_jax.stages.rlhf_config import RLHFConfig
from llama_jax.stages.sft import SFTConfig

PNG = b"\x89PNG\r\n\x1a\n planted"
BEGAN = 1_800_000_000.0  # 2027-01-15 08:00:00 UTC
MODEL = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 96, "head_dim": 16, "vocab_size": 300}
CONFIGS = {
    "sft": SFTConfig(checkpoint="hub"),
    "reward": RewardConfig(checkpoint="hub"),
    "dpo": DPOConfig(checkpoint="hub"),
    "rejection": RejectionConfig(checkpoint="hub"),
    "ppo": PPOConfig(checkpoint="hub", iterations=40),
    "rlhf": RLHFConfig(checkpoint="hub"),
    "ghost_attention": GhostAttentionConfig(checkpoint="hub"),
    "distillation": DistillationConfig(checkpoint="hub"),
}


def as_json(config) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def pretrain_config(**changes) -> dict:
    config = PretrainConfig(model=LlamaConfig(**MODEL), train_tokens=40_000, batch_tokens=1000, **changes)
    data = {"sources": ["text:books", "jsonl:code"], "weights": [3.0, 1.0]}
    fields = as_json(config)
    return fields | {"data": fields["data"] | data}


def step(number: int, loss: float, **more) -> dict:
    known = {"train/loss": loss, "train/accuracy": 0.5, "train/lr": 1e-3, "train/grad_norm": 1.0, "train/skipped": 0}
    return {"step": number} | known | {"train/tokens_per_s": 100.0 * number, "train/data_wait": 0.25} | more


def plant(folder: Path, stage: str, config: dict | None = None, records=(), spells=(), start=("cpu", 2)) -> Path:
    """A run's folder; spells are (seconds behind BEGAN, how many they are long)."""
    (folder / "samples").mkdir(parents=True)
    device, devices = start
    starts = [{"at": "2027-01-15T07:59:50+00:00", "device": device, "devices": devices}]
    config = as_json(CONFIGS[stage]) if config is None else config
    known = {"stage": stage, "config": config | {"out": str(folder)}, "versions": {"jax": "9.9"}, "starts": starts}
    (folder / "config.json").write_text(json.dumps(known))
    if records:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for began, seconds in spells:
        write_events(folder, BEGAN + began, BEGAN + began + seconds / 2, BEGAN + began + seconds)
    return folder


def write_events(folder: Path, *times: float) -> Path:
    """A TensorBoard file of so many events: a length, its checksum, the event, its checksum."""
    path = folder / "tensorboard" / f"events.out.tfevents.{int(times[0])}.host"
    path.parent.mkdir(exist_ok=True)
    events = [Event(wall_time=time, step=number).SerializeToString() for number, time in enumerate(times)]
    path.write_bytes(b"".join(struct.pack("<QI", len(one), 0) + one + b"\0\0\0\0" for one in events))
    return path


class Page(HTMLParser):
    """A parsed page: its tables as lists of rows, and every tag with its attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.tags, self.text, self.in_cell = [], [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.tables[-1][-1][-1] += data

    def table(self, *header: str) -> list[list[str]]:
        """The rows of the table with this header."""
        (found,) = [one[1:] for one in self.tables if one and one[0] == list(header)]
        return found


def report(capsys, *words) -> tuple[int, str, str]:
    code = cli.main(["report", *map(str, words)])
    return code, *capsys.readouterr()


def page_of(capsys, out: Path, *words) -> Page:
    code, said, err = report(capsys, *words, "--out", out)
    assert (code, err) == (0, "") and said.split() == [str(out / "report.md"), str(out / "report.html")]
    return Page((out / "report.html").read_text())


def plant_evaluation(folder: Path) -> Path:
    tasks = [
        {"task": "boolq", "group": "reading", "shots": 0, "n": 3270, "metric": "acc", "value": 71.25}
        | {"interval": [69.7, 72.8], "paper": 77.4, "paper_model": "7B", "difference": -6.15},
        {"task": "mine", "group": "", "shots": 1, "n": 10, "metric": "em", "value": 50.0, "paper": None},
    ]
    folder.mkdir()
    groups = [{"group": "reading", "value": 60.5, "paper": 61.3, "difference": -0.8}]
    (folder / "results.json").write_text(json.dumps({"tasks": tasks, "groups": groups}))
    return folder
