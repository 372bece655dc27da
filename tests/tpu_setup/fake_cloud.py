"""Plays gcloud, kubectl, ssh, scp and Slurm: keeps a small world in $FAKE_CLOUD, refuses what the real ones refuse.

`called` plays one call of a command, by a stub of its name on PATH. The world is a folder:

  calls.jsonl   every call in turn, with what it was given on stdin
  fates.json    [[state, ...], ...]: what becomes of each thing that is created; a state lasts for one look, the last for ever,
                "STATE@N" until the file `step` holds N, and {"refuse": text} refuses to create
  world.json    what was created, and how often it was looked at
  hosts/NAME/   the home of a host; commands over SSH really run there
  flaky         so many looks at a slice fail before one answers
  down          names of hosts that do not answer, one a line
"""

import fcntl
import json
import os
import sys

# Larger modules are imported where they are needed: a test makes some dozen calls, each a process.
WORLD = os.environ.get("FAKE_CLOUD", "")
WIDE = {"--project", "--quiet", "--format"}
# What each command knows, as `gcloud ... --help` of version 528.0.0 lists it; + marks two that newer ones have.
FLAGS = {
    "compute tpus queued-resources create": "zone accelerator-type runtime-version node-id node-count node-prefix spot reserved "
    "scopes service-account network subnetwork valid-until-duration internal-ips",
    "compute tpus queued-resources describe": "zone",
    "compute tpus queued-resources delete": "zone force async",
    "compute tpus tpu-vm describe": "zone",
    "compute tpus tpu-vm ssh": "zone worker command internal-ip ssh-flag",
    "compute tpus tpu-vm scp": "zone worker internal-ip scp-flag",
    "compute instance-groups managed create": "zone size template workload-policy default-action-on-vm-failure "
    "target-size-policy-mode+",
    "compute instance-groups managed describe": "zone",
    "compute instance-groups managed list-instances": "zone",
    "compute instance-groups managed delete": "zone",
    "compute instance-templates create": "instance-template-region machine-type image-family image-project boot-disk-size "
    "maintenance-policy provisioning-model instance-termination-action reservation-affinity reservation scopes "
    "service-account network subnet no-address",
    "compute instance-templates delete": "region",
    "compute resource-policies create workload-policy": "region type accelerator-topology accelerator-topology-mode+",
    "compute resource-policies delete": "region",
    "compute ssh": "zone command ssh-flag tunnel-through-iap",
    "compute scp": "zone scp-flag tunnel-through-iap",
    "container node-pools create": "cluster location async node-locations machine-type num-nodes tpu-topology placement-type "
    "placement-policy enable-gvnic scopes spot reservation-affinity reservation service-account",
    "container node-pools describe": "cluster location",
    "container node-pools delete": "cluster location",
    "container clusters get-credentials": "location",
}


class Fail(SystemExit):
    def __init__(self, text: str, code: int = 1):
        print(text, file=sys.stderr)
        super().__init__(code)


def read(name: str) -> str:
    """A file of the world, "" where there is none."""
    path = os.path.join(WORLD, name)
    if not os.path.exists(path):
        return ""
    with open(path) as file:
        return file.read()


def load() -> dict:
    return json.loads(read("world.json") or '{"things": {}, "created": 0}')


def save(world: dict) -> None:
    with open(os.path.join(WORLD, "world.json"), "w") as file:
        json.dump(world, file)


def create(world: dict, kind: str, name: str, flags: dict) -> None:
    key = f"{kind} {name}"
    if key in world["things"]:
        raise Fail(f"ERROR: (gcloud) ALREADY_EXISTS: Resource '{name}' already exists")
    fates = [["READY"]]
    if kind in ("queued-resources", "managed", "node-pools", "jobset"):
        fates = json.loads(read("fates.json"))
        fate = fates[min(world["created"], len(fates) - 1)]
        world["created"] += 1
        if isinstance(fate[0], dict) and "refuse" in fate[0]:
            save(world)
            raise Fail(f"ERROR: (gcloud) {fate[0]['refuse']}")
        fates = [fate]
    world["things"][key] = {"fate": fates[0], "at": 0, "flags": flags}


def look(world: dict, kind: str, name: str, missing: str) -> tuple[str, str]:
    """A thing's state and its message; every look moves it on."""
    thing = world["things"].get(f"{kind} {name}")
    if thing is None:
        raise Fail(missing)
    while True:
        found = thing["fate"][thing["at"]]
        found = {"state": found} if isinstance(found, str) else found
        state, _, until = found["state"].partition("@")
        last = thing["at"] == len(thing["fate"]) - 1
        if until and int(read("step") or 0) >= int(until) and not last:
            thing["at"] += 1
            continue
        thing["shown"] = found
        if not until and not last:
            thing["at"] += 1
        if kind == "queued-resources" and state != "ACTIVE":
            vanish(name)
        return state, found.get("message", "")


def vanish(name: str) -> None:
    """A slice that is taken away takes its hosts, what ran on them and their disks."""
    import shutil
    import signal
    from pathlib import Path

    for home in Path(WORLD, "hosts").glob(f"{name}-w-*"):
        for pid in home.glob("llama_jax-runs/*/pid"):
            try:
                os.killpg(int(pid.read_text()), signal.SIGKILL)
            except (ProcessLookupError, ValueError):
                pass
        shutil.rmtree(home, ignore_errors=True)


def chips(flags: dict) -> int:
    prefix, number = flags["--accelerator-type"].rsplit("-", 1)
    return int(number) // (2 if prefix in ("v4", "v5p") else 1)


def home_of(name: str, command: str) -> str:
    if name in read("down").split():
        raise Fail(f"{command}: connect to host {name} port 22: Connection timed out", 255)
    home = os.path.join(WORLD, "hosts", name)
    os.makedirs(home, exist_ok=True)
    return home


def on_host(name: str, command: str) -> int:
    home = home_of(name, "ssh")
    os.environ.pop("LLAMA_JAX_RUNS", None)
    os.chdir(home)
    os.environ.update(HOME=home, HOST_NAME=name)
    os.execvp("bash", ["bash", "-c", command])


def copy(name: str, source: str, target: str) -> int:
    import shutil

    shutil.copy(source, os.path.join(home_of(name, "scp"), target))
    return 0


def parse(words: list[str]) -> tuple[str, list[str], dict]:
    command = max((c for c in FLAGS if words[: len(c.split())] == c.split()), key=len, default=None)
    if command is None:
        raise Fail(f"ERROR: (gcloud) Invalid choice: {' '.join(words)}", 2)
    rest, known = words[len(command.split()) :], {f"--{flag.rstrip('+')}" for flag in FLAGS[command].split()} | WIDE
    flags = {word.partition("=")[0]: word.partition("=")[2] for word in rest if word.startswith("--")}
    if unknown := sorted(flags.keys() - known):
        raise Fail(f"ERROR: (gcloud.{command.replace(' ', '.')}) unrecognized arguments: {' '.join(unknown)}", 2)
    if "--quiet" not in flags:
        raise Fail(f"{command} would stop and ask")
    return command, [word for word in rest if not word.startswith("--")], flags


def gcloud(words: list[str]) -> int:
    command, names, flags = parse(words)
    if command.endswith(("resources describe", "managed describe", "pools describe")) and (
        flaky := int(read("flaky") or 0)
    ):
        with open(os.path.join(WORLD, "flaky"), "w") as file:
            file.write(str(flaky - 1))
        raise Fail("ERROR: (gcloud) 503: The service is currently unavailable")
    if flags.get("--zone", "").startswith("mars"):
        where = f"'locations/{flags['--zone']}' (or it may not exist)"
        raise Fail(f"ERROR: (gcloud) PERMISSION_DENIED: Permission denied on {where}. NOT_FOUND")
    kind, verb = command.split()[-2:]
    name = names[0] if names else ""
    if command == "compute ssh":
        return on_host(name, flags["--command"])
    if command == "compute scp":
        host, target = names[1].split(":")
        return copy(host, name, target)
    if kind == "tpu-vm" and verb == "ssh":
        return on_host(f"{name}-w-{flags['--worker']}", flags["--command"])
    if kind == "tpu-vm" and verb == "scp":
        node, target = names[1].split(":")
        return copy(f"{node}-w-{flags['--worker']}", name, target)
    world = load()
    try:
        return changing(world, command, kind, verb, name, flags)
    finally:
        save(world)


def changing(world: dict, command: str, kind: str, verb: str, name: str, flags: dict) -> int:
    kind = "resource-policies" if verb == "workload-policy" else kind
    missing = f"ERROR: (gcloud) NOT_FOUND: Resource 'projects/p/{kind}/{name}' was not found"
    if command == "container clusters get-credentials":
        return 0
    if verb in ("create", "workload-policy"):
        create(world, kind, name, flags)
    elif verb == "delete":
        if world["things"].pop(f"{kind} {name}", None) is None:
            raise Fail(missing)
        vanish(name)
    elif kind == "queued-resources":
        state, message = look(world, kind, name, missing)
        made = world["things"][f"{kind} {name}"]["flags"]
        found = {
            "state": {"state": state},
            "tpu": {"nodeSpec": [{"node": {"acceleratorType": made["--accelerator-type"]}}]},
        }
        found |= {"spot": {}} if "--spot" in made else {}
        if message:
            found["state"]["failedData"] = {"error": {"code": 8, "message": message}}
        print(json.dumps(found))
    elif kind == "tpu-vm":
        owner = next(
            (t for key, t in world["things"].items() if key.startswith("queued") and name.startswith(key.split()[1])),
            None,
        )
        if owner is None:
            raise Fail(missing)
        count = max(1, chips(owner["flags"]) // 4)
        ends = [{"ipAddress": f"10.0.0.{number + 2}"} for number in range(count)]
        print(json.dumps({"state": "READY", "networkEndpoints": ends, "createTime": "2026-01-02T03:04:05.678901234Z"}))
    elif verb == "list-instances":
        thing = world["things"][f"managed {name}"]
        status = thing.get("shown", {"state": "RUNNING"})
        each = status["state"].split(",")
        size = int(thing["flags"]["--size"])
        error = {"errors": {"errors": [{"code": "QUOTA_EXCEEDED", "message": status.get("message")}]}}
        rows = [
            {"instance": f"zones/z/instances/{name}-{n}x", "instanceStatus": each[n % len(each)]} for n in range(size)
        ]
        print(json.dumps([row | ({"lastAttempt": error} if "message" in status else {}) for row in rows]))
    elif kind == "managed":
        look(world, kind, name, missing)
        print(json.dumps({"creationTimestamp": "2026-01-02T03:04:05.000-07:00"}))
    elif kind == "node-pools":
        state, message = look(world, kind, name, missing)
        made = world["things"][f"{kind} {name}"]["flags"]
        print(json.dumps({"status": state, "config": {"spot": "--spot" in made}, "conditions": [{"message": message}]}))
    return 0


def kubectl(words: list[str], stdin: str) -> int:
    words = [word for word in words if not word.startswith(("--context", "--namespace"))]
    world = load()
    try:
        if words[0] == "apply" and stdin:
            name = next(line.split('"')[1] for line in stdin.splitlines() if line.startswith("  name:"))
            create(world, "jobset", name, {})
            print(f"jobset.jobset.x-k8s.io/{name} created")
        elif words[:2] == ["get", "jobset"]:
            error = f'Error from server (NotFound): jobsets.jobset.x-k8s.io "{words[2]}" not found'
            state, _ = look(world, "jobset", words[2], error)
            terminal = {"terminalState": state} if state in ("Completed", "Failed") else {}
            print(json.dumps({"status": terminal | {"restarts": 1}}))
        elif words[:2] == ["get", "pods"]:
            code = int(read("pod_code") or 0)
            end = {"state": {"terminated": {"exitCode": code}}}
            status = {"phase": "Failed" if code else "Succeeded", "containerStatuses": [end]}
            print(
                json.dumps(
                    {
                        "items": [
                            {"metadata": {"name": "l7-slice-0-1"}, "spec": {"nodeName": "node-1"}, "status": status}
                        ]
                    }
                )
            )
        elif words[:2] == ["delete", "jobset"]:
            world["things"].pop(f"jobset {words[2]}", None)
        elif words[0] == "logs":
            print("[pod/l7-slice-0-0] a line of the log")
        return 0
    finally:
        save(world)


def main(command: str, words: list[str], stdin: str) -> int:
    with open(os.path.join(WORLD, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(os.path.join(WORLD, "calls.jsonl"), "a") as calls:
            calls.write(json.dumps([command, words, stdin]) + "\n")
        if command == "gcloud" and not {"ssh", "scp"} & set(words[:4]):
            return gcloud(words)
        if command == "kubectl":
            return kubectl(words, stdin)
        if command == "squeue":
            sys.stdout.write(read("squeue"))
            return 0
    if command == "gcloud":
        return gcloud(words)
    if command == "ssh":
        return on_host(words[-2], words[-1])
    if command == "scp":
        host, target = words[-1].split(":")
        return copy(host, words[-2], target)
    return 0  # sudo, sbatch, scancel, gcsfuse: that they were called is all


def called() -> int:
    """One call, as a process of its own."""
    command, *words = sys.argv[1:]
    return main(command, words, sys.stdin.read() if "--filename=-" in words else "")
