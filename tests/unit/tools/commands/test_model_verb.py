import json

from quire.tools.cli import main


def test_script(tmp_path, capsys):
    script = tmp_path / "steps"
    script.write_text("mmap 2p as=a\nstore a hello\n\nload a 5\n")
    assert main(["model", str(script)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for words in ("> store a hello", "tlb miss", "level=3", "by=zero fill", "'hello'"):
        assert words in out


def test_json(capsys):
    line = "faults 3 fifo,lru,opt,clock 1 2 3 4 1 2 5 1 2 3 4 5"
    assert main(["model", "--json", "--command", f"{line}; mmap 1p"]) == 0
    counted, mapped = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert counted["result"].splitlines()[:2] == ["fifo: 9 faults", "lru: 10 faults"]
    assert mapped["events"][0]["event"] == "mmap"


def test_nonsense_ends_a_script(capsys):
    assert main(["model", "--command", "mmap 1p as=a; nonsense; load a"]) == 2
    out, err = capsys.readouterr()
    assert "no verb 'nonsense'" in err
    assert "load" not in out


def test_standard_input(monkeypatch, capsys):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("translate 0x1000\n"))
    assert main(["model"]) == 0
    assert "indices=0, 0, 0, 1" in capsys.readouterr().out


def test_interactive_session_goes_on_after_nonsense(monkeypatch, capsys):
    import io

    typed = io.StringIO("nonsense\nmaps\n")
    typed.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", typed)
    assert main(["model"]) == 0
    out, err = capsys.readouterr()
    assert "no verb" in err
    assert out.count("quire model> ") == 3
    assert "nothing is mapped" in out


def test_script_that_is_not_there(capsys):
    assert main(["model", "/no/such/script"]) == 2
    assert "cannot be read" in capsys.readouterr().err
