"""A student's folder: a copy of the package in which one lab is blank, and what was passed so far.

    refinfer-labs/
        README.md
        lab.json        which lab is open, which were passed, how many hints were read
        refinfer/       the package; labs that nobody has come to yet are solved in it, except in the same file
        yours/          solutions that were there before a reset
        weight-cache/   packed weights of `refinfer lab run`

Writes and reads this folder. Leaves to others: what is right (`check`), what is printed (`cli.lab`).
Read more: tutorial 00; clauses LAB-5 to LAB-8.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from difflib import SequenceMatcher, unified_diff
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any, Final, Self

from refinfer import __version__
from refinfer.errors import LabError
from refinfer.labs.catalogue import PACKAGE, Lab, Place, lab_of, labs, places
from refinfer.labs.regions import Region, blank, is_blank, outside, regions_of, replaced
from refinfer.whole_file import read_json, read_whole

__all__ = ["DEFAULT_FOLDER", "State", "Workspace", "all_labs", "copy_folder", "copy_package"]

DEFAULT_FOLDER: Final = "refinfer-labs"
_STATE: Final = "lab.json"
_LARGEST_STATE_BYTES: Final = 100_000
_LARGEST_MODULE_BYTES: Final = 1_000_000

_README: Final = """\
# A course cut out of refinfer

`refinfer/` is a copy of the package. In it, one lab is blank: a function, or a part of one, that raises
`NotImplementedError`. Write it, between the two comments `# lab NN: ...` and `# end lab`; all else stays as it is. Then
the next lab opens, and your own code runs in it.

    refinfer lab             what to do next
    refinfer lab check       does it hold? --watch checks whenever you save
    refinfer lab run         text from the model, written with your code; its packed weights are in weight-cache/
    refinfer lab hint        one hint at a time, three in all
    refinfer lab list        all labs
    refinfer lab reset 4     make lab 4 blank again, and go on there; yours is kept in yours/
    refinfer lab solution    the difference to ours, once the lab is passed or given up

Only what stands between the two comments is checked. A helper or an import that you need goes between them too.
"""


@dataclass(slots=True)
class State:
    """What a workspace remembers: `course` are the labs it leads through, `current` the open one, None at the end."""

    course: list[str]
    current: str | None
    passed: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    hints: dict[str, int] = field(default_factory=dict)
    version: str = __version__


def copy_package(folder: Path) -> None:
    """Copy the package into a folder, without the tests that a wheel carries."""
    copy_folder(PACKAGE, folder / "refinfer", without="course")


def copy_folder(source: Path, target: Path, *, without: str) -> None:
    """Copy a folder without bytecode, and without folders of one name; a copy may be written even if ours may not."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_dir() and path.name not in ("__pycache__", without):
            copy_folder(path, target / path.name, without=without)
        elif path.is_file() and path.suffix != ".pyc":
            (target / path.name).write_bytes(path.read_bytes())


class Workspace:
    """One student's folder. Only `start` makes one.

    Laws: the open lab begins blank, and with it the later ones of the same files, which would show their solutions.
    What a student has written is never lost.
    """

    def __init__(self, folder: Path, state: State) -> None:
        self.folder = folder
        self.state = state

    @classmethod
    def start(cls, folder: Path, course: Sequence[Lab]) -> Self:
        """Make a workspace that leads through some labs, with the first of them open.

        Raises:
            LabError: the folder is not empty, or cannot be written.
        """
        for above in folder.resolve().parents:
            if above == PACKAGE.resolve() or _has_state(above):
                raise LabError(f"{folder} would be inside {above}; name another folder")
        is_new = not os.path.lexists(folder)
        if not is_new and not (folder.is_dir() and not any(folder.iterdir())):
            here = "has a workspace already" if _has_state(folder) else "is not an empty folder"
            raise LabError(f"{folder} {here}; name another folder, or remove it first")
        made = cls(folder, State([lab.number for lab in course], course[0].number))
        try:
            copy_package(folder)
            _write_whole(folder / "README.md", _README)
            made.blank(course[0])
            made.save()
        except BaseException as error:
            shutil.rmtree(folder / "refinfer", ignore_errors=True)
            with contextlib.suppress(OSError):
                (folder / "README.md").unlink(missing_ok=True)
                (folder / _STATE).unlink(missing_ok=True)
                if is_new:
                    folder.rmdir()
            if isinstance(error, OSError):
                raise LabError(f"{folder} cannot be written: {error.strerror or error}") from None
            raise
        return made

    @staticmethod
    def where(folder: Path | None = None) -> Path | None:
        """Return the folder of a workspace, if there is one; None means as in `find`."""
        here = folder or Path.cwd()
        tried = [here] if folder else [here, *here.parents, here / DEFAULT_FOLDER]
        return next((each for each in tried if _has_state(each)), None)

    @classmethod
    def find(cls, folder: Path | None = None) -> Self:
        """Open the workspace in a folder; None means this one, one above it, or `refinfer-labs` in it.

        Raises:
            LabError: no workspace is there, or what it remembers cannot be read.
        """
        found = cls.where(folder)
        if found is None:
            raise LabError(f"{folder or 'this folder'} has no workspace; refinfer lab start makes one")
        path = found / _STATE
        try:
            raw: dict[str, Any] = read_json(path, _LARGEST_STATE_BYTES)
            state = State(**raw)
            named = [*state.course, *state.passed, *state.given_up, *([state.current] if state.current else [])]
            sound = bool(state.course) and all(lab_of(number).number == number for number in named)
            sound &= all(type(n) is int and n > 0 for n in state.hints.values())
        except OSError as error:
            raise LabError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, AttributeError, LabError):
            sound = False
        if not sound:
            raise LabError(f"{path} is damaged; begin a new workspace with refinfer lab start")
        return cls(found, state)

    def save(self) -> None:
        """Write what the workspace remembers.

        Raises:
            LabError: it cannot be written.
        """
        _write_whole(self.folder / _STATE, json.dumps(asdict(self.state), indent=1) + "\n")

    @property
    def current(self) -> Lab | None:
        """The open lab; None at the end of the course."""
        return lab_of(self.state.current) if self.state.current else None

    def source(self, module: str) -> str:
        """Return the student's text of a module.

        Raises:
            LabError: it is missing or not a text.
        """
        try:
            text = read_whole(self.folder / module, _LARGEST_MODULE_BYTES).decode("utf-8-sig")
        except OSError:
            raise LabError(f"{module} is missing or cannot be read; refinfer lab reset writes it again") from None
        except UnicodeDecodeError:
            raise LabError(f"{module} is not in UTF-8; save it again in this encoding") from None
        return StringIO(text, newline=None).getvalue()

    def region(self, place: Place) -> Region:
        """Return the student's text in a region.

        Raises:
            LabError: the module is missing, or the comments around its regions have changed.
        """
        wanted = [each.region.lab for each in places() if each.module == place.module]
        source = self.source(place.module)
        try:
            found = regions_of(source)
        except LabError as error:
            raise LabError(f"{place.module}: {error}") from None
        if [region.lab for region in found] != wanted:
            raise LabError(
                f"{place.module}: the comments `# lab {place.region.lab}: ...` and `# end lab` have changed; put them "
                f"back, or begin again with refinfer lab reset {place.region.lab}"
            )
        return found[place.order]

    def is_blank(self, lab: Lab) -> bool:
        """Return whether some region of a lab is not written yet, or its markers are missing."""
        try:
            return any(is_blank(self.region(place)) for place in lab.places)
        except LabError:
            return True

    def is_own(self, lab: Lab) -> bool:
        """Return whether the student has written a lab: it is not blank, and not ours."""
        return not self.is_blank(lab) and (
            lab.number in self.state.passed or any(self.region(place).text != place.region.text for place in lab.places)
        )

    def strays(self, lab: Lab) -> list[str]:
        """Return a line for each change outside the regions of a lab's modules; such changes are not taken over."""
        notes = []
        for module in dict.fromkeys(place.module for place in lab.places):
            ours, theirs = outside((PACKAGE.parent / module).read_text(encoding="utf-8")), outside(self.source(module))
            matcher = SequenceMatcher(None, [line for _, line in ours], [line for _, line in theirs], autojunk=False)
            for kind, our_first, our_end, first, end in matcher.get_opcodes():
                was = [line for _, line in ours[our_first:our_end] if line.strip()]
                now = [(n, line) for n, line in theirs[first:end] if line.strip()]
                if kind != "equal" and (was or now):
                    notes.append(_stray(module, was, now))
        return notes

    def is_begun(self, lab: Lab) -> bool:
        """Return whether a lab is or was the open one, or is not as we have written it."""
        done = lab.number in (*self.state.passed, *self.state.given_up, self.state.current)
        return done or any(self.region(place).text != place.region.text for place in lab.places)

    def blank(self, lab: Lab) -> None:
        """Make a lab blank, and the later ones of its modules that are not begun."""
        modules = {place.module for place in lab.places}
        texts = {place: blank(place.region) for place in lab.places}
        for later in labs():
            if later.number > lab.number and not self._is_done(later):
                texts |= {place: blank(place.region) for place in later.places if place.module in modules}
        self._write(lab, texts)

    def _is_done(self, lab: Lab) -> bool:
        return lab.number in (*self.state.passed, *self.state.given_up) or self.is_own(lab)

    def solve(self, lab: Lab) -> None:
        """Write our solution of a lab."""
        self._write(lab, {place: place.region.text for place in lab.places})

    def _write(self, lab: Lab, texts: dict[Place, str]) -> None:
        """Put texts into the regions of a lab; a module without its markers is written anew, with all else solved."""
        for module in dict.fromkeys(place.module for place in lab.places):
            wanted = {place.order: text for place, text in texts.items() if place.module == module}
            try:
                for place in lab.places:
                    self.region(place)
                source = self.source(module)
            except LabError:
                source = (PACKAGE.parent / module).read_text(encoding="utf-8")
            _write_whole(self.folder / module, replaced(source, wanted))

    def apply(self, lab: Lab) -> list[Path]:
        """Write our solution of a lab; return where the student's own is kept."""
        kept = self._keep(lab)
        self.solve(lab)
        return kept

    def open(self, lab: Lab) -> list[Path]:
        """Make a lab blank and the open one, as if it had not been passed; return where the student's own is kept."""
        kept = self._keep(lab)
        self.blank(lab)
        for numbers in (self.state.passed, self.state.given_up):
            if lab.number in numbers:
                numbers.remove(lab.number)
        self.state.hints.pop(lab.number, None)
        if lab.number not in self.state.course:
            self.state.course = sorted([*self.state.course, lab.number])
        self.state.current = lab.number
        self.save()
        return kept

    def _keep(self, lab: Lab) -> list[Path]:
        """Write a student's own of a lab into a file of its own; a module without its markers is kept whole."""
        texts: list[str] = []
        try:
            if self.is_own(lab):
                texts = ["\n".join(f"# {place.module}\n{self.region(place).lines}" for place in lab.places)]
            for place in lab.places:
                self.region(place)
        except LabError:
            files = dict.fromkeys(self.folder / place.module for place in lab.places)
            texts = [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]
        return [self._kept(lab, text) for text in texts]

    def _kept(self, lab: Lab, text: str) -> Path:
        names = (self.folder / "yours" / f"lab-{lab.number}-{n}.py" for n in count(1))
        path = next(path for path in names if not path.exists())
        _write_whole(path, text)
        return path

    def finish(self, lab: Lab, *, given_up: bool = False) -> Lab | None:
        """Note that a lab was passed or given up; if it was the open one, open the next one and return it."""
        done, other = self.state.passed, self.state.given_up
        if given_up:
            done, other = other, done
        if lab.number not in done:
            done.append(lab.number)
        if lab.number in other:
            other.remove(lab.number)
        following = None
        if self.state.current == lab.number:
            over = {*self.state.passed, *self.state.given_up}
            left = [number for number in self.state.course if number not in over]
            later = [number for number in left if number > lab.number]
            following = lab_of((later or left)[0]) if left else None
            self.state.current = following.number if following else None
            if following and not self.is_own(following):
                self.blank(following)
        self.save()
        return following

    def hint(self, lab: Lab) -> tuple[int, str]:
        """Return the number of the next hint, and the hint; after the last one, the last one again."""
        number = min(self.state.hints.get(lab.number, 0) + 1, len(lab.hints))
        self.state.hints[lab.number] = number
        self.save()
        return number, lab.hints[number - 1]

    def difference(self, lab: Lab) -> str:
        """Return what differs between a student's solution and ours, as a unified difference."""
        parts: list[str] = []
        for place in lab.places:
            theirs, ours = self.region(place).lines, place.region.lines
            title = f"{place.module}, lab {lab.number}"
            parts += unified_diff(
                theirs.splitlines(), ours.splitlines(), f"yours: {title}", f"ours: {title}", lineterm=""
            )
        return "\n".join(parts)

    def state_of(self, lab: Lab) -> str:
        """Return `passed`, `given up`, `open`, or `not begun`."""
        if lab.number in self.state.passed:
            return "passed"
        if lab.number in self.state.given_up:
            return "given up"
        return "open" if lab.number == self.state.current else "not begun"


def _has_state(folder: Path) -> bool:
    return os.path.isfile(folder / _STATE)  # noqa: PTH113  (also if the folder may not be searched)


def _write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all: a student's work may be in it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise LabError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def _stray(module: str, was: Sequence[str], now: Sequence[tuple[int, str]]) -> str:
    """Return the line about one change outside a region."""
    if now and any(line.lstrip().startswith(("def ", "return ", ")")) for line in was) and len(was) == len(now):
        return f"{module}, line {now[0][0]}: this line is outside the lab and stays ours: {was[0].strip()}"
    if now:
        return (
            f"{module}, line {now[0][0]}: `{now[0][1].strip()[:60]}` is outside the lab, so it is not used; "
            "put what you need between the two comments"
        )
    return f"{module}: the line `{was[0].strip()[:60]}` is missing; it is outside the lab, and is still used"


def all_labs() -> list[Lab]:
    """Return the labs that the course leads through: all but the optional ones."""
    return [lab for lab in labs() if not lab.is_optional]
