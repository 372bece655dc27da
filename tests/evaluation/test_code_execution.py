"""Generated programs: right ones pass, wrong ones fail, and what attacks fails, changes nothing and leaves nothing."""

import ast
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from functools import cache
from pathlib import Path

import pytest

from llama_jax.errors import UserError
from llama_jax.evaluation import code_execution
from llama_jax.evaluation.code_execution import Containment, Outcome, Program, find_containment, run_programs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's lines are Linux's")

IS_ROOT = os.geteuid() == 0
NAMESPACES = Containment(namespaces=True, filters=False, own_user=IS_ROOT)
FILTERS = Containment(namespaces=False, filters=True, own_user=False)
GUARD = Containment(namespaces=False, filters=False, own_user=False)
# Each line alone: the kernel's two without the guard, and the guard without the kernel's.
LINES = {
    "namespaces": Containment(namespaces=True, filters=False, own_user=IS_ROOT, guard=False),
    "filters": Containment(namespaces=False, filters=True, own_user=False, guard=False),
    "guard": GUARD,
}
FINDS = Program("found = True", "assert found")


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch, tmp_path):
    """Marks every process that a test starts, and fails where one of them outlives it."""
    mark = f"# {uuid.uuid4()}"
    child = tmp_path / "child.py"
    child.write_text(code_execution._CHILD.read_text() + mark)
    monkeypatch.setattr(code_execution, "_CHILD", child)
    yield mark
    assert not running(mark)


def running(mark: str) -> list[str]:
    """Numbers of the keepers and the programs whose command lines hold the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            pass
    return [pid for pid in found if pid != str(os.getpid())]


@cache
def has_namespaces() -> bool:
    command = ["unshare", "--mount", "--net", "--ipc", "--pid", *([] if IS_ROOT else ["--user"]), "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@cache
def has_filters() -> bool:
    return os.uname().machine in ("x86_64", "aarch64") and ctypes.CDLL(None).syscall(444, None, 0, 1) >= 3


def skip_without(containment):
    """Asks the kernel itself: where it has what is tested and a program cannot be held so, the test fails."""
    if (containment.namespaces and not has_namespaces()) or (containment.filters and not has_filters()):
        pytest.skip("this machine's kernel lacks what is tested")


def run(programs, containment, timeout=10.0, **more) -> list[Outcome]:
    skip_without(containment)
    return list(run_programs(programs, run_code=True, timeout=timeout, containment=containment, workers=4, **more))


@pytest.fixture(params=LINES)
def line(request) -> Containment:
    return LINES[request.param]


def test_right_ones_pass_wrong_ones_fail_and_say_why():
    candidates = [
        "def double(x):\n    return 2 * x",
        "def double(x):\n    return 2 + x + 1",
        "def double(x):\n    return 2 x",
        "def treble(x):\n    return 3 * x",
        "def double(x):\n    raise KeyError(x)",
    ]
    outcomes = run([Program(code, "assert double(2) == 4, 'twice 2'") for code in candidates], GUARD)
    assert [one.why for one in outcomes] == [
        "passed",
        "failed: AssertionError: twice 2",
        "failed: SyntaxError: invalid syntax (program, line 2)",
        "failed: NameError: name 'double' is not defined",
        "failed: KeyError: 2",
    ]
    assert [one.passed for one in outcomes] == [True, False, False, False, False]


@pytest.mark.parametrize("containment", [NAMESPACES, FILTERS, GUARD])
def test_what_honest_programs_use_is_there(containment):
    code = (
        "import asyncio, collections, dataclasses, random, re, subprocess, tempfile, threading, typing\n"
        "import numpy, pickle\n"
        "try:\n    import ctypes\nexcept ImportError:\n    ctypes = None\n"
        "@dataclasses.dataclass\nclass Pair:\n    x: int\n    y: int\n"
        "async def add(pair):\n    return int(numpy.array([pair.x, pair.y]).sum())\n"
        "def double(x):\n"
        "    with tempfile.TemporaryFile('w+') as file, open('/dev/null', 'w') as null:\n"
        "        print(asyncio.run(add(pickle.loads(pickle.dumps(Pair(x, x))))), file=file)\n"
        "        print('nothing', file=null)\n"
        "        file.seek(0)\n"
        "        thread = threading.Thread(target=lambda: found.append(int(file.read())))\n"
        "        found = []\n"
        "        thread.start()\n"
        "        thread.join()\n"
        "    return found[0]\n"
    )
    assert run([Program(code, "assert double(2) == 4")], containment) == [Outcome(True, "passed")]


PRETENDERS = {
    "leaves": "import os\nos._exit(0)",
    "exits": "import sys\nsys.exit(0)",
    "exits later": "import sys\ndef double(x):\n    sys.exit(0)",
    "prints": "import os\nprint('passed')\nos.write(3, b'passed')\nos.write(1, b'{\"said\": \"passed\"}')\ndef double(x): pass",
    "closes": "import os\nos.closerange(0, 60)\ndouble = lambda x: 2 * x",
    "swallows": "def double(x):\n    return '''",
    "defines check": "double = lambda x: None\n__debug = 0\nassert_ = print",
    "replaces builtins": (
        "import builtins, os, json, sys\n"
        "builtins.exec = builtins.compile = lambda *a, **k: None\n"
        "builtins.AssertionError = builtins.BaseException = builtins.SystemExit = type('E', (Exception,), {})\n"
        "os.write = os._exit = json.dumps = sys.exit = sys.excepthook = lambda *a: None\n"
        "double = lambda x: None"
    ),
    "goes on at exit": "import atexit, os\natexit.register(lambda: os.write(3, b'passed'))\ndouble = 1",
}


def test_pretenders_do_not_pass():
    programs = [Program(code, "assert double(2) == 4") for code in PRETENDERS.values()]
    outcomes = dict(zip(PRETENDERS, run(programs, GUARD), strict=True))
    assert not [name for name, one in outcomes.items() if one.passed]
    assert {outcomes[name].why for name in ("leaves", "exits", "exits later")} == {"exited before its tests were done"}


def test_time_and_memory_are_limited(line):
    began = time.monotonic()
    (hang,) = run([Program("import time\ntime.sleep(60)", "")], line, timeout=0.6)
    assert hang == Outcome(False, "timed out after 0.6 s") and time.monotonic() - began < 10
    hogs = [Program("x = bytearray(1 << 30)", ""), Program("x = []\nwhile True: x.append(bytearray(1 << 24))", "")]
    assert run(hogs, line, memory=2**28) == [Outcome(False, "out of memory")] * 2


def test_a_program_that_catches_everything_is_stopped_too():
    block = "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n"
    loop = block + "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    assert run([Program(loop, "")], GUARD, timeout=0.6) == [Outcome(False, "timed out after 0.6 s")]


def test_output_goes_nowhere_and_input_is_empty(capfd):
    write = "import os\nwhile True:\n    os.write(1, b'x' * 65536)\n    os.write(2, b'y' * 65536)"
    (flood,) = run([Program(write, "")], GUARD, timeout=0.6)
    (reader,) = run([Program("import sys\nread = sys.stdin.read()", "assert read == ''")], GUARD)
    assert flood == Outcome(False, "timed out after 0.6 s")
    assert reader.passed
    assert capfd.readouterr() == ("", "")


def succeeding(attacks, containment) -> list[str]:
    """Which of many lines of Python raise nothing, each tried by the same program."""
    code = f"""
import os, pathlib, shutil, socket, sys, urllib.request
done = []
for attack in {attacks!r}:
    try:
        exec(attack)
    except Exception:
        pass
    else:
        done.append(attack)
"""
    (outcome,) = run([Program(code, "raise OSError(done)")], containment)
    return ast.literal_eval(outcome.why.removeprefix("failed: OSError: "))


@pytest.fixture
def outside():
    """A folder and a file that every user may change, beside no program's own."""
    folder = Path(tempfile.mkdtemp(prefix="outside-"))
    folder.chmod(0o777)
    (folder / "kept").write_text("precious")
    (folder / "kept").chmod(0o666)
    yield folder
    shutil.rmtree(folder)


def test_files_outside_are_neither_written_nor_read(line, outside):
    kept = str(outside / "kept")
    attacks = [
        f"open({str(outside / 'new')!r}, 'w')",
        f"open({kept!r}, 'a').write('x')",
        f"os.open({kept!r}, os.O_RDWR)",
        f"os.remove({kept!r})",
        f"os.remove(pathlib.Path({kept!r}))",
        f"os.rename({kept!r}, {kept + '2'!r})",
        f"os.truncate({kept!r}, 0)",
        f"os.mkdir({str(outside / 'made')!r})",
        f"os.symlink('x', {str(outside / 'link')!r})",
        f"os.symlink({kept!r}, 'link'); open('link', 'w')",
        f"os.mkdir('d'); os.chdir('d'); os.symlink('../{outside.name}/kept', 'l'); os.rename('l', '../l'); open('../l', 'w')",
        f"__import__('sqlite3').connect(pathlib.Path({str(outside)!r}, 'db'))",
        f"os.link({kept!r}, 'hard'); open('hard', 'w')",
        f"shutil.copy(__import__('os').__file__, {str(outside)!r})",
        f"pathlib.Path({str(outside)!r}, 'new').touch()",
        f"open({kept!r}).read()",
        f"open('/proc/{os.getpid()}/environ').read()",
        "open('/etc/passwd').read()",
        "os.listdir('/etc')",
        "list(os.scandir('/var'))",
        "os.open(os.__file__, os.O_RDWR)",
    ]
    assert succeeding(attacks, line) == []
    (outcome,) = run([Program(f"open({kept!r}, 'w')", "")], line)
    assert not outcome.passed
    assert [path.name for path in outside.iterdir()] == ["kept"]
    assert (outside / "kept").read_text() == "precious"


def test_its_own_folder_is_its_own_and_goes(line):
    code = "import os\nos.mkdir('a')\nopen('a/b', 'w').write('c')\nos.rename('a/b', 'd')\nhere = os.getcwd()\n"
    (outcome, told) = run(
        [Program(code, "assert open('d').read() == 'c'"), Program(code + "raise OSError(here)", "")], line
    )
    assert outcome.passed
    assert not Path(told.why.removeprefix("failed: OSError: ")).exists()


def test_files_are_of_limited_size():
    code = "import os\nf = os.open('big', os.O_CREAT | os.O_WRONLY)\nfor _ in range(100): os.write(f, bytes(1 << 20))"
    many = "for i in range(5): open(str(i), 'wb').write(bytes(20 << 20))"
    each, together = run([Program(code, ""), Program(many, "")], NAMESPACES)
    assert each.why.startswith("failed: OSError") and together.why.startswith("failed: OSError")
    assert run([Program(code, "")], GUARD)[0].why == "failed: OSError: [Errno 27] File too large"


def test_the_network_is_not_there(line):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as packets:
        packets.bind(("127.0.0.1", 0))
        server.setblocking(False)
        packets.setblocking(False)
        attacks = [
            f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)",
            f"socket.socket(type=socket.SOCK_DGRAM).sendto(b's', ('127.0.0.1', {packets.getsockname()[1]}))",
            f"urllib.request.urlopen('http://127.0.0.1:{server.getsockname()[1]}', timeout=5)",
            f"socket.socket(fileno=os.dup(3)).connect(('127.0.0.1', {server.getsockname()[1]}))",
        ]
        assert succeeding(attacks, line) == []
        assert not run([Program(f"import socket\n{attacks[0]}", "")], line)[0].passed
        for receive in (server.accept, lambda: packets.recv(10)):
            with pytest.raises(BlockingIOError):
                receive()


def test_the_environment_is_clean(line, monkeypatch):
    monkeypatch.setenv("A_SECRET", "sesame")
    seen = "import os\nseen = dict(os.environ)"
    (outcome,) = run([Program(seen, "assert 'sesame' not in str(seen)\nraise OSError(sorted(seen))")], line)
    assert outcome.why == (
        "failed: OSError: ['HOME', 'LANG', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'PYTHONHASHSEED', 'TMPDIR']"
    )


def test_no_process_of_others_is_seen_or_signalled(line):
    probe = f"import os\nos.kill({os.getpid()}, 0)"
    assert not run([Program(probe, "")], line)[0].passed


def test_the_guard_refuses_processes_and_native_calls():
    attacks = [
        "os.system('true')",
        "os.popen('true').read()",
        "os.execv('/bin/true', ['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.fork() or os._exit(0)",
        "os.killpg(0, 0)",
        "__import__('subprocess').run('true')",
        "__import__('multiprocessing.util').util.spawnv_passfds(b'/bin/true', [b'true'], [])",
        "__import__('ctypes').CDLL(None)",
        "__import__('resource').setrlimit(7, (9, 9))",
    ]
    assert succeeding(attacks, GUARD) == []


def test_its_parent_cannot_be_killed():
    attack = Program("import os\nos.kill(os.getppid(), 9)", "")
    for containment in (NAMESPACES, FILTERS, GUARD, LINES["filters"]):
        assert run([attack], containment)[0].why.startswith("failed: PermissionError")
    # Without the guard a program in namespaces is the first process of its own, and has no parent to kill.
    assert run([Program("import os\nos.kill(os.getppid(), 9)", "assert os.getppid() == 0")], LINES["namespaces"])[
        0
    ].passed


def test_a_signal_to_its_group_reaches_no_other():
    attack = Program("import os\nos.kill(0, 9)", "")
    assert run([attack], Containment(False, False, False, guard=False)) == [
        Outcome(False, "killed by signal 9 (Killed)")
    ]


def test_a_fork_bomb_stays_small_and_ends(line):
    """One of 2 ** 7 processes, so that a machine survives the day on which this fails."""
    bomb = "import os, time\nfor _ in range(7):\n    os.fork()\ntime.sleep(60)"
    star = "import os, time\nfor _ in range(100):\n    if not os.fork(): time.sleep(60)"
    assert not run([Program(bomb, "")], line, timeout=1.0)[0].passed
    assert run([Program(star, "")], line)[0].why in (
        "failed: BlockingIOError: [Errno 11] Resource temporarily unavailable",
        "failed: PermissionError: [Errno 1] Operation not permitted",
        "failed: PermissionError: refused: os.fork",
    )


@pytest.mark.parametrize("containment", [LINES["namespaces"], Containment(False, False, False, guard=False)])
def test_a_process_that_a_program_leaves_is_ended_with_it(containment, nothing_left):
    """A grandchild in a session of its own, whose parents are gone: nobody's group and nobody's child."""
    leave = (
        "import os, sys, time\n"
        "r, w = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        os.write(w, b'x')\n"
        "        time.sleep(60)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "os.read(r, 1)\n"
    )
    (outcome,) = run([Program(leave, "")], containment)
    assert outcome.passed
    assert not running(nothing_left)


def test_in_namespaces_there_is_no_way_back():
    """As the program's own user no privilege is left, and none can be made."""
    code = (
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None)\n"
        "ways = {\n"
        "    'user namespace': libc.unshare(0x10000000),\n"
        "    'mount': libc.mount(b'none', b'/', None, 32 | 4096, None),\n"
        "    'chroot': libc.chroot(b'.'),\n"
        "    'root': libc.setuid(0),\n"
        "}\n"
        "names = os.listdir('/')\n"
    )
    needed = code_execution._readable()  # a checkout may lie in /tmp, its packages with it
    hidden = {
        name for name in ("etc", "proc", "tmp", "var") if not any(path.startswith(f"/{name}/") for path in needed)
    }
    assert hidden >= {"etc", "proc"}
    tests = f"assert set(ways.values()) == {{-1}}, ways\nassert not set(names) & {hidden}, names"
    assert run([Program(code, tests)], LINES["namespaces"]) == [Outcome(True, "passed")]
    for folder in code_execution._readable():
        unnamed = f"import os\nos.open({folder!r}, os.O_TMPFILE | os.O_RDWR)"
        (outcome,) = run([Program(unnamed, "")], Containment(True, False, own_user=False, guard=False))
        assert "Read-only" in outcome.why


@pytest.mark.parametrize("name", ["namespaces", "filters"])
def test_memory_that_processes_share_is_not_shared_with_programs(name):
    libc, key = ctypes.CDLL(None), 0x11A3A2 + os.getpid()
    shared = libc.shmget(key, 4096, 0o1666)
    try:
        assert libc.shmget(key, 0, 0) == shared >= 0
        find = Program("import ctypes", f"assert ctypes.CDLL(None).shmget({key}, 0, 0) == -1")
        assert run([find], LINES[name])[0].passed
    finally:
        libc.shmctl(shared, 0, None)  # removes it


def test_filters_leave_threads_but_no_process():
    threads = "import threading\nt = threading.Thread(target=lambda: done.append(1))\ndone = []\nt.start()\nt.join()"
    spawn = "import subprocess\nsubprocess.run(['/bin/echo'])"
    limits = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))"
    thread, process, own = run(
        [Program(threads, "assert done"), Program(spawn, ""), Program(limits, "")], LINES["filters"]
    )
    assert thread.passed and own.passed and "Operation not permitted" in process.why


def test_filters_refuse_the_quieter_ways_too():
    """Calls by their numbers, as a program would make them that knows what is watched; of a test process, which must live."""
    if os.uname().machine != "x86_64":
        pytest.skip("numbers of x86_64")
    mine = os.getpid()
    calls = {
        "socket": (41, 2, 1, 0),
        "clone": (56, 17, 0, 0, 0, 0),
        "fork": (57,),
        "vfork": (58,),
        "kill": (62, mine, 0),
        "tkill": (200, mine, 0),
        "tgkill": (234, mine, mine, 0),
        "queue": (129, mine, 0, 0),
        "queue to a thread": (297, mine, mine, 0, 0),
        "others' limits": (302, mine, 7, 0, 0),
        "trace": (101, 16, mine, 0, 0),
        "user namespace": (272, 0x10000000),
        "shared memory": (29, 0, 4096, 0o1600),
        "semaphore": (64, 0, 1, 0o1600),
        "queue of messages": (68, 0, 0o1600),
        "io_uring": (425, 1, 0),
        "second numbering": ((1 << 30) + 39,),
    }
    code = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"calls = {calls!r}\n"
        "wrong = [name for name, call in calls.items() if libc.syscall(*call) != -1 or ctypes.get_errno() != 1]\n"
        "clone3 = libc.syscall(435, 0, 0), ctypes.get_errno()"
    )
    tests = "assert not wrong, wrong\nassert clone3 == (-1, 38)"
    assert run([Program(code, tests)], LINES["filters"]) == [Outcome(True, "passed")]


def as_user_of_a_namespace(code: str) -> subprocess.CompletedProcess:
    """Runs Python as a user that is not root, with what root's own files need to be read."""
    if not IS_ROOT or not shutil.which("unshare"):
        pytest.skip("plays another user by util-linux's unshare, as root")
    command = ["unshare", "--user", "--map-user=1000", "--map-group=1000", sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60)
    if result.returncode and result.stderr.startswith("unshare"):
        pytest.skip(f"this machine lets nobody make user namespaces: {result.stderr}")
    return result


def test_a_user_that_is_not_root_has_namespaces_too(outside):
    code = f"""
import json, os
from llama_jax.evaluation.code_execution import *
found = find_containment()
programs = [Program("import os", "assert os.getuid() == 1000 and os.getpid() == 1"),
            Program("open({str(outside / "new")!r}, 'w')", ""),
            Program("import socket; socket.create_connection(('127.0.0.1', 9))", ""),
            Program("import ctypes", "assert ctypes.CDLL(None).unshare(0x10000000) == -1"),
            Program("import ctypes", "assert ctypes.CDLL(None).mount(b'none', b'/', None, 32 | 4096, None) == -1")]
held = Containment(True, False, False, guard=False)
print(json.dumps([os.getuid(), found == Containment(True, False, False),
                  [one.why for one in run_programs(programs, run_code=True, timeout=10, containment=held)]]))
"""
    result = as_user_of_a_namespace(code)
    user, is_found, whys = json.loads(result.stdout)
    assert (user, is_found) == (1000, True)
    assert whys == ["passed", whys[1], "failed: OSError: [Errno 101] Network is unreachable", "passed", "passed"]
    assert "No such file" in whys[1] and not (outside / "new").exists()


def test_programs_end_with_the_one_who_runs_them(nothing_left, tmp_path):
    skip_without(NAMESPACES)
    code = f"""
import pathlib
from llama_jax.evaluation import code_execution as c
c._CHILD = pathlib.Path({str(code_execution._CHILD)!r})
held = c.Containment(True, False, {IS_ROOT}, guard=False)
sleep = c.Program("import os, time\\nos.fork()\\ntime.sleep(60)", "")
print(list(c.run_programs([sleep] * 2, run_code=True, timeout=60, containment=held)))
"""
    command, here = [sys.executable, "-c", code], Path(__file__).parents[2]
    parent = subprocess.Popen(
        command, cwd=here, env=os.environ | {"TMPDIR": str(tmp_path)}
    )  # nobody is left to tidy up
    assert eventually(lambda: len(running(nothing_left)) == 6), parent.poll()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert eventually(lambda: not running(nothing_left))


def eventually(happens) -> bool:
    until = time.monotonic() + 20
    while not (is_so := happens()) and time.monotonic() < until:
        time.sleep(0.05)
    return is_so


def test_programs_run_side_by_side_and_their_order_is_kept():
    began = time.monotonic()
    programs = [
        Program(f"import time\ntime.sleep({wait})", f"assert not {n}, {n}") for n, wait in enumerate((2, 2, 2, 0))
    ]
    assert [one.why[-1] for one in run(programs, GUARD)] == ["d", "1", "2", "3"]
    assert time.monotonic() - began < 5  # of 6 seconds


def test_outcomes_do_not_wait_for_all_and_what_nobody_waits_for_does_not_begin():
    began = time.monotonic()
    programs = [FINDS, *[Program("import time\ntime.sleep(3)", "")] * 9]
    outcomes = run_programs(programs, run_code=True, containment=GUARD, workers=1, timeout=5)
    assert next(outcomes).passed
    outcomes.close()
    assert time.monotonic() - began < 15  # of 27 seconds


def test_text_that_is_no_program_fails():
    texts = ["x = '\ud800'", "x = 1\0", "(" * 10_000, "x = 1\n\tif", "import signal\nsignal.raise_signal(40)"]
    outcomes = run([Program(text, "") for text in texts], GUARD)
    assert [one.why[:7] for one in outcomes] == ["failed:"] * 4 + ["killed "]


def test_a_thread_that_goes_on_is_not_waited_for():
    code = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()"
    assert run([Program(code, "")], GUARD) == [Outcome(True, "passed")]


def test_what_a_program_says_is_fit_for_a_terminal():
    (outcome,) = run([Program("raise OSError('\\x1b[31m\\n' * 100)", "")], GUARD)
    assert outcome.why.startswith("failed: OSError:  [31m  [31m") and len(outcome.why) <= 400
    many = "import os\nfor _ in range(40): os.write(3, b'x' * 100)"
    assert run([Program(many, "")], GUARD)[0].why == "x" * 400


def test_nothing_runs_that_the_user_did_not_allow():
    with pytest.raises(UserError, match="--run-code"):
        run_programs([FINDS], run_code=False)


def test_limits_below_what_python_needs_are_refused():
    for limits in ({"timeout": 0.0}, {"memory": 2**20}):
        with pytest.raises(UserError, match="at least 64 MiB"):
            run_programs([FINDS], run_code=True, **limits)


def test_what_the_kernel_has_is_found():
    expected = (has_namespaces(), not has_namespaces() and has_filters())
    found = find_containment()
    assert (found.namespaces, found.filters, found.own_user, found.guard) == (*expected, IS_ROOT, True)


def test_the_strongest_containment_that_works_is_taken(monkeypatch, capsys):
    broken, real = set(), code_execution._run

    def run_one(program, containment, timeout, memory):
        if (containment.namespaces, containment.filters) in broken:
            raise code_execution._Broken(f"broken {len(broken)}")
        return Outcome(True, "passed")

    monkeypatch.setattr(code_execution, "_run", run_one)
    assert find_containment() == NAMESPACES
    broken.add((True, False))
    assert find_containment() == Containment(False, True, IS_ROOT)
    assert list(run_programs([FINDS], run_code=True)) and capsys.readouterr().err == ""
    broken.add((False, True))
    assert find_containment() == Containment(False, False, IS_ROOT)
    assert list(run_programs([FINDS], run_code=True))
    assert "audit hooks alone" in capsys.readouterr().err
    broken.add((False, False))
    with pytest.raises(UserError, match="broken 3; broken 3; broken 3.* are not run"):
        find_containment()
    assert real is not run_one


def test_where_python_belongs_to_root_alone_nothing_runs_with_roots_rights(monkeypatch, tmp_path):
    """Without namespaces root's program becomes another user, and one that cannot start Python does not run at all."""
    if not IS_ROOT:
        pytest.skip("about root")
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0o700)
    (hidden / "python").write_text("#!/bin/sh\n")
    (hidden / "python").chmod(0o755)
    monkeypatch.setattr(code_execution, "_python", lambda: str(hidden / "python"))
    with pytest.raises(UserError, match="could not be contained any more .*Permission denied"):
        list(run_programs([FINDS], run_code=True, containment=Containment(False, False, own_user=True)))


def test_root_without_namespaces_is_another_user(monkeypatch, outside):
    """With a Python that all may read; the kernel then counts processes, and keeps what belongs to others."""
    python = "/usr/bin/python3"
    if not IS_ROOT or not os.access(python, os.X_OK):
        pytest.skip("about root, with a Python for all users")
    monkeypatch.setattr(code_execution, "_python", lambda: os.path.realpath(python))
    (outside / "kept").chmod(0o644)
    outside.chmod(0o755)
    programs = [
        Program("import os", "assert os.getuid() == os.geteuid() == os.getgid() >= 60578 and os.getgroups() == []"),
        Program(f"open({str(outside / 'kept')!r}, 'w')", ""),
        Program("import os\nos.kill(os.getppid(), 0)", ""),
        Program("import os, time\nfor _ in range(100):\n    if not os.fork(): time.sleep(60)", ""),
    ]
    groups = os.getgroups()
    os.setgroups([*groups, 5])
    try:
        whys = [one.why for one in run(programs, Containment(False, False, own_user=True, guard=False))]
    finally:
        os.setgroups(groups)
    assert whys[0] == "passed"
    assert "Permission denied" in whys[1] and "not permitted" in whys[2] and "temporarily unavailable" in whys[3]
