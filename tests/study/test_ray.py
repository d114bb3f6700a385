"""The Ray engine on a real cluster of several nodes on this machine, one of them killed."""

from __future__ import annotations

import gzip
import os
import signal
import socket
from pathlib import Path

import numpy as np
import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'bnexp[ray]'")

from ray.cluster_utils import Cluster  # noqa: E402

from bnexp.cli.export import run_export  # noqa: E402
from bnexp.config.study import ResourcesConfig  # noqa: E402
from bnexp.data import shipping  # noqa: E402
from bnexp.errors import Interrupted, UserError  # noqa: E402
from bnexp.study.on_ray import _require_listener, run_on_ray  # noqa: E402
from bnexp.study.run import find_record, run_study  # noqa: E402
from tests.study.studies import DECAYS, ROOT, SMALL, plan_of, rows_of  # noqa: E402
from tests.study.test_local import LONG, Silent, local  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """A head that takes no training, and one node that does."""
    former = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)
    small = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    found.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
    yield found
    ray.shutdown()
    found.shutdown()
    if former is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = former


def on_ray(jobs, watcher):
    run_on_ray(jobs, "auto", ResourcesConfig(), watcher)


def test_the_same_numbers_as_on_this_machine(cluster, tmp_path):
    text = SMALL + DECAYS.replace("seeds: 2", "seeds: 1")
    there = run_study(plan_of(text), on_ray, 1, Silent(), runs=tmp_path / "ray")
    here = run_study(plan_of(text), local, 2, Silent(), runs=tmp_path / "here")
    assert there.states == here.states == {"finished": 6}
    assert rows_of(there.record) == rows_of(here.record)
    for path in there.record.experiments.iterdir():
        assert (path / "config.yaml").read_text() == (
            here.record.experiments / path.name / "config.yaml"
        ).read_text()


class KillsTheNode(Silent):
    """Kills the node that trains once a checkpoint came back, and adds another one."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder, self.killed = cluster, folder, False
        self.steps: set[str] = set()

    def show(self, progress) -> None:
        found = list(self.folder.glob("*/experiments/*/checkpoints/step-*.pt"))
        if found and not self.killed:
            self.killed = True
            self.steps = {path.name for path in found}
            node = next(n for n in self.cluster.list_all_nodes() if not n.head)
            self.cluster.remove_node(node, allow_graceful=False)
            self.cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)


def test_a_node_that_dies_loses_nothing(cluster, tmp_path):
    text = LONG.replace("seeds: 2", "seeds: 1").replace("[20, 30]", "[20]")
    plan = plan_of(text, "training.steps=12000", "checkpoints.every_steps=500")
    display = KillsTheNode(cluster, tmp_path)
    found = run_study(plan, on_ray, 1, display, runs=tmp_path)
    assert display.killed and found.states == {"finished": 1}
    (folder,) = found.record.experiments.iterdir()
    lines = (folder / "steps.csv").read_text().splitlines()[1:]
    assert [int(line.split(",")[0]) for line in lines] == list(range(1, 12001))
    resumes = found.record.run(folder.name).environment["resumes"]
    assert resumes and resumes[0]["step"] >= 500  # it did not begin anew
    undisturbed = run_study(plan, local, 1, Silent(), runs=tmp_path / "here")
    assert rows_of(undisturbed.record) == rows_of(found.record)


class Interrupts(Silent):
    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, False

    def show(self, progress) -> None:
        found = list(self.folder.glob("*/experiments/*/checkpoints/step-*.pt"))
        if found and not self.asked:
            self.asked = True
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_brings_the_checkpoints_back(cluster, tmp_path):
    plan = plan_of(LONG.replace("[20, 30]", "[20]").replace("seeds: 2", "seeds: 1"),
                   "training.steps=100000", "checkpoints.every_steps=500")  # fmt: skip
    with pytest.raises(Interrupted):
        run_study(plan, on_ray, 1, Interrupts(tmp_path), runs=tmp_path)
    record = find_record(plan, tmp_path)
    assert record.state["state"] == "interrupted"
    (folder,) = record.experiments.iterdir()
    run = record.run(folder.name)
    assert run is not None and run.state["state"] == "interrupted"
    (newest, *_) = sorted(path.name for path in run.checkpoints.glob("step-*.pt"))[::-1]
    assert int(newest[5:-3]) == run.state["step"] > 0


def test_data_are_sent_to_a_node_that_lacks_them(cluster, tmp_path, monkeypatch):
    """The files are moved away once they have been put into the cluster."""
    data = tmp_path / "mine"
    data.mkdir()
    for part, count in (("train", 300), ("t10k", 50)):
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            path = data / f"{part}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(head + array.tobytes()))
    original = shipping.shipment

    def ship_then_hide(name, root):
        found = original(name, root)
        data.rename(tmp_path / "moved")
        return found

    monkeypatch.setattr(shipping, "shipment", ship_then_hide)
    text = SMALL.replace("name: digits,", f"name: mnist, root: {data},") + "seeds: 1"
    found = run_study(plan_of(text), on_ray, 1, Silent(), runs=tmp_path / "runs")
    assert found.states == {"finished": 1}, found.failed
    (folder,) = found.record.experiments.iterdir()
    assert str(data) in (folder / "config.yaml").read_text()


def test_weights_are_sent_to_a_node_that_lacks_them(cluster, tmp_path, monkeypatch):
    """Another file lies where they were once they have been put into the cluster."""
    weights = tmp_path / "given.pt"
    first = run_study(plan_of(SMALL + "seeds: 1"), local, 1, Silent(), runs=tmp_path / "first")
    (folder,) = first.record.experiments.iterdir()
    run_export(str(folder), weights, None, None, None, tmp_path)
    original = shipping.weights_shipment

    def ship_then_exchange(path):
        found = original(path)
        path.write_bytes(b"other contents")
        return found

    text = SMALL.replace("model: {", f"model: {{weights: {weights}, ") + "seeds: 1"
    plan = plan_of(text)
    here = run_study(plan, local, 1, Silent(), runs=tmp_path / "here")
    monkeypatch.setattr(shipping, "weights_shipment", ship_then_exchange)
    there = run_study(plan, on_ray, 1, Silent(), runs=tmp_path / "there")
    assert here.states == there.states == {"finished": 1}, there.failed
    assert rows_of(there.record) == rows_of(here.record)
    (folder,) = there.record.experiments.iterdir()
    assert str(weights) in (folder / "config.yaml").read_text()


def test_resources_that_no_node_has_are_refused_at_once(cluster):
    with pytest.raises(UserError, match="no node of the Ray cluster has 64 CPUs"):
        run_on_ray([], "auto", ResourcesConfig(cpus=64), None)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_listens_is_refused_at_once(scheme):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(UserError, match="no Ray cluster can be reached") as error:
        _require_listener(f"{scheme}127.0.0.1:{port}")
    assert "\n" not in str(error.value)
