"""Compute Engine: a slice of v5p and later as a group of instances that come together or not at all."""

import json
from argparse import Namespace

from llama_jax.errors import UserError
from tpu_setup.hosts import Host
from tpu_setup.provision import State, forgiving
from tpu_setup.queued import SSH_FLAGS
from tpu_setup.shell import EXISTS, MISSING, PERMANENT, Refused, Shell, meaning

GONE = ("STOPPING", "STOPPED", "SUSPENDING", "SUSPENDED", "TERMINATED")


class ComputeEngine:
    """A managed instance group with its template and, where several hosts make the slice, its workload policy."""

    def __init__(self, args: Namespace, shell: Shell):
        if not (args.zone and args.project):
            raise UserError("Compute Engine needs --zone ZONE and --project PROJECT: its group names both in full")
        if not (args.image_family or "image_family" in args.slice.row):
            raise UserError(f"Compute Engine does not offer {args.slice.generation}; use --backend queued or gke")
        if args.slices > 1:
            raise UserError("--slices over 1 is for --backend queued and gke; a group of Compute Engine is one slice")
        self.args, self.shell = args, shell
        self.region = args.zone.rpartition("-")[0]
        self.project = [f"--project={args.project}", "--quiet"]
        self.where = [f"--zone={args.zone}", *self.project]

    def _own(self, kind: str) -> str:
        return f"projects/{self.args.project}/regions/{self.region}/{kind}/{self.args.name}"

    def _group(self, verb: str, *flags: str) -> list[str]:
        return ["gcloud", "compute", "instance-groups", "managed", verb, self.args.name, *self.where, *flags]

    def _instances(self, assumed: list[dict]) -> list[dict]:
        return json.loads(self.shell.read(self._group("list-instances", "--format=json"), json.dumps(assumed)))

    def state(self, assumed: State) -> State:
        """See provision.Cloud."""
        try:
            text = self.shell.read(self._group("describe", "--format=json"), "")
        except Refused as refused:
            if refused.kind == MISSING:
                return State("absent")
            raise
        if not text:
            if assumed.kind != "absent":
                self._instances([])
            return assumed
        instances = self._instances([])
        status = [one.get("instanceStatus", "PENDING") for one in instances]
        errors = [e for one in instances for e in one.get("lastAttempt", {}).get("errors", {}).get("errors", [])]
        reasons = sorted({f"{error.get('code', '')}: {error.get('message', '')}" for error in errors})
        counts = ", ".join(f"{status.count(word)} {word}" for word in sorted(set(status))) or "no instance yet"
        detail = "; ".join([counts, *reasons])
        if any(word in GONE for word in status) or any(meaning(reason)[0] == PERMANENT for reason in reasons):
            kind = "lost"
        elif status and set(status) == {"RUNNING"} and len(status) == self.args.slice.hosts:
            kind = "ready"
        else:
            kind = "starting" if {"RUNNING", "STAGING", "PROVISIONING"} & set(status) else "queued"
        return State(kind, detail, self.args.spot, rest=kind == "lost" and "RUNNING" in status)

    def since(self) -> str:
        """When the group was made; its instances come a little later."""
        return json.loads(self.shell.read(self._group("describe", "--format=json"), "{}")).get("creationTimestamp", "")

    def create(self) -> None:
        """See provision.Cloud; what an earlier attempt left is used."""
        args, one_host = self.args, self.args.slice.hosts == 1
        compute = ["gcloud", "compute"]
        if not one_host:
            policy = [
                "resource-policies",
                "create",
                "workload-policy",
                args.name,
                f"--region={self.region}",
                *self.project,
            ]
            shape = [f"--accelerator-topology={args.slice.topology}", "--accelerator-topology-mode=AUTO_CONNECT"]
            forgiving(self.shell, [*compute, *policy, "--type=HIGH_THROUGHPUT", *shape], EXISTS)
        forgiving(self.shell, [*compute, "instance-templates", "create", args.name, *self._template()], EXISTS)
        bound = [f"--workload-policy={self._own('resourcePolicies')}", "--target-size-policy-mode=bulk"]
        self.shell.run(self._group(
            *("create", f"--size={args.slice.hosts}", f"--template={self._own('instanceTemplates')}"),
            *([] if one_host else bound),
            "--default-action-on-vm-failure=do-nothing",
        ))  # fmt: skip

    def _template(self) -> list[str]:
        args = self.args
        optional = {
            "--service-account": args.service_account,
            "--network": args.network,
            "--subnet": args.subnetwork,
            "--reservation": args.reservation,
        }
        return [
            *(f"--instance-template-region={self.region}", *self.project),
            f"--machine-type={args.machine_type or args.slice.machine_type}",
            f"--image-family={args.image_family or args.slice.row['image_family']}",
            "--image-project=ubuntu-os-accelerator-images",
            "--boot-disk-size=200GB",  # the image's own 10 GB hold no environment
            "--maintenance-policy=TERMINATE",
            *(["--provisioning-model=SPOT", "--instance-termination-action=STOP"] if args.spot else []),
            *(["--reservation-affinity=specific"] if args.reservation else []),
            "--scopes=https://www.googleapis.com/auth/cloud-platform",
            *(f"{flag}={value}" for flag, value in optional.items() if value),
            *(["--no-address"] if args.internal_ip else []),
        ]

    def delete(self) -> None:
        """See provision.Cloud."""
        compute, region = ["gcloud", "compute"], f"--region={self.region}"
        forgiving(self.shell, self._group("delete"))
        forgiving(self.shell, [*compute, "instance-templates", "delete", self.args.name, region, *self.project])
        if self.args.slice.hosts > 1:
            forgiving(self.shell, [*compute, "resource-policies", "delete", self.args.name, region, *self.project])

    def hosts(self) -> list[Host]:
        """The instances by name; inside the network a name is an address."""
        assumed = [
            {"instance": f"{self.args.name}-{k:04}", "instanceStatus": "RUNNING"} for k in range(self.args.slice.hosts)
        ]
        found = [(one["instance"].rpartition("/")[2], one.get("instanceStatus")) for one in self._instances(assumed)]
        if down := [f"{name} is {status}" for name, status in found if status != "RUNNING"]:
            raise UserError(f"{', '.join(down)}, not RUNNING; wait follows them")
        return [Host(name, name, (name,)) for name, _ in sorted(found)]

    def ssh(self, host: Host, command: str) -> list[str]:
        """What runs a command on a host."""
        via = ["--tunnel-through-iap"] if self.args.internal_ip else []
        return ["gcloud", "compute", "ssh", host.name, *self.where, *via, *SSH_FLAGS, f"--command={command}"]

    def copy(self, host: Host, source: str, target: str) -> list[str]:
        """What copies a file to a host's home."""
        via = ["--tunnel-through-iap"] if self.args.internal_ip else []
        return ["gcloud", "compute", "scp", source, f"{host.name}:{target}", *self.where, *via]
