"""The verbs that need neither data nor a model: doctor and demo."""

from collections.abc import Sequence

from llama_jax.verbs.arguments import Json, call


def doctor(argv: Sequence[str]) -> int:
    """See llama_jax.doctor."""

    def run(*, as_json: Json = False) -> int:
        """Show what this machine has, what is missing, and the command that installs it.

        Exits with 2 if something required is missing or computes wrongly.

        Examples:
          llama-jax doctor
          llama-jax doctor --json > machine.json

        Args:
          as_json: Print JSON.
        """
        from llama_jax import doctor

        return doctor.run(as_json)

    return call(run, "doctor", argv)


def demo(argv: Sequence[str]) -> None:
    """See llama_jax.demo."""

    def run(
        *, out: str = "runs/demo", seed: int = 0, train_tokens: int = 0, dialogues: int = 0, dry_run: bool = False
    ) -> None:
        """Run the whole pipeline in about 8 minutes on 2 cores, without a download, and write a report.

        Text that every Python carries -> tokenizer -> pretraining -> held-out bits per byte beside gzip and xz ->
        fine-tuning on dialogues of a small world of questions -> its answers, graded by a program -> report.md.

        Examples:
          llama-jax demo
          llama-jax demo --out runs/again --seed 1

        Args:
          out: The folder; one that was interrupted goes on.
          seed: Of initialisation, data and sampling.
          train_tokens: Pretrain on so many tokens instead of the recipe's.
          dialogues: Fine-tune on so many dialogues instead of 4,000.
          dry_run: Say what would be done, and touch nothing.
        """
        from llama_jax import demo

        demo.run(out, seed=seed, train_tokens=train_tokens, dialogues=dialogues, dry_run=dry_run)

    call(run, "demo", argv)
