"""A stream of zstd frames, unpacked bit by bit; a frame cut short is an error, not an end."""

import io
from typing import BinaryIO

from zstandard import ZstdDecompressor, ZstdError

__all__ = ["ZstdError", "ZstdReader"]

# What one byte unpacks to has hardly a bound: little at a time keeps memory bounded also for a hostile file.
_PACKED_BYTES = 1 << 13
_LARGEST_WINDOW = 1 << 31


class ZstdReader(io.RawIOBase):
    """Reads the frames of a file one after the other; raises ZstdError or EOFError where one is broken."""

    def __init__(self, packed: BinaryIO) -> None:
        self._packed = packed
        self._decompressor = ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._frame = None
        self._left = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def readinto(self, buffer) -> int:  # pyright: ignore[reportIncompatibleMethodOverride] (the stubs disagree)
        """Fill a buffer as far as there is something; return how far."""
        while not self._ready:
            packed = self._left or self._packed.read(_PACKED_BYTES)
            self._left = b""
            if not packed:
                if self._frame is not None:
                    raise EOFError("the last frame of zstd is cut short")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(packed))
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        """Close the file as well."""
        self._packed.close()
        super().close()
