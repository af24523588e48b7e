"""Specifies `refinfer.weight_cache.publish` on a full disk: an error when space is reserved, nothing left over."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from build_site import Site, put, taken
from children import Child, watched
from refinfer.arrays import PAGE_BYTES
from refinfer.errors import WeightCacheError
from refinfer.weight_cache.publish import Draft, write_small_file
from starts import NOTHING, OLD_FILE, before, make_small

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, as POSIX has it")


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """Nothing may wait for ever."""
    with watched():
        yield


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_small(tmp_path)


def try_on_a_full_disk(site: Site, old: dict[str, bytes]) -> bool:
    """Build where there may be no room; check that it is all there or nothing, and return which."""
    folder, others = site.cache.parent, site.folder - old.keys()
    try:
        prepared = site.open()
    except WeightCacheError as error:
        assert "cannot be written" in str(error)  # noqa: PT017 -- either way is right
        assert {name: data for name, data in taken(folder).items() if name not in others} == old
        return False
    site.check(prepared)
    assert site.folder - others in (site.own_names, {site.cache.name})  # the side file may find no room
    return True


@pytest.mark.spec("PUBLISH-6")
@pytest.mark.parametrize("fallocate", [True, False], ids=["fallocate", "no fallocate"])
@pytest.mark.parametrize("what", [NOTHING, OLD_FILE])
def test_beyond_the_largest_file_allowed_a_build_fails_and_leaves_what_was_there(
    site: Site, what: str, fallocate: bool
) -> None:
    old = before(what, site)
    nbytes = len(whole_file(site))
    limits = [*range(0, nbytes + PAGE_BYTES, 1024), nbytes - 1, nbytes]

    def work(_: object) -> None:
        import resource

        if not fallocate:
            del os.posix_fallocate
        for limit in limits:
            put(site.cache.parent, old)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            done = try_on_a_full_disk(site, old)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert done == (limit >= nbytes)

    assert Child(work).end() == 0


def whole_file(site: Site) -> bytes:
    apart = replace(site, cache=site.source.with_name("apart.rwc"))
    apart.open()
    return apart.cache.read_bytes()


def tmpfs(folder: Path, nbytes: int) -> None:
    """Mount a file system of that size, which only this process sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, recursive_private = 0x20000, 0x44000
    failed = (
        libc.unshare(new_namespace)
        or libc.mount(b"none", b"/", None, recursive_private, None)
        or libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=%d" % nbytes)
    )
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def can_mount(tmp_path_factory: pytest.TempPathFactory) -> bool:
    folder = tmp_path_factory.mktemp("mount")
    return sys.platform == "linux" and os.geteuid() == 0 and Child(lambda _: tmpfs(folder, PAGE_BYTES)).end() == 0


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, int], None]:
    """Return what mounts a small file system, in a child."""
    if not can_mount(tmp_path_factory):
        pytest.skip("needs Linux, and the right to mount a file system")
    return tmpfs


def leave_free(filler: Path, n_pages: int) -> None:
    """Fill a disk except for the given number of pages."""
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(PAGE_BYTES))
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017
        file.truncate(max(0, file.tell() // PAGE_BYTES - n_pages) * PAGE_BYTES)


@pytest.mark.spec("PUBLISH-6")
@pytest.mark.parametrize("fallocate", [True, False], ids=["fallocate", "no fallocate"])
@pytest.mark.parametrize("what", [NOTHING, OLD_FILE])
def test_on_a_full_disk_a_build_fails_and_leaves_what_was_there(
    site: Site, what: str, fallocate: bool, small_disk: Callable[[Path, int], None]
) -> None:
    old, folder = before(what, site), site.cache.parent
    n_pages = -(-len(whole_file(site)) // PAGE_BYTES)

    def work(_: object) -> None:
        if not fallocate:
            del os.posix_fallocate
        small_disk(folder, 64 * PAGE_BYTES)
        outcomes = []
        for n_free in range(n_pages + 4):
            for path in folder.iterdir():
                path.unlink()
            for name, data in old.items():
                (folder / name).write_bytes(data)
            leave_free(folder / "filler", n_free)
            outcomes.append(try_on_a_full_disk(site, old))
        assert outcomes == [n_free >= n_pages for n_free in range(n_pages + 4)]

    assert Child(work).end() == 0


@pytest.mark.spec("PUBLISH-6")
@pytest.mark.parametrize("fallocate", [True, False], ids=["fallocate", "no fallocate"])
def test_a_full_disk_is_an_error_when_space_is_reserved_and_never_when_it_is_written(
    tmp_path: Path, fallocate: bool, small_disk: Callable[[Path, int], None]
) -> None:
    def work(_: object) -> None:
        if not fallocate:
            del os.posix_fallocate
        small_disk(tmp_path, 16 * PAGE_BYTES)
        leave_free(tmp_path / "filler", 10)
        draft = Draft(tmp_path / "file")
        first = draft.grow(0, 6 * PAGE_BYTES)
        with pytest.raises(OSError, match="No space left"):
            draft.grow(6 * PAGE_BYTES, 5 * PAGE_BYTES)
        draft.settle(6 * PAGE_BYTES)
        draft.write(5 * PAGE_BYTES, b"kept")
        second = draft.grow(6 * PAGE_BYTES, 2 * PAGE_BYTES - 100)
        leave_free(tmp_path / "more", 0)
        assert [(space.start, space.view.size) for space in (first, second)] == [
            (0, 6 * PAGE_BYTES),
            (6 * PAGE_BYTES, 2 * PAGE_BYTES - 100),
        ]
        assert first.view.tobytes() == bytes(5 * PAGE_BYTES) + b"kept".ljust(PAGE_BYTES, b"\0")
        assert not second.view.any()
        first.view[:], second.view[:] = ord("x"), ord("y")  # if a page is missing, this ends the process
        expected = b"x" * (6 * PAGE_BYTES) + b"y" * (2 * PAGE_BYTES - 100)
        for space in (first, second):
            space.drop_pages()
        assert first.view.tobytes() + second.view.tobytes() == expected
        draft.settle(8 * PAGE_BYTES)
        draft.publish()
        assert (tmp_path / "file").read_bytes() == expected + bytes(100)

    assert Child(work).end() == 0


@pytest.mark.spec("PUBLISH-7", "PUBLISH-6")
def test_a_small_file_that_finds_no_room_leaves_the_old_one(
    tmp_path: Path, small_disk: Callable[[Path, int], None]
) -> None:
    def work(_: object) -> None:
        small_disk(tmp_path, 16 * PAGE_BYTES)
        (tmp_path / "small").write_bytes(b"old")
        leave_free(tmp_path / "filler", 2)
        before = taken(tmp_path)
        with pytest.raises(OSError, match="No space left"):
            write_small_file(tmp_path / "small", bytes(3 * PAGE_BYTES))
        assert taken(tmp_path) == before
        write_small_file(tmp_path / "small", bytes(2 * PAGE_BYTES))
        assert taken(tmp_path) == {**before, "small": bytes(2 * PAGE_BYTES)}

    assert Child(work).end() == 0
