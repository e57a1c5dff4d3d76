"""One tensor's bytes into a GGUF, where a full disk says so."""

from __future__ import annotations

import errno
import os

from gguf import GGUFWriter

from lowvram.export.gguf_types import Bytes


def write_bytes(writer: GGUFWriter, data: Bytes) -> None:
    """numpy tells of a short write without saying that the disk is full.

    Raises:
        OSError: the disk is full, or the system lets the file grow no further.
    """
    try:
        writer.write_tensor_data(data)
    except OSError as error:
        if error.errno is not None:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
