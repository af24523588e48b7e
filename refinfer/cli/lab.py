"""The command `lab`: a course in which students rewrite parts of this package.

Prints what to do next, and what a check found. Leaves to others: workspaces and checking (`labs`).
Read more: tutorial 00; clauses LAB-15 to LAB-19.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from refinfer.cli.options import add_json, seconds
from refinfer.cli.table import print_table
from refinfer.cli.terminal import PIPE_COLUMNS, columns_of, say, words_of, wrap
from refinfer.clock import RealClock
from refinfer.errors import LabError
from refinfer.labs.catalogue import PACKAGE, Lab, lab_of, labs
from refinfer.labs.check import Failure, Limits, Verdict, check, require_pytest
from refinfer.labs.run import generate, own_labs
from refinfer.labs.workspace import DEFAULT_FOLDER, Workspace, all_labs

__all__ = ["ACTIONS", "add_lab", "run_lab"]

_LOOK_S: Final = 0.3
_WIDEST: Final = 100


def add_lab(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `refinfer lab`, each with its options."""
    parser.set_defaults(run=run_lab)
    actions = parser.add_subparsers(metavar="ACTION", dest="action", title="actions (default: say what to do next)")
    for name, (_, text) in ACTIONS.items():
        action = actions.add_parser(name, help=text, description=text)
        if name == "reset":
            action.add_argument("lab", metavar="N", help="number of the lab")
        elif name in ("check", "hint", "solution"):
            action.add_argument("lab", metavar="N", nargs="?", help="number of the lab (default: the open one)")
        if name not in ("start", "grade"):
            action.add_argument(
                "--dir",
                metavar="DIR",
                type=Path,
                help=f"the workspace (default: this folder, one above it, or {DEFAULT_FOLDER} in it)",
            )
        if name in _OPTIONS:
            _OPTIONS[name](action)


def _start_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "dir", metavar="DIR", nargs="?", type=Path, default=Path(DEFAULT_FOLDER),
        help=f"a new or empty folder (default: {DEFAULT_FOLDER})",
    )  # fmt: skip
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--only", metavar="N", help="this lab alone")
    group.add_argument("--at", metavar="N", help="begin at this lab; the ones before it are solved")


def _check_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--watch", action="store_true", help="check again whenever a file of the lab is saved")
    parser.add_argument(
        "--reference-before", action="store_true", help="take our solutions of the earlier labs instead of your own"
    )
    _add_seconds(parser)
    add_json(parser)


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="?", default="ROMEO:", help="text to continue (default: ROMEO:)"
    )


def _grade_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dirs", metavar="DIR", nargs="+", type=Path, help="the workspaces of students")
    parser.add_argument("--tests", metavar="DIR", type=Path, help="a folder of tests to take instead of ours")
    _add_seconds(parser)
    add_json(parser, "print a list of JSON objects")


def _add_seconds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seconds", metavar="S", type=seconds, default=Limits().seconds,
        help=f"how long the tests of a lab may take (default: {Limits().seconds:g})",
    )  # fmt: skip


def _solution_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--give-up", action="store_true", help="show it although the lab is not passed")
    parser.add_argument("--apply", action="store_true", help="write it into the workspace, and go on")


_OPTIONS: Final[dict[str, Callable[[argparse.ArgumentParser], None]]] = {
    "start": _start_options,
    "check": _check_options,
    "run": _run_options,
    "list": lambda parser: add_json(parser, "print a list of JSON objects"),
    "grade": _grade_options,
    "solution": _solution_options,
}


def run_lab(args: argparse.Namespace) -> int | None:
    """Run `refinfer lab ACTION`; return 1 if a lab was checked and has not passed.

    Raises:
        LabError: there is no such workspace or lab, or this is the copy in a workspace.
    """
    if (PACKAGE.parent / "lab.json").exists():
        raise LabError(f"this is the copy in {PACKAGE.parent}; run the command refinfer, or python from another folder")
    if args.action is None:
        _next()
        return None
    run, _ = ACTIONS[args.action]
    return run(args)


def _chosen(args: argparse.Namespace, workspace: Workspace) -> Lab:
    if args.lab is not None:
        return lab_of(args.lab)
    if workspace.current is None:
        raise LabError("the course is over; name a lab, such as 4")
    return workspace.current


def _paragraph(text: str, margin: str = "", then: str | None = None) -> None:
    width = min(columns_of(sys.stdout) or PIPE_COLUMNS, _WIDEST)
    print(*wrap(words_of(text), width, margin, margin if then is None else then), sep="\n")


def _title(lab: Lab) -> str:
    return f"lab {lab.number}, {lab.title}"


def _show(lab: Lab, workspace: Workspace) -> None:
    """Print what a lab is about, and where it is."""
    say(f"{_title(lab)}: about {lab.minutes} minutes")
    for place in lab.places:
        print(f"  {place.module}, line {workspace.region(place).first}")
        _paragraph(place.region.task, "    ")
    _paragraph(f"read tutorial {lab.page}. Think first: {lab.think}")
    if lab.spoilers:
        _paragraph(f"these places give it away: {', '.join(lab.spoilers)}")


def _start(args: argparse.Namespace) -> None:
    require_pytest()
    first = lab_of(args.only or args.at or "1")
    course = [first] if args.only else [lab for lab in all_labs() if lab.number >= first.number]
    workspace = Workspace.start(args.dir, course)
    say(["a workspace is in", f"{args.dir};", "its README.md says what there is"])
    _show(first, workspace)
    _paragraph("then: refinfer lab check")


def _next() -> None:
    workspace = Workspace.find()
    lab = workspace.current
    if lab is None:
        _over(workspace)
        return
    done = len({*workspace.state.passed} & {*workspace.state.course})
    say(f"{done} of {len(workspace.state.course)} labs passed")
    _show(lab, workspace)
    read = workspace.state.hints.get(lab.number, 0)
    _paragraph(f"then: refinfer lab check ({read} of {len(lab.hints)} hints read: refinfer lab hint)")


def _over(workspace: Workspace) -> None:
    _paragraph(f"every lab of {workspace.folder} is done; refinfer lab run writes a text with your code")
    if optional := [lab.number for lab in labs() if lab.number not in workspace.state.course]:
        _paragraph(f"there is more: refinfer lab reset {optional[0]} opens one of {', '.join(optional)}")


def _check(args: argparse.Namespace) -> int:
    if args.watch and args.json:
        raise LabError("--watch and --json do not go together; give one of them")
    workspace = Workspace.find(args.dir)
    lab = _chosen(args, workspace)
    files = list(dict.fromkeys(workspace.folder / place.module for place in lab.places))
    while True:
        saved = _saved_at(files)
        status = _check_once(args, workspace, lab)
        if not status or not args.watch:
            return status
        say(["waiting for you to save", *(f"{file};" for file in files), "Ctrl-C ends it"])
        sys.stdout.flush()
        while _saved_at(files) == saved:
            RealClock().sleep(_LOOK_S)
        print()


def _saved_at(files: Sequence[Path]) -> list[int]:
    times = []
    for file in files:
        try:
            times.append(file.stat().st_mtime_ns)
        except OSError:  # it is missing, perhaps for a moment only: an editor puts another file in its place
            times.append(0)
    return times


def _check_once(args: argparse.Namespace, workspace: Workspace, lab: Lab) -> int:
    verdict = check(workspace, lab, reference_before=args.reference_before, limits=Limits(args.seconds))
    if not args.json:
        _report(verdict)
    workspace = Workspace.find(workspace.folder)  # meanwhile, a hint may have been read
    is_ours = lab.number in workspace.state.given_up and not workspace.is_own(lab)
    following = workspace.finish(lab) if verdict.passed and not is_ours else None
    if args.json:
        print(json.dumps(_as_json(verdict) | {"next": following.number if following else None}))
    elif verdict.passed:
        _go_on(workspace, following)
    return 0 if verdict.passed else 1


def _as_json(verdict: Verdict) -> dict[str, Any]:
    failure = verdict.failure
    return {
        "lab": verdict.lab.number,
        "title": verdict.lab.title,
        "passed": verdict.passed,
        "held": verdict.held,
        "laws": len(verdict.lab.tests),
        "problem": verdict.problem,
        "first": failure.sentence if failure else None,
        "clauses": list(failure.clauses) if failure else [],
        "lines": list(failure.lines) if failure else [],
        "printed": list(failure.printed) if failure else [],
        "others": [other.sentence for other in verdict.failures[1:]],
        "notes": list(verdict.notes),
    }


def _report(verdict: Verdict) -> None:
    """Print what a check found."""
    lab = verdict.lab
    for note in verdict.notes:
        _paragraph(f"note: {note}")
    held = f"{verdict.held} of {len(lab.tests)} laws hold"
    if verdict.passed:
        say(f"{_title(lab)}: passed, {held}")
        _paragraph(lab.shows)
        return
    say(f"{_title(lab)}: not yet, {held}" if verdict.problem is None else f"{_title(lab)}: {verdict.problem}")
    if failure := verdict.failure:
        _paragraph(f"the first that does not: {failure.sentence}")
        for line in failure.lines:
            _paragraph(line, "  ", "    ")
        if failure.printed:
            _paragraph(f"your code printed: {' | '.join(failure.printed)}", "  ", "    ")
        if failure.clauses:
            _paragraph(_clauses_line(failure), "  ", "    ")
        for other in verdict.failures[1:]:
            _paragraph(f"nor does this: {other.sentence}", "", "  ")
    _paragraph(f"read: tutorial {lab.page}; for help: refinfer lab hint {lab.number}")


def _clauses_line(failure: Failure) -> str:
    """Return the first clause of a law, and the numbers of the others; after an error of the code, numbers alone."""
    numbers = [clause.partition(":")[0] for clause in failure.clauses]
    is_error = re.match(r"\w+(Error|Exit|Interrupt)\b", failure.lines[0] if failure.lines else "")
    shown = numbers if is_error else [*failure.clauses[:1], *numbers[1:]]
    return f"in the specification: {'; '.join(shown)}"


def _go_on(workspace: Workspace, following: Lab | None) -> None:
    if following is not None:
        print()
        print("next: ", end="")
        _show(following, workspace)
    elif workspace.current is None:
        print()
        _over(workspace)


def _run(args: argparse.Namespace) -> int:
    workspace = Workspace.find(args.dir)
    problem = generate(workspace, args.prompt)
    sys.stdout.flush()
    if problem is not None:
        print(flush=True)
        say(f"refinfer: {problem}", sys.stderr)
        return 1
    used, unused = own_labs(workspace)
    if not used:
        say("all of it is our code so far", sys.stderr)
    else:
        yours = "; ".join(f"{lab.number} {lab.title}" for lab in used)
        rest = f", and yours of {', '.join(lab.number for lab in unused)} is not used by a run" if unused else ""
        say(["written with your code of", f"{yours};", f"all else is ours{rest}"], sys.stderr)
    return 0


def _list(args: argparse.Namespace) -> None:
    workspace = Workspace.find(args.dir) if args.dir or Workspace.where() else None
    rows = [
        {
            "number": lab.number,
            "title": lab.title,
            "minutes": lab.minutes,
            "state": workspace.state_of(lab) if workspace else "not begun",
            "page": lab.page,
        }
        for lab in labs()
    ]
    if args.json:
        print(json.dumps(rows))
        return
    names = ["lab", "title", "minutes", "state", "tutorial"]
    print_table("the labs", names, [[str(value) for value in row.values()] for row in rows], prose=["title"])


def _hint(args: argparse.Namespace) -> None:
    workspace = Workspace.find(args.dir)
    lab = _chosen(args, workspace)
    was_last = workspace.state.hints.get(lab.number, 0) == len(lab.hints)
    count, text = workspace.hint(lab)
    say(f"{_title(lab)}, hint {count} of {len(lab.hints)}" + (": there are no more" if was_last else ""))
    _paragraph(text)


def _reset(args: argparse.Namespace) -> None:
    workspace = Workspace.find(args.dir)
    lab = lab_of(args.lab)
    _say_kept(workspace.open(lab))
    _show(lab, workspace)


def _say_kept(kept: Sequence[Path]) -> None:
    if kept:
        say(["what you had written is in", *map(str, kept)])


def _solution(args: argparse.Namespace) -> None:
    workspace = Workspace.find(args.dir)
    lab = _chosen(args, workspace)
    number_ = lab.number
    if number_ not in workspace.state.passed and number_ not in workspace.state.given_up and not args.give_up:
        raise LabError(f"lab {number_} is not passed yet; refinfer lab hint helps, and --give-up shows it all the same")
    difference = workspace.difference(lab) or "yours is ours, line by line"
    print(difference)
    print()
    _paragraph(lab.shows)
    following = None
    if args.give_up and number_ not in workspace.state.passed:
        following = workspace.finish(lab, given_up=True)
    if args.apply:
        _say_kept(workspace.apply(lab))
        say(f"lab {number_} is ours now in {workspace.folder}")
    if following is not None:
        _go_on(workspace, following)


def _grade(args: argparse.Namespace) -> None:
    require_pytest()
    if args.tests and not args.tests.is_dir():
        raise LabError(f"{args.tests} is not a folder of tests")
    rows = [row for folder in args.dirs for row in _grades(folder, args)]
    if args.json:
        print(json.dumps(rows))
        return
    print_table(
        "labs",
        ["student", "lab", "state", "laws", "first that does not hold"],
        [[row["student"], row["lab"] or "", row["state"], row["of"], row["first"] or ""] for row in rows],
        keys=2,
        prose=["first that does not hold"],
    )


def _grades(folder: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each lab of a student; what is wrong with a workspace is a row of its own."""
    place = folder.resolve()
    row = {"student": place.parent.name if place.name == DEFAULT_FOLDER else place.name}
    try:
        workspace = Workspace.find(folder)
    except LabError as error:
        yield row | {"lab": None, "state": "no workspace", "held": 0, "laws": 0, "of": "", "first": str(error)}
        return
    for lab in map(lab_of, workspace.state.course):
        verdict = check(workspace, lab, reference_before=True, tests=args.tests, limits=Limits(args.seconds))
        laws = len(lab.tests)
        yield row | {
            "lab": lab.number,
            "state": _grade_of(workspace, verdict),
            "held": verdict.held,
            "laws": laws,
            "of": f"{verdict.held} of {laws}",
            "first": verdict.problem or (verdict.failure.sentence if verdict.failure else None),
        }


def _grade_of(workspace: Workspace, verdict: Verdict) -> str:
    if workspace.is_blank(verdict.lab):
        return "blank"
    if verdict.lab.number in workspace.state.given_up:
        return "given up"
    if not workspace.is_own(verdict.lab):
        return "not begun"
    return "passed" if verdict.passed else "not yet"


ACTIONS: Final[dict[str, tuple[Callable[[argparse.Namespace], int | None], str]]] = {
    "start": (_start, "Make a workspace: a copy of this package in which the first lab is blank."),
    "check": (_check, "Check a lab, and open the next one if it is passed."),
    "run": (_run, "Continue a prompt with the code of the workspace."),
    "list": (_list, "Show all labs."),
    "hint": (_hint, "Show the next hint."),
    "reset": (_reset, "Make a lab blank again, and go on there."),
    "solution": (_solution, "Show the difference to our solution of a lab that is passed or given up."),
    "grade": (_grade, "Check all labs of some workspaces, with our solutions of all others."),
}
"""The actions, each with a line of help."""
