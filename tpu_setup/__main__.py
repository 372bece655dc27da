"""`python3 -m tpu_setup VERB NAME ...`: a slice from nothing to a supervised run, and back to nothing.

Needs Python 3.11 and the cloud's own commands on the user's machine, nothing else. Exit codes are those of llama-jax: 0 done,
1 a bug, 2 something to be put right, and of `run --watch` and nothing else the run's own.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence

from llama_jax.cli import end_of
from llama_jax.errors import UserError
from tpu_setup import generations, verbs
from tpu_setup.compute_engine import ComputeEngine
from tpu_setup.gke import Gke
from tpu_setup.queued import Queued
from tpu_setup.shell import Shell
from tpu_setup.slurm import Slurm
from tpu_setup.ssh import Ssh

BACKENDS = {"queued": Queued, "compute": ComputeEngine, "gke": Gke, "ssh": Ssh, "slurm": Slurm}
VERBS = {
    "create": "ask for a slice, unless it is there",
    "wait": "follow it until it is there; one on spot is asked for again whenever it is lost",
    "bootstrap": "bring this project and its environment to every host",
    "run": "start a command on every host, detached and supervised",
    "logs": "follow every host's log until the run ends",
    "status": "what is there, and where the run is on each host",
    "stop": "have the run save and end; the slice stays, and is paid for",
    "delete": "give the slice back",
    "doctor": "count the devices of all hosts, and time a collective over them",
    "cost": "what it costs, at your price",
}


class _Parser(argparse.ArgumentParser):
    """Takes @FILE for the flags in a file: words as in a shell, # for comments."""

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        return shlex.split(line, comments=True)


def parser() -> argparse.ArgumentParser:
    """The command line: every verb takes every flag that describes the slice, so that one @FILE does for all."""
    slice_flags = _Parser(add_help=False)
    _add_slice_flags(slice_flags)
    top = _Parser(prog="python3 -m tpu_setup", description=__doc__.splitlines()[0], fromfile_prefix_chars="@")
    verbs_parser = top.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)
    for verb, what in VERBS.items():
        verbs_parser.add_parser(verb, help=what, description=what, parents=[slice_flags], fromfile_prefix_chars="@")
    return top


def _add_slice_flags(flags: argparse.ArgumentParser) -> None:
    add = flags.add_argument
    add("name", help="of the slice, and of the run on it")
    add("--backend", choices=BACKENDS, default="queued", help="queued resources unless given")
    add("--dry-run", action="store_true", help="print the commands, exactly, and touch nothing")
    group = flags.add_argument_group("the slice")
    add = group.add_argument
    add("--tpu", metavar="v5e-16", help="GENERATION-NUMBER as the cloud counts, or GENERATION:TOPOLOGY")
    add("--slices", type=int, default=1, help="so many slices of it")
    add("--zone")
    add("--project")
    add("--spot", action="store_true", help="cheaper, and taken away at any time")
    add(
        "--reservation",
        metavar="NAME",
        help="from a reservation (for queued resources any word: they find it themselves)",
    )
    add("--service-account", metavar="EMAIL", help="of the hosts")
    add("--network")
    add("--subnetwork")
    add(
        "--internal-ip",
        action="store_true",
        help="hosts without addresses of their own outside, reached from inside or over IAP",
    )
    add("--valid-until", metavar="6h", help="how long a queued request stands")
    add("--generations", metavar="FILE", help="a file laid over tpu_setup/generations.toml")
    add("--runtime-version", help="of a TPU VM, instead of the table's")
    add("--machine-type", help="instead of the table's (compute, gke)")
    add("--image-family", help="instead of the table's (compute)")
    group = flags.add_argument_group("GKE")
    add = group.add_argument
    add("--cluster")
    add("--location", help="of the cluster; the zone's region unless given")
    add("--namespace", default="default")
    add("--image", help="of the container; its working directory is this project's checkout")
    add("--kubernetes-account", default="default", help="the Kubernetes service account that may read the bucket")
    group = flags.add_argument_group("GPU clusters")
    add = group.add_argument
    add("--hosts", metavar="HOST,HOST", help="(ssh) the first one coordinates")
    add("--nodes", type=int, help="(slurm)")
    add("--devices-per-host", type=int, default=8, help="GPUs of a host")
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="=--FLAG",
        help="(slurm) a flag for sbatch, as in --sbatch=--time=8:00:00",
    )
    group = flags.add_argument_group("the run")
    add = group.add_argument
    add("--bucket", metavar="gs://NAME", help="mounted on every host")
    add("--mount", default="/mnt/bucket", help="where")
    add("--libtpu", metavar="VERSION", help="whose flags to use; that of requirements.lock unless given")
    add("--libtpu-args", metavar="FLAGS", help="instead of the table's; '' for none")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="for the command")
    add("--max-restarts", type=int, default=50)
    add(
        "--restart-on",
        default="42,134",
        metavar="CODES",
        help="exit codes after which it is started again; 42: preempted and saved, or another host lost; 134: process 0 lost",
    )
    add("--grace", type=int, default=300, help="seconds to save in after SIGTERM")
    add(
        "--watch",
        action="store_true",
        help="run stays, starts the run again on a new slice when this one is lost, and ends as it ends",
    )
    add("--lines", type=int, default=100, help="of the log so far")
    add("--megabytes", type=int, default=64, help="that each device reduces in doctor")
    add("--price", type=float, metavar="MONEY", help="of a chip for an hour (cost)")
    add("--hours", type=float, help="to reckon with (cost)")
    group = flags.add_argument_group("waiting")
    add = group.add_argument
    add("--poll", type=float, default=30, help="seconds between two looks")
    add("--timeout", type=float, default=24, help="hours until wait gives up")


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments, with the slice that --tpu names."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", args.name):
        raise UserError(
            f"the name {args.name!r} is none for the cloud: small letters, digits and -, a letter first, 40 at most"
        )
    if args.slices < 1:
        raise UserError(f"--slices {args.slices} is no number of slices; give 1 or more")
    if not re.fullmatch(r"\d{1,3}(,\d{1,3})*", args.restart_on) or "0" in args.restart_on.split(","):
        raise UserError(
            f"--restart-on {args.restart_on} is no list of codes that mean a failure; give such as 42 or 42,143"
        )
    if bad := [one for one in args.env if not re.match(r"[A-Za-z_]\w*=", one)]:
        raise UserError(f"--env {bad[0]} sets nothing; give NAME=VALUE")
    if args.bucket and not args.bucket.startswith("gs://"):
        raise UserError(f"--bucket {args.bucket} is no bucket; give gs://NAME")
    args.table = generations.load_table(args.generations)
    args.slice = None
    if args.backend not in ("ssh", "slurm"):
        if not args.tpu:
            raise UserError(
                f"--backend {args.backend} needs --tpu, such as v5e-16 (put what describes a slice into a file: @FILE)"
            )
        args.slice = args.table.find(args.tpu)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # What stands behind -- is the command to run, and none of ours: neither its flags nor its @.
    cut = words.index("--") if "--" in words else len(words)
    words, command = words[:cut], words[cut + 1 :]

    def one() -> int:
        args = checked(parser().parse_args(words))
        if command and args.verb != "run":
            raise UserError(f"{args.verb} takes no command behind --; run does")
        shell = Shell(args.dry_run)
        return verbs.do(args, shell, BACKENDS[args.backend](args, shell), command)

    return end_of(one)


if __name__ == "__main__":
    sys.exit(main())
