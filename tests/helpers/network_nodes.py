"""Machines with separate addresses, made of network namespaces; needs root and iproute2.

They share this machine's files and processors but not its network: traffic goes over a virtual cable between
the two.
"""

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

NETNS = Path("/etc/netns")
"""Where `ip netns exec` looks for a namespace's own /etc/hosts."""
INTERFACE = "eth0"


@contextmanager
def two_machines(names: tuple[str, str]) -> Iterator[dict[str, str]]:
    """Host name -> namespace, for two machines that know each other by name; both are deleted on exit."""
    spaces = {name: f"k25-{os.getpid()}-{name}" for name in names}
    addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, start=1)}
    hosts = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items())
    try:
        for space in spaces.values():
            ip("netns", "add", space)
            (NETNS / space).mkdir(parents=True)
            (NETNS / space / "hosts").write_text(hosts)
            ip("-n", space, "link", "set", "lo", "up")
        here, there = spaces.values()
        ends = ("type", "veth", "peer", "name", INTERFACE, "netns", there)
        ip("link", "add", INTERFACE, "netns", here, *ends)
        for name, space in spaces.items():
            ip("-n", space, "address", "add", f"{addresses[name]}/24", "dev", INTERFACE)
            ip("-n", space, "link", "set", INTERFACE, "up")
        yield spaces
    finally:
        for space in spaces.values():
            subprocess.run(["ip", "netns", "delete", space], check=False)
            (NETNS / space / "hosts").unlink(missing_ok=True)
            if (NETNS / space).is_dir():
                (NETNS / space).rmdir()


@contextmanager
def switched_machines(num_machines: int, mtu_bytes: int, port_mtus: Mapping[int, int]) -> Iterator[list[str]]:
    """Namespaces of machines whose interfaces have `mtu_bytes`, on one switch.

    The switch is a bridge in a namespace of its own. `port_mtus` maps machines to the MTU of their port,
    if it is another; a port drops larger packets without a word, as switches do. Machine n has the addresses
    10.78.0.(n + 1) and fd78::(n + 1).
    """
    spaces = [f"k25-{os.getpid()}-m{number}" for number in range(num_machines)]
    switch = f"k25-{os.getpid()}-switch"
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for number, space in enumerate(spaces):
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
            port = f"port{number}"
            ends = ("type", "veth", "peer", "name", port, "netns", switch)
            ip("link", "add", INTERFACE, "netns", space, "mtu", str(mtu_bytes), *ends)
            for address in (f"10.78.0.{number + 1}/24", f"fd78::{number + 1}/64"):
                nodad = ("nodad",) if ":" in address else ()
                ip("-n", space, "address", "add", address, "dev", INTERFACE, *nodad)
            ip("-n", space, "link", "set", INTERFACE, "up")
            port_mtu = str(port_mtus.get(number, mtu_bytes))
            ip("-n", switch, "link", "set", port, "mtu", port_mtu, "master", "bridge", "up")
        yield spaces
    finally:
        for space in (*spaces, switch):
            subprocess.run(["ip", "netns", "delete", space], check=False, capture_output=True)


@contextmanager
def inside(space: str) -> Iterator[None]:
    """Let this thread, and those that it starts, open sockets on one of the machines."""
    with open("/proc/thread-self/ns/net") as own, open(f"/run/netns/{space}") as other:
        os.setns(other.fileno(), os.CLONE_NEWNET)
        try:
            yield
        finally:
            os.setns(own.fileno(), os.CLONE_NEWNET)


def start_on(
    space: str, host: str, command: Sequence[str], environment: Mapping[str, str], folder: Path, log: IO[str]
) -> subprocess.Popen[str]:
    """Start a command on one of the machines, under its host name."""
    named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host, *command]
    return subprocess.Popen(
        ["ip", "netns", "exec", space, *named],
        cwd=folder,
        env=os.environ | environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ip(*words: str) -> None:
    """Run iproute2's command. Raises AssertionError with its errors if it fails."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)} (needs root): {done.stderr}"
