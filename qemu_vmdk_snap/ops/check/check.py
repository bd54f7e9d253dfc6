"""Check an image and its backing chain, reading only: everything but the guest's own data."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from qemu_vmdk_snap.chain.parent import MAX_DEPTH, Descent, find_parent
from qemu_vmdk_snap.chain.resolver import Resolver, confined
from qemu_vmdk_snap.errors import CorruptChain, FormatError, Unsupported
from qemu_vmdk_snap.light import dataclass, replace
from qemu_vmdk_snap.ops.check.findings import Finding, Findings, GrainCounts, Severity
from qemu_vmdk_snap.ops.check.small import audit_small
from qemu_vmdk_snap.ops.progress import OnProgress, Progress, ignore
from qemu_vmdk_snap.storage.blockfile import BlockFile, FileOpener, open_posix
from qemu_vmdk_snap.storage.journal.grainlog import waiting
from qemu_vmdk_snap.storage.journal.record import pending_in
from qemu_vmdk_snap.storage.locks import lock_image
from qemu_vmdk_snap.units import SECTOR_SIZE, byte_sectors, sector_bytes
from qemu_vmdk_snap.vmdk.cowd.header import COWD_MAGIC, CowdHeader, legacy_descriptor, read_cowd_header
from qemu_vmdk_snap.vmdk.descriptor import MAX_BYTES, Descriptor, ExtentLine, is_descriptor
from qemu_vmdk_snap.vmdk.extent import ExtentSpec, open_extent
from qemu_vmdk_snap.vmdk.flat.extent import FlatExtent
from qemu_vmdk_snap.vmdk.sparse.header import (
    MAGIC,
    NEWLINE_PROBE,
    HeaderFlag,
    SparseExtentHeader,
    check_header,
    refuse_moved,
)


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check found. Counts are of grains of the images whose tables were read."""

    path: Path
    corruptions: int
    leaks: int
    findings: tuple[Finding, ...]
    """The first of each kind, worst first; the counts include all."""
    total: int
    allocated: int
    fragmented: int
    compressed: int
    end: int
    """The byte after the last part of `path` that is in use."""
    depth: int
    """Links that were checked."""
    check_errors: int = 0
    """What could not be checked: a file that cannot be opened or read, a parent that is missing or not allowed."""
    repairable: int = 0
    """Notes on values that a repair corrects, though the data is right."""

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types: the keys of `qemu-img check`, and the findings.

        As in qemu-img, `corruptions` and `leaks` are there only if they are not 0.
        """
        answer: dict[str, object] = {
            "image-end-offset": self.end,
            "total-clusters": self.total,
            "check-errors": self.check_errors,
        }
        if self.corruptions:
            answer["corruptions"] = self.corruptions
        if self.leaks:
            answer["leaks"] = self.leaks
        return answer | {
            "allocated-clusters": self.allocated,
            "fragmented-clusters": self.fragmented,
            "compressed-clusters": self.compressed,
            "filename": str(self.path),
            "format": "vmdk",
            "chain-depth": self.depth,
            "findings": [finding.as_dict() for finding in self.findings],
        }


@dataclass(slots=True)
class _Image:
    """One image as far as it can be read."""

    path: Path
    descriptor: Descriptor
    header: SparseExtentHeader | None
    """Of the extent that embeds the descriptor; None for a descriptor in a file of its own."""
    files: list[BlockFile]


def check_image(
    path: Path | str,
    *,
    trusted_dirs: Sequence[Path | str] = (),
    resolver: Resolver | None = None,
    whole_chain: bool = False,
    opener: FileOpener = open_posix,
    lock: bool = True,
    on_progress: OnProgress = ignore,
) -> CheckReport:
    """Check the tables of the image and whether the links of its chain fit; `whole_chain` checks every link's tables.

    What is broken becomes a finding; nothing is written. Parents and extents are opened beside the file that names them
    and below `trusted_dirs`; `resolver` replaces that rule.

    Raises:
        FormatError: `path` is not a VMDK image, or its descriptor cannot be read.
        Unsupported: an incompatible feature hides what the tables mean.
        LockBusy: another process writes one of the images.
        OSError: `path` cannot be read.
    """
    checker = _Checker(resolver or confined(trusted_dirs), opener, lock, on_progress)
    return checker.run(Path(path), whole_chain)


class _Checker:
    def __init__(self, resolver: Resolver, opener: FileOpener, lock: bool, on_progress: OnProgress) -> None:
        self._resolver, self._opener, self._lock, self._on_progress = resolver, opener, lock, on_progress
        self._findings = Findings()
        self._counts = GrainCounts()
        self._done = 0
        self._open_files: list[BlockFile] = []

    def run(self, path: Path, whole_chain: bool) -> CheckReport:
        try:
            return self._run(path, whole_chain)
        finally:
            for file in self._open_files:  # what was closed before stays closed
                file.close()

    def _run(self, path: Path, whole_chain: bool) -> CheckReport:
        image = self._open(path)
        self._note_pending(path)
        end = self._check_one(image, deep=True)
        depth = self._follow(image, whole_chain)
        worst = sorted(self._findings.listed, key=lambda finding: list(Severity).index(finding.severity))
        return CheckReport(
            path,
            self._findings.count(Severity.CORRUPTION),
            self._findings.count(Severity.LEAK),
            tuple(worst),
            self._counts.total,
            self._counts.allocated,
            self._counts.fragmented,
            self._counts.compressed,
            end,
            depth,
            self._findings.count(Severity.ERROR),
            self._findings.repairable,
        )

    def _note_pending(self, path: Path) -> None:
        if (left := waiting(path)) is not None:
            left.close()
            rule = f"must be followed by `recover {path}`, which names the grains that it has acknowledged"
            self._findings.add(Severity.NOTE, path, 0, "server", "killed", rule)
        with contextlib.suppress(CorruptChain):  # another user's record does not apply to this image
            for pending in pending_in(path.parent):
                if pending.involves(path):
                    rule = f"must be finished: run `recover {path.parent}`"
                    name = pending.operation.name if pending.operation is not None else "unreadable"
                    self._findings.add(Severity.NOTE, path, 0, "interrupted operation", name, rule)

    def _follow(self, image: _Image, whole_chain: bool) -> int:
        """Check each parent and how it fits the link above; return how many links there are."""
        descent, depth = Descent(), 1
        descent.step(image.path)
        while (parent := self._parent_of(image)) is not None:
            obstacle = descent.obstacle(parent)
            if obstacle == "loop":
                self._bad_hint(image, "must not lead to a link of the chain again")
                break
            if obstacle == "depth":
                self._bad_hint(image, f"must end within {MAX_DEPTH} links", Severity.ERROR)
                break
            depth += 1
            try:
                below = self._open(parent)
            except FormatError as error:
                self._findings.broken(error)
                break
            except (Unsupported, OSError) as error:
                self._bad_hint(image, f"must name an image that can be read: {_reason(error)}", Severity.ERROR)
                break
            try:
                self._check_one(below, deep=whole_chain)
            except Unsupported as error:
                self._bad_hint(image, f"must name an image that can be read: {error}", Severity.ERROR)
                break
            self._check_fit(image, below)
            image = below
        return depth

    def _parent_of(self, image: _Image) -> Path | None:
        descriptor = image.descriptor
        try:
            return find_parent(descriptor, self._resolver)
        except FormatError:
            return None  # noted when the descriptor was checked
        except CorruptChain as error:
            if descriptor.parent_hint is not None:
                self._bad_hint(image, f"must name an image that may be opened: {error.reason}", Severity.ERROR)
                return None
            at = descriptor.offset_of("parentCID")
            rule = "must be ffffffff, or parentFileNameHint must name the parent"
            self._findings.corrupt(image.path, at, "parentCID", f"{descriptor.parent_cid:08x}", rule)
            return None

    def _bad_hint(self, image: _Image, rule: str, severity: Severity = Severity.CORRUPTION) -> None:
        descriptor = image.descriptor
        at = descriptor.offset_of("parentFileNameHint")
        self._findings.add(severity, image.path, at, "parentFileNameHint", descriptor.parent_hint, rule)

    def _check_fit(self, image: _Image, parent: _Image) -> None:
        mine, theirs = image.descriptor, parent.descriptor
        try:
            parent_cid, cid = mine.parent_cid, theirs.cid
        except FormatError:
            return  # noted when the descriptor was checked
        if parent_cid != cid:
            rule = f"must be the CID {cid:08x} of {parent.path}: the parent was modified after the overlay was made"
            rule += " (`image check -r all --relink-cids` trusts it as it is)"
            self._findings.corrupt(image.path, mine.offset_of("parentCID"), "parentCID", f"{parent_cid:08x}", rule)
        if mine.sectors != theirs.sectors:
            at = mine.extents[0].at if mine.extents else mine.base
            rule = f"must be the {theirs.sectors} sectors of the parent {parent.path}, for VMware's tools"
            larger = mine.sectors > theirs.sectors
            rule += " (QEMU reads zeros past the parent's end)" if larger else " (QEMU makes smaller overlays, too)"
            severity = Severity.NOTE if larger else Severity.ERROR
            self._findings.add(severity, image.path, at, "capacity", mine.sectors, rule)

    def _open(self, path: Path) -> _Image:
        """Read the descriptor of `path`; faults that a check can work with become findings."""
        file = self._opened(path)
        try:
            return self._read_image(file)
        except BaseException:
            file.close()
            raise

    def _read_image(self, file: BlockFile) -> _Image:
        path, head = file.path, file.read_at(0, SECTOR_SIZE)
        if is_descriptor(head):
            raw = file.read_at(0, min(file.size(), MAX_BYTES))
            return _Image(path, Descriptor.parse(raw, path=path), None, [file])
        if head[:4] == COWD_MAGIC:
            return _Image(path, legacy_descriptor(read_cowd_header(file, path), path), None, [file])
        if head[:4] != MAGIC:
            raise FormatError(path, 0, "magic", head[:4], "must be b'KDMV', or the text '# Disk DescriptorFile'")
        header = self._read_header(file)
        if not header.descriptor_offset:
            raise Unsupported(path, "has no descriptor: it is an extent; check the descriptor file that names it")
        base = sector_bytes(header.descriptor_offset)
        raw = file.read_at(base, min(sector_bytes(header.descriptor_size), MAX_BYTES))
        return _Image(path, Descriptor.parse(raw, path=path, base=base), header if header.is_extent else None, [file])

    def _opened(self, path: Path) -> BlockFile:
        file = self._opener(path, False)
        descriptor = file.fileno()
        if self._lock and descriptor is not None:
            try:
                lock_image(descriptor, path, writable=False)
            except BaseException:
                file.close()
                raise
        self._open_files.append(file)
        return file

    def _read_header(self, file: BlockFile) -> SparseExtentHeader:
        """Return the header; raises FormatError if no table can be found."""
        path = file.path
        header = SparseExtentHeader.parse(file.read_at(0, SECTOR_SIZE), path=path)
        if header.flags & HeaderFlag.NEWLINE_TEST and header.newline_probe != NEWLINE_PROBE:
            rule = "must be b'\\n \\r\\n': the file was damaged by a text-mode transfer"
            at = header.offset_of("newline_probe")
            self._findings.corrupt(path, at, "newline_probe", header.newline_probe, rule)
            header = replace(header, newline_probe=NEWLINE_PROBE)
        if header.unclean_shutdown:
            at, rule = header.offset_of("unclean_shutdown"), "must be 0: a writer did not close the image"
            self._findings.corrupt(path, at, "unclean_shutdown", header.unclean_shutdown, rule)
        try:
            check_header(header, path, file.size())
        except FormatError as error:
            check_header(header, path, file.size(), tolerant=True)  # raises where neither directory is in the file
            self._findings.broken(error)
            good = header.rgd_offset if error.field == "gd_offset" else header.gd_offset
            header = replace(header, gd_offset=good, rgd_offset=0)
        return header

    def _check_one(self, image: _Image, *, deep: bool) -> int:
        """Check the descriptor and, if `deep`, the tables of every extent; return where the image's own file ends."""
        try:
            self._check_descriptor(image)
            return self._check_extents(image) if deep else 0
        finally:
            for file in image.files:
                file.close()

    def _check_descriptor(self, image: _Image) -> None:
        descriptor = image.descriptor
        for key in ("cid", "parent_cid", "create_type"):
            try:
                getattr(descriptor, key)
            except FormatError as error:
                self._findings.broken(error)
        if not descriptor.sectors:
            rule = "must give the disk at least one sector"
            self._findings.corrupt(image.path, descriptor.base, "extents", len(descriptor.extents), rule)
        # A ddb.longContentID that differs is not a fault: QEMU changes only the CID.

    def _check_extents(self, image: _Image) -> int:
        if image.header is not None:
            self._check_embedding(image, image.header)
        total = sector_bytes(image.descriptor.sectors)
        end = image.files[0].size()
        self._done = 0
        for line in image.descriptor.extents:
            try:
                extent_end = self._check_extent(image, line, total)
            except FormatError as error:
                self._findings.broken(error)
                continue
            except OSError as error:
                rule = f"must be readable: {_reason(error)}"
                self._findings.unchecked(image.path, line.at, "extent", line.file, rule)
                continue
            if image.header is not None and extent_end is not None:
                end = extent_end
        return end

    def _check_embedding(self, image: _Image, header: SparseExtentHeader) -> None:
        descriptor = image.descriptor
        lines = descriptor.extents
        if len(lines) > 1:
            rule = "must be the only extent of an embedded descriptor"
            self._findings.corrupt(image.path, lines[1].at, "extent", lines[1].file, rule)
        stream = (descriptor.get("createType") or "").lower() == "streamoptimized"
        if stream != header.compressed:
            rule = "must be streamOptimized exactly where the header's flags say that grains are compressed"
            at = descriptor.offset_of("createType")
            self._findings.corrupt(image.path, at, "createType", descriptor.get("createType"), rule)

    def _check_extent(self, image: _Image, line: ExtentLine, total: int) -> int | None:
        """Check one extent; return where its file ends, if its tables show it."""
        if line.file is None or line.access == "NOACCESS":
            self._advance(sector_bytes(line.sectors), total)
            return None
        header, file = image.header, image.files[0]
        if header is None:
            try:
                path = self._resolver(image.path, line.file, "extent")
                file = self._opened(path)
            except (CorruptChain, OSError) as error:
                rule = f"must name a file that can be opened: {_reason(error)}"
                self._findings.unchecked(image.path, line.at, "extent", line.file, rule)
                return None
            image.files.append(file)
            cowd = file.read_at(0, 4) == COWD_MAGIC  # which may have the type SPARSE too
            if cowd and line.type in ("SPARSE", "VMFSSPARSE"):
                return self._check_cowd(line, file, total)
            header = self._read_header(file) if line.type == "SPARSE" else None
        if line.type in ("FLAT", "VMFS"):
            self._check_length(image, line, file)
        if header is None or header.compressed or header.flags & HeaderFlag.MARKERS:
            return self._resolve_all(line, file, total)
        if header.capacity != line.sectors:
            rule = f"must be the {line.sectors} sectors that the descriptor gives the extent"
            self._findings.corrupt(file.path, header.offset_of("capacity"), "capacity", header.capacity, rule)
        refuse_moved(header, file)
        return self._audit(file, header, total)

    def _check_length(self, image: _Image, line: ExtentLine, file: BlockFile) -> None:
        start = line.offset if line.type == "FLAT" else 0
        needed, size = sector_bytes(start + line.sectors), file.size()
        if size < needed:
            rule = f"must be at least {needed}, for the extent of {image.path}: the file was cut short"
            self._findings.corrupt(file.path, size, "length", size, rule)

    def _check_cowd(self, line: ExtentLine, file: BlockFile, total: int) -> int:
        header = read_cowd_header(file, file.path)
        if header.capacity < line.sectors:
            rule = f"must be at least the {line.sectors} sectors that the descriptor gives the extent"
            self._findings.corrupt(file.path, header.offset_of("capacity"), "capacity", header.capacity, rule)
        end = self._audit(file, header, total)
        used = byte_sectors(end)
        if used - header.free_sector >= header.grain_size:
            # QEMU appends grains and does not update it: every reader, QEMU and our writer use the end of the file.
            rule = f"must be past everything in use, at sector {used}, before ESXi writes to the extent"
            items = [(header.offset_of("free_sector"), header.free_sector, rule)]
            self._findings.repairable_many(file.path, "free_sector", items, 1)
        return end

    def _audit(self, file: BlockFile, header: SparseExtentHeader | CowdHeader, total: int) -> int:
        """Check the tables of an extent and return where its file ends."""
        unit = sector_bytes(header.grain_size)
        small = None if isinstance(header, CowdHeader) else audit_small(file, header)
        if small is not None:
            self._counts.add(small.counts)
            self._advance(small.counts.total * unit, total)
            return small.end
        from qemu_vmdk_snap.ops.check.tables import audit_tables

        audit = audit_tables(file, header, self._findings, lambda grains: self._advance(grains * unit, total))
        self._counts.add(audit.counts)
        return audit.end

    def _resolve_all(self, line: ExtentLine, file: BlockFile, total: int) -> int | None:
        """Check a kind without redundant tables by reading all of it."""
        extent = open_extent(ExtentSpec(line, file.path, file, False))
        if isinstance(extent, FlatExtent):  # without tables
            self._advance(extent.capacity, total)
            return None
        from qemu_vmdk_snap.ops.check.runs import audit_runs

        self._counts.add(audit_runs(extent, file, self._findings, lambda length: self._advance(length, total)))
        return None

    def _advance(self, length: int, total: int) -> None:
        self._done = min(total, self._done + length)
        self._on_progress(Progress("check", self._done, total))


def _reason(error: Exception) -> str:
    """Return the reason of an error, without the name that the finding has already."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return error.reason if isinstance(error, CorruptChain) else str(error)
