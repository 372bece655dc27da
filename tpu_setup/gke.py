"""GKE: a node pool for each slice, and a JobSet, which restarts all Pods of a run together, for the run."""

import json
import shlex
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from string import Template

from llama_jax.errors import UserError
from tpu_setup.provision import State, forgiving
from tpu_setup.shell import EXISTS, MISSING, Refused, Shell

TEMPLATE = Path(__file__).with_name("jobset.yaml")
CONTROLLER = "https://github.com/kubernetes-sigs/jobset/releases/download/v0.8.0/manifests.yaml"
KINDS = {"PROVISIONING": "starting", "RUNNING": "ready", "RUNNING_WITH_ERROR": "starting", "RECONCILING": "starting"}
KINDS |= {"STOPPING": "deleting", "ERROR": "lost"}
ENDED = ("Completed", "Failed")


class Gke:
    """The node pools NAME (or NAME-0, NAME-1, ...) of a cluster, and the JobSet NAME on them."""

    def __init__(self, args: Namespace, shell: Shell):
        if missing := [f"--{word}" for word in ("project", "zone", "cluster") if not getattr(args, word)]:
            raise UserError(f"GKE needs {', '.join(missing)} (gcloud container clusters list shows the clusters)")
        self.args, self.shell = args, shell
        self.region = args.zone.rpartition("-")[0]
        self.location = args.location or self.region
        self.project = [f"--project={args.project}", "--quiet"]
        self.where = [f"--cluster={args.cluster}", f"--location={self.location}", *self.project]
        self.pools = [args.name] if args.slices == 1 else [f"{args.name}-{number}" for number in range(args.slices)]
        context = f"gke_{args.project}_{self.location}_{args.cluster}"
        self.kubectl = ["kubectl", f"--context={context}", f"--namespace={args.namespace}"]

    def state(self, assumed: State) -> State:
        """See provision.Cloud; the worst of the pools counts."""
        pools = [self._pool(pool, assumed) for pool in self.pools]
        worst = min(pools, key=lambda pool: _ORDER.index(pool.kind))
        return replace(worst, rest=not worst.paid and any(pool.paid for pool in pools))

    def _pool(self, pool: str, assumed: State) -> State:
        argv = ["gcloud", "container", "node-pools", "describe", pool, *self.where, "--format=json"]
        try:
            text = self.shell.read(argv, "")
        except Refused as refused:
            if refused.kind == MISSING:
                return State("absent", f"{pool} does not exist")
            raise
        if not text:
            return assumed
        found = json.loads(text)
        status = found.get("status", "PROVISIONING")
        reasons = "; ".join(one.get("message", "") for one in found.get("conditions", []) if status != "RUNNING")
        spot = found.get("config", {}).get("spot", self.args.spot)
        return State(KINDS.get(status, "starting"), f"{pool} {status}{': ' if reasons else ''}{reasons}", spot)

    def create(self) -> None:
        """See provision.Cloud; pools that are there already stay."""
        args, several = self.args, self.args.slice.hosts > 1
        if "workload_policy" in args.slice.row and several:
            policy = [
                "resource-policies",
                "create",
                "workload-policy",
                args.name,
                f"--region={self.region}",
                *self.project,
            ]
            shape = ["--type=HIGH_THROUGHPUT", f"--accelerator-topology={args.slice.topology}"]
            forgiving(self.shell, ["gcloud", "compute", *policy, *shape], EXISTS)
            placed = [f"--placement-policy={args.name}"]
        else:
            placed = [f"--tpu-topology={args.slice.topology}", "--placement-type=COMPACT"] if several else []
        optional = {"--service-account": args.service_account, "--reservation": args.reservation}
        for pool in self.pools:
            create = ["gcloud", "container", "node-pools", "create", pool, *self.where, "--async"]
            flags = [
                f"--node-locations={args.zone}",
                f"--machine-type={args.machine_type or args.slice.machine_type}",
                f"--num-nodes={args.slice.hosts}",
                *placed,
                "--enable-gvnic",
                "--scopes=https://www.googleapis.com/auth/cloud-platform",
                *(["--spot"] if args.spot else []),
                *(["--reservation-affinity=specific"] if args.reservation else []),
                *(f"{flag}={value}" for flag, value in optional.items() if value),
            ]
            forgiving(self.shell, [*create, *flags], EXISTS)

    def delete(self) -> None:
        """See provision.Cloud."""
        for pool in self.pools:
            forgiving(self.shell, ["gcloud", "container", "node-pools", "delete", pool, *self.where])
        if "workload_policy" in self.args.slice.row and self.args.slice.hosts > 1:
            policy = ["resource-policies", "delete", self.args.name, f"--region={self.region}", *self.project]
            forgiving(self.shell, ["gcloud", "compute", *policy])

    def since(self) -> str:
        """A node pool does not say."""
        return ""

    def bootstrap(self) -> None:
        """Credentials for kubectl, and the JobSet controller in the cluster; the environment is in the image."""
        credentials = ["gcloud", "container", "clusters", "get-credentials", self.args.cluster]
        self.shell.run([*credentials, f"--location={self.location}", *self.project])
        self.shell.run([*self.kubectl, "apply", "--server-side", f"--filename={CONTROLLER}"])

    def render(self, name: str, words: Sequence[str], environment: dict[str, str], max_restarts: int) -> str:
        """The JobSet of a run."""
        args = self.args
        if not args.image:
            raise UserError("GKE runs an image: --image IMAGE, whose working directory is this project's checkout")
        attributes = {"bucketName": (args.bucket or "").removeprefix("gs://"), "mountOptions": "implicit-dirs"}
        driver = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}
        values = {
            "name": name,
            "max_restarts": max_restarts,
            "slices": args.slices,
            "hosts": args.slice.hosts,
            "restart_on": [int(code) for code in args.restart_on.split(",")],
            "mounts": "true" if args.bucket else "false",
            "grace": args.grace,
            "service_account": args.kubernetes_account,
            "accelerator": args.slice.row["gke_accelerator"],
            "topology": args.slice.topology,
            "image": args.image,
            "command": [_unexpanded(word) for word in words],
            "environment": [{"name": key, "value": _unexpanded(value)} for key, value in environment.items()],
            "chips": args.slice.chips_per_host,
            "mount": args.mount,
        }
        filled = {key: json.dumps(value) for key, value in values.items()}
        # Without a bucket the folder is there all the same, and as short-lived as its Pod.
        volume = f"csi: {json.dumps(driver)}" if args.bucket else "emptyDir: {}"
        return Template(TEMPLATE.read_text()).substitute(filled, bucket=volume, word="$word")

    def xpk(self, words: Sequence[str], environment: dict[str, str]) -> str:
        """The same run as a command of XPK, for clusters that are managed with it."""
        args = self.args
        kind = args.slice.accelerator_type or f"{args.slice.row['accelerator']}:{args.slice.topology}"
        return shlex.join([
            *("xpk", "workload", "create", f"--workload={args.name}", f"--cluster={args.cluster}"),
            *(f"--project={args.project}", f"--zone={args.zone}", f"--docker-image={args.image}"),
            *(f"--tpu-type={kind}", f"--num-slices={args.slices}", f"--max-restarts={args.max_restarts}"),
            f"--restart-on-exit-codes={args.restart_on}",
            f"--command={shlex.join(['env', *(f'{k}={v}' for k, v in environment.items()), *words])}",
        ])  # fmt: skip

    def start(self, words: Sequence[str], environment: dict[str, str]) -> None:
        """Hands the run to the cluster; one that is there already is left as it is."""
        print(f"# the same with XPK: {self.xpk(words, environment)}")
        self._apply(self.render(self.args.name, words, environment, self.args.max_restarts))

    def _apply(self, manifest: str) -> None:
        self.shell.run([*self.kubectl, "apply", "--filename=-"], stdin=manifest)

    def progress(self, name: str) -> tuple[str, list[str], int]:
        """How the run as a whole stands (or ""), a line for it and each Pod, and its exit code; done with --dry-run."""
        argv = [*self.kubectl, "get", "jobset", name, "--output=json"]
        try:
            found = json.loads(self.shell.read(argv, '{"status": {"terminalState": "Completed"}}'))
        except Refused as refused:
            if refused.kind == MISSING:
                raise UserError(f"there is no run {name} in the cluster; run starts one") from refused
            raise
        selector = f"--selector=jobset.sigs.k8s.io/jobset-name={name}"
        pods = json.loads(self.shell.read([*self.kubectl, "get", "pods", selector, "--output=json"], '{"items": []}'))
        state, restarts = found.get("status", {}).get("terminalState", ""), found.get("status", {}).get("restarts", 0)
        codes = [code for pod in pods["items"] for code in _exit_codes(pod) if code]
        lines = [f"{name}: {state or 'running'}, {restarts} restarts", *map(_line, pods["items"])]
        return state, lines, codes[0] if codes else 2 if state == "Failed" else 0

    def logs(self, name: str, lines: int) -> int:
        """Follows the logs of all Pods until they end; the exit code of kubectl."""
        selector = f"--selector=jobset.sigs.k8s.io/jobset-name={name}"
        limit = f"--max-log-requests={self.args.slice.hosts * self.args.slices}"
        follow = ["logs", selector, "--follow", "--prefix", f"--tail={lines}", limit]
        return self.shell.stream([*self.kubectl, *follow], lambda line: print(line, end="", flush=True))

    def stop(self, name: str) -> None:
        """Deletes the JobSet: its Pods get SIGTERM and --grace seconds to save."""
        self.shell.run([*self.kubectl, "delete", "jobset", name, "--ignore-not-found", "--wait"])

    def check(self, words: Sequence[str]) -> str:
        """Starts words on every host once, beside the run's name; returns that name."""
        name = f"{self.args.name}-doctor"
        self._apply(self.render(name, words, {}, max_restarts=0))
        return name


_ORDER = ("lost", "deleting", "absent", "queued", "starting", "ready")


def _unexpanded(text: str) -> str:
    """Kubernetes puts variables in for $(NAME) and takes $$ for $."""
    return text.replace("$", "$$")


def _exit_codes(pod: dict) -> list[int]:
    ends = (one.get("state", {}).get("terminated") for one in pod.get("status", {}).get("containerStatuses", []))
    return [end["exitCode"] for end in ends if end]


def _line(pod: dict) -> str:
    """A Pod in a line: its name, node and phase, and how its container ended."""
    how = "".join(f" with {code}" for code in _exit_codes(pod))
    node = pod.get("spec", {}).get("nodeName", "no node yet")
    return f"{pod['metadata']['name']} on {node}: {pod.get('status', {}).get('phase', 'Unknown')}{how}"
