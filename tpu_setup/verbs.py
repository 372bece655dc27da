"""What each verb does with each kind of back-end, and what it says about money when it ends."""

import time
from argparse import Namespace
from collections.abc import Sequence
from datetime import UTC, datetime

from llama_jax.errors import UserError
from llama_jax.planning.hardware import CHIPS
from tpu_setup import hosts, provision
from tpu_setup.generations import locked_libtpu
from tpu_setup.gke import Gke
from tpu_setup.hosts import ROOT, Run
from tpu_setup.provision import ABSENT, READY, State
from tpu_setup.shell import Refused, Shell
from tpu_setup.slurm import Slurm
from tpu_setup.ssh import Ssh
from tpu_setup.watch import watch, watch_jobset


class Remembered:
    """A cloud that keeps what was last seen of it, for the last word to the user."""

    def __init__(self, cloud: provision.Cloud):
        self.cloud, self.last = cloud, None

    def state(self, assumed: State) -> State:
        """See provision.Cloud."""
        self.last = self.cloud.state(assumed)
        return self.last

    def create(self) -> None:
        """See provision.Cloud; what was refused may have come in part."""
        try:
            self.cloud.create()
            self.last = State("queued")
        except Refused:
            self.state(ABSENT)
            raise

    def delete(self) -> None:
        """See provision.Cloud."""
        self.cloud.delete()
        self.last = ABSENT


def do(args: Namespace, shell: Shell, back, command: Sequence[str]) -> int:
    """Carries out one verb; returns the exit code."""
    if isinstance(back, Slurm):
        return _slurm(args, back, command)
    if isinstance(back, Ssh) and args.verb in ("create", "wait", "delete"):
        raise UserError(
            f"--backend ssh rents nothing, so there is nothing to {args.verb}; go on with bootstrap and run"
        )
    cloud = Remembered(back)
    try:
        match args.verb:
            case "create":
                provision.create(cloud, shell, args.name)
            case "wait":
                provision.wait(cloud, shell, args.name, poll=args.poll, timeout=args.timeout * 3600)
            case "delete":
                provision.delete(cloud, shell, args.name)
            case "cost":
                _cost(args, cloud)
            case _:
                return (
                    _gke(args, cloud, shell, command)
                    if isinstance(back, Gke)
                    else _on_hosts(args, cloud, shell, command)
                )
        return 0
    finally:
        # Whichever way it ended: an error, Ctrl-C, or well.
        note = None if args.slice is None or args.dry_run else provision.reminder(cloud.last, args.name, size(args))
        if note:
            shell.say(note)


def size(args: Namespace) -> str:
    """What is rented, in words."""
    one = args.slice
    kind = one.accelerator_type or f"{one.generation}:{one.topology}"
    several = f"{args.slices} x " if args.slices > 1 else ""
    return f"{several}{kind}, {one.chips * args.slices} chips on {one.hosts * args.slices} hosts"


def environment(args: Namespace) -> dict[str, str]:
    """What a run's command finds set: the generation's flags, a compile cache that outlives the hosts, the user's own."""
    found = {}
    if args.slice is not None:
        version = args.libtpu or locked_libtpu(ROOT / "requirements.lock")
        flags = args.table.libtpu_args(args.slice.generation, version, args.slices)
        flags = flags if args.libtpu_args is None else args.libtpu_args
        found = {"LIBTPU_INIT_ARGS": flags} if flags else {}
    if args.bucket:
        found["JAX_COMPILATION_CACHE_DIR"] = f"{args.mount}/jax-cache"
    return found | dict(one.split("=", 1) for one in args.env)


def _needed(command: Sequence[str]) -> Sequence[str]:
    if not command:
        raise UserError(
            "run needs a command behind --, such as -- llama-jax pretrain pretrain_7b --out /mnt/bucket/runs/7b"
        )
    return command


def _ready(args: Namespace, cloud: Remembered) -> None:
    state = cloud.state(assumed=READY)
    if state.kind != "ready":
        raise UserError(f"{args.name} is not there ({state.detail or state.kind}); create asks for it, wait follows it")


def devices(args: Namespace, count: int) -> tuple[int, int]:
    """How many devices jax must find on all `count` hosts, and on one."""
    here = args.devices_per_host
    if args.slice is not None:
        here = args.slice.chips_per_host * next(chip.devices for chip in CHIPS if chip.name == args.slice.generation)
    return here * count, here


def _on_hosts(args: Namespace, cloud: Remembered, shell: Shell, command: Sequence[str]) -> int:
    back, name = cloud.cloud, args.name
    extra = "cuda" if args.slice is None else "tpu"

    def bootstrap() -> None:
        hosts.bootstrap(shell, back, name, extra=extra, bucket=args.bucket, mount=args.mount)

    count = len(back.hosts()) if args.slice is None else args.slice.hosts * args.slices
    match args.verb:
        case "bootstrap":
            _ready(args, cloud)
            bootstrap()
        case "run":
            run = Run(name, _needed(command), environment(args), args.max_restarts, args.restart_on)
            if args.watch:
                return watch(cloud, back, shell, run, count, bootstrap, poll=args.poll, timeout=args.timeout * 3600)
            _ready(args, cloud)
            hosts.start(shell, back, run, count)
            shell.say(
                f"it goes on without this terminal: logs {name} follows it, status {name} looks at it, stop {name} ends it"
            )
        case "logs":
            hosts.logs(shell, back, name, args.lines, args.poll)
        case "stop":
            _ready(args, cloud)
            hosts.stop(shell, back, name, args.grace)
        case "doctor":
            hosts.doctor(shell, back, *devices(args, count), args.megabytes)
        case "status":
            state = cloud.state(assumed=READY)
            if args.slice is not None:
                print(f"{name}: {state.detail or state.kind} ({size(args)})")
            if state.kind == "ready":
                hosts.show(shell, back, name)
    return 0


def _gke(args: Namespace, cloud: Remembered, shell: Shell, command: Sequence[str]) -> int:
    back, name = cloud.cloud, args.name
    match args.verb:
        case "bootstrap":
            back.bootstrap()
        case "run":
            _ready(args, cloud)
            back.start(_needed(command), environment(args))
            if args.watch:
                return watch_jobset(cloud, back, shell, name, poll=args.poll, timeout=args.timeout * 3600)
            shell.say(
                f"it goes on without this terminal: logs {name} follows it, status {name} looks at it, stop {name} ends it"
            )
        case "logs":
            if code := back.logs(name, args.lines):
                raise UserError(f"kubectl logs ended with {code}")
        case "stop":
            cloud.state(assumed=READY)
            back.stop(name)
        case "doctor":
            return _gke_doctor(args, back)
        case "status":
            state = cloud.state(assumed=READY)
            print(f"{name}: {state.detail or state.kind} ({size(args)})")
            if state.kind == "ready":
                print("\n".join(back.progress(name)[1]))
    return 0


def _gke_doctor(args: Namespace, back: Gke) -> int:
    """The check as a JobSet of its own, which is deleted whatever comes of it."""
    name = back.check(["python", *_check(args, *devices(args, args.slice.hosts * args.slices))])
    try:
        begin = time.monotonic()
        while not (found := back.progress(name))[0]:
            if time.monotonic() - begin > 900:
                raise UserError("\n".join([f"{name} has not ended after 15 min:", *found[1]]))
            time.sleep(args.poll)
        back.logs(name, args.lines)
        return found[2]
    finally:
        back.stop(name)


def _check(args: Namespace, everywhere: int, here: int) -> list[str]:
    return [
        "-m",
        "tpu_setup.check_devices",
        f"--devices={everywhere}",
        f"--here={here}",
        f"--megabytes={args.megabytes}",
    ]


def _slurm(args: Namespace, back: Slurm, command: Sequence[str]) -> int:
    match args.verb:
        case "bootstrap":
            back.shell.run(["bash", str(ROOT / "tpu_setup" / "bootstrap.sh"), "cuda"])
        case "run" if args.watch:
            raise UserError("Slurm starts a preempted run again by itself; leave --watch out, status shows where it is")
        case "run":
            back.start(_needed(command), environment(args))
        case "logs":
            if code := back.logs(args.lines):
                raise UserError(
                    f"{back.log} cannot be followed (tail ended with {code}); run writes it where run was called"
                )
        case "status":
            print(back.state())
        case "stop":
            back.stop()
        case "doctor":
            back.check(["python", *_check(args, *devices(args, args.nodes))])
        case _:
            raise UserError(f"Slurm rents nothing, so there is nothing to {args.verb}; go on with bootstrap and run")
    return 0


def _cost(args: Namespace, cloud: Remembered) -> None:
    """The money, from the user's price: what is there, by the hour and the day, and so far."""
    if args.price is None:
        raise UserError(
            "cost needs --price, of a chip for an hour: prices change, see https://cloud.google.com/tpu/pricing"
        )
    if args.slice is None:
        raise UserError("cost is for what is rented: --backend queued, compute or gke")
    hourly = args.slice.chips * args.slices * args.price
    print(f"{args.name}: {size(args)}")
    print(f"at {args.price:g} a chip-hour: {hourly:,.2f} an hour, {24 * hourly:,.2f} a day")
    if args.hours is not None:
        print(f"{args.hours:g} hours: {args.hours * hourly:,.2f}")
    state = cloud.state(assumed=READY)
    if not state.paid:
        print(f"now: {state.detail or state.kind}; not paid for")
    elif since := cloud.cloud.since():
        hours = (datetime.now(UTC) - datetime.fromisoformat(since)).total_seconds() / 3600
        print(f"there since {since}: {hours:.1f} hours, {hours * hourly:,.2f} so far, if it was there all the time")
    else:
        print("now: there and paid for; since when, the console's billing shows")
