"""Can the public names be found, imported late, and used alike?"""

from __future__ import annotations

import importlib
import inspect
import json
import pydoc
import re
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path

import pytest

import qemu_vmdk_snap
from qemu_vmdk_snap import create_image, create_overlay
from qemu_vmdk_snap.lazy import public_names

PACKAGES = ["qemu_vmdk_snap", "qemu_vmdk_snap.domain", "qemu_vmdk_snap.harness"]


PUBLIC: list[str] = importlib.import_module("qemu_vmdk_snap").__all__


def functions() -> list[str]:
    return [name for name in PUBLIC if inspect.isfunction(getattr(qemu_vmdk_snap, name))]


@pytest.mark.parametrize("package", PACKAGES)
def test_dir_and_help_show_every_name(package: str) -> None:
    module = importlib.import_module(package)
    names: list[str] = module.__all__
    assert set(names) <= set(dir(module))
    shown = pydoc.plain(pydoc.render_doc(module))
    for name in names:
        value = getattr(module, name)
        if inspect.isclass(value):
            assert f"class {value.__name__}(" in shown
        elif inspect.isfunction(value):
            assert f"    {name}(" in shown
            assert value.__doc__


@pytest.mark.parametrize("package", PACKAGES)
def test_every_line_of_the_stub_is_read(package: str) -> None:
    module = importlib.import_module(package)
    lines = Path(str(module.__file__)).with_suffix(".pyi").read_text().splitlines()
    assert len(module.__all__) == sum(line.startswith("from ") for line in lines)
    assert not [line for line in lines if line.startswith(("import ", "def ", "class "))]


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_imports_nothing_else(package: str) -> None:
    names = "numpy", "libvirt", "pexpect", "logging", "qemu_vmdk_snap.chain", "qemu_vmdk_snap.ops", "pathlib._local"
    code = f"import sys, {package}; dir({package}); print([m for m in {names!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match=r"module 'qemu_vmdk_snap' has no attribute 'nothing'"):
        qemu_vmdk_snap.nothing  # type: ignore[attr-defined] # noqa: B018


def test_a_stub_with_another_name(tmp_path: Path) -> None:
    (tmp_path / "__init__.pyi").write_text("from pathlib import Path as Place\n\n__version__: str\n")
    get, _ = public_names("json", str(tmp_path / "__init__.py"))
    assert get("Place") is Path
    assert get("__all__") == ["Place"]


def test_what_functions_return_is_public() -> None:
    public = [getattr(qemu_vmdk_snap, name) for name in PUBLIC if name[0].isupper()]
    for name in functions():
        function = getattr(qemu_vmdk_snap, name)
        module = sys.modules[function.__module__]
        returned = typing.get_type_hints(function, vars(module))["return"]
        for part in [returned, *typing.get_args(returned)]:
            ours = inspect.isclass(part) and part.__module__.startswith("qemu_vmdk_snap")
            assert not ours or part in public, f"{name} returns {part}"


REPORTS = [
    (package, name)
    for package in PACKAGES
    for name in importlib.import_module(package).__all__
    if name.endswith(("Report", "Info", "State"))
    or name in {"Adopted", "Change", "Check", "Decision", "Deleted", "Finding", "Measurement", "Mismatch", "Pause"}
    or name in {"PlannedDisk", "Recovered", "Recovery", "Work"}
]


@pytest.mark.parametrize(("package", "name"), REPORTS)
def test_a_report_has_the_json_of_its_command(package: str, name: str) -> None:
    value = getattr(importlib.import_module(package), name)
    signature = inspect.signature(value.as_dict)
    assert list(signature.parameters) == ["self"]
    assert signature.return_annotation == "dict[str, object]"


NO_REPORTS = {"Census", "Dependent", "Descriptor", "Followed", "Identity", "LinkFacts", "DomainHardware"}
"""What functions return besides reports: values to work with."""


def test_what_a_function_returns_is_json_or_open() -> None:
    for package in ("qemu_vmdk_snap", "qemu_vmdk_snap.domain"):
        module = importlib.import_module(package)
        public = {name: getattr(module, name) for name in module.__all__}
        for name, function in public.items():
            if not inspect.isfunction(function):
                continue
            returned = str(inspect.signature(function).return_annotation)
            for part in re.findall(r"\w+", returned):
                value = public.get(part)
                if inspect.isclass(value) and part not in NO_REPORTS:
                    assert hasattr(value, "as_dict") or hasattr(value, "close"), f"{name} returns {part}"


def test_the_threads_of_what_is_open_are_documented() -> None:
    threads = (Path(__file__).parents[3] / "docs" / "api.md").read_text().partition("## Threads")[2]
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) and not getattr(value, "_is_protocol", False):
                is_open = hasattr(value, "close") or hasattr(value, "__exit__")
                assert not is_open or f"`{name}`" in threads, name


def test_what_a_report_says_is_json(tmp_path: Path) -> None:
    base, top = tmp_path / "base.vmdk", tmp_path / "top.vmdk"
    create_image(base, 1 << 20, durable=False)
    create_overlay(top, base, durable=False)
    renewed = qemu_vmdk_snap.renew_overlay(top)
    assert json.loads(json.dumps(renewed.as_dict())) == {
        "filename": str(top),
        "parent": str(base),
        "dropped-bytes": renewed.dropped_bytes,
    }
    checked = qemu_vmdk_snap.check_image(top).as_dict()
    assert json.loads(json.dumps(checked)) == checked


def test_paths_may_be_text_and_folders_are_named_alike() -> None:
    for name in functions():
        parameters = inspect.signature(getattr(qemu_vmdk_snap, name)).parameters
        for parameter in parameters.values():
            text = str(parameter.annotation)
            if "Path" in text and parameter.name not in ("resolver", "opener", "owner"):
                assert "str" in text, f"{name}({parameter.name}: {text})"
        if "resolver" in parameters:
            assert parameters["resolver"].default is None, name
            assert "trusted_dirs" in parameters, name


def test_paths_of_methods_may_be_text() -> None:
    openers: list[Callable[..., object]] = [
        qemu_vmdk_snap.PosixFile.open,
        qemu_vmdk_snap.RawDisk,
        qemu_vmdk_snap.Census.of,
    ]
    openers += [qemu_vmdk_snap.Census.dependents, qemu_vmdk_snap.Census.other_names]
    for call in openers:
        for parameter in inspect.signature(call).parameters.values():
            assert "Path" not in str(parameter.annotation) or "str" in str(parameter.annotation), call


def test_no_signature_shows_the_environment() -> None:
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            if inspect.isfunction(getattr(module, name)):
                assert "environ(" not in str(inspect.signature(getattr(module, name))), name


def test_a_domain_is_called_alike_by_every_function() -> None:
    for name in importlib.import_module("qemu_vmdk_snap.domain").__all__:
        value = getattr(importlib.import_module("qemu_vmdk_snap.domain"), name)
        if inspect.isfunction(value):
            assert "domain_name" not in inspect.signature(value).parameters, name


def test_a_folder_is_trusted_by_every_function(tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    base, top = tmp_path / "bases" / "base.vmdk", str(tmp_path / "top.vmdk")
    create_image(base, 1 << 20, durable=False)
    create_overlay(top, base, durable=False)
    with pytest.raises(qemu_vmdk_snap.CorruptChain):
        qemu_vmdk_snap.compact(top)
    trusted = [str(tmp_path / "bases")]
    assert qemu_vmdk_snap.check_image(top).corruptions == 1 or qemu_vmdk_snap.check_image(top).check_errors == 1
    assert qemu_vmdk_snap.check_image(top, trusted_dirs=trusted).depth == 2
    assert qemu_vmdk_snap.repair(top, trusted_dirs=trusted).undo is None
    assert qemu_vmdk_snap.compact(top, trusted_dirs=trusted).path == Path(top)
    assert qemu_vmdk_snap.resize(top, 2 << 20, trusted_dirs=trusted).after == 2 << 20
    assert qemu_vmdk_snap.rebase(top, None, trusted_dirs=trusted).parent is None
