"""The daemons of one test cluster, under one process that takes all of them with it when it ends.

It is a child-subreaper and holds the reading end of a pipe: when the owner closes it or dies (SIGKILL too), every
daemon, step and task is killed and the folder removed. Each node has a subreaper of its own, so that one node can lose
its power. Standard library only; run as a script:

    supervisor.py serve ROOT NODE...    owner's pipe on stdin: one JSON list ["kill"|"start", NODE] a line
    supervisor.py can-isolate           exit status 0 when this user may make namespaces
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

_PR_SET_CHILD_SUBREAPER = 36
_CLONE_NEWNS, _CLONE_NEWUTS = 0x00020000, 0x04000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000


def become_subreaper() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def isolate(hosts: Path, name: str) -> None:
    """Give this process its own hostname, /etc/hosts and /dev/shm, as a machine of its own would have.

    Raises:
        OSError: not allowed here.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(status: int) -> None:
        if status:
            raise OSError(ctypes.get_errno(), "cannot make namespaces")

    call(libc.unshare(_CLONE_NEWNS | _CLONE_NEWUTS))
    call(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    call(libc.mount(str(hosts).encode(), b"/etc/hosts", None, _MS_BIND, None))
    call(libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, None))
    call(libc.sethostname(name.encode(), len(name)))


def _state_and_parent(pid: int) -> tuple[str, int]:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return fields[0], int(fields[1])


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                children.setdefault(_state_and_parent(int(entry))[1], []).append(int(entry))
    found, todo = [], [pid]
    while todo:
        for child in children.get(todo.pop(), []):
            found.append(child)
            todo.append(child)
    return found


def kill_descendants(pid: int) -> None:
    """SIGKILL everything below a process until nothing is left; new processes may appear while we look."""
    for _ in range(500):
        alive = False
        for child in _descendants(pid):
            with contextlib.suppress(OSError):
                if _state_and_parent(child)[0] != "Z":
                    os.kill(child, signal.SIGKILL)
                    alive = True
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not alive:
            return
        time.sleep(0.01)


def _run_node(root: Path, name: str) -> NoReturn:
    """The init of one node: slurmd and all its steps and tasks stay below it."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        become_subreaper()
        if (root / "hosts").exists():
            isolate(root / "hosts", name)
        null = os.open(os.devnull, os.O_RDWR)
        log = os.open(root / "log" / f"{name}.stderr.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for descriptor, target in ((null, 0), (null, 1), (log, 2)):  # the owner's pipe stays with the supervisor
            os.dup2(descriptor, target)
        slurmd = subprocess.Popen(
            ["slurmd", "-D", "-N", name, "-f", str(root / "slurm.conf")], stdin=null, stdout=log, stderr=log
        )
        while os.wait()[0] != slurmd.pid:
            pass
    finally:
        os._exit(0)


class Supervisor:
    """The daemons of a cluster whose files are in `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.nodes: dict[str, int] = {}
        self.errors = open(root / "log" / "daemons.stderr.log", "ab")  # noqa: SIM115, open as long as the daemons

    def start_daemon(self, *command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.errors, stderr=self.errors)

    def start_munged(self, timeout_s: float = 60.0) -> bool:
        run = self.root / "run"
        files = {
            "key-file": self.root / "munge.key",
            "socket": run / "munge.sock",
            "pid-file": run / "munged.pid",
            "log-file": self.root / "log" / "munged.log",
            "seed-file": run / "munged.seed",
        }
        self.start_daemon(
            "munged", "--foreground", "--num-threads=2", *(f"--{key}={path}" for key, path in files.items())
        )
        return _poll(lambda: files["socket"].exists(), timeout_s)

    def start_controller(self, timeout_s: float = 60.0) -> bool:
        conf = self.root / "slurm.conf"
        port = re.search(r"^SlurmctldPort=(\d+)", conf.read_text(), re.MULTILINE)
        assert port is not None
        controller = self.start_daemon("slurmctld", "-D", "-c", "-f", str(conf))
        # a slurmd that finds no controller sleeps for a second before it tries again
        return _poll(lambda: controller.poll() is not None or _listens(int(port[1])), timeout_s)

    def start_node(self, name: str) -> None:
        pid = os.fork()
        if pid == 0:
            _run_node(self.root, name)
        self.nodes[name] = pid

    def kill_node(self, name: str) -> None:
        pid = self.nodes.pop(name)
        os.kill(pid, signal.SIGSTOP)  # it stays the reaper until all below it are dead
        kill_descendants(pid)
        os.kill(pid, signal.SIGKILL)


def _poll(condition: Callable[[], bool], timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def serve(root: Path, nodes: list[str]) -> None:
    become_subreaper()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the owner, and its pipe ends us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if (root / "hosts").exists():  # slurmctld must resolve node1 too: it calls back the srun that runs there
        isolate(root / "hosts", socket.gethostname())
    supervisor = Supervisor(root)
    try:
        ok = supervisor.start_munged() and supervisor.start_controller()
        for name in nodes if ok else []:
            supervisor.start_node(name)
        print(json.dumps(ok), flush=True)
        for line in sys.stdin:
            command, name = json.loads(line)
            (supervisor.kill_node if command == "kill" else supervisor.start_node)(name)
            print(json.dumps(True), flush=True)
    finally:
        kill_descendants(os.getpid())
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(Path(sys.argv[2]), sys.argv[3:])
    else:
        isolate(Path("/etc/hosts"), "node")
