import copy
import errno
import pickle
import sys
import types

import pytest

import quire
from quire import errors

ALL = [getattr(errors, name) for name in errors.__all__ if name != "error_of_failure"]


@pytest.mark.parametrize("kind", ALL)
def test_every_error_is_public_and_derives_from_error(kind):
    assert issubclass(kind, quire.Error)
    assert getattr(quire, kind.__name__) is kind


def test_builtin_families():
    assert issubclass(quire.FormatError, (quire.SourceError, ValueError))
    assert issubclass(quire.ChecksumError, quire.CorruptError)
    for kind in (quire.BudgetError, quire.ModeError, quire.ClosedError):
        assert issubclass(kind, ValueError)
    assert issubclass(quire.PmapError, RuntimeError)


@pytest.mark.parametrize("kind", ALL)
def test_fields_survive_pickle_and_copy(kind):
    error = kind("no luck", source="s3://b/x", offset=4096, page=1, errno=errno.EIO)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is kind
        assert (twin.message, twin.source, twin.offset, twin.page, twin.errno) == (
            "no luck",
            "s3://b/x",
            4096,
            1,
            errno.EIO,
        )


def test_text_names_source_offset_and_errno():
    error = quire.PageIOError("the read failed", source="a.npy", offset=4096, errno=errno.EIO)
    assert str(error) == "the read failed (source a.npy, offset 4096, EIO)"
    assert str(quire.Error("a.npy is short", source="a.npy")) == "a.npy is short"
    assert str(quire.Error("odd", errno=99999)) == "odd (errno 99999)"
    assert str(quire.TruncatedError()) == "TruncatedError"


def pending(monkeypatch, failure):
    core = types.SimpleNamespace(take_pending_error=lambda: failure)
    monkeypatch.setitem(sys.modules, "quire._core", core)


@pytest.mark.parametrize("kind", [quire.PageIOError, quire.ChecksumError, quire.ProtectionError])
def test_made_without_arguments_takes_the_pending_failure(kind, monkeypatch):
    failure = {"code": "io", "source": "x", "offset": 8, "page": 2, "errno": 5, "message": "gone"}
    pending(monkeypatch, failure)
    error = kind()
    assert (error.source, error.offset, error.page, error.errno) == ("x", 8, 2, 5)
    assert str(error) == "gone (source x, offset 8, EIO)"


def test_made_with_arguments_leaves_the_pending_failure(monkeypatch):
    monkeypatch.setitem(sys.modules, "quire._core", None)
    assert str(quire.PageIOError("mine")) == "mine"
    assert quire.PageIOError(source="x").source == "x"


def test_without_the_core_nothing_is_pending(monkeypatch):
    monkeypatch.delitem(sys.modules, "quire._core")
    assert quire.PageIOError().source is None


def test_every_code_has_its_class():
    for code, kind in errors.CLASS_OF_CODE.items():
        failure = dict.fromkeys(["source", "offset", "page", "errno", "message"]) | {"code": code}
        assert type(errors.error_of_failure(failure)) is kind
    failure["code"] = "unheard of"
    assert type(errors.error_of_failure(failure)) is quire.PageIOError
