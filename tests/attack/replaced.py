"""A module whose source is another than its file's, for a process that imports it.

Leaves to others: what is changed in the source (`mutations`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType


class MutantFinder(SourceFileLoader):
    """Finds one module, and gives it another source than its file has."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self._source = source

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        """Find the module if it is the one, and the package it is looked for in is no copy of ours."""
        file = Path(self.path)
        folder = file.parent.parent if file.name == "__init__.py" else file.parent
        if name != self.name or (path is not None and folder not in (Path(place).resolve() for place in path)):
            return None
        return spec_from_file_location(name, self.path, loader=self)

    def get_code(self, fullname: str) -> CodeType:
        """Compile the source; code that was compiled before is not used."""
        return compile(self._source, self.path, "exec", dont_inherit=True)


def replace_source(name: str, path: str, source: str) -> None:
    """Have this process import a module with that source."""
    sys.meta_path.insert(0, MutantFinder(name, path, source))
