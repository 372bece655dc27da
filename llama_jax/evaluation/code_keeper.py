"""The process that contains one generated program, waits for it and ends it: the middle part of `code_execution`.

Runs as a script, alone, with the job as JSON in its argument, and answers in JSON on standard output. It imports nothing of
the package, and little besides, as it starts once for every program. The program itself goes past it on standard input.
"""

import ctypes
import errno
import json
import math
import os
import resource
import select
import signal
import struct
import sys

PROCESSES = 16  # threads count too
FILES_BYTES = 64 * 2**20  # of one file, and in namespaces of all together
OWN_USERS = range(60_578, 61_178)  # no system gives these to an account, and a container with 65,536 has them
WORK = "/program-work"  # the work folder in namespaces, where no other has such a name
LIBC = ctypes.CDLL(None, use_errno=True)

# From Linux's headers.
CLONE_THREAD = 1 << 16
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (1 << bit for bit in (17, 27, 28, 29, 30))
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
PR_SET_SECCOMP, SECCOMP_FILTER = 22, 2
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, ATTR_RDONLY_NOSUID_NODEV = 442, -100, 0x8000, 7
SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT, LANDLOCK_VERSION, PATH_BENEATH = 444, 445, 446, 1, 1
# Landlock's rights: all but execution, up to version 3; those for reading; those that a file can have.
FS_ALL, FS_READ, FS_FILE = (1 << 15) - 2, 1 << 2 | 1 << 3, 1 << 1 | 1 << 2 | 1 << 14
# Of each architecture: its name for seccomp, its clone and prlimit64, and what is refused: socket, fork, vfork, kill, tkill,
# tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo, ptrace, process_vm_writev, unshare, setns, shmget, semget, msgget; and for both
# pidfd_send_signal, io_uring_setup and pidfd_getfd.
SYSCALLS = {
    "x86_64": (
        0xC000003E,
        56,
        302,
        (41, 57, 58, 62, 200, 234, 129, 297, 101, 311, 272, 308, 29, 64, 68, 424, 425, 438),
    ),
    "aarch64": (0xC00000B7, 220, 261, (198, 129, 130, 131, 138, 240, 117, 271, 97, 268, 194, 190, 186, 424, 425, 438)),
}


def main() -> None:
    """Does the job, and answers what `keep` gives, or {"broken"} where the containment could not be built."""
    job = json.loads(sys.argv[1])
    user = OWN_USERS[os.getpid() % len(OWN_USERS)] if job["own_user"] else os.getuid()
    try:
        if sys.platform == "linux":
            call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != job["parent"]:
                return  # it ended before its end would be told
            call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        if job["namespaces"]:
            enter_namespaces()
            build_root(job["folder"], job["readable"], user)
        elif job["own_user"]:
            os.chown(job["folder"], user, user)
        answer = keep(job, user)
    except OSError as error:
        answer = {"broken": str(error)}
    print(json.dumps(answer))


def call(name: str, *arguments) -> int:
    """Calls a function of the C library; raises OSError where it answers -1."""
    passed = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    answer = getattr(LIBC, name)(*passed)
    if answer == -1:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return answer


def enter_namespaces() -> None:
    """Leaves the machine's mounts, network and System V memory; children see no process but their own.

    Whoever is not root may do so only inside a user namespace, where the user keeps the own id.
    """
    spaces = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    user, group = os.getuid(), os.getgid()
    call("unshare", spaces | (CLONE_NEWUSER if user else 0))
    for file, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        if user:
            with open(f"/proc/self/{file}", "w") as opened:
                opened.write(line)


def build_root(root: str, readable: list[str], owner: int) -> None:
    """Makes a folder a whole file system: what is readable, read-only; /dev/null; and an empty WORK of the owner."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in readable:
        os.makedirs(root + path)
        mount(path, root + path, None, MS_BIND | MS_REC)
    for path in ("/dev", WORK):
        os.mkdir(root + path)
    with open(root + "/dev/null", "w"):
        pass
    attributes = (ctypes.c_uint64 * 4)(ATTR_RDONLY_NOSUID_NODEV, 0, 0, 0)
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, os.fsencode(root), AT_RECURSIVE, attributes, 32)
    mount("/dev/null", root + "/dev/null", None, MS_BIND)
    size = f"size={FILES_BYTES},nr_inodes=1000,mode=700,uid={owner}"
    mount("tmpfs", root + WORK, "tmpfs", MS_NOSUID | MS_NODEV, size)


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2)."""
    call("mount", source.encode(), os.fsencode(target), kind and kind.encode(), flags, options.encode())


def allow_files(work: str, readable: list[str]) -> None:
    """Has the kernel (Landlock) refuse files to this process: in `work` it may do all, in what is readable only read.

    Before version 3 it lets any file be emptied, which is not good enough.
    """
    if call("syscall", SYS_LANDLOCK_CREATE, None, 0, LANDLOCK_VERSION) < 3:
        raise OSError("this kernel's Landlock is older than version 3")
    rules = call("syscall", SYS_LANDLOCK_CREATE, struct.pack("=Q", FS_ALL), 8, 0)
    for path, rights in [(work, FS_ALL), ("/dev/null", FS_FILE), *((path, FS_READ) for path in readable)]:
        beneath = struct.pack("=Qi", rights, os.open(path, os.O_PATH))
        call("syscall", SYS_LANDLOCK_ADD, rules, PATH_BENEATH, beneath, 0)
    call("syscall", SYS_LANDLOCK_RESTRICT, rules, 0)


def refuse_calls() -> None:
    """Has the kernel (seccomp) refuse this process sockets, processes other than threads, and signals."""
    if os.uname().machine not in SYSCALLS:
        raise OSError(f"no list of system calls for {os.uname().machine}")
    architecture, clone, prlimit, refused = SYSCALLS[os.uname().machine]
    load, equal, at_least, has_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, error = (answer, 0, 0, 0x7FFF0000), lambda number: (answer, 0, 0, 0x50000 | number)
    # Instructions are (code, instructions to skip if true, if false, value); a call's number stands at 0 of the data, its
    # architecture at 4 and its first argument at 16.
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), error(errno.EPERM), (load, 0, 0, 0)]
    for number in refused:
        program += [(equal, 0, 1, number), error(errno.EPERM)]
    program += [(at_least, 0, 1, 1 << 30), error(errno.EPERM)]  # x86_64's second numbering
    program += [(equal, 0, 1, 435), error(errno.ENOSYS)]  # clone3 hides its flags; the C library then takes clone
    for number, own in ((clone, (has_bit, 0, 1, CLONE_THREAD)), (prlimit, (equal, 0, 1, 0))):  # threads, and own limits
        program += [(equal, 0, 4, number), (load, 0, 0, 16), own, allow, error(errno.EPERM)]
    program.append(allow)
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in program))
    call("prctl", PR_SET_SECCOMP, SECCOMP_FILTER, struct.pack("@HP", len(program), ctypes.addressof(code)), 0, 0)


def keep(job: dict, user: int) -> dict:
    """Starts the program as a user and waits for it or ends it: gives what it said, its status, and whether it was late."""
    (told, tell), (failed, fail) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(told)
        os.close(failed)
        become_child(job, user, tell, fail)
    os.close(tell)
    os.close(fail)
    if failure := os.read(failed, 4096):  # none comes, but the end, when the program starts
        return {"broken": failure.decode(errors="replace")}
    status, is_late = wait(child, job["timeout"])
    end_descendants(child)
    os.set_blocking(told, False)  # where a process could be left, it might hold the other end
    try:
        said = os.read(told, 4096)
    except BlockingIOError:
        said = b""
    return {"said": said.decode(errors="replace"), "status": status, "late": is_late}


def become_child(job: dict, user: int, tell: int, fail: int) -> None:
    """Turns this process into the contained one, which never returns; where that fails, it says so and ends."""
    try:
        os.setsid()
        null, tell, fail = os.open("/dev/null", os.O_RDWR), os.dup2(tell, 60, False), os.dup2(fail, 61, False)
        for target, source in ((1, null), (2, null), (3, tell)):
            os.dup2(source, target)
        if job["namespaces"]:
            # In a chroot nobody may make a user namespace, which is how a process comes by privileges to leave it.
            os.chroot(job["folder"])
        os.chdir(WORK if job["namespaces"] else job["folder"])
        if job["own_user"]:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        limit(job)
        keeper = select.poll()
        keeper.register(fail, 0)
        if keeper.poll(0):
            os._exit(1)  # nobody can read any more: it ended before its end would be told
        if job["filters"]:
            allow_files(job["folder"], job["readable"])
            refuse_calls()
        home = os.getcwd()
        # Our choice: a fixed hash seed, so that a score repeats; one thread, so that NumPy fits into the limits.
        environment = {"HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
        environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        os.execve(job["python"], [job["python"], "-SsPB", "-c", job["child"]], environment)
    except BaseException as error:
        os.write(fail, str(error).encode())
    finally:
        os._exit(1)


def limit(job: dict) -> None:
    """Sets the limits that hold for this process and all that it starts."""
    seconds = math.ceil(job["timeout"]) + 1  # of processor, behind the clock's
    limits = {
        resource.RLIMIT_CPU: (seconds, seconds + 1),
        resource.RLIMIT_FSIZE: (FILES_BYTES, FILES_BYTES),
        resource.RLIMIT_NOFILE: (64, 64),
        resource.RLIMIT_CORE: (0, 0),
    }
    if sys.platform == "linux":
        limits[resource.RLIMIT_AS] = (job["memory"], job["memory"])  # macOS refuses it
        if job["namespaces"] or job["own_user"]:  # elsewhere the processes of the user's other programs count
            limits[resource.RLIMIT_NPROC] = (PROCESSES, PROCESSES)
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for what, values in limits.items():
        resource.setrlimit(what, values)


def wait(child: int, seconds: float) -> tuple[int, bool]:
    """Waits for a child; gives its status, and whether it was killed because its time was over."""
    late = []

    def end(*_):
        late.append(True)
        os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _, status = os.waitpid(child, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return status, bool(late)


def end_descendants(child: int) -> None:
    """Kills and collects what an ended child leaves: its group, and on Linux, where orphans become ours, everything.

    In namespaces nothing is left: with the first of its processes the kernel ends them all.
    """
    try:
        os.killpg(child, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # none is left, or only others' since
    while True:
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as opened:
                left = [int(one) for one in opened.read().split()]
            for one in left:
                os.kill(one, signal.SIGKILL)
            ended, _ = os.waitpid(-1, 0 if left else os.WNOHANG)
        except (ChildProcessError, FileNotFoundError):
            return
        if not ended:
            return


if __name__ == "__main__":
    main()
