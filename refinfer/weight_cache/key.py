"""What identifies a packed buffer: everything that decides its bytes, and nothing else.

Knows: the fields of a pack identifier. Does not know: how anything is packed (`packers`), where buffers are kept.
Spec: KEY-1 to KEY-3. Tutorial: 04.

XNNPACK's identifier is `seed = N ^ K ^ nr ^ kr ^ sr ^ ...`, so that a matrix and its transpose share one, and the
tensor's number in the model file, so that another model's tensor has it too. Here every field is kept and compared,
and a tensor is named by the content of the file it comes from.
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

    So a look-up reads no weight, and a changed file changes every key made from it.

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

    `packer` is one of `packers.PACKERS`; `shape` is the tensor's, `(N, K)` for a matrix; `tile` its tile shape.
    `flags` and `bias` belong to packers that have variants or put biases into tiles; the engine's do not.

    Raises:
        PackingError: sizes below one, or beyond any memory.
    """

    packer: str
    shape: tuple[int, ...]
    format: str
    tile: TileShape
    weights: WeightId
    bias: WeightId | None = None
    flags: int = 0

    def __post_init__(self) -> None:
        if not self.shape or not all(1 <= size <= _LARGEST_SIZE for size in self.shape):
            raise PackingError(f"a tensor of shape {list(self.shape)} cannot be packed")
        require_name(self.packer)
        require_name(self.format)
        if not all(0 <= n < 1 << 32 for n in (self.flags, self.tile.nr, self.tile.kr, self.tile.sr)):
            raise PackingError(f"flags and tile sizes must be numbers of 32 bits, not {self.flags} and {self.tile}")

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.weights.name


# --8<-- [end:key]
