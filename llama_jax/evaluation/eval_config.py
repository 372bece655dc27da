"""What `llama-jax eval` asks a model (paper 2.3, 4.1 and A.2.2), field by field."""

from dataclasses import dataclass, field
from typing import Literal

from llama_jax.evaluation.safety_config import SafetyConfig


@dataclass(frozen=True)
class EvalConfig:
    """Which model is asked what."""

    checkpoint: str = ""
    """The model, of any form."""
    suite: str = "table3"
    """table3: the paper's academic benchmarks; chat: word problems in the chat format (Table 15); safety: Table 14; or a
    task of lm-eval as FILE.yaml."""
    tasks: tuple[str, ...] = ()
    """Only these of the suite, or any task of lm-eval."""
    files: tuple[str, ...] = ()
    """Benchmarks of one's own, as NAME=SOURCE or NAME=SOURCE,EXAMPLES, a source being FILE.jsonl, FILE.csv, hf:NAME or tfds:NAME; with
    files and without --tasks nothing else is asked."""
    shots: int | None = None
    """Examples before each question; the paper's if not given."""
    limit: int | None = None
    """Ask only so many questions of each task."""
    chat: bool = False
    """Ask in Llama 2's chat format, as is done with --suite chat."""
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    """What --suite safety asks, and who judges."""
    run_code: bool = False
    """Allow programs that the model writes to run, contained; HumanEval and MBPP are left out otherwise."""
    code_samples: int = 1
    """Programs for each problem of HumanEval and MBPP; above 1 they are drawn at temperature 0.8, for pass@k alone."""
    rows: int = 16
    """Texts that the model continues at once."""
    int8: bool = False
    """Keep the weights in 8 bits."""
    mesh: str = ""
    """Devices to lie on, such as auto or tensor=4; one if empty."""
    seed: int = 0
    """Of what is drawn."""
    out: str = "runs/eval"
    """The evaluation's folder: results.json, report.md, every question with its answer in samples/."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Go on with the answers that the folder holds: if it holds some; never (refuses such a folder); or fail without."""
    dry_run: bool = False
    """Print what would be asked, and touch nothing."""
    json: bool = False
    """Print results.json in the end."""


# Answers are kept by what was asked, so that other questions may be added to a folder.
FREE_TO_CHANGE = (
    "suite", "safety", "tasks", "files", "shots", "limit", "chat", "run_code", "code_samples", "rows", "mesh", "out", "resume",
    "dry_run", "json",
)  # fmt: skip
