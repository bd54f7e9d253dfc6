"""The reader of records: whatever a file holds, it gives a record or one DomainError, soon and with little memory."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qemu_vmdk_snap import DomainError
from qemu_vmdk_snap.domain.journal.fields import read
from qemu_vmdk_snap.domain.journal.record import Intent, IntentStore, Overlay

UUID = "00000000-1111-2222-3333-444444444444"
WHOLE = Intent(
    uuid=UUID,
    domain="d",
    snapshot="größer",
    overlays=(Overlay("vda", "/img/a-1.vmdk", "/img/a.vmdk", (1, 2)), Overlay("vdb", "/img/b-1.vmdk", "/img/b.vmdk")),
    old_xml="<domain/>",
    new_xml="<domain/>",
    snapshot_xml="<domainsnapshot/>",
    live=True,
    operation="delete",
    current="s0",
    discard=("/img/c.vmdk",),
    discard_inodes=(7,),
    work=({"target": "vda", "mode": "merge"},),
    snapshots=(("s2", "<domainsnapshot/>"),),
)
RECORD: dict[str, Any] = {"version": 1, **asdict(WHOLE)}
KEPT = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800") | st.just("<a"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def attempt(folder: Path, data: bytes) -> Intent | None:
    store = IntentStore(folder, "system")
    store.path(UUID).write_bytes(data)
    try:
        return store.read(UUID)
    except DomainError as error:
        said = str(error)
    assert str(store.path(UUID)) in said
    assert "\n" not in said
    return None


def test_a_whole_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    IntentStore(tmp_path, "system").write(WHOLE)
    assert IntentStore(tmp_path, "system").read(UUID) == WHOLE


def test_every_field_has_a_kind_that_the_reader_knows() -> None:
    plain = json.loads(json.dumps(asdict(WHOLE)))
    assert {field.name for field in fields(Intent)} == set(plain)
    assert read(Intent, plain, parts={"Overlay": Overlay}) == WHOLE


@given(data=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
@KEPT
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    assert attempt(tmp_path, data) is None


@given(name=st.sampled_from(sorted(RECORD)), value=json_values)
@KEPT
def test_any_value_of_any_field(tmp_path: Path, name: str, value: object) -> None:
    found = attempt(tmp_path, json.dumps({**RECORD, name: value}).encode())
    if found is not None:
        assert found.uuid == UUID
        IntentStore(tmp_path, "system").write(found)  # what is read can be written, XML and all
        assert IntentStore(tmp_path, "system").read(UUID) == found


@given(name=st.sampled_from(["target", "path", "frozen", "identity", "more"]), value=json_values)
@KEPT
def test_any_value_inside_an_overlay(tmp_path: Path, name: str, value: object) -> None:
    overlay = {**RECORD["overlays"][0], name: value}
    found = attempt(tmp_path, json.dumps({**RECORD, "overlays": [overlay]}).encode())
    assert found is None or name != "more"


@given(data=st.data())
@KEPT
def test_flipped_and_missing_bytes(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(json.dumps(RECORD).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    attempt(tmp_path, bytes(whole))
    assert attempt(tmp_path, bytes(whole[: cut - 1 if cut else 0])) is None


@pytest.mark.parametrize("name", sorted(set(RECORD) - {"version"}))
def test_a_missing_field_that_has_no_default_is_named(tmp_path: Path, name: str) -> None:
    store = IntentStore(tmp_path, "system")
    store.path(UUID).write_text(json.dumps({key: value for key, value in RECORD.items() if key != name}))
    if name in ("uuid", "domain", "snapshot", "overlays", "old_xml", "new_xml", "snapshot_xml"):
        with pytest.raises(DomainError, match=rf"is damaged: the field '{name}' is missing"):
            store.read(UUID)
    else:
        assert store.read(UUID) is not None


@pytest.mark.parametrize("data", [b"[" * 2_000_000, b'{"version": ' + b"9" * 100_000 + b"}"], ids=["nested", "digits"])
def test_what_would_exhaust_a_parser_is_one_line(tmp_path: Path, data: bytes) -> None:
    assert attempt(tmp_path, data) is None


def test_an_endless_record_is_not_read(tmp_path: Path) -> None:
    store = IntentStore(tmp_path, "system")
    with store.path(UUID).open("wb") as file:
        file.truncate(1 << 40)
    tracemalloc.start()
    try:
        with pytest.raises(DomainError, match="is larger than 67108864 bytes"):
            store.read(UUID)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_the_record_of_another_domain_is_refused(tmp_path: Path) -> None:
    store = IntentStore(tmp_path, "system")
    store.path("u-2").write_text(json.dumps(RECORD))
    with pytest.raises(DomainError, match=rf"is damaged: it is of domain '{UUID}'"):
        store.read("u-2")


@pytest.mark.parametrize("text", ["\ud800", "a\0b"])
@pytest.mark.parametrize("name", ["snapshot", "domain", "new_xml", "current"])
def test_what_no_file_and_no_libvirt_could_be_given_is_no_text(tmp_path: Path, name: str, text: str) -> None:
    assert attempt(tmp_path, json.dumps({**RECORD, name: text}).encode()) is None
