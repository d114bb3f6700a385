import io
import tarfile

import pytest

from bnexp.errors import UserError
from bnexp.records import create_run
from bnexp.study.parcel import pack, unpack


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def run(tmp_path):
    run = create_run("x", "seed: 0\n", {"environment.json": {}}, folder=tmp_path / "run")
    (run.checkpoints / "step-000000003.pt").write_bytes(b"three")
    return run


def test_a_record_arrives_whole_without_its_lock(run, tmp_path):
    with run.locked():
        parcel = pack(run.path)
    unpack(parcel, tmp_path / "there")
    there = contents(tmp_path / "there")
    assert ".lock" not in there
    assert there == {k: v for k, v in contents(run.path).items() if k != ".lock"}


def test_a_newer_parcel_replaces_and_an_old_checkpoint_goes(run, tmp_path):
    unpack(pack(run.path), tmp_path / "there")
    (run.checkpoints / "step-000000003.pt").unlink()
    (run.checkpoints / "step-000000006.pt").write_bytes(b"six")
    run.write_state("finished", 6, 6)
    unpack(pack(run.path), tmp_path / "there")
    assert contents(tmp_path / "there") == contents(run.path)


def test_a_parcel_without_checkpoints_takes_none_away(run, tmp_path):
    unpack(pack(run.path), tmp_path / "there")
    (run.checkpoints / "step-000000003.pt").unlink()
    unpack(pack(run.path), tmp_path / "there")
    assert (tmp_path / "there" / "checkpoints" / "step-000000003.pt").exists()


def test_logs_come_before_the_checkpoint_and_the_state_last(run, tmp_path, monkeypatch):
    """Whoever is killed while unpacking leaves what can be gone on with."""
    import bnexp.study.parcel as parcel

    order = []
    monkeypatch.setattr(parcel, "write_atomically", lambda path, *_, **__: order.append(path.name))
    run.write_state("running", 3, 6)
    content = pack(run.path)
    (tmp_path / "there" / "checkpoints").mkdir(parents=True)
    unpack(content, tmp_path / "there")
    assert order.index("steps.csv") < order.index("step-000000003.pt") < order.index("state.json")


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/../../outside"])
def test_a_parcel_writes_nowhere_else(tmp_path, name):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = 1
        archive.addfile(entry, io.BytesIO(b"x"))
    with pytest.raises(UserError, match="no record has"):
        unpack(content.getvalue(), tmp_path / "there")
    assert not (tmp_path / "outside").exists()


def test_links_are_not_sent(run, tmp_path):
    (run.path / "link").symlink_to("/etc/passwd")
    unpack(pack(run.path), tmp_path / "there")
    assert "link" not in contents(tmp_path / "there")
