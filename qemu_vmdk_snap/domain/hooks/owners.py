"""Which domain a policy file belongs to: the UUID is a domain's identity, and its name may change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_vmdk_snap.domain.connect import connection, find_domain, libvirt_errors
from qemu_vmdk_snap.domain.hooks import policy as policies
from qemu_vmdk_snap.domain.hooks.install import PolicyState
from qemu_vmdk_snap.errors import VmdkSnapError

if TYPE_CHECKING:
    import libvirt


def find_policy(folder: Path, name: str) -> Path:
    """Return the policy of a domain, by its UUID or else by its name, as the hook looks for it.

    If libvirt cannot be asked for the UUID, it is the one by name, also if it does not exist.
    """
    by_name = folder / f"{name}.toml"
    connect = policies.load(by_name).connect if by_name.exists() else policies.DEFAULT_CONNECT
    try:
        with connection(connect) as conn:
            domain = find_domain(conn, name)
            by_uuid = folder / f"{domain.UUIDString()}.toml"
            return by_uuid if by_uuid.exists() else folder / f"{domain.name()}.toml"
    except VmdkSnapError:
        return by_name


def without_domain(states: Sequence[PolicyState]) -> list[PolicyState]:
    """Return the policies that no domain has, each with that as its problem.

    A policy with another problem is left out, and so is one whose connection cannot be opened: an unseen domain
    may exist.
    """
    found: list[PolicyState] = []
    good = [state for state in states if state.problem is None]
    for connect in sorted({state.connect for state in good}):
        try:
            with connection(connect) as conn:
                domains = _domains(conn)
        except VmdkSnapError:
            continue
        mine = [state for state in good if state.connect == connect]
        for state in mine:
            problem = _problem(state, domains, {one.domain for one in mine}, connect)
            found += [replace(state, problem=problem)] if problem else []
    return found


def _domains(conn: libvirt.virConnect) -> dict[str, str]:
    """Return name -> UUID of every domain."""
    with libvirt_errors("-", "list the domains"):
        return {domain.name(): domain.UUIDString() for domain in conn.listAllDomains()}


def _problem(state: PolicyState, domains: dict[str, str], called: set[str], connect: str) -> str | None:
    if state.domain in domains.values():
        return None
    if state.domain not in domains:
        return f"no domain of {connect} has this name or UUID: was it renamed?"
    uuid = domains[state.domain]
    return f"is ignored: the domain has a policy by its UUID, {uuid}.toml" if uuid in called else None
