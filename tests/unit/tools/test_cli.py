import errno
import importlib
import re
import subprocess
import sys

import pytest

import quire
from quire.tools import cli
from quire.tools.commands import info as info_module


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == quire.__version__


def test_help_names_every_verb_with_the_first_line_of_its_help(capsys):
    assert cli.main(["--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for verb, summary in cli.VERBS.items():
        function = getattr(importlib.import_module(f"quire.tools.commands.{verb}"), verb)
        assert function.__doc__.strip().splitlines()[0] == summary
        assert verb in told


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    out, err = capsys.readouterr()
    assert f"quire {verb}" in out
    assert "not given" in out or "JSON" in out
    assert err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["juggle"],
        ["info"],
        ["info", "a", "b"],
        ["doctor", "--loud"],
        ["pack", "a", "--frame", "big", "-o", "b"],
        ["pack", "-"],
        ["pack", "a.zst"],
    ],
)
def test_wrong_usage(arguments, capsys):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("quire: ")


def test_quire_error_is_one_message(tmp_path, capsys):
    assert cli.main(["info", str(tmp_path / "absent")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "absent" in err
    assert "Traceback" not in err


def test_traceback_on_demand(tmp_path, monkeypatch):
    monkeypatch.setenv("QUIRE_TRACEBACK", "1")
    with pytest.raises(quire.SourceError):
        cli.main(["info", str(tmp_path / "absent")])


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (ImportError(), 1)])
def test_other_ends(error, status, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(info_module, "resolve", fail)
    assert cli.main(["info", "x"]) == status
    assert capsys.readouterr().err.startswith("quire: ")


def test_without_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cyclopts", None)
    assert cli.main(["doctor"]) == 1
    assert "pip install 'quire[cli]'" in capsys.readouterr().err


def test_reader_that_leaves():
    command = f"{sys.executable} -m quire.tools.cli doctor | true"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert ended.stderr == ""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: .*a file or folder of"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/a/b"), "/a/b: .*check the path"),
        (OSError(errno.ENOSPC, "No space left"), "No space left; QUIRE_TRACEBACK=1"),
    ],
    ids=lambda given: type(given).__name__,
)
def test_what_the_system_refuses_is_one_message(error, said, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(info_module, "resolve", fail)
    assert cli.main(["info", "x"]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert re.match(f"quire: .*{said}", told)
    monkeypatch.setenv("QUIRE_TRACEBACK", "1")
    with pytest.raises(OSError, match=error.strerror):
        cli.main(["info", "x"])
