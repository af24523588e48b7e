"""What several tests of products measure scratch memory with."""

from __future__ import annotations

from refinfer.arrays import Float32Array
from refinfer.packing.product import GemmScratch


class MeasuredScratch(GemmScratch):
    """Scratch memory that records the most that was handed out at any time."""

    most = 0

    def take(self, *shape: int) -> Float32Array:
        taken = super().take(*shape)
        self.most = max(self.most, self.used)
        return taken
