"""Hosts that are there and open to SSH: a cluster of GPUs, or any machines that see each other."""

from argparse import Namespace

from llama_jax.errors import UserError
from tpu_setup.hosts import Host
from tpu_setup.provision import READY, State
from tpu_setup.shell import Shell

FLAGS = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=15"]


class Ssh:
    """The hosts of --hosts; the first one is the coordinator, under a name that the others can reach."""

    def __init__(self, args: Namespace, shell: Shell):
        if not args.hosts:
            raise UserError("--backend ssh needs --hosts HOST,HOST,..., each with its user where that is another")
        self.args = args

    def state(self, assumed: State) -> State:
        """Always there: nothing of it is rented here."""
        return READY

    def hosts(self) -> list[Host]:
        """The hosts in the order given, which is that of jax's processes."""
        return [Host(name, name.rpartition("@")[2], (name,)) for name in self.args.hosts.split(",")]

    def ssh(self, host: Host, command: str) -> list[str]:
        """What runs a command on a host."""
        return ["ssh", *FLAGS, host.name, command]

    def copy(self, host: Host, source: str, target: str) -> list[str]:
        """What copies a file to a host's home."""
        return ["scp", *FLAGS, source, f"{host.name}:{target}"]
