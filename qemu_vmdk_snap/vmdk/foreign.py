"""Files that are not VMDK: what they are by their first bytes, and what to do with them instead.

Sources: the formats' own specifications; QEMU's block/*.c for the disk formats. The head of VMware's change-tracking
file is not documented: such a file is recognised by its name, and by the descriptor that names it.
"""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.light import Final

HEAD_BYTES: Final = 1024
"""What `kind_of` looks at."""

_CONVERT: Final = "convert it with `qemu-img convert -O vmdk`"
_UNPACK: Final = "unpack it and open the .vmdk inside"

_MAGIC: Final[tuple[tuple[int, bytes, str], ...]] = (
    (257, b"ustar", "a tar archive (an OVA is one): unpack it (tar xf) and open the .vmdk inside"),
    (0, b"\x1f\x8b", "a gzip file: unpack it (gunzip) and open what is inside"),
    (0, b"PK\x03\x04", f"a zip archive: {_UNPACK}"),
    (0, b"BZh", "a bzip2 file: unpack it (bunzip2) and open what is inside"),
    (0, b"\xfd7zXZ\0", "an xz file: unpack it (unxz) and open what is inside"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file: unpack it (unzstd) and open what is inside"),
    (0, b"7z\xbc\xaf\x27\x1c", f"a 7z archive: {_UNPACK}"),
    (0, b"QFI\xfb", f"a qcow2 image: {_CONVERT}"),
    (0, b"QED\0", f"a QED image: {_CONVERT}"),
    (0, b"conectix", f"a VHD image (vpc): {_CONVERT}"),
    (0, b"vhdxfile", f"a VHDX image: {_CONVERT}"),
    (64, b"\x7f\x10\xda\xbe", f"a VDI image of VirtualBox: {_CONVERT}"),
    (0, b"<<< ", f"a disk image of VirtualBox (VDI): {_CONVERT}"),
    (0, b"LUKS\xba\xbe", "a LUKS volume: it is opened with cryptsetup"),
    (0, b"\x7fELF", "a program (ELF)"),
    (0, b"COWD", "a COWD extent"),
    (0, b"KDMV", "a hosted sparse extent of VMDK"),
    (0, b"\xbe\xba\xfe\xca\0\0\0\0", "a seSparse extent of VMDK"),
)
_TEXTS: Final[tuple[tuple[bytes, str], ...]] = (
    (b"<envelope", "an OVF description: open the .vmdk that it names"),
    (b"<?xml", "an XML file"),
    (b"disk.enabled", "a text file"),
    (b".encoding", "a dictionary of VMware (.vmx or .vmsd): open a .vmdk that it names"),
)
_RAW: Final = "it may be a raw image (-f raw, where the command takes it)"


def kind_of(head: bytes, name: str = "", tail: bytes = b"") -> str | None:
    """Return what a file that begins with `head` is, with a hint what to do; None if it is unknown.

    `name` is its name, `tail` its last 512 bytes if they were read.
    """
    if not head:
        return "an empty file"
    for offset, magic, words in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return words
    if tail.startswith(b"conectix"):
        return f"a VHD image (vpc) of fixed size: {_CONVERT}"
    if Path(name).stem.lower().endswith("-ctk") or head[:4] == b"\xa2\x72\x19\xf6":
        return "a change-tracking file of VMware (-ctk.vmdk): it holds no data of the disk"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for start, words in _TEXTS:
        if text.startswith(start):
            return words
    if head[510:512] == b"\x55\xaa" or head[512:520] == b"EFI PART":
        return f"the bytes of a disk themselves (it has a partition table or boot sector): {_RAW}"
    return None
