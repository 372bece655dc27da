"""The paper's safety evaluation (4.1, 4.4, A.4) of one model, next to the paper's numbers: ToxiGen, BOLD, TruthfulQA, violations
and false refusals, as far as their files are named.
"""

from dataclasses import dataclass
from typing import Any

from llama_jax.errors import UserError
from llama_jax.evaluation.comparisons import Comparison
from llama_jax.evaluation.engine import Engine
from llama_jax.evaluation.safety_config import SafetyConfig
from llama_jax.evaluation.safety_model import SafetyModel, make_safety_model
from llama_jax.evaluation.safety_paper_values import PaperModel
from llama_jax.evaluation.safety_suites import adversarial, bold, borderline, measure_all, toxigen, truthfulqa
from llama_jax.text.chat import Llama2Chat, Plain, Template


@dataclass(frozen=True)
class SafetyResult:
    """What came out."""

    model: str
    paper_model: PaperModel
    tables: tuple[Comparison, ...]
    samples: dict[str, list[dict[str, Any]]]
    """By benchmark, what was asked, answered and found, for people to read."""

    def markdown(self) -> str:
        """All tables, one below the other."""
        return "\n\n".join(table.markdown() for table in self.tables)

    def as_json(self) -> dict[str, Any]:
        """The same for a program."""
        tables = [table.as_json() for table in self.tables]
        return {"model": self.model, "paper_model": str(self.paper_model), "tables": tables}


def run_safety(config: SafetyConfig, engine: Engine, name: str) -> SafetyResult:
    """Evaluates a model; the benchmarks whose files `config` names.

    Args:
      config: what is asked, and who judges; in every process of a run alike, so that none waits for another.
      engine: asks the model.
      name: of its checkpoint.

    Raises:
      UserError: no benchmark, a bad file, or a judge that is not there or gives no probabilities.
      Preempted: told to stop; what was answered is kept.
    """
    template: Template = Plain() if config.plain else Llama2Chat()
    model = make_safety_model(engine, name, is_chat=config.chat, template=template, decoding=config.decoding)
    return evaluate(config, model, template)


def evaluate(config: SafetyConfig, model: SafetyModel, template: Template) -> SafetyResult:
    """As `run_safety`, for a model of any kind.

    All files are read and all judges found before the model is asked anything.
    """
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
    parts = [benchmark(config, model, template) for benchmark in prepare]
    return SafetyResult(model.name, model.paper, *measure_all(parts))
