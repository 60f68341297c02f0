import json
import re

import quire
from quire import _core, shared_records
from quire.tools.cli import main
from quire.tools.commands import doctor

REFUSED = {
    "name": "uffd",
    "works": False,
    "default": False,
    "pointer": True,
    "system_calls": True,
    "reason": "userfaultfd: EPERM",
    "remedy": "sysctl vm.unprivileged_userfaultfd=1",
}
WORKING = REFUSED | {"name": "inline", "works": True, "default": True, "reason": "", "remedy": ""}


def test_json(capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["pmaps"] == _core.probe()
    assert sum(row["default"] for row in facts["pmaps"]) == 1
    assert facts["page_bytes"] == _core.page_bytes()
    assert facts["kernel"]


def test_table(capsys):
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for row in _core.probe():
        assert row["name"] in out
    for fact in ("kernel", "page", "budget", "vm.unprivileged_userfaultfd", "seccomp"):
        assert fact in out


def test_who_serves_system_calls(monkeypatch, capsys):
    """One story, in the table and below it."""
    rows = [WORKING, WORKING | {"name": "guard", "system_calls": False}]
    rows.append(WORKING | {"name": "soft", "system_calls": False, "pointer": False})
    monkeypatch.setattr(_core, "probe", lambda: rows)
    for reason, word in ((None, "by quire"), ("numpy is another", "no")):
        monkeypatch.setattr(_core, "watch_exports", lambda reason=reason: reason)
        main(["doctor"])
        out = capsys.readouterr().out
        told = {line.split()[0]: re.split(r"  +", line)[4] for line in out.splitlines()[1:4]}
        assert told == {"inline": "yes", "guard": word, "soft": "no"}
        said = next(line for line in out.splitlines() if line.startswith("system calls by quire"))
        assert ("not here" in said) == (reason is not None)


def test_what_the_pmap_kernel_can_do_here(monkeypatch, capsys):
    for reason, word in ((None, "with budgets"), ("the kernel is old", "as the kernel is old")):
        monkeypatch.setattr(_core, "kernel_unwatched", lambda reason=reason: reason)
        main(["doctor"])
        out = capsys.readouterr().out
        said = next(line for line in out.splitlines() if line.startswith("pmap kernel"))
        assert "plain local files" in said
        assert word in said


def test_remedies_of_what_is_better_than_the_default(monkeypatch, capsys):
    monkeypatch.setattr(_core, "probe", lambda: [REFUSED, WORKING])
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "userfaultfd: EPERM" in out
    assert "uffd: sysctl vm.unprivileged_userfaultfd=1" in out
    assert doctor.advice({"pmaps": [WORKING, REFUSED]}) == []


def test_no_pmap_at_all(monkeypatch, capsys):
    monkeypatch.setattr(_core, "probe", lambda: [REFUSED])
    assert main(["doctor"]) == 1
    assert "To enable a better pmap" in capsys.readouterr().out


def test_machine_without_the_files(monkeypatch, tmp_path):
    for name in ("SYSCTL", "DEVICE", "STATUS"):
        monkeypatch.setattr(doctor, name, tmp_path / "absent")
    facts = doctor.examine()
    assert facts["unprivileged_userfaultfd"] is None
    assert facts["userfaultfd_device"] == "not there"
    assert facts["seccomp"] == "unknown"


def test_shared_names_that_nobody_holds(monkeypatch, tmp_path):
    folder = tmp_path / "names"
    monkeypatch.setattr(shared_records, "folder_path", lambda: str(folder))
    assert doctor.examine()["shared_names"].startswith("0 names are held")
    with quire.shared("held", 1):
        (folder / "name.stale").touch(mode=0o600)
        said = doctor.examine()["shared_names"]
        assert said == "1 names are held; 1 that nobody held were removed"
    folder.rmdir()
    folder.symlink_to(tmp_path)
    shared_records.checked_folder.cache_clear()
    assert "not safe to use" in doctor.examine()["shared_names"]
    shared_records.checked_folder.cache_clear()
