"""Making a new streamOptimized extent: it is empty until its writer has run, from start to end."""

from __future__ import annotations

from collections.abc import Callable

from qemu_vmdk_snap.light import TYPE_CHECKING, dataclass
from qemu_vmdk_snap.storage.blockfile import BlockFile
from qemu_vmdk_snap.units import sector_bytes
from qemu_vmdk_snap.vmdk.grain.new_extent import Wanted

if TYPE_CHECKING:
    from qemu_vmdk_snap.vmdk.grain.bulk import BulkWriter


@dataclass(frozen=True, slots=True)
class StreamLayout:
    """A planned stream."""

    wanted: Wanted

    @property
    def grain_bytes(self) -> int:
        """Bytes of a grain before it is deflated."""
        return sector_bytes(self.wanted.grain_sectors)

    @property
    def fixed_bytes(self) -> int:
        """0: the size depends on the data."""
        return 0

    def create(self, file: BlockFile) -> None:
        """Do nothing: the writer begins with the header."""

    def writer(self, file: BlockFile) -> BulkWriter:
        """Return the writer of the stream into the empty file."""
        position = 0

        def append(data: bytes) -> None:
            nonlocal position
            file.write_at(position, data)
            position += len(data)

        return self.stream(append)

    def stream(self, write: Callable[[bytes], object]) -> BulkWriter:
        """Return a writer that passes the bytes of the stream, in order, to `write`."""
        from qemu_vmdk_snap.vmdk.stream.writer import BulkStream, StreamWriter  # NumPy and libdeflate: only to fill it

        wanted = self.wanted
        text = wanted.descriptor or b""
        return BulkStream(StreamWriter(write, wanted.sectors, text, wanted.path, grain_sectors=wanted.grain_sectors))


def plan_extent(wanted: Wanted) -> StreamLayout:
    """Return the layout of a stream."""
    return StreamLayout(wanted)
