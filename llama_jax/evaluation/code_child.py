"""The process in which a generated program and its tests run: the innermost part of `code_execution`, which tells what it holds.

`code_keeper` starts this file's text with the task on standard input; nothing of the package is imported here. Tests that
pass are reported as the task's token on file descriptor 3; anything else that is written there is why they did not.
"""

import marshal  # json takes longer to import than all else here
import os
import sys
import types

# Changes of files that Python reports; each is refused where a path among its arguments lies outside the work folder.
_CHANGES = {
    *("os.chmod", "os.chown", "os.chflags", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink"),
    *("os.truncate", "os.utime", "os.setxattr", "os.removexattr", "os.chdir", "shutil.chown", "sqlite3.connect"),
}
_LOOKS = {"os.listdir", "os.scandir"}
# What no program of a benchmark needs: processes, signals to others, other limits, native calls.
_REFUSED = {
    *("os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.posix_spawn", "os.spawn", "os.system"),
    *("pty.spawn", "resource.prlimit", "resource.setrlimit", "subprocess.Popen"),
}
_REFUSED_KINDS = ("ctypes", "socket", "syslog")
_REFUSED_IMPORTS = ("_ctypes", "_cffi_backend", "_posixshmem")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def guard(work: str, readable: list[str]) -> None:
    """Refuses, from here on, what a program should not do, wherever Python reports it before it happens.

    Args:
      work: the one folder in which files may be written.
      readable: folders in which files may be read besides.
    """
    realpath, fspath, sep = os.path.realpath, os.fspath, os.sep
    readable, work_only = [*readable, work], [work]

    def lies_in(path, folders) -> bool:
        whole = realpath(os.fsdecode(fspath(path)))
        return whole == "/dev/null" or any(whole == one or whole.startswith(one + sep) for one in folders)

    def watch(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, int) and not lies_in(path, work_only if flags & _WRITES else readable):
                raise PermissionError(f"refused: file {path!r}")
        elif event == "import" and arguments[0] in _REFUSED_IMPORTS:
            raise ImportError(f"refused: import {arguments[0]}")
        elif event in _REFUSED or event.partition(".")[0] in _REFUSED_KINDS:
            # Event loops talk to themselves through a pair of local sockets, which they only make.
            if event != "socket.__new__" or arguments[1] != 1:  # AF_UNIX
                raise PermissionError(f"refused: {event}")
        elif event in _CHANGES or event in _LOOKS:
            for path in arguments:
                folders = readable if event in _LOOKS else work_only
                if isinstance(path, str | bytes | os.PathLike) and not lies_in(path, folders):
                    raise PermissionError(f"refused: {event} {path!r}")

    def refused(*_):
        raise PermissionError("refused: fork_exec")

    import _posixsubprocess  # starts processes without reporting it

    _posixsubprocess.fork_exec = refused
    sys.addaudithook(watch)


def verdict(candidate: str, tests: str, token: str) -> str:
    """Runs the candidate, then the tests on its names; gives the token if both ran to their ends, or else why not.

    The two are compiled apart, so that no candidate swallows its tests, and run by the `exec` from before the candidate. What
    else it may have replaced is used after a failure alone, and makes no token of it.
    """
    run, module = exec, types.ModuleType("program")  # not __main__: what a program does as a script is not asked for
    sys.modules["program"] = module
    try:
        checks = compile(tests, "tests", "exec", dont_inherit=True)
        run(compile(candidate, "program", "exec", dont_inherit=True), module.__dict__)
        run(checks, module.__dict__)
    except MemoryError:
        return "out of memory"
    except SystemExit:
        return "exited before its tests were done"
    except BaseException as error:
        return "failed: " + _describe(error)
    return token


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:300].rstrip(": ")
    except BaseException:
        return "an exception that cannot be printed"


def main() -> None:
    """Reads the task, and leaves as soon as the verdict is written: threads and exit handlers have no say."""
    task = marshal.load(sys.stdin.buffer)
    sys.path += task["packages"]
    if task["guard"]:
        guard(os.getcwd(), task["readable"])
    os.write(3, verdict(task["candidate"], task["tests"], task["token"]).encode(errors="replace"))
    os._exit(0)


if __name__ == "__main__":
    main()
