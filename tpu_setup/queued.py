"""Queued resources: TPU VMs of every generation but v7x, asked for in a queue; one request may hold several slices."""

import json
from argparse import Namespace

from llama_jax.errors import UserError
from tpu_setup.hosts import Host
from tpu_setup.provision import State, forgiving
from tpu_setup.shell import MISSING, Refused, Shell

KINDS = {
    "CREATING": "queued",
    "ACCEPTED": "queued",
    "WAITING_FOR_RESOURCES": "queued",
    "PROVISIONING": "starting",
    "ACTIVE": "ready",
    "SUSPENDING": "lost",
    "SUSPENDED": "lost",
    "FAILED": "lost",
    "DELETING": "deleting",
}
# A host that is gone must not hold a command for ever.
SSH_FLAGS = ["--ssh-flag=-oConnectTimeout=20", "--ssh-flag=-oServerAliveInterval=15"]


class Queued:
    """One queued resource and its nodes, each node a slice of several workers."""

    def __init__(self, args: Namespace, shell: Shell):
        if not args.zone:
            raise UserError("queued resources need a zone: --zone ZONE (gcloud compute tpus locations list)")
        if args.slice.accelerator_type is None:
            known = ", ".join(args.slice.row["topologies"])
            raise UserError(
                f"--tpu {args.tpu}: queued resources know the topologies {known}; others with --backend gke"
            )
        if not (args.runtime_version or "runtime_version" in args.slice.row):
            raise UserError(f"queued resources do not offer {args.slice.generation}; use --backend gke or compute")
        self.args, self.shell = args, shell
        self.where = [f"--zone={args.zone}", *([f"--project={args.project}"] if args.project else []), "--quiet"]

    def state(self, assumed: State) -> State:
        """See provision.Cloud."""
        argv = [
            "gcloud",
            "compute",
            "tpus",
            "queued-resources",
            "describe",
            self.args.name,
            *self.where,
            "--format=json",
        ]
        try:
            text = self.shell.read(argv, "")
        except Refused as refused:
            if refused.kind == MISSING:
                return State("absent")
            raise
        if not text:
            return assumed
        found = json.loads(text)
        self._check(found)
        state = found["state"]["state"]
        reason = found["state"].get("failedData", {}).get("error", {}).get("message", "")
        detail = f"{state}: {reason}" if reason else state
        spot = "spot" in found or self.args.spot
        return State(KINDS.get(state, "starting"), detail, spot)

    def _check(self, found: dict) -> None:
        types = {spec["node"]["acceleratorType"] for spec in found.get("tpu", {}).get("nodeSpec", []) if "node" in spec}
        asked = self.args.slice.accelerator_type
        if types and types != {asked}:
            raise UserError(
                f"{self.args.name} exists as {', '.join(types)}, not {asked}; delete it, or use another name"
            )

    def create(self) -> None:
        """See provision.Cloud."""
        args = self.args
        several = [f"--node-count={args.slices}", f"--node-prefix={args.name}"]
        optional = {
            "--service-account": args.service_account,
            "--network": args.network,
            "--subnetwork": args.subnetwork,
            "--valid-until-duration": args.valid_until,
        }
        self.shell.run([
            *("gcloud", "compute", "tpus", "queued-resources", "create", args.name, *self.where),
            f"--accelerator-type={args.slice.accelerator_type}",
            f"--runtime-version={args.runtime_version or args.slice.row['runtime_version']}",
            *(several if args.slices > 1 else [f"--node-id={args.name}"]),
            *(["--spot"] if args.spot else ["--reserved"] if args.reservation else []),
            "--scopes=https://www.googleapis.com/auth/cloud-platform",
            *(f"{flag}={value}" for flag, value in optional.items() if value),
            *(["--internal-ips"] if args.internal_ip else []),
        ])  # fmt: skip

    def delete(self) -> None:
        """See provision.Cloud; --force takes the nodes too."""
        delete = ["gcloud", "compute", "tpus", "queued-resources", "delete", self.args.name]
        forgiving(self.shell, [*delete, "--force", *self.where])

    def since(self) -> str:
        """When the first node came: its request may have waited long before."""
        return self._node(self._nodes()[0]).get("createTime", "")

    def hosts(self) -> list[Host]:
        """Every worker of every node, in the order of jax's processes."""
        return [host for node in self._nodes() for host in self._workers(node)]

    def _nodes(self) -> list[str]:
        args = self.args
        return [args.name] if args.slices == 1 else [f"{args.name}-{number}" for number in range(args.slices)]

    def _node(self, node: str) -> dict:
        assumed = [{"ipAddress": f"ADDRESS-OF-{node}-W-{worker}"} for worker in range(self.args.slice.hosts)]
        argv = ["gcloud", "compute", "tpus", "tpu-vm", "describe", node, *self.where, "--format=json"]
        return json.loads(self.shell.read(argv, json.dumps({"state": "READY", "networkEndpoints": assumed})))

    def _workers(self, node: str) -> list[Host]:
        found = self._node(node)
        if found.get("state") != "READY":
            raise UserError(f"the node {node} is {found.get('state')}, not READY; wait follows it")
        ends = found.get("networkEndpoints", [])
        return [Host(f"{node}-w-{i}", end["ipAddress"], (node, str(i))) for i, end in enumerate(ends)]

    def ssh(self, host: Host, command: str) -> list[str]:
        """What runs a command on a host."""
        node, worker = host.at
        via = ["--internal-ip"] if self.args.internal_ip else []
        to = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", node, f"--worker={worker}", *self.where, *via]
        return [*to, *SSH_FLAGS, f"--command={command}"]

    def copy(self, host: Host, source: str, target: str) -> list[str]:
        """What copies a file to a host's home."""
        node, worker = host.at
        via = ["--internal-ip"] if self.args.internal_ip else []
        to = ["gcloud", "compute", "tpus", "tpu-vm", "scp", source, f"{node}:{target}"]
        return [*to, f"--worker={worker}", *self.where, *via]
