"""What identifies a packed buffer (a tensor's packed bytes): everything that decides these bytes, and nothing else.

Defines the fields of a pack identifier, the key under which the weight cache keeps a buffer for the next start. Leaves
to others: how a tensor is packed (`packers`), where buffers are kept (`memory`, `file`).
Read more: tutorial 04; clauses KEY-1 to KEY-3.

XNNPACK's identifier has two parts. The seed, `N ^ K ^ nr ^ kr ^ sr ^ ...`, is the same for a matrix and its transpose.
The tensor's number in the model file can be the same in another model. Here every field is kept and compared, and a
tensor is identified by its name and the content of its file.
"""

from __future__ import annotations

from dataclasses import dataclass

from refinfer.errors import PackingError
from refinfer.packing.layout import TileShape

__all__ = ["DIGEST_BYTES", "PackKey", "WeightId", "require_name"]

DIGEST_BYTES = 32
_LARGEST_SIZE = 1 << 48
_LONGEST_NAME = 65_535


def require_name(name: str) -> None:
    """Check that a name can be written to a file and read back.

    Raises:
        PackingError: UTF-8 cannot express it, or it takes more than 65,535 bytes.
    """
    try:
        nbytes = len(name.encode())
    except UnicodeEncodeError:
        nbytes = _LONGEST_NAME + 1
    if nbytes > _LONGEST_NAME:
        raise PackingError(f"a name must be text of at most {_LONGEST_NAME} bytes in UTF-8, not {name[:40]!r}")


@dataclass(frozen=True, slots=True)
class WeightId:
    """Which tensor: the SHA-256 of the file that holds it, and its name there.

    A look-up therefore reads no weight, and every key changes when its file does.

    Raises:
        PackingError: the digest does not have 32 bytes.
    """

    source: bytes
    name: str

    def __post_init__(self) -> None:
        if len(self.source) != DIGEST_BYTES:
            raise PackingError(f"a weight is identified by a digest of {DIGEST_BYTES} bytes, not {len(self.source)}")
        require_name(self.name)


# --8<-- [start:key]
@dataclass(frozen=True, slots=True)
class PackKey:
    """The pack identifier: which packer made which tensor into which layout.

    `packer` is "goi" for a matrix cut into tiles (XNNPACK's word), "rows" for a table of single rows, or "vectors".
    `shape` is the tensor's, `(N, K)` for a matrix. `tile` is its tile shape, and `chunk_nbytes` the aim that its chunks
    were cut for.

    Raises:
        PackingError: a size is below one, or larger than any memory.
    """

    packer: str
    shape: tuple[int, ...]
    format: str
    tile: TileShape
    chunk_nbytes: int
    weights: WeightId

    def __post_init__(self) -> None:
        if not self.shape or not all(1 <= size <= _LARGEST_SIZE for size in self.shape):
            raise PackingError(f"a tensor of shape {list(self.shape)} cannot be packed")
        require_name(self.packer)
        require_name(self.format)
        for what, n in {"nr": self.tile.nr, "kr": self.tile.kr, "sr": self.tile.sr, "aim": self.chunk_nbytes}.items():
            if not 1 <= n < 1 << 32:
                raise PackingError(f"{self.name!r}: the {what} must be a number of 32 bits above zero, not {n}")

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.weights.name


# --8<-- [end:key]
