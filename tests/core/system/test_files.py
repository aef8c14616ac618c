"""Files are written whole, and a folder without locks is warned of."""

from helpers import files_in

from core.system.files import locked, whole_file


def test_writers_of_one_file_never_share_a_temporary_name(tmp_path):
    target = tmp_path / "scan.nii.gz"
    with whole_file(target) as first:
        with whole_file(target) as second:
            first.write_text("first")
            second.write_text("second")
        assert target.read_text() == "second"
    assert files_in(tmp_path) == {"scan.nii.gz": b"first"}


def test_without_locks_there_is_a_warning(tmp_path, monkeypatch, capsys):
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("core.system.files.fcntl.flock", no_locks)
    with locked(tmp_path / "lock"):
        pass
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path / 'lock'}: this file system has no locks")
