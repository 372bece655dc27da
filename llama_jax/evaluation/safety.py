"""The paper's safety evaluation (4.1, 4.4, A.4) of one model, next to the paper's numbers: ToxiGen, BOLD, TruthfulQA, violations
and false refusals, as far as their files are named.

What the model says is kept in the folder as it comes, a file for each benchmark, so that a run which was stopped goes on; what
was said of it stands beside in NAME.judged.jsonl, when it is whole.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_jax.errors import UserError
from llama_jax.evaluation.comparisons import Comparison
from llama_jax.evaluation.safety_config import SafetyConfig
from llama_jax.evaluation.safety_model import SafetyModel, make_safety_model
from llama_jax.evaluation.safety_paper_values import PaperModel
from llama_jax.evaluation.safety_suites import adversarial, bold, borderline, toxigen, truthfulqa
from llama_jax.generation.llama import Llama
from llama_jax.text.chat import Llama2Chat, Plain, Template


@dataclass(frozen=True)
class SafetyResult:
    """What came out."""

    model: str
    paper_model: PaperModel
    tables: tuple[Comparison, ...]

    def markdown(self) -> str:
        """All tables, one below the other."""
        return "\n\n".join(table.markdown() for table in self.tables)

    def as_json(self) -> dict[str, Any]:
        """The same for a program."""
        tables = [table.as_json() for table in self.tables]
        return {"model": self.model, "paper_model": str(self.paper_model), "tables": tables}


def run_safety(config: SafetyConfig, llama: Llama, name: str, out: Path) -> SafetyResult:
    """Evaluates a model; the benchmarks whose files `config` names.

    Args:
      config: what is asked, and who judges.
      llama: the model.
      name: of its checkpoint; answers of another one are not gone on with.
      out: the folder where answers are kept; those that are there already are not drawn again.

    Raises:
      UserError: no benchmark, a bad file, a judge that is not there or gives no probabilities, or answers in the folder that
        were drawn otherwise.
      Preempted: told to stop; what was answered is kept.
    """
    template: Template = Plain() if config.plain else Llama2Chat()
    model = make_safety_model(llama, name, is_chat=config.chat, template=template, decoding=config.decoding)
    return evaluate(config, model, template, out)


def evaluate(config: SafetyConfig, model: SafetyModel, template: Template, out: Path) -> SafetyResult:
    """As `run_safety`, for a model of any kind.

    All files are read and all judges found before the model is asked anything.
    """
    if config.batch < 1:
        raise UserError(f"--safety.batch is {config.batch}; it must be 1 or more")
    given = {
        toxigen: config.toxigen,
        bold: config.bold,
        truthfulqa: config.truthfulqa,
        adversarial: config.adversarial,
        borderline: config.borderline,
    }
    prepare = [benchmark for benchmark, files in given.items() if files]
    if not prepare:
        raise UserError(
            "no benchmark: name the files of --safety.toxigen, --safety.bold, --safety.truthfulqa, --safety.adversarial or --safety.borderline"
        )
    parts = [benchmark(config, model, template, out) for benchmark in prepare]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written to ({error.strerror}); name another") from error
    tables = tuple(table for part in parts for table in part())
    return SafetyResult(model.name, model.paper, tables)
