"""A real SLURM of several nodes on this host, for as long as the tests run.

Everything lives in namespaces of its own: a control host (munged, slurmctld, and the commands of the tests) and the
nodes (one slurmd each) with a network, an address and a host name of their own, joined by a bridge that the host does
not see. So no port, host name, file of /etc or SLURM of the host is touched, and nothing outlives the first process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "ip", "unshare", "nsenter")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
NAMESPACES = ["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--kill-child"]
READY_S = 30.0

# The number comes from the host's /proc: nsenter, outside, needs that one. The last line holds the namespaces open
# until standard input closes, which it also does when the tests are killed.
CONTROL = """
read -r pid _ </proc/self/stat
mount -t proc proc /proc
mount --bind hosts /etc/hosts
hostname control
ip link set lo up
ip link add nodes up type bridge
ip address add 10.0.0.1/24 dev nodes
echo $pid
read
"""

# Process 1 is the control host's shell: its network is where the other end of this node's cable belongs.
NODE = """
hostname $0
nsenter --target 1 --net ip link add $0 up master nodes type veth peer name eth0 netns $$
ip address add $1/24 dev eth0
ip link set eth0 up
ip link set lo up
exec slurmd -D -N $0
"""

# linuxproc, none, none: no cgroups. config_overrides: the CPUs named here, whatever the host has. cred_expire: a requeued
# job waits that long, two minutes if it is not set.
SLURM_CONF = """
ClusterName=tests
SlurmctldHost=control(10.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=5
{nodes}
PartitionName=all Nodes=ALL Default=YES
"""


def why_not() -> str:
    """What this host lacks for a SLURM of its own; empty if nothing."""
    if os.geteuid() != 0:
        return "only root can make the nodes' namespaces"
    if missing := [p for p in PROGRAMS if not shutil.which(p, path=PATH)]:
        return f"not installed: {', '.join(missing)}"
    tried = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True)
    return f"this host gives no namespaces: {tried.stderr.strip()}" if tried.returncode else ""


class Cluster:
    """Up inside `with`. `directory` keeps the configuration and the daemons' logs."""

    def __init__(self, directory: Path, nodes: int = 2, cpus: int = 4) -> None:
        self.directory = directory
        self.cpus = cpus
        self.addresses = {f"node{n}": f"10.0.0.{10 + n}" for n in range(1, nodes + 1)}
        self._processes: list[subprocess.Popen[str]] = []
        self._pid = ""

    def __enter__(self) -> Cluster:
        self._write_files()
        try:
            self._start_control()
            for name, address in self.addresses.items():
                self._daemon(["unshare", "--net", "--uts", "bash", "-ec", NODE, name, address], f"slurmd-{name}")
            self._wait_for_nodes()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The first process is the namespaces' init: the kernel ends all others with it."""
        for process in self._processes:
            process.kill()
            process.wait()

    def popen(self, words: list[str], **variables: str) -> subprocess.Popen[str]:
        """A command on the control host, in the tests' working directory; both its outputs are in one pipe."""
        enter = ["nsenter", "--target", self._pid, "--mount", "--net", "--uts", "--pid", "--wd"]
        return subprocess.Popen(
            [*enter, *words],
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._environment() | variables,
        )

    def run(self, words: list[str], timeout_s: float = 240, **variables: str) -> tuple[int, str]:
        """Exit code and output of a command on the control host."""
        process = self.popen(words, **variables)
        output, _ = process.communicate(timeout=timeout_s)
        return process.returncode, output

    def _environment(self) -> dict[str, str]:
        """Without what a launcher around the tests has set."""
        foreign = ("SLURM_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_")
        env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        return env | {"PATH": PATH, "SLURM_CONF": str(self.directory / "slurm.conf")}

    def _write_files(self) -> None:
        size = f"CPUs={self.cpus} SocketsPerBoard=1 CoresPerSocket={self.cpus} ThreadsPerCore=1"
        nodes = [f"NodeName={n} NodeAddr={a} NodeHostname={n} {size}" for n, a in self.addresses.items()]
        conf = SLURM_CONF.format(directory=self.directory, nodes="\n".join(nodes))
        (self.directory / "slurm.conf").write_text(conf)
        hosts = {"localhost": "127.0.0.1", "control": "10.0.0.1"} | self.addresses
        (self.directory / "hosts").write_text("".join(f"{a} {n}\n" for n, a in hosts.items()))
        key = self.directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))

    def _start_control(self) -> None:
        control = subprocess.Popen(
            [*NAMESPACES, "bash", "-ec", CONTROL.replace("hosts /etc", f"{self.directory}/hosts /etc")],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._environment(),
        )
        self._processes.append(control)
        assert control.stdout is not None
        self._pid = control.stdout.readline().strip()
        assert self._pid, "the control host did not start"
        keys = [f"--{name}={self.directory}/munge.{name}" for name in ("socket", "pid-file", "seed-file", "log-file")]
        self._daemon(["munged", "--foreground", "--force", f"--key-file={self.directory}/munge.key", *keys], "munged")
        self._daemon(["slurmctld", "-D"], "slurmctld")

    def _daemon(self, words: list[str], name: str) -> None:
        log = f'exec >{self.directory}/{name}.log 2>&1; exec "$@"'
        self._processes.append(self.popen(["bash", "-c", log, "bash", *words]))

    def _wait_for_nodes(self) -> None:
        deadline = time.monotonic() + READY_S
        while True:
            _, idle = self.run(["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"])
            if set(idle.split()) >= set(self.addresses):
                return
            if time.monotonic() > deadline:
                logs = "".join(f"--- {p.name}\n{p.read_text()[-1500:]}" for p in sorted(self.directory.glob("*.log")))
                raise RuntimeError(f"not all nodes came up: {idle}\n{logs}")
            time.sleep(0.1)
