"""Commands as a user would type them: printed and run, or with --dry-run printed alone; and what their refusals mean."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llama_jax.errors import UserError

MISSING, EXISTS, CAPACITY, PERMANENT, UNKNOWN = "missing", "exists", "capacity", "permanent", "unknown"

# What the cloud says -> what kind of refusal it is, and what to do. The first match counts: a zone that does not exist
# must not pass for a slice that does not, nor a quota for a lack of chips, which is worth asking again.
REFUSALS = (
    (r"no active account|not currently have an active account|Reauthentication", PERMANENT, "gcloud auth login"),
    (r"property \[(core/)?project\] is not", PERMANENT, "add --project PROJECT"),
    (
        r"has not been used in project|API .*disabled|SERVICE_DISABLED",
        PERMANENT,
        "gcloud services enable tpu.googleapis.com compute.googleapis.com container.googleapis.com",
    ),
    (
        r"[Qq]uota",
        PERMANENT,
        "ask for quota (console: IAM & Admin, Quotas), or take a smaller slice, another zone, or --spot, whose quota is its own",
    ),
    (
        r"no (more )?capacity|(?i:stockout)|RESOURCE_POOL_EXHAUSTED|not (have )?enough resources|[Ii]nsufficient capacity",
        CAPACITY,
        "ask again later, or in another zone: gcloud compute tpus locations list",
    ),
    (
        r"locations?/\S*.*(may not exist|not found|unauthorized)|Location \S+ is not found|zones/[\w-]+' was not found"
        r"|[Uu]nknown zone|Invalid value for field 'zone'|unrecognized location",
        PERMANENT,
        "give another --zone: gcloud compute tpus locations list",
    ),
    (
        r"[Aa]ccelerator type .*not (found|supported|available)|is not available in zone",
        PERMANENT,
        "gcloud compute tpus accelerator-types list --zone=ZONE shows what the zone has",
    ),
    (
        r"PERMISSION_DENIED|[Pp]ermission denied|Required '\S+' permission|does not have permission",
        PERMANENT,
        "have the project's owner grant roles/tpu.admin and roles/iam.serviceAccountUser (on GKE roles/container.admin)",
    ),
    (r"ALREADY_EXISTS|[Aa]lready ?[Ee]xists", EXISTS, "delete it first, or use another name"),
    (
        r"Not found: \S+/clusters/[^/\s]+$",
        PERMANENT,
        "gcloud container clusters list shows the clusters and their --location",
    ),
    (r"context \S+ does not exist", PERMANENT, "bootstrap gets the credentials of the cluster"),
    (r"doesn't have a resource type", PERMANENT, "bootstrap brings the JobSet controller into the cluster"),
    # No looser: what passes for missing is created again, or taken for deleted.
    (r"NOT_FOUND|\(NotFound\)|code=404|' was not found", MISSING, "create makes it"),
    (r"unrecognized arguments", PERMANENT, "gcloud components update: this gcloud does not know the flag yet"),
    (r"immutable", PERMANENT, "another run of this name is there: stop it first"),
    (r"INVALID_ARGUMENT|Invalid value", PERMANENT, "see what it names; --dry-run shows the command"),
)

INSTALL = {
    "gcloud": "install the Google Cloud CLI: https://cloud.google.com/sdk/docs/install",
    "kubectl": "gcloud components install kubectl gke-gcloud-auth-plugin",
    "ssh": "install OpenSSH's client",
    "scp": "install OpenSSH's client",
    "git": "install git",
    "sbatch": "run this where Slurm's commands are: on a login node",
}


def meaning(said: str) -> tuple[str, str]:
    """The kind of a refusal and its remedy, from what the cloud said."""
    found = (rule[1:] for rule in REFUSALS if re.search(rule[0], said))
    return next(found, (UNKNOWN, "run it by hand to see more"))


class Refused(UserError):
    """A command that ended badly: what it said, what kind of refusal that is, and what to do about it."""

    def __init__(self, argv: Sequence[str], code: int, said: str):
        self.kind, remedy = meaning(said)
        self.code, self.said = code, said.strip()
        super().__init__(f"{shlex.join(argv)}\n  ended with {code}: {self.said or '(it said nothing)'}\n  -> {remedy}")


@dataclass(frozen=True)
class Shell:
    """Runs commands, or with `dry_run` prints them and goes on with what the caller assumes that they would say."""

    dry_run: bool = False

    def run(self, argv: Sequence[str], stdin: str | None = None) -> None:
        """One command for its effect."""
        print(_typed(argv, stdin), file=sys.stdout if self.dry_run else sys.stderr, flush=True)
        if not self.dry_run:
            said = self._call(argv, stdin)
            if said.strip():
                print(said.rstrip(), file=sys.stderr, flush=True)

    def read(self, argv: Sequence[str], assumed: str) -> str:
        """What one command prints; it changes nothing, and is shown with --dry-run alone."""
        if self.dry_run:
            print(_typed(argv))
            return assumed
        return self._call(argv)

    def say(self, text: str) -> None:
        """A word to the user about what happened: with --dry-run nothing did."""
        if not self.dry_run:
            print(text, file=sys.stderr, flush=True)

    def stream(self, argv: Sequence[str], each_line: Callable[[str], None]) -> int:
        """Runs a command and hands over its lines as they come, ends of lines included; returns its exit code."""
        if self.dry_run:
            print(_typed(argv))
            return 0
        with started(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
            for line in process.stdout:
                each_line(line)
        return process.returncode

    def _call(self, argv: Sequence[str], stdin: str | None = None) -> str:
        given = {"stdin": subprocess.DEVNULL} if stdin is None else {"stdin": subprocess.PIPE}
        with started(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **given) as process:
            out, error = process.communicate(stdin)
        if process.returncode:
            raise Refused(argv, process.returncode, error or out)
        return out


def started(argv: Sequence[str], **options) -> subprocess.Popen:
    """A command, started; one that is not installed is the user's to install."""
    try:
        return subprocess.Popen(argv, text=True, **options)
    except FileNotFoundError as error:
        remedy = INSTALL.get(argv[0], "put it on PATH")
        raise UserError(f"the command {argv[0]} is not on this machine; {remedy}") from error


def _typed(argv: Sequence[str], stdin: str | None = None) -> str:
    return shlex.join(argv) + ("" if stdin is None else f" <<'EOF'\n{stdin.rstrip()}\nEOF")
