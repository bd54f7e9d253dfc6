"""`hook status`: show whether the hook is installed, and problems with it or with a policy."""

from __future__ import annotations

from dataclasses import asdict, replace

from qemu_vmdk_snap.cli.hook.options import add_folder, add_policies
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_folder(parser)
    add_policies(parser, default=None)


def run(args: argparse.Namespace, ui: Ui) -> int:
    """Show it; exit status 0 when the hook is installed and nothing is wrong, else 1."""
    from qemu_vmdk_snap import __version__
    from qemu_vmdk_snap.domain.hooks import install as hooks
    from qemu_vmdk_snap.domain.hooks.owners import without_domain

    state = hooks.status(args.dir.absolute(), args.policies)
    lost = {one.path: one for one in without_domain(state.policies)}
    state = replace(state, policies=tuple(lost.get(policy.path, policy) for policy in state.policies))
    good = state.installed and state.problem is None and not any(policy.problem for policy in state.policies)
    if ui.json_output:
        ui.json({**asdict(state), "good": good})
        return 0 if good else 1
    ui.text(f"Hook: {state.path}" + (f" of version {state.version}" if state.version else ""))
    if state.problem:
        ui.text(f"  {state.problem}")
    elif not state.current:
        ui.text(f"  differs from what version {__version__} installs: install it again")
    for policy in state.policies:
        ui.text(f"Policy of domain {policy.domain}: {policy.path}: {policy.problem or 'good'}")
    for daemon in state.restart:
        advice = "restart it if this is the first hook in the folder"
        ui.text(f"Daemon {daemon} was started before the hook was installed: {advice}")
    return 0 if good else 1
