"""The numbers of the NBD protocol, and its records. Source: NetworkBlockDevice/nbd, doc/proto.md."""

from __future__ import annotations

import errno
import struct
from typing import Final

GREETING: Final = struct.Struct(">8s8sH")
NBD_MAGIC: Final = b"NBDMAGIC"
OPTION_MAGIC: Final = b"IHAVEOPT"
FIXED_NEWSTYLE: Final = 1
NO_ZEROES: Final = 2

OPTION: Final = struct.Struct(">8sII")
OPTION_REPLY: Final = struct.Struct(">QIII")
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9

OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_INFO: Final = 6
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_LIST_META_CONTEXT: Final = 9
OPT_SET_META_CONTEXT: Final = 10

REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4
REP_ERR_UNSUP: Final = 0x80000001
REP_ERR_INVALID: Final = 0x80000003
REP_ERR_UNKNOWN: Final = 0x80000006
REP_ERR_TOO_BIG: Final = 0x80000009

INFO_EXPORT: Final = 0
INFO_NAME: Final = 1
INFO_BLOCK_SIZE: Final = 3

HAS_FLAGS: Final = 1
READ_ONLY: Final = 1 << 1
SEND_FLUSH: Final = 1 << 2
SEND_FUA: Final = 1 << 3
SEND_TRIM: Final = 1 << 5
SEND_WRITE_ZEROES: Final = 1 << 6
SEND_DF: Final = 1 << 7
CAN_MULTI_CONN: Final = 1 << 8
SEND_FAST_ZERO: Final = 1 << 11

REQUEST: Final = struct.Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
REQUEST_MAGIC: Final = 0x25609513
READ: Final = 0
WRITE: Final = 1
DISCONNECT: Final = 2
FLUSH: Final = 3
TRIM: Final = 4
WRITE_ZEROES: Final = 6
BLOCK_STATUS: Final = 7

FLAG_FUA: Final = 1
FLAG_NO_HOLE: Final = 2
FLAG_DF: Final = 4
FLAG_REQ_ONE: Final = 8
FLAG_FAST_ZERO: Final = 16
ALLOWED_FLAGS: Final = {
    READ: FLAG_DF | FLAG_FUA,
    WRITE: FLAG_FUA,
    FLUSH: FLAG_FUA,
    TRIM: FLAG_FUA,
    WRITE_ZEROES: FLAG_FUA | FLAG_NO_HOLE | FLAG_FAST_ZERO,
    BLOCK_STATUS: FLAG_REQ_ONE | FLAG_FUA,
}
"""Which flags each command may have; FUA is harmless where it has no meaning."""

SIMPLE_REPLY: Final = struct.Struct(">IIQ")  # magic, error, cookie
SIMPLE_MAGIC: Final = 0x67446698
CHUNK: Final = struct.Struct(">IHHQI")  # magic, flags, type, cookie, length
DATA_CHUNK: Final = struct.Struct(">IHHQIQ")  # the same, and the offset of the data
CHUNK_MAGIC: Final = 0x668E33EF
CHUNK_DONE: Final = 1
CHUNK_NONE: Final = 0
CHUNK_DATA: Final = 1
CHUNK_STATUS: Final = 5
CHUNK_ERROR: Final = (1 << 15) + 1

STATE_HOLE: Final = 1
STATE_ZERO: Final = 2
STATE_CHANGED: Final = 1

PREFERRED_BLOCK: Final = 64 << 10
MAX_BLOCK: Final = 32 << 20

EPERM: Final = 1
EIO: Final = 5
ENOMEM: Final = 12
EINVAL: Final = 22
ENOSPC: Final = 28
ENOTSUP: Final = 95
ESHUTDOWN: Final = 108

_ERRORS: Final = {
    errno.EPERM: EPERM,
    errno.EROFS: EPERM,
    errno.EACCES: EPERM,
    errno.ENOMEM: ENOMEM,
    errno.EINVAL: EINVAL,
    errno.ENOSPC: ENOSPC,
    errno.EDQUOT: ENOSPC,
    errno.EFBIG: ENOSPC,
    errno.ENOTSUP: ENOTSUP,
}


def error_of(error: BaseException) -> int:
    """Return the error of the protocol that tells of `error`."""
    number = error.errno if isinstance(error, OSError) else None
    return EIO if number is None else _ERRORS.get(number, EIO)
