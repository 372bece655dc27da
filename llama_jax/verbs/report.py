"""The verb that reports: one page on runs, or a model card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from llama_jax.errors import UserError
from llama_jax.planning.carbon import KG_PER_KWH, PUE
from llama_jax.verbs.arguments import call


def report(argv: Sequence[str]) -> None:
    """See llama_jax.evaluation.run_page and llama_jax.evaluation.model_card."""

    def run(
        runs: Annotated[tuple[str, ...], arg(metavar="RUN...")],
        /,
        *,
        out: str = "report",
        model_card: bool = False,
        power_w: float | None = None,
        kg_per_kwh: float = KG_PER_KWH,
        pue: float = PUE,
    ) -> None:
        """Write one page on runs of any stage, and on evaluations: report.md and a report.html that needs nothing else.

        Curves (runs of a kind over each other), numbers, tables beside the paper, samples, data, energy and carbon as the
        paper's Table 2 has them, recipes and versions. A run of rlhf brings those in its folder along.

        With --model-card MODEL_CARD.md instead, of one run or checkpoint, with what is known filled in.

        Examples:
          llama-jax report runs/books
          llama-jax report runs/books runs/books-again runs/mine --out reports/books
          llama-jax report runs/books --power-w 250 --kg-per-kwh 0.05
          llama-jax report runs/mine evals/mine --model-card

        Args:
          runs: Folders of runs, checkpoints in them, and folders of evaluations.
          out: The folder to write.
          model_card: Write a model card in place of the page.
          power_w: Power of a device under load, in watts; what is published for it, if not given.
          kg_per_kwh: Carbon intensity of the electricity, in kg CO2eq per kWh; the default is what the paper's table comes to.
          pue: What the data centre draws over what its devices do; the default is what the paper's table comes to.
        """
        if not runs:
            raise UserError("name a run first: llama-jax report RUN ... (llama-jax report --help)")
        if kg_per_kwh < 0 or pue < 1 or (power_w is not None and power_w <= 0):
            raise UserError("--power-w must be above 0, --kg-per-kwh 0 or more, and --pue 1 or more")
        from llama_jax.evaluation.energy import Assumptions
        from llama_jax.evaluation.model_card import write_model_card
        from llama_jax.evaluation.run_page import check_out, write_run_page
        from llama_jax.evaluation.runs import find_runs, read_runs

        folders, evaluations = find_runs(runs)
        target, assumed = Path(out).resolve(), Assumptions(power_w, kg_per_kwh, pue)
        check_out(target)
        if not model_card:
            print(*write_run_page(read_runs(folders), evaluations, target, assumed), sep="\n")
            return
        models = [one for one in runs if Path(one).resolve() not in evaluations]
        if len(models) != 1 or len(folders) != 1:
            raise UserError(
                f"--model-card is of one model, and {len(folders)} runs are named; name one run or one checkpoint in it"
            )
        print(write_model_card(Path(models[0]).resolve(), evaluations, target, assumed))

    call(run, "report", argv)
