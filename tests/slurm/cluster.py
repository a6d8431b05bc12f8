"""A throw-away SLURM of several nodes on one machine, for any user: real daemons on loopback, files in one folder.

    with SlurmCluster(nodes=2) as cluster:
        job = cluster.sbatch("job.sh", cwd=tmp_path)
        assert cluster.wait_job(job)["JobState"] == "COMPLETED"

Needs the packages slurm-wlm and munge of Debian or Ubuntu. supervisor.py holds the daemons and ends with this process.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pwd
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE_S

SUPERVISOR = Path(__file__).with_name("supervisor.py")
PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"))
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "munged")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
# What a shell inside a job, or a user's own settings, would slip into ours.
FOREIGN = ("SLURM", "SBATCH_", "SRUN_", "PMI", "MUNGE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")

SLURM_CONF = """\
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
# listen on 127.0.0.1 only
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# cred_expire: seconds before a requeued job may start again; below 5 SLURM takes 120
AuthInfo=socket={root}/run/munge.sock,cred_expire=5
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
TmpFS={root}/tmp/%n
MailProg=/bin/true
# no cgroups
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
# what many sites have: a script that forgets --mpi starts every task alone
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# nodes may claim more CPUs and memory than this machine has
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
PriorityType=priority/basic
EnforcePartLimits=ALL
JobRequeue=1
FirstJobId={first_job}
ReturnToService=1
SlurmctldTimeout=10
SlurmdTimeout={slurmd_timeout_s}
MessageTimeout={message_timeout_s}
TCPTimeout=2
KillWait=1
MinJobAge=600
GresTypes=gpu
{nodes}
{partitions}
"""


def require_slurm() -> None:
    """Skip the calling test on a machine without SLURM; in CI, where it must be there, fail it."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if missing:
        message = f"no {', '.join(missing)}: apt-get install slurm-wlm munge"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(message)


@functools.cache
def slurm_version() -> tuple[int, ...]:
    shown = subprocess.run(["slurmctld", "-V"], env={"PATH": PATH}, capture_output=True, text=True, check=True).stdout
    return tuple(int(number) for number in re.findall(r"\d+", shown)[:2])


@functools.cache
def can_isolate() -> bool:
    """True when this user may give every node namespaces of its own (root, outside an ordinary container)."""
    probe = [sys.executable, str(SUPERVISOR), "can-isolate"]
    return os.geteuid() == 0 and subprocess.run(probe, capture_output=True).returncode == 0


def free_ports(count: int) -> list[int]:
    """Free loopback ports below the ephemeral range, so that no outgoing connection takes one meanwhile."""
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        while len(ports) < count:
            probe = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", random.SystemRandom().randrange(12000, 32000)))
                ports.append(probe.getsockname()[1])
    return ports


class SlurmCluster:
    """See the module. Every node claims `cpus`, `memory_mb` and `gpus` (made of /dev/null).

    A dead node is noticed after about 20 s. slurmd_timeout_s=1 with message_timeout_s=2 make it 5 s on SLURM 22.05;
    newer ones need slurmd_timeout_s=5 and take 10 s.
    """

    def __init__(
        self,
        *,
        nodes: int = 2,
        cpus: int = 8,
        memory_mb: int = 64_000,
        gpus: int = 0,
        partitions: Sequence[str] = ("debug",),
        slurmd_timeout_s: int = 10,
        message_timeout_s: int = 10,
    ) -> None:
        self.cpus, self.memory_mb, self.gpus = cpus, memory_mb, gpus
        self.partitions = tuple(partitions)
        self.slurmd_timeout_s, self.message_timeout_s = slurmd_timeout_s, message_timeout_s
        # where the nodes cannot have hosts files of their own, they are named by addresses, which resolve as they are
        self.isolated = can_isolate()
        self.nodes = [f"node{i + 1}" if self.isolated else f"127.0.0.{i + 2}" for i in range(nodes)]
        self.root = Path()
        self.env: dict[str, str] = {}
        self._supervisor: subprocess.Popen[str] | None = None

    def __enter__(self) -> SlurmCluster:
        logs = ""
        for _ in range(3):  # a free port may be taken between the look and the bind
            self._write_files()
            self._supervisor = subprocess.Popen(
                [sys.executable, str(SUPERVISOR), "serve", str(self.root), *self.nodes],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self.env,
                cwd=self.root,
                text=True,
                start_new_session=True,
            )
            assert self._supervisor.stdout is not None
            if json.loads(self._supervisor.stdout.readline() or "false") and self.wait_nodes():
                return self
            logs = self.logs()
            self.__exit__()
        raise RuntimeError(f"SLURM did not start\n{logs}")

    def __exit__(self, *_: object) -> None:
        if self._supervisor is not None:
            supervisor, self._supervisor = self._supervisor, None
            try:
                supervisor.communicate(timeout=PATIENCE_S)  # closes its pipe
            finally:
                supervisor.kill()
        shutil.rmtree(self.root, ignore_errors=True)

    def kill_node(self, name: str) -> None:
        """SIGKILL slurmd and every step and task of a node: a power failure."""
        self._ask("kill", name)

    def start_node(self, name: str) -> None:
        self._ask("start", name)

    def _ask(self, command: str, name: str) -> None:
        assert self._supervisor is not None
        assert self._supervisor.stdin is not None
        assert self._supervisor.stdout is not None
        self._supervisor.stdin.write(json.dumps([command, name]) + "\n")
        self._supervisor.stdin.flush()
        assert json.loads(self._supervisor.stdout.readline())

    def _write_files(self) -> None:
        # not pytest's folder: the name of a Unix socket has at most 107 bytes
        self.root = root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        root.chmod(0o755)  # munged wants every folder above its socket to be open to all
        for folder in ["run", "log", "state", "dev", *(f"{each}/{n}" for each in ("spool", "tmp") for n in self.nodes)]:
            (root / folder).mkdir(parents=True, mode=0o755)
        with open(os.open(root / "munge.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as key:
            key.write(os.urandom(128))
        if self.isolated:
            known = Path("/etc/hosts").read_text()
            (root / "hosts").write_text(f"{known}\n127.0.0.1 {' '.join(self.nodes)}\n")
        # slurmd loads a cgroup plugin even when nothing uses it, and finding one out by itself can fail
        plugin = "disabled" if slurm_version() >= (23, 2) else "cgroup/v1"
        (root / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        self._write_gres()
        self._write_conf()
        kept = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
        self.env = {**kept, "PATH": PATH, "SLURM_CONF": str(root / "slurm.conf")}

    def _write_gres(self) -> None:
        lines = ["AutoDetect=off"]
        for i in range(self.gpus):
            device = self.root / "dev" / f"gpu{i}"  # must be a character device
            device.symlink_to("/dev/null")
            lines += [f"NodeName={name} Name=gpu File={device}" for name in self.nodes]
        (self.root / "gres.conf").write_text("\n".join(lines) + "\n")

    def _write_conf(self) -> None:
        host = socket.gethostname().split(".")[0]
        controller_port, *node_ports = free_ports(1 + len(self.nodes))
        gres = f" Gres=gpu:{self.gpus}" if self.gpus else ""
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} "
            f"RealMemory={self.memory_mb}{gres} State=UNKNOWN"
            for name, port in zip(self.nodes, node_ports, strict=True)
        ]
        partitions = [
            f"PartitionName={name} Nodes=ALL Default={'YES' if name == self.partitions[0] else 'NO'} "
            "DefaultTime=10 MaxTime=INFINITE State=UP"
            for name in self.partitions
        ]
        text = SLURM_CONF.format(
            name=self.root.name.replace("_", "").lower(),
            host=host,
            controller_port=controller_port,
            user=pwd.getpwuid(os.getuid()).pw_name,
            root=self.root,
            # MPICH names files in /dev/shm by job and step: clusters side by side need job numbers of their own
            first_job=random.SystemRandom().randrange(1, 60_000) * 1000 + 1,
            slurmd_timeout_s=self.slurmd_timeout_s,
            message_timeout_s=self.message_timeout_s,
            nodes="\n".join(nodes),
            partitions="\n".join(partitions),
        )
        (self.root / "slurm.conf").write_text(text)

    def run(self, *command: object, cwd: Path | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A client of this cluster, such as scontrol."""
        words = [str(word) for word in command]
        done = subprocess.run(words, env=self.env, cwd=cwd or self.root, text=True, capture_output=True)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def sbatch(self, *arguments: object, cwd: Path | None = None) -> int:
        """Number of a new job."""
        return int(self.run("sbatch", "--parsable", *arguments, cwd=cwd).stdout.split(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says, of an ended job too. Not for arrays."""
        shown = self.run("scontrol", "-o", "show", "job", number).stdout
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def wait_job(self, number: int, states: Sequence[str] = ENDED, timeout_s: float = PATIENCE_S) -> dict[str, str]:
        end = time.monotonic() + timeout_s
        while True:
            job = self.job(number)
            if job["JobState"] in states:
                return job
            if time.monotonic() > end:
                raise TimeoutError(f"job {number} is {job['JobState']} ({job.get('Reason')})\n{self.logs()}")
            time.sleep(0.1)

    def wait_nodes(self, timeout_s: float = 60.0) -> bool:
        """True when all nodes are idle."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            shown: Any = self.run("sinfo", "-h", "-N", "-p", self.partitions[0], "-o", "%t", check=False).stdout
            if shown.split() == ["idle"] * len(self.nodes):
                return True
            time.sleep(0.05)
        return False

    def logs(self, tail: int = 2000) -> str:
        files = sorted((self.root / "log").glob("*.log"))
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-tail:]}" for path in files)
