"""`completion`: a script that lets a shell complete commands, options, domains, snapshots and files."""

from __future__ import annotations

import argparse

from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import PluginError

_ZSH = """\
#compdef PROGRAM
_python_argcomplete() {
    local IFS=$'\\013'
    local -a completions
    completions=($(COMP_LINE="$BUFFER" COMP_POINT="$CURSOR" _ARGCOMPLETE=1 _ARGCOMPLETE_SUPPRESS_SPACE=1 \\
        "${words[1]}" 8>&1 9>/dev/null 1>/dev/null 2>/dev/null </dev/null))
    compadd -- "${completions[@]}"
}
# Autoloaded from a folder of completions it is called at once; evaluated it is registered.
if [[ $zsh_eval_context == *func ]]; then
    _python_argcomplete "$@"
else
    compdef _python_argcomplete PROGRAM
fi
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `completion`."""
    parser.add_argument(
        "shell", choices=("bash", "zsh", "fish"), help='e.g. in ~/.bashrc: eval "$(qemu-vmdk-snap completion bash)"'
    )


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Print the script."""
    from qemu_vmdk_snap.cli.commands import PROGRAM

    try:
        from argcomplete.shell_integration import shellcode
    except ImportError as error:
        raise PluginError("argcomplete", "is missing: install python3-argcomplete, or argcomplete (PyPI)") from error
    # argcomplete 2, as Debian 12 has it, knows no zsh.
    script = shellcode([PROGRAM], use_defaults=True, shell=args.shell) or _ZSH.replace("PROGRAM", PROGRAM)
    if ui.json_output:
        ui.json({"shell": args.shell, "script": script})
        return
    for line in script.splitlines():
        ui.text(line)
