"""Hosts on this machine: each in network, mount, UTS and process namespaces of its own, with libvirtd and sshd.

A host has the plain `qemu:///system`, the program's own folders in `/etc` and `/var/lib`, and an address on a bridge.
The bridge is in one more network namespace, where the controllers run: nothing of it is seen on the machine, two beds
do not meet, and all of it ends with the processes that hold the namespaces. Writes below `/etc`, `/var`, `/opt` and
`/usr/local` go into memory; `/root` is empty.

Without a process namespace of its own each QEMU that libvirtd probes would stay a zombie until the machine's first
process asks for it, and libvirtd waits for that.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Final

from tests.domain.libvirtd import LIBVIRTD_CONF, QEMU_CONF
from tests.domain.sshd import SSH_CONFIG, SSHD_COMMON

PROGRAM: Final = Path(sys.executable).parent / "qemu-vmdk-snap"
ADMIN: Final = 64321
"""The number of the user who becomes root by sudo."""

HOOKS_DEADLINE: Final = 240
"""Seconds that a drop-in has: those of the tests wait for one another."""

NOBODYS_ADDRESS: Final = "10.77.0.99"
DEBIANS_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NET: Final = "10.77.0"
_WAIT: Final = 120.0

SWITCH: Final = """\
ip link set lo up
ip link add br0 type bridge
ip addr add {net}.1/24 dev br0
ip link set br0 up
echo ready
exec cat
"""

HOST: Final = """\
set -e
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -m 755 /run/sshd /run/lock /run/libvirt /run/bed
for folder in /etc /var /opt /usr/local; do
    mkdir -p /run/bed/upper$folder /run/bed/work$folder
    mount -t overlay overlay -o lowerdir=$folder,upperdir=/run/bed/upper$folder,workdir=/run/bed/work$folder $folder
done
for folder in /root /etc/libvirt /var/lib/libvirt /var/log/libvirt /etc/qemu-vmdk-snap /var/lib/qemu-vmdk-snap; do
    mkdir -p $folder
    mount -t tmpfs -o mode=755 tmpfs $folder
done
mkdir -p /var/cache/libvirt
mount --bind {cache} /var/cache/libvirt
cp {folder}/conf/* /etc/libvirt/
# What pip and a shell are told on this machine, a host is not.
rm -rf /etc/xdg/pip /etc/pip.conf
: >/etc/environment
hostname {name}
echo {name} >/etc/hostname
printf '127.0.0.1 localhost {name}\\n' >/etc/hosts
printf 'admin:x:{admin}:{admin}::/run/admin:/bin/sh\\n' >>/etc/passwd
printf 'admin:x:{admin}:\\n' >>/etc/group
printf 'admin:*:19000:0:99999:7:::\\n' >>/etc/shadow
mkdir -p /etc/sudoers.d
printf 'admin ALL=(ALL) NOPASSWD: ALL\\n' >/etc/sudoers.d/bed
chmod 440 /etc/sudoers.d/bed
mkdir -m 700 /run/admin
chown {admin}:{admin} /run/admin
rm -f /etc/nologin
if [ -n '{program}' ]; then
    printf '#!/bin/sh\\nQEMU_VMDK_SNAP_HOOKS_DEADLINE={deadline} exec {program} "$@"\\n' >/usr/local/bin/qemu-vmdk-snap
    chmod 755 /usr/local/bin/qemu-vmdk-snap
fi
ip link set lo up
echo up
read -r linked # the switch has given it its end of a cable
ip addr add {address}/24 dev eth0
ip link set eth0 up
virtlogd --config /etc/libvirt/virtlogd.conf </dev/null >>{folder}/log 2>&1 &
libvirtd --config /etc/libvirt/libvirtd.conf </dev/null >>{folder}/log 2>&1 &
/usr/sbin/sshd -D -e -f {folder}/sshd_config </dev/null >>{folder}/sshd.log 2>&1 &
while read -r word; do
    [ "$word" != cut ] || pkill -KILL -f '^sshd(-session)?: (root|admin)' || echo 'no connection'
    echo done
done
"""

SSHD_CONFIG: Final = f"""\
{SSHD_COMMON}\
ListenAddress {{address}}:22
HostKey {{keys}}/host
AuthorizedKeysFile {{keys}}/key.pub
UseDNS no
MaxStartups 100
Subsystem sftp internal-sftp
SetEnv "PATH={{debian}}"
"""


class Switch:
    """The network of a bed: a bridge in a namespace of its own, which is also where controllers run."""

    def __init__(self) -> None:
        words = ["unshare", "--net", "sh", "-ec", SWITCH.format(net=_NET)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        _expect(self.process.stdout, "ready")

    def inside(self, *words: str) -> list[str]:
        """Return the command that runs `words` as a controller: in the network, and ending with all that it started."""
        enter = ["nsenter", f"--net=/proc/{self.process.pid}/ns/net"]
        return [*enter, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *words]

    def plug(self, pid: int, port: str) -> None:
        """Give the network namespace of a process an eth0, the other end of which is `port` of the bridge."""
        add = ["ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(pid)]
        self._run(*add)
        self._run("ip", "link", "set", port, "master", "br0", "up")

    def close(self) -> None:
        """End the network."""
        self.process.kill()
        self.process.communicate()

    def _run(self, *words: str) -> None:
        subprocess.run(["nsenter", f"--net=/proc/{self.process.pid}/ns/net", *words], check=True)


class Host:
    """One host. `folder` is of this machine, and has its configuration and logs, and `img` for images."""

    def __init__(self, name: str, number: int, folder: Path, keys: Path) -> None:
        self.name, self.folder, self.keys = name, folder, keys
        self.port, self.address = f"port{number}", f"{_NET}.{number + 1}"
        self.images = folder / "img"
        self.images.mkdir(parents=True)
        conf = folder / "conf"
        conf.mkdir()
        (conf / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(folder=folder))
        (conf / "virtlogd.conf").write_text(f'log_outputs = "3:file:{folder}/virtlogd.log"\n')
        (conf / "qemu.conf").write_text(QEMU_CONF.format(uid=0, gid=0))
        (folder / "sshd_config").write_text(SSHD_CONFIG.format(address=self.address, keys=keys, debian=DEBIANS_PATH))
        self._process: subprocess.Popen[str] | None = None
        self._pid = 0

    def begin(self, switch: Switch, cache: Path, program: Path | None) -> None:
        """Start it; `wait` until it can be used. `cache` is where libvirtd keeps what it knows of QEMU."""
        words = {"name": self.name, "folder": self.folder, "cache": cache, "address": self.address, "admin": ADMIN}
        script = self.folder / "init"
        script.write_text(HOST.format(**words, program=program or "", deadline=HOOKS_DEADLINE))
        namespaces = ["--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        env = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        self._process = subprocess.Popen(
            ["unshare", *namespaces, "bash", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        _expect(self._process.stdout, "up")
        holder = self._process.pid
        (child,) = Path(f"/proc/{holder}/task/{holder}/children").read_text().split()
        self._pid = int(child)
        switch.plug(self._pid, self.port)
        self._tell("linked", None)

    def wait(self) -> None:
        """Wait until libvirtd and sshd answer."""
        deadline = time.monotonic() + _WAIT
        ask = ["virsh", "-c", self.uri, "uri"]
        while not (
            self.root("run/libvirt/libvirt-sock").exists()
            and (self.folder / "sshd.log").exists()
            and "Server listening" in (self.folder / "sshd.log").read_text()
            and subprocess.run(ask, capture_output=True, check=False).returncode == 0
        ):
            assert self._process is not None
            assert self._process.poll() is None, self._evidence()
            assert time.monotonic() < deadline, self._evidence()
            time.sleep(0.1)

    @property
    def uri(self) -> str:
        """What its libvirtd is reached at from outside; inside it is qemu:///system."""
        return f"qemu+unix:///system?socket={self.root('run/libvirt/libvirt-sock')}"

    def root(self, path: str) -> Path:
        """Return where a file of the host is seen from outside."""
        return Path(f"/proc/{self._pid}/root") / path

    def cut(self) -> None:
        """Kill every connection of its sshd."""
        self._tell("cut", "done")

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the host, as root."""
        # With its root: that of the mounts' namespace is another one where the tests themselves run in a chroot.
        enter = ["nsenter", f"--target={self._pid}", "--mount", "--uts", "--net", "--pid", "--root"]
        env = {**os.environ, "PATH": DEBIANS_PATH, "HOME": "/root"}
        return subprocess.run([*enter, *words], capture_output=True, text=True, env=env, check=False, timeout=300)

    def end(self) -> None:
        """End everything that runs on it, at once: by its process 1."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def variables(self, become: bool = False, pipelining: bool = True) -> dict[str, object]:
        """Return what an inventory says of it."""
        return {
            "ansible_host": self.address,
            "ansible_user": "admin" if become else "root",
            "ansible_become": become,
            "ansible_pipelining": pipelining,
            "ansible_ssh_private_key_file": str(self.keys / "key"),
            "ansible_ssh_common_args": f"-F {self.keys}/ssh_config",
            "ansible_python_interpreter": "/usr/bin/python3",
        }

    def _tell(self, word: str, answer: str | None) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        if answer is not None:
            _expect(self._process.stdout, answer)

    def _evidence(self) -> str:
        return "\n".join(path.read_text()[-4000:] for path in sorted(self.folder.glob("*log")))


def make_keys(folder: Path, addresses: Sequence[str]) -> Path:
    """Make what all hosts and controllers share: a key, a host key, and what ssh is to know."""
    folder.mkdir()
    for name in ("key", "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder) + "ConnectTimeout 10\n")
    public = (folder / "host.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"{address} {public}" for address in addresses))
    (folder / "key.pub").chmod(0o644)
    return folder


@contextlib.contextmanager
def bed(folder: Path, *names: str, bare: Sequence[str] = ()) -> Iterator[tuple[Switch, list[Host]]]:
    """Have hosts of these names for the length of the block, all of them up; those in `bare` without the program."""
    addresses = [f"{_NET}.{number}" for number in range(2, len(names) + 2)]
    keys = make_keys(folder / "keys", addresses)
    cache = folder / "cache"
    cache.mkdir()
    with contextlib.ExitStack() as running:
        switch = Switch()
        running.callback(switch.close)
        hosts = [Host(name, number, folder / name, keys) for number, name in enumerate(names, 1)]
        for host in hosts:
            running.callback(host.end)
            host.begin(switch, cache, None if host.name in bare else PROGRAM)
        for host in hosts:
            host.wait()
        yield switch, hosts


def _expect(stream: IO[str] | None, word: str) -> None:
    assert stream is not None
    line = stream.readline().strip()
    assert line == word, f"{line!r} instead of {word!r}"
