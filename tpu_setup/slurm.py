"""Slurm: a job with a process on each node of a GPU cluster, put back into the queue when it was preempted."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from llama_jax.errors import UserError
from tpu_setup.shell import Shell

HERE = Path(__file__).resolve().parent
SAVE_SECONDS = 300
"""How long before its time limit a job is told to save."""


class Slurm:
    """The job NAME of this user; the checkout lies on a file system that all nodes share."""

    def __init__(self, args: Namespace, shell: Shell):
        if not args.nodes:
            raise UserError("--backend slurm needs --nodes N")
        self.args, self.shell = args, shell
        self.log = f"slurm-{args.name}.log"

    def job(self) -> tuple[str, str] | None:
        """Number and state of the job, where it waits or runs."""
        argv = ["squeue", "--me", f"--name={self.args.name}", "--noheader", "--format=%i %T"]
        lines = self.shell.read(argv, "").split("\n")
        return next((tuple(line.split(maxsplit=1)) for line in lines if line.strip()), None)

    def start(self, words: Sequence[str], environment: dict[str, str]) -> None:
        """Hands the run to Slurm, unless it is there."""
        args = self.args
        if found := self.job():
            raise UserError(f"{args.name} is job {found[0]}, {found[1]}; stop it first, or use another name")
        self.shell.run([
            *("sbatch", f"--job-name={args.name}", f"--nodes={args.nodes}", "--ntasks-per-node=1"),
            *(f"--gpus-per-node={args.devices_per_host}", "--requeue", f"--signal=TERM@{SAVE_SECONDS}"),
            *(f"--output={self.log}", "--open-mode=append", *args.sbatch),
            *(str(HERE / "job.sbatch"), str(args.max_restarts), args.restart_on),
            *("env", *(f"{key}={value}" for key, value in environment.items()), *words),
        ])  # fmt: skip

    def state(self) -> str:
        """The job in a line."""
        found = self.job()
        if found:
            return f"{self.args.name} is job {found[0]}, {found[1]}"
        argv = ["sacct", f"--name={self.args.name}", "--allocations", "--noheader", "--format=JobID,State,ExitCode,End"]
        lines = self.shell.read(argv, "").split("\n")
        return f"{self.args.name} is not in the queue; Slurm remembers: {lines[-2].strip() if len(lines) > 1 else 'nothing'}"

    def stop(self) -> None:
        """Has the run save and end, and not be started again."""
        found = self.job() or (("JOB", "RUNNING") if self.shell.dry_run else None)
        if found is None:
            return self.shell.say(f"{self.args.name} is not in the queue")
        if found[1] != "RUNNING":
            return self.shell.run(["scancel", found[0]])
        self.shell.run(["scancel", "--batch", "--signal=USR1", found[0]])
        self.shell.say(f"job {found[0]} was told to save and end; status shows when it has")

    def logs(self, lines: int) -> int:
        """Follows the log, in which srun puts the process's number before each line, until Ctrl-C."""
        return self.shell.stream(
            ["tail", "-n", str(lines), "-F", self.log], lambda line: print(line, end="", flush=True)
        )

    def check(self, words: Sequence[str]) -> None:
        """Runs words on as many nodes as the run has, and waits."""
        where = [f"--nodes={self.args.nodes}", "--ntasks-per-node=1", f"--gpus-per-node={self.args.devices_per_host}"]
        code = self.shell.stream(["srun", "--label", *where, *words], lambda line: print(line, end="", flush=True))
        if code:
            raise UserError(f"srun ended with {code}; its lines begin with the number of the process that failed")
