"""`completion`: a script that lets a shell complete commands, options and their values."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from qemu_vmdk_snap.cli.ui import Ui


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `completion`."""
    parser.add_argument(
        "shell", choices=("bash", "zsh", "fish"), help='e.g. in ~/.bashrc: eval "$(qemu-vmdk-snap completion bash)"'
    )


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Print the script."""
    lines = [*(_fish() if args.shell == "fish" else _bash(zsh=args.shell == "zsh"))]
    if ui.json_output:
        ui.json({"shell": args.shell, "script": "\n".join(lines) + "\n"})
        return
    for line in lines:
        ui.text(line)


def _bash(*, zsh: bool) -> Iterator[str]:
    from qemu_vmdk_snap.cli.pages.catalogue import every_command, takes_value

    entries = list(every_command())
    first = sorted({entry.words[0] for entry in entries})
    groups: dict[str, list[str]] = {}
    for entry in entries:
        if len(entry.words) == 2:
            groups.setdefault(entry.words[0], []).append(entry.words[1])
    if zsh:
        yield "autoload -U +X bashcompinit && bashcompinit"
    yield "_qemu_vmdk_snap() {"
    yield '    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words=""'
    yield '    if [ "$COMP_CWORD" -eq 1 ]; then'
    yield f'        COMPREPLY=($(compgen -W "{" ".join(first)} --help --version" -- "$word")); return'
    yield "    fi"
    yield '    case "$COMP_CWORD ${COMP_WORDS[1]}" in'
    for group, names in groups.items():
        yield f'        "2 {group}") COMPREPLY=($(compgen -W "{" ".join(names)} --help" -- "$word")); return ;;'
    yield "    esac"
    yield '    case "${COMP_WORDS[1]} ${COMP_WORDS[2]} $before" in'
    for entry in entries:
        for option in entry.options:
            if takes_value(option) and option.choices:
                choices = " ".join(map(str, option.choices))
                for name in option.option_strings:
                    pattern = f'"{" ".join(entry.words)} "*"{name}"'
                    yield f'        {pattern}) COMPREPLY=($(compgen -W "{choices}" -- "$word")); return ;;'
    yield "    esac"
    yield '    case "${COMP_WORDS[1]} ${COMP_WORDS[2]} " in'
    for entry in entries:
        offered = " ".join(name for option in entry.options for name in option.option_strings)
        yield f'        "{" ".join(entry.words)} "*) words="{offered}" ;;'
    yield "    esac"
    yield '    case "$word" in'
    yield '        -*) COMPREPLY=($(compgen -W "$words" -- "$word")) ;;'
    yield '        *) COMPREPLY=($(compgen -f -- "$word")) ;;'
    yield "    esac"
    yield "}"
    yield "complete -o filenames -o bashdefault -F _qemu_vmdk_snap qemu-vmdk-snap"


def _fish() -> Iterator[str]:
    from qemu_vmdk_snap.cli.commands import GROUPS
    from qemu_vmdk_snap.cli.pages.catalogue import every_command, takes_value

    begin = "complete -c qemu-vmdk-snap"
    for group, text in GROUPS.items():
        yield f"{begin} -n __fish_use_subcommand -f -a {group} -d {_quoted(text)}"
    for entry in every_command():
        here = f"__fish_seen_subcommand_from {entry.words[-1]}"
        if len(entry.words) == 2:
            group = f"__fish_seen_subcommand_from {entry.words[0]}"
            here = f"{group}; and {here}"
            yield f"{begin} -n '{group}' -a {entry.words[1]} -d {_quoted(entry.help)}"
        else:
            yield f"{begin} -n __fish_use_subcommand -f -a {entry.words[0]} -d {_quoted(entry.help)}"
        for option in entry.options:
            names = " ".join(f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in option.option_strings)
            value = " -r" if takes_value(option) else ""
            choices = f" -f -a {_quoted(' '.join(map(str, option.choices)))}" if option.choices else ""
            yield f"{begin} -n '{here}' {names}{value}{choices} -d {_quoted(option.help or '')}"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("%%", "%") + "'"
