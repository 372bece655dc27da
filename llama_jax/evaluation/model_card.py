"""A model card under the headings of the paper's own (A.7, Table 52): what runs say is filled in, the rest is asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import UserError
from llama_jax.evaluation.energy import Assumptions, energy_section
from llama_jax.evaluation.report import cell, table, training_numbers, write_page
from llama_jax.evaluation.run_page import data_table, evaluation_sections, ppo_numbers, progress
from llama_jax.evaluation.runs import CARD, STAGES, Run, read_run, read_runs, run_folder
from llama_jax.training.checkpoint import newest_readable, read_metadata

LIMITATIONS = """A language model may write what is untrue, biased or otherwise objectionable, and its answers cannot be foreseen. Nothing on
this card says that it does not: before it is used, it must be tested for what it is to be used for."""


def to_fill(what: str) -> str:
    """The place of what no run knows."""
    return f"**To be filled in by you:** {what}"


def write_model_card(model: Path, evaluations: Sequence[Path], out: Path, assumed: Assumptions) -> Path:
    """Writes the card of a run's newest checkpoint, or of a checkpoint in a run, and gives its path.

    Args:
      model: the run or the checkpoint.
      evaluations: folders whose results belong to it.
      out: the folder to write it into.
      assumed: what carbon depends on.

    Raises:
      UserError: the card is there already, or the run has no checkpoint.
    """
    path = out / CARD
    if path.exists():
        raise UserError(f"{path} is there, perhaps with what you filled in; move it away, or name another --out")
    runs, beyond = lineage(run_folder(model))
    checkpoint = newest_readable(model)
    metadata = read_metadata(checkpoint)
    sections = [
        "## Model details",
        table(("", ""), details(runs, beyond, checkpoint, metadata)),
        "## Intended use",
        to_fill("the uses, languages and users that the model is meant for, and those that it is not."),
        "## Hardware and software (paper 2.2.1)",
        hardware(runs),
        energy_section(runs, assumed),
        "## Training data",
        data_table(runs),
        to_fill(
            "where the sources come from, their licences, what was removed from them, and the day up to which they reach."
        ),
        "## Evaluation",
        *evaluation(runs[-1], evaluations),
        "## Ethical considerations and limitations",
        LIMITATIONS,
        to_fill("what was tested for safety, in which languages, and what was found."),
    ]
    out.mkdir(parents=True, exist_ok=True)
    return write_page(path, f"Model card of {runs[-1].name}", [section for section in sections if section])


def lineage(folder: Path) -> tuple[list[Run], str]:
    """The runs that a model went through, its own last; and the checkpoint before the first of them, empty if it began with
    random weights.
    """
    folders: list[Path] = []
    current: Path | None = folder
    while current is not None and current not in folders:
        folders.insert(0, current)
        parent = read_run(current, current.name).parent
        current = run_folder(Path(parent).resolve()) if parent else None
    return read_runs(folders), parent


def details(runs: Sequence[Run], beyond: str, checkpoint: Path, metadata: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines on what the model is."""
    run = runs[-1]
    spells = [spell for one in runs for spell in one.spells]
    dates = f"{spells[0].began:%Y-%m-%d} to {spells[-1].ended:%Y-%m-%d}" if spells else to_fill("when it was trained.")
    licence = to_fill("its licence") + (
        f"; it was made from {cell(beyond)}, whose licence binds it." if beyond else "."
    )
    output = "a score of an answer" if "reward" in metadata else "text"
    stages = [f"{STAGES[one.stage][0] if one.stage in STAGES else one.stage}, steps: {progress(one)}" for one in runs]
    made = [f"the weights of {cell(beyond)}" if beyond else "random weights", *stages]
    return [
        ("Developers", to_fill("who made it.")),
        ("Checkpoint", cell(f"{run.name}/{checkpoint.parent.name}/{checkpoint.name}")),
        ("Input", "text"),
        ("Output", output),
        *architecture(metadata),
        ("Made of", ", then ".join(made)),
        ("Tokens of pretraining", pretraining_tokens(runs)),
        ("Dates", dates),
        ("Status", to_fill("whether it is finished, and whether further versions follow.")),
        ("Licence", licence),
        ("Comments", to_fill("where to send them.")),
    ]


def architecture(metadata: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines on the shape of the model; of adapters, on the model that they belong to."""
    if "model" not in metadata:
        return [("Architecture", f"adapters of rank {metadata['lora']['rank']} beside {cell(metadata['base'])}")]
    fields = metadata["model"]
    scaling = fields.get("rope_scaling")
    model = LlamaConfig(**fields | {"rope_scaling": scaling and RopeScaling(**scaling)})
    return [
        (
            "Architecture",
            f"decoder-only transformer (Llama 2): {model.n_layers} layers of width {model.dim}, {model.n_heads} heads of "
            f"{model.head_dim} with {model.n_kv_heads} of keys and values, SwiGLU of {model.ffn_dim}, RoPE base {model.rope_theta:g}",
        ),
        ("Parameters", f"{model.n_params:,}" + (", and a head for scores" if "reward" in metadata else "")),
        ("Context length", f"{model.context_length:,} tokens"),
        ("Vocabulary", f"{model.vocab_size:,} pieces"),
    ]


def pretraining_tokens(runs: Sequence[Run]) -> str:
    """How many tokens its runs of pretraining read."""
    tokens = [run.steps * run.config["batch_tokens"] for run in runs if run.stage == "pretrain" and run.steps]
    return f"{sum(tokens):,}" if tokens else to_fill("those of the model that it was made from.")


def hardware(runs: Sequence[Run]) -> str:
    """What its runs ran on, and with."""
    known = {f"{one.devices} x {one.device}": None for run in runs for one in run.spells if one.devices}
    devices = ", ".join(known) or to_fill("the devices that it was trained on.")
    versions = ", ".join(f"{name} {version}" for name, version in runs[-1].versions.items())
    return table(("", ""), [("Devices", devices), ("Software", versions)])


def evaluation(run: Run, evaluations: Sequence[Path]) -> list[str]:
    """What its run measured on held-out data, and the tables of evaluations."""
    numbers = ppo_numbers(run.records) if run.stage == "ppo" else training_numbers(run.records)
    rows = [(name, value) for name, value in numbers.items() if "held out" in name or name.startswith("eval/")]
    parts = [table((f"held-out data of {run.stage}", ""), rows)] if rows else []
    for folder in evaluations:
        heading, *tables = evaluation_sections(folder)
        parts += [f"#{heading}", *tables]
    return parts or [to_fill("how it was evaluated, and what came out.")]
