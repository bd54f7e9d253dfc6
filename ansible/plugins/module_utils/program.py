"""Calls the installed program and takes its JSON; what all modules of the collection share."""

import json
import os
from datetime import UTC

PROGRAM_ARGUMENTS = dict(
    connect=dict(type="str", aliases=["uri"]),
    executable=dict(type="path", default="qemu-vmdk-snap"),
)


class Failed(Exception):
    """The program ended with an error. `error` is its object: class, code, message and what it is about."""

    def __init__(self, error, command):
        """Keep the error and the command line that met it."""
        super().__init__(error.get("message", "the program failed"))
        self.error, self.command = error, command

    @property
    def code(self):
        """Return the frozen code, `no-snapshot` for one."""
        return self.error.get("code")


class Program:
    """The program on this host, for one module."""

    def __init__(self, module):
        """Find the program; without it the module fails."""
        self.module = module
        self.status = 0  # exit status of the last command
        self.path = module.get_bin_path(
            module.params["executable"], required=False, opt_dirs=["/usr/local/bin", "/opt/qemu-vmdk-snap/bin"]
        )
        if self.path is None:
            module.fail_json(
                msg="{} is not installed on this host: the role qemu_vmdk_snap.vmdk.host installs it".format(
                    module.params["executable"]
                ),
                code="not-installed",
            )

    def call(self, *words, **options):
        """Return what the command answers as JSON. Its warnings are passed on once.

        `connect` says whether the command takes a connection. Raises Failed where the command fails, unless its exit
        status is in `accept`.
        """
        accept = options.get("accept", (0,))
        command = [self.path] + [str(word) for word in words]
        if options.get("connect", True) and self.module.params["connect"]:
            command += ["--connect", self.module.params["connect"]]
        command.append("--output=json")
        # The program's own messages are not translated, but libvirt's are.
        status, out, err = self.module.run_command(command, environ_update=dict(LC_ALL="C.UTF-8"))
        self.status = status
        answers = list(_values(out))
        error = next((one["error"] for one in answers if isinstance(one, dict) and "error" in one), None)
        for one in answers:
            for line in one.get("warnings", []) if isinstance(one, dict) else []:
                self.module.warn(line)
        if error is not None or status not in accept:
            if error is None:
                lines = [line for line in err.strip().splitlines() if line] or [f"ended with status {status}"]
                error = {"class": "", "code": "error", "message": lines[-1]}
            error.setdefault("exit-status", status)
            raise Failed(error, command)
        return answers[0] if answers else None

    def version(self):
        """Return the version of the program."""
        status, out, _err = self.module.run_command([self.path, "--version"])
        return out.split()[-1] if status == 0 and out.split() else None

    def fail(self, failed, **more):
        """Let the module fail with the program's own code and exit status."""
        error = failed.error
        self.module.fail_json(
            msg=error["message"],
            code=error["code"],
            exit_status=error["exit-status"],
            error=error,
            cmd=failed.command,
            **more,
        )


def _values(text):
    """Yield the JSON values that follow one another in `text`: a report, and an error after it."""
    decoder, at = json.JSONDecoder(), 0
    while True:
        while at < len(text) and text[at].isspace():
            at += 1
        if at == len(text):
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError:
            return
        yield value


def domain_arguments():
    """Return the arguments that say which domain is meant, those of VMware's modules included."""
    return dict(
        name=dict(type="str", aliases=["domain", "guest", "vm_name"]), uuid=dict(type="str"), **VMWARE_ARGUMENTS
    )


VMWARE_ARGUMENTS = dict(
    hostname=dict(type="str"),
    username=dict(type="str", aliases=["admin", "user"]),
    password=dict(type="str", no_log=True, aliases=["pass", "pwd"]),
    port=dict(type="int"),
    validate_certs=dict(type="bool"),
    proxy_host=dict(type="str"),
    proxy_port=dict(type="int"),
    datacenter=dict(type="str"),
    folder=dict(type="str"),
    moid=dict(type="str"),
    name_match=dict(type="str"),
    use_instance_uuid=dict(type="bool"),
)
"""What playbooks for VMware have and what means nothing here: accepted, and named in one warning."""


def the_domain(module):
    """Return the domain that the arguments mean: its UUID, else its name."""
    ignored = sorted(name for name in VMWARE_ARGUMENTS if module.params.get(name) is not None)
    if ignored:
        module.warn("these parameters mean nothing to libvirt and are ignored: {}".format(", ".join(ignored)))
    domain = module.params["uuid"] or module.params["name"]
    if not domain:
        module.fail_json(msg="name or uuid must say which domain is meant", code="invalid-request")
    if domain.startswith("-"):
        module.fail_json(msg=f"{domain!r} cannot be the name of a domain", code="invalid-request")
    return domain


def all_domains(program):
    """Return by the name of each domain its snapshots as `as_results` has them, or the `error` that it gives."""
    # A domain that cannot be read has an error of its own, and the status is that of the first one.
    answer = program.call("snapshot", "list", "--all", accept=range(256))
    return dict(
        (one["domain"], as_results(one["snapshots"]) if "snapshots" in one else dict(error=one["error"]))
        for one in answer
    )


def as_results(snapshots):
    """Return snapshots as VMware's modules do: the current one, and all, with ids in their order of creation."""
    ordered = sorted(snapshots, key=lambda one: (one["creation-time"], one["name"]))
    rows = [
        dict(
            id=number,
            name=one["name"],
            description=one["description"] or "",
            creation_time=_iso(one["creation-time"]),
            state=one["state"],
            parent=one["parent"],
            children=one["children"],
            current=one["current"],
            disks=one["disks"],
        )
        for number, one in enumerate(ordered, 1)
    ]
    current = next((row for row in rows if row["current"]), {})
    return dict(current_snapshot=current, snapshots=rows)


def _iso(seconds):
    from datetime import datetime

    return datetime.fromtimestamp(seconds, UTC).isoformat()


def absolute(path):
    """Return the path as the program is to see it: never as an option."""
    return os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111 - `..` after a link stays what it is
