"""What a person names as `package:name` on a command line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from refinfer.cli.imported import imported
from refinfer.errors import RequestError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with some modules; the path and the table of modules are put back."""
    (tmp_path / "wild_mine.py").write_text(
        "import wild_next\nclass Own:\n    def way(self): ...\nnumber = wild_next.n\n"
    )
    (tmp_path / "wild_next.py").write_text("n = 7\n")
    (tmp_path / "wild_lacking.py").write_text("import wild_nowhere.deep\n")
    (tmp_path / "wild_broken.py").write_text("def f(:\n")
    (tmp_path / "wild_exits.py").write_text("import sys\nsys.exit('bye')\n")
    (tmp_path / "wild_fails.py").write_text("1 / 0\n")
    (tmp_path / "wild_package").mkdir()
    (tmp_path / "wild_package" / "__init__.py").write_text("")
    (tmp_path / "wild_package" / "inner.py").write_text("class Own: ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("wild_")]:
        del sys.modules[name]


@pytest.mark.spec("CLI-28")
def test_a_module_of_the_current_folder_is_found_with_what_it_imports_itself(here: Path) -> None:
    assert imported("wild_mine:Own").__name__ == "Own"
    assert imported("wild_mine:Own.way").__name__ == "way"
    assert imported("wild_mine:number") == 7
    assert imported("wild_package.inner:Own").__module__ == "wild_package.inner"
    assert sys.path[0] == str(here)
    assert sys.path.count(str(here)) == 1


@pytest.mark.spec("CLI-28")
def test_the_current_folder_comes_first(here: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("installed")
    (elsewhere / "wild_next.py").write_text("n = 8\n")
    sys.path[:0] = [str(elsewhere), str(here)]
    assert imported("wild_next:n") == 7


@pytest.mark.spec("CLI-28")
def test_an_installed_module_is_found_too(here: Path) -> None:
    assert imported("refinfer.planning.locks:LOCKS")["none"]


REFUSED = {
    "mine": "'mine' is not of the form package:name, such as mine:name for a file mine.py",
    ":Own": "':Own' is not of the form package:name",
    "wild_mine:": "'wild_mine:' is not of the form package:name",
    "wild_none:Own": "wild_none:Own: there is no module 'wild_none'; neither in ",
    "wild_package.none:Own": "wild_package.none:Own: there is no module 'wild_package.none'; neither in ",
    "wild_none.inner:Own": "wild_none.inner:Own: there is no module 'wild_none'; neither in ",
    "wild_mine.py:Own": "wild_mine.py:Own: there is no module 'wild_mine.py'; write wild_mine, without .py",
    "wild_lacking:Own": "wild_lacking:Own: there is no module 'wild_nowhere'; wild_lacking itself needs it",
    "wild_broken:f": "wild_broken:f: importing wild_broken raised SyntaxError: ",
    "wild_exits:f": "wild_exits:f: importing wild_exits raised SystemExit: 'bye'; mend the module first",
    "wild_fails:f": "wild_fails:f: importing wild_fails raised ZeroDivisionError: 'division by zero'",
    ".:f": ".:f: importing . raised ",
    "wild_mine:Own.none": "wild_mine:Own.none: Own has no 'none'",
    "wild_mine:none": "wild_mine:none: wild_mine has no 'none'",
    "wild_mine:number:x": "wild_mine:number:x: wild_mine has no 'number:x'",
}


@pytest.mark.spec("CLI-28", "ERR-1")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_there_is_one_line_that_says_what_is_missing(name: str, here: Path) -> None:
    with pytest.raises(RequestError) as refused:
        imported(name)
    assert str(refused.value).startswith(REFUSED[name])
    assert "\n" not in str(refused.value)


@pytest.mark.spec("CLI-28", "ERR-1")
@pytest.mark.parametrize("name", ["./wild_mine.py:number", "folder/wild_mine.py:number", "../wild_mine:number"])
def test_a_path_is_refused_with_the_name_to_write_instead(here: Path, name: str) -> None:
    with pytest.raises(RequestError, match="names a path; write wild_mine:number, in the folder of the file"):
        imported(name)
