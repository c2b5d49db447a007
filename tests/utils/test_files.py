"""Files are written whole or not at all, and corrupt ones are refused."""

import hashlib
import os
import stat
import threading

import pytest

from resnet_paths._utils import files
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.files import cache_folder, check_sha256, shipped_folder, write_then_rename


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def write_half(path, error):
    with write_then_rename(path) as temporary:
        temporary.write_text("half")
        raise error


def test_content_arrives_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new" / "folder" / "file.csv"
    with write_then_rename(path) as temporary:
        assert temporary.parent == path.parent  # the same file system, so that the rename is atomic
        assert temporary.suffix == ".csv"
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert names_in(path.parent) == ["file.csv"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_after_an_error_the_old_file_is_still_there(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error):
        write_half(path, error)
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["file"]


def test_after_an_error_there_is_no_new_file(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_half(tmp_path / "file", ZeroDivisionError)
    assert names_in(tmp_path) == []


def test_an_error_of_the_rename_leaves_no_temporary_file(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError), write_then_rename(tmp_path / "file") as temporary:  # noqa: PT011
        temporary.write_text("whole")
    assert names_in(tmp_path) == ["file"]
    assert (tmp_path / "file").is_dir()


def test_the_old_content_is_replaced_only_at_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with write_then_rename(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_content_is_on_disk_before_the_rename(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: calls.append(os.fstat(descriptor).st_size))
    with write_then_rename(tmp_path / "file") as temporary:
        temporary.write_text("12345")
        assert not calls
    assert calls == [5]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_are_those_of_an_ordinary_new_file(tmp_path, mask):
    before = os.umask(mask)
    try:
        with write_then_rename(tmp_path / "file") as temporary:
            temporary.write_text("")
    finally:
        after = os.umask(before)
    assert after == mask  # the process's own mask is put back
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_writers_at_the_same_time_do_not_mix(tmp_path):
    contents = [str(number) * 20_000 for number in range(8)]

    def write(content):
        with write_then_rename(tmp_path / "file") as temporary:
            temporary.write_text(content)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_text() in contents
    assert names_in(tmp_path) == ["file"]


def test_right_checksum_passes(tmp_path):
    (tmp_path / "file").write_bytes(b"right")
    check_sha256(tmp_path / "file", hashlib.sha256(b"right").hexdigest())


def test_wrong_checksum_names_file_both_sums_and_what_to_do(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"wrong")
    right = hashlib.sha256(b"right").hexdigest()
    with pytest.raises(ResnetPathsError) as caught:
        check_sha256(path, right, "Fetch it again.")
    message = str(caught.value)
    assert str(path) in message
    assert hashlib.sha256(b"wrong").hexdigest() in message
    assert right in message
    assert message.endswith("The file is corrupt or incomplete. Fetch it again.")


@pytest.mark.parametrize("name", ["absent", "folder"])
def test_checksum_of_what_is_no_file(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ResnetPathsError, match=rf"data file: got '.*{name}'; allowed: an existing file\. Restore it"):
        check_sha256(tmp_path / name, "0" * 64)


def test_shipped_folder_of_a_checkout():
    folder = shipped_folder("data")
    assert folder.is_absolute()
    assert (folder / "fashion-mnist" / "LICENSE").is_file()


def test_shipped_folder_of_an_installed_wheel_comes_first(tmp_path, monkeypatch):
    package = tmp_path / "resnet_paths"
    package.mkdir()
    monkeypatch.setattr(files, "__file__", str(package / "_utils" / "files.py"))
    with pytest.raises(ResnetPathsError, match=r"shipped folder 'data'.*Reinstall the project"):
        shipped_folder("data")
    (tmp_path / "data").mkdir()
    assert shipped_folder("data") == tmp_path / "data"
    (package / "data").mkdir()
    assert shipped_folder("data") == package / "data"


def test_the_data_distribution_comes_before_the_part_in_the_wheel_but_not_before_a_checkout(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "resnet_paths_data").mkdir()
    assert shipped_folder("data").parent.name != tmp_path.name
    package = tmp_path / "resnet_paths"
    monkeypatch.setattr(files, "__file__", str(package / "_utils" / "files.py"))
    for name in ("data", "notebooks"):
        (package / name).mkdir(parents=True)
    assert shipped_folder("data") == tmp_path / "resnet_paths_data"
    assert shipped_folder("notebooks") == package / "notebooks"


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_PATHS_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"
    assert not cache_folder().exists()
    monkeypatch.setenv("RESNET_PATHS_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "resnet_paths"
