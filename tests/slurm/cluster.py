"""A real SLURM of several nodes on this host, for as long as the tests run.

Everything lives in namespaces of its own: a control host (munged, slurmctld, and the commands of the tests) and the
nodes (one slurmd each) with a network, an address and a host name of their own, joined by a bridge that the host does
not see. So no port, host name, file of /etc or SLURM of the host is touched, and nothing outlives the first process.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time
from pathlib import Path
from types import TracebackType

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "ip", "unshare", "nsenter")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
NAMESPACES = ["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--kill-child"]
READY_S = 60.0

# The number comes from the host's /proc: nsenter, outside, needs that one. The last line holds the namespaces open
# until standard input closes, which it also does when the tests are killed.
CONTROL = """
read -r pid _ </proc/self/stat
mount -t proc proc /proc
mount --bind hosts /etc/hosts
mount -t tmpfs -o size=$SMALL small small
hostname control
ip link set lo up
ip link add nodes up type bridge
ip address add 10.0.0.1/24 dev nodes
echo $pid
read
"""

# Process 1 is the control host's shell: its network is where the other end of this node's cable belongs. The daemon and
# all tasks of a node are in a process namespace of its own: what `pid` names is the power switch.
NODE = """
hostname $0
echo $$ >$2
nsenter --target 1 --net ip link delete $0 2>/dev/null || true
nsenter --target 1 --net ip link add $0 up master nodes type veth peer name eth0 netns $$
ip address add $1/24 dev eth0
ip link set eth0 up
ip link set lo up
exec unshare --pid --fork --kill-child --mount-proc slurmd -D -N $0
"""
SMALL_DISK_MIB = 24

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
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=8
ReturnToService=2
KillWait=5
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
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

    def __init__(self, directory: Path, nodes: int = 5, cpus: int = 4, gpus: int = 2) -> None:
        """`gpus`: device files without a device, which SLURM hands out as it would real ones."""
        self.directory = directory
        self.cpus = cpus
        self.gpus = gpus
        self.addresses = {f"node{n}": f"10.0.0.{10 + n}" for n in range(1, nodes + 1)}
        self._processes: list[subprocess.Popen[str]] = []
        self._pid = ""

    def __enter__(self) -> Cluster:
        self._write_files()
        try:
            self._start_control()
            for name, address in self.addresses.items():
                self._start_node(name, address)
            self.wait_for_nodes()
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

    def power_off(self, node: str) -> None:
        """The node's daemon and all its tasks end at once, without a word to anybody."""
        assert self.run(["kill", "-9", (self.directory / f"{node}.pid").read_text().strip()])[0] == 0

    def power_on(self, node: str) -> None:
        self._start_node(node, self.addresses[node])

    def cable(self, node: str, state: str) -> None:
        """`down`: the node's network is unplugged; `up`: it is there again."""
        assert self.run(["ip", "link", "set", node, state])[0] == 0

    def inside(self, path: Path) -> Path:
        """A path of the control host and the nodes (the small disk is mounted there alone), as this process sees it."""
        return Path(f"/proc/{self._pid}/root{path}")

    @property
    def small_disk(self) -> Path:
        """A file system of SMALL_DISK_MIB, for all nodes; see `inside`."""
        return self.directory / "small"

    def _start_node(self, name: str, address: str) -> None:
        pid = self.directory / f"{name}.pid"
        self._daemon(["unshare", "--net", "--uts", "bash", "-ec", NODE, name, address, str(pid)], f"slurmd-{name}")

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
        gres = f"Gres=gpu:h100:{self.gpus}"
        nodes = [f"NodeName={n} NodeAddr={a} NodeHostname={n} {size} {gres}" for n, a in self.addresses.items()]
        for number in range(self.gpus):
            os.mknod(self.directory / f"gpu{number}", 0o600 | stat.S_IFCHR, os.makedev(195, number))
        files = f"{self.directory}/gpu[0-{self.gpus - 1}]"
        (self.directory / "gres.conf").write_text(
            f"NodeName={','.join(self.addresses)} Name=gpu Type=h100 File={files}\n"
        )
        self.small_disk.mkdir()
        conf = SLURM_CONF.format(directory=self.directory, nodes="\n".join(nodes))
        (self.directory / "slurm.conf").write_text(conf)
        hosts = {"localhost": "127.0.0.1", "control": "10.0.0.1"} | self.addresses
        (self.directory / "hosts").write_text("".join(f"{a} {n}\n" for n, a in hosts.items()))
        key = self.directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))

    def _start_control(self) -> None:
        control = CONTROL.replace("hosts /etc", f"{self.directory}/hosts /etc")
        control = control.replace("$SMALL small small", f"{SMALL_DISK_MIB}m small {self.small_disk}")
        process = subprocess.Popen(
            [*NAMESPACES, "bash", "-ec", control],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._environment(),
        )
        self._processes.append(process)
        assert process.stdout is not None
        self._pid = process.stdout.readline().strip()
        assert self._pid, "the control host did not start"
        keys = [f"--{name}={self.directory}/munge.{name}" for name in ("socket", "pid-file", "seed-file", "log-file")]
        self._daemon(["munged", "--foreground", "--force", f"--key-file={self.directory}/munge.key", *keys], "munged")
        self._daemon(["slurmctld", "-D"], "slurmctld")

    def _daemon(self, words: list[str], name: str) -> None:
        log = f'exec >{self.directory}/{name}.log 2>&1; exec "$@"'
        self._processes.append(self.popen(["bash", "-c", log, "bash", *words]))

    def wait_for_nodes(self) -> None:
        """Returns when all are idle."""
        deadline = time.monotonic() + READY_S
        while True:
            _, idle = self.run(["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"])
            if set(idle.split()) >= set(self.addresses):
                return
            if time.monotonic() > deadline:
                logs = "".join(f"--- {p.name}\n{p.read_text()[-1500:]}" for p in sorted(self.directory.glob("*.log")))
                raise RuntimeError(f"not all nodes came up: {idle}\n{logs}")
            time.sleep(0.1)
