"""What a person names as `package:name`: imported with the current folder first on the path, as `python -m` does.

Leaves to others: what the thing is for; the tests that anybody can run on their own classes import by this too.
Read more: tutorial 09; clause CLI-28.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from refinfer.errors import RequestError
from refinfer.units import shown

__all__ = ["imported"]


def imported(name: str) -> Any:  # noqa: ANN401  (whatever the module has)
    """Return what `package:name` names; a dot leads on, as in `package.module:Class.method`.

    Raises:
        RequestError: the name has another form, the module cannot be imported, or does not have it.
    """
    module, colon, path = name.partition(":")
    if not (module and colon and path):
        raise RequestError(f"{shown(name)} is not of the form package:name, such as mine:name for a file mine.py")
    if "/" in module:
        raise RequestError(f"{shown(name)} names a path; write {Path(module).stem}:{path}, in the folder of the file")
    try:
        here = str(Path.cwd())
        if sys.path[:1] != [here]:
            sys.path.insert(0, here)
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        hint = f"write {module[:-3]}, without .py" if module.endswith(".py") else f"neither in {here} nor installed"
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):  # it is there, and lacks another
            hint = f"{module} itself needs it"
        raise RequestError(f"{name}: there is no module {shown(error.name or module)}; {hint}") from None
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {shown(str(error))}"
        raise RequestError(f"{name}: importing {module} raised {what}; mend the module first") from error
    for attribute in path.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError:
            raise RequestError(f"{name}: {getattr(found, '__name__', module)} has no {shown(attribute)}") from None
    return found
