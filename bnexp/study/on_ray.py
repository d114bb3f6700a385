"""The engine for a Ray cluster: a task per training, whose record travels as bytes.

Ray decides where a task runs, by the study's resources. The task trains in a folder of its own
machine; its checkpoints go to a mailbox, an actor that the study empties, as they are written, and
the whole record comes back at the end. When a worker or a node dies, the task is begun again with
the newest checkpoint that came back.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnexp.config import Config, resolve
from bnexp.config.schema import TORCHVISION_WEIGHTS
from bnexp.config.study import ResourcesConfig
from bnexp.config.yaml_text import parse_yaml
from bnexp.errors import RunFailed, UserError
from bnexp.importing import require_extra
from bnexp.records.experiment import is_run
from bnexp.study.jobs import Ended, Job, Watcher
from bnexp.study.parcel import pack, unpack
from bnexp.training.signals import SIGNALS

if TYPE_CHECKING:
    from bnexp.data.shipping import Shipment

ATTEMPTS = 5
TICK_SECONDS = 0.25
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 60.0
ROOM_SECONDS = 300.0
"""How long a study waits for a node that could take its tasks, when there is none."""
END_SECONDS = 120.0


class Mailbox:
    """What tasks and study tell each other while tasks run. An actor."""

    def __init__(self) -> None:
        self._started: list[str] = []
        self._records: dict[str, bytes] = {}
        self._stopping = False

    def start(self, key: str) -> bool:
        """A task begins; False where it should not."""
        if not self._stopping:
            self._started.append(key)
        return not self._stopping

    def put(self, key: str, record: bytes) -> None:
        self._records[key] = record

    def take(self) -> tuple[list[str], dict[str, bytes]]:
        """What has come since it was last asked: begun tasks, and the newest record of each."""
        found = self._started, self._records
        self._started, self._records = [], {}
        return found

    def stop(self) -> None:
        self._stopping = True

    def stopping(self) -> bool:
        return self._stopping


def run_on_ray(
    jobs: Sequence[Job], address: str, resources: ResourcesConfig, watcher: Watcher
) -> None:
    """Run `jobs` on the cluster at `address` (`auto`: the one of this machine). UserError, before
    anything is begun, where there is no Ray, no cluster, or no room in it."""
    require_extra("ray", "--ray")
    import ray

    with _connected(ray, address):
        if not _has_room(ray, resources):
            raise UserError(
                f"no node of the Ray cluster has {resources.cpus} CPUs and {resources.gpus:g} "
                "GPUs, as the study's resources ask for"
            )
        _Cluster(ray, resources, watcher).run(jobs)


@contextlib.contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    _require_listener(address)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise _unreachable(address, error) from None
    finally:
        for number, handler in handlers.items():  # Ray sets its own
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    """UserError where nobody listens at `HOST:PORT`: Ray would try for minutes, deaf to signals."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise _unreachable(address, error) from None


def _unreachable(address: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    return UserError(
        f"--ray {address}: no Ray cluster can be reached ({reason}); start one with: ray start "
        "--head"
    )


def _has_room(ray: Any, resources: ResourcesConfig) -> bool:
    """Whether a node that is alive could take a task, were it empty."""
    return any(
        node["Alive"]
        and node["Resources"].get("CPU", 0) >= resources.cpus
        and node["Resources"].get("GPU", 0) >= resources.gpus
        for node in ray.nodes()
    )


class _Cluster:
    def __init__(self, ray: Any, resources: ResourcesConfig, watcher: Watcher) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray = ray
        self._resources = resources
        self._watcher = watcher
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._mailbox = (
            ray.remote(Mailbox)
            .options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)
            .remote()
        )
        self._task = ray.remote(_train).options(
            num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=0
        )
        self._data: dict[tuple, Any] = {}
        self._weights: dict[str, Any] = {}
        self._running: dict[Any, Job] = {}
        self._attempts: dict[str, int] = {}
        self._room = time.monotonic()

    def run(self, jobs: Sequence[Job]) -> None:
        ray, by_key = self._ray, {job.key: job for job in jobs}
        for job in jobs:
            self._submit(job)
        asked = None
        try:
            while self._running:
                if self._watcher.stop() and asked is None:
                    asked = time.monotonic()
                    ray.get(self._mailbox.stop.remote(), timeout=ANSWER_SECONDS)
                if asked is not None and time.monotonic() - asked > END_SECONDS:
                    break
                done, _ = ray.wait(list(self._running), timeout=TICK_SECONDS)
                self._read_mail(by_key)
                for reference in done:
                    self._end(reference, asked is not None)
                self._refuse_to_wait_for_ever()
                self._watcher.tick()
        finally:
            for reference in self._running:
                with contextlib.suppress(Exception):
                    ray.cancel(reference, force=True)
            ray.kill(self._mailbox)

    def _submit(self, job: Job) -> None:
        config = resolve(parse_yaml(job.config, job.key), [], job.key)
        record = pack(job.folder) if is_run(job.folder) else None
        parcel = None if record is None else self._ray.put(record)
        files = [self._data_of(config), self._weights_of(config)]
        # References within a list are passed on as they are: a node fetches what it lacks.
        reference = self._task.remote(job, [parcel], files, self._mailbox)
        self._running[reference] = job

    def _data_of(self, config: Config) -> Any:
        """A reference to the files that `config` reads here, put into the cluster once."""
        from bnexp.data.shipping import shipment

        key = (config.data.name, config.data.root)
        if key not in self._data:
            found = shipment(config.data.name, config.data.root)
            self._data[key] = None if found is None else self._ray.put(found)
        return self._data[key]

    def _weights_of(self, config: Config) -> Any:
        """A reference to the file of weights that `config` starts from, put there once."""
        from bnexp.data.shipping import weights_shipment

        given = config.model.weights
        if given is None or TORCHVISION_WEIGHTS.fullmatch(given):
            return None
        if given not in self._weights:
            self._weights[given] = self._ray.put(weights_shipment(Path(given)))
        return self._weights[given]

    def _read_mail(self, by_key: dict[str, Job]) -> None:
        try:
            started, records = self._ray.get(self._mailbox.take.remote(), timeout=ANSWER_SECONDS)
        except self._ray.exceptions.RayError:  # it is begun again, empty
            return
        for key in started:
            self._watcher.started(by_key[key])
        for key, record in records.items():
            unpack(record, by_key[key].folder)

    def _end(self, reference: Any, asked: bool) -> None:
        job = self._running.pop(reference)
        errors = self._ray.exceptions
        try:
            found, record = self._ray.get(reference)
        except errors.RayTaskError as error:
            if isinstance(error.cause, ImportError):
                raise UserError(
                    f"a node of the Ray cluster lacks something ({error.cause}): install the same "
                    "bnexp on all of them"
                ) from None
            self._watcher.ended(job, Ended("failed", f"{error.cause!r}"[:500]))
            return
        except errors.RayError as error:  # its worker or its node died
            self._attempts[job.key] = tries = self._attempts.get(job.key, 0) + 1
            if asked:
                self._watcher.ended(job, Ended("interrupted"))
            elif tries < ATTEMPTS:
                self._submit(job)
            else:
                reason = " ".join(str(error).split())[:200]
                said = f"its worker died {tries} times ({type(error).__name__}: {reason})"
                self._watcher.ended(job, Ended("failed", said))
            return
        if record is not None:
            unpack(record, job.folder)
        self._watcher.ended(job, found)

    def _refuse_to_wait_for_ever(self) -> None:
        now = time.monotonic()
        if now - self._room < 5:
            return
        if _has_room(self._ray, self._resources):
            self._room = now
        elif now - self._room > ROOM_SECONDS:
            raise RunFailed(
                f"for {ROOM_SECONDS:.0f} s no node of the Ray cluster could take a training; go on "
                "with the same command"
            )


# ------------------------------------------------------------------------ on a node


def _train(
    job: Job, parcel: list[Any], files: list[Any], mailbox: Any
) -> tuple[Ended, bytes | None]:
    """The task: train in a folder of this machine, and send the record."""
    import dataclasses
    import tempfile
    import threading

    import ray

    from bnexp.study.worker import run_job

    if not ray.get(mailbox.start.remote(job.key)):
        return Ended("interrupted"), None
    with tempfile.TemporaryDirectory(prefix="bnexp-study-", ignore_cleanup_errors=True) as place:
        folder = Path(place) / job.key
        if parcel[0] is not None:
            unpack(ray.get(parcel[0]), folder)
        config = _with_files(resolve(parse_yaml(job.config, job.key), [], job.key), *files)
        ended = threading.Event()
        sender = threading.Thread(
            target=_send_checkpoints, args=(job.key, folder, mailbox, ended), daemon=True
        )
        # Ray's own handler would end the worker; and SIGINT is blocked in it.
        former = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            sender.start()
            found = run_job(dataclasses.replace(job, config=config.to_yaml(), folder=folder))
        except KeyboardInterrupt:
            found = Ended("interrupted")
        finally:
            ended.set()
            signal.signal(signal.SIGTERM, former)
            sender.join(ANSWER_SECONDS)
        if not is_run(folder):
            return found, None
        (folder / "config.yaml").write_text(job.config)  # with the files where the study has them
        return found, pack(folder)


def _send_checkpoints(key: str, folder: Path, mailbox: Any, ended: Any) -> None:
    """Send the record whenever there is a new checkpoint; end the training when told to."""
    import os

    import ray

    sent: set[str] = set()
    while not ended.wait(0.5):
        try:
            if ray.get(mailbox.stopping.remote(), timeout=ANSWER_SECONDS) and not ended.is_set():
                os.kill(os.getpid(), signal.SIGTERM)
                return
            there = {path.name for path in (folder / "checkpoints").glob("step-*.pt")}
            if there - sent:
                ray.get(mailbox.put.remote(key, pack(folder)), timeout=ANSWER_SECONDS)
                sent = there
        except Exception:  # the record is sent at the end, too
            continue


def _with_files(config: Config, data: Any, weights: Any) -> Config:
    """`config` with its data on this node, where they are or sent here, and with its weights."""
    import ray

    from bnexp.data.shipping import is_here

    if data is not None and not is_here(config.data.name, config.data.root):
        root = _placed(ray.get(data))
        config = config.model_copy(update={"data": config.data.model_copy(update={"root": root})})
    if weights is not None:  # a file of that name may be here, and another one
        shipped = ray.get(weights)
        (name,) = shipped.contents
        path = str(_placed(shipped) / name)
        config = config.model_copy(
            update={"model": config.model.model_copy(update={"weights": path})}
        )
    return config


def _placed(shipped: Shipment) -> Path:
    """The folder on this node that has these files, which all that want them share."""
    import getpass
    import tempfile

    from bnexp.atomic import write_atomically
    from bnexp.records.making import place, staged

    parent = Path(tempfile.gettempdir()) / f"bnexp-data-{getpass.getuser()}"
    root = parent / shipped.digest
    if not root.exists():
        with staged(parent) as staging:
            for name, content in shipped.contents.items():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(staging / name, content)
            place(staging, [root])
    return root
