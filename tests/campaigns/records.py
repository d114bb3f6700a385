"""Damaged records, read by every command that reads records, for as long as is asked for.

    python tests/campaigns/records.py [--seconds 600] [--seed 0] [--only NUMBER]

A small experiment and an audit are made once. Each case damages a copy: bytes (cut off, flipped,
zeroed, doubled, swapped with another file's), texts (hostile ones, other types, other ranges, keys
gone), tensors behind a right checksum, and the folder itself (links out of it, loops, pipes,
devices, sockets, folders in place of files). Then commands run on it, most of them in this process,
some as processes of their own. Each must end within LIMIT seconds, with what it says on purpose:
  * exit code 0, 1 or 2, and after 1 or 2 one printable line; never a traceback;
  * nothing outside of the record is made, changed or removed;
  * `runs` lists the other record whatever this one holds;
  * `eval`, `export` and `train --resume` say what the undamaged record says, or a line about it;
  * a number of comparison.json that others in it belie is not shown;
  * a page has no markup of a stranger's, no NaN, and no share above 100 %.
Exit code 1 if anything else happens.
"""

from __future__ import annotations

import argparse
import collections
import copy
import csv
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT = 300
REAL = 50  # of so many cases, one in processes of their own
CONFIG = """
name: r
data: {name: digits, limit: {train: 100, test: 60}, val_fraction: 0.2}
model: {name: mlp}
statistics:
  estimators: {ema-0.5: {rule: ema, decay: 0.5}, window: {rule: pooled, window: 3}}
training: {steps: 12, batch_size: 16, averages: {ema: {decay: 0.9}}}
test: {every: 4, statistics: [running, recomputed]}
checkpoints: {every_steps: 4}
"""
MORE = "training.steps=16"
AUDIT = """
import bnexp, torch
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=0.01), nn.ReLU(), nn.Flatten(),
                    nn.Linear(144, 12), nn.BatchNorm1d(12, momentum=0.01), nn.Linear(12, 3))
def batches(n):
    y = torch.randint(3, (n,))
    x = torch.randn(n, 1, 8, 8) + y[:, None, None, None]
    return list(zip(x.split(32), y.split(32)))
for _ in range(3):
    for x, y in batches(256):
        net.zero_grad(); nn.functional.cross_entropy(net(x), y).backward()
        with torch.no_grad():
            for p in net.parameters(): p -= 0.1 * p.grad
bnexp.audit(net, batches(256), batches(128), batch=True).save("runs/a-1")
"""
TEXTS = (
    "", "x", "<script>alert(1)</script>", "[/red]", "[bold]", "\x1b[31m", "a\nb", "\0", "\udcff",
    "²", "٣", "../../victim/a", "/dev/zero", "x" * 100_000, "{{ 7*7 }}", "\u202e", "running",
    "best", "recomputed/exact", "swa/running", "1e999", "True", "null", "&amp;", "'\"", "\u2028",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 0.5, -0.5, 1.5, 1e-320, 1e308, -1e308, 2**31, 2**53, 2**63,
    10**4000, float("nan"), float("inf"), [], {}, [[]], [None], {"a": {}}, [1e308] * 50, *TEXTS,
)  # fmt: skip


KINDS = ("missing", "folder", "pipe", "loop", "out", "new", "device", "socket", "hard")
LITTER = (
    ".x.tmp", "step-000000099.pt", "step-00000000²0.pt", "best-on-test.pt", "a\nb", "\udcff.pt",
    "accuracy.svg", ".lock", "results.png", "report.html",
)  # fmt: skip


class Wrong(Exception):
    pass


# ---------------------------------------------------------------------------------- the damages


def of_bytes(path: Path, chance: random.Random) -> str:
    content = bytearray(path.read_bytes())
    at, size = chance.randrange(len(content) + 1), chance.choice((1, 4, 30, 600))
    kind = chance.choice(("cut", "flip", "zero", "double", "insert", "shuffle", "other", "empty"))
    if kind == "cut":
        del content[at:]
    elif kind == "empty":
        content.clear()
    elif kind == "flip":
        for _ in range(chance.choice((1, 1, 5, 100)) if content else 0):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif kind == "zero":
        content[at : at + size] = bytes(len(content[at : at + size]))
    elif kind == "double":
        content[at:at] = content[at : at + size]
    elif kind == "insert":
        content[at:at] = chance.choice(TEXTS).encode("utf-8", "surrogatepass")
    elif kind == "shuffle":
        lines = bytes(content).split(b"\n")
        chance.shuffle(lines)
        content = bytearray(b"\n".join(lines))
    else:
        others = [p for p in path.parent.rglob("*") if p.is_file() and p != path]
        content = bytearray(chance.choice(others).read_bytes() if others else b"")
    path.write_bytes(content)
    return kind


def places(tree: Any, where: tuple = ()) -> list[tuple]:
    """The paths to everything in a tree of dicts and lists."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [p for key in keys for p in [(*where, key), *places(tree[key], (*where, key))]]


def of_a_tree(tree: Any, chance: random.Random) -> str:
    """Change one thing in place; said."""
    if not (found := places(tree)):
        return "nothing"
    *parents, key = chance.choice(found)
    node = leaf(tree, parents)
    kind = chance.choice(("value", "value", "value", "gone", "doubled", "nested", "scaled"))
    where = ".".join(map(str, (*parents, key)))
    if kind == "gone":
        del node[key]
    elif kind == "doubled" and isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
    elif kind == "nested":
        node[key] = {"a": node[key]} if chance.random() < 0.5 else [node[key]]
    elif kind == "scaled" and isinstance(node[key], int | float) and math.isfinite(node[key]):
        node[key] = type(node[key])(node[key] * chance.choice((2, -1, 0.5, 1000)))
    else:
        node[key] = chance.choice(VALUES)
    return f"{kind} of {where} is {ascii(node.get(key) if isinstance(node, dict) else '…')[:80]}"


def of_json(path: Path, chance: random.Random) -> str:
    tree = json.loads(path.read_text())
    said = [of_a_tree(tree, chance) for _ in range(chance.choice((1, 1, 1, 3)))]
    sys.set_int_max_str_digits(0)
    path.write_bytes(json.dumps(tree).encode("utf-8", "surrogatepass"))
    sys.set_int_max_str_digits(4300)
    return "; ".join(said)


def of_yaml(path: Path, chance: random.Random) -> str:
    import yaml

    tree = yaml.safe_load(path.read_text())
    said = of_a_tree(tree, chance)
    sys.set_int_max_str_digits(0)
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), errors="replace")
    sys.set_int_max_str_digits(4300)
    return said


def of_csv(path: Path, chance: random.Random) -> str:
    rows = [line.split(",") for line in path.read_text().splitlines()]
    row = rows[chance.randrange(len(rows))]
    i = chance.randrange(len(row))
    numbers = ("nan", "-1", "1e308", "9" * 30, "9" * 5000, "0.5", "2", "1_0", " 3", "0x1", '"')
    row[i] = chance.choice((*TEXTS, *numbers))
    if chance.random() < 0.1:
        row.append("1")
    path.write_bytes("\n".join(map(",".join, rows)).encode("utf-8", "surrogatepass") + b"\n")
    return f"cell {i} is {ascii(row[i])[:60]}"


def of_tensors(path: Path, chance: random.Random) -> str:
    """Other content behind a right checksum."""
    import torch

    tree = torch.load(path, weights_only=True)
    tensors = [p for p in places(tree) if isinstance(leaf(tree, p), torch.Tensor)]
    if tensors and chance.random() < 0.6:
        *parents, key = chance.choice(tensors)
        node = leaf(tree, parents)
        value = node[key]
        node[key] = chance.choice((
            lambda t: t.double() if t.is_floating_point() else t.float(),
            lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t - 10**6,
            lambda t: -t.abs() - 1 if t.is_floating_point() else ~t,
            lambda t: t.flatten()[:-1],
            lambda t: t[None],
            lambda t: t.to_sparse() if t.dim() else t.bool(),
            lambda t: t.expand(2, *t.shape),
            lambda t: t.tolist(),
        ))(value)  # fmt: skip
        said = f"tensor {'.'.join(map(str, (*parents, key)))}"
    else:
        said = of_a_tree(tree, chance)
    torch.save(tree, path)
    return said


def leaf(tree: Any, path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def of_the_folder(path: Path, chance: random.Random) -> str:
    victim = Path("victim").absolute()
    kind = chance.choice(KINDS)
    content = path.read_bytes() if path.is_file() else b""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if kind == "folder":
        (path / "inside").mkdir(parents=True)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind in ("out", "hard"):
        (victim / "copy").write_bytes(content)
        path.symlink_to(victim / "copy") if kind == "out" else os.link(victim / "copy", path)
    elif kind == "new":
        path.symlink_to(victim / "new")
    elif kind == "device":
        path.symlink_to(chance.choice(("/dev/zero", "/dev/null", "/dev/tty")))
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)
        socket.socket(socket.AF_UNIX).bind(path.name[:90])
        os.chdir(here)
    return kind


def linked_folder(record: Path, chance: random.Random) -> str:
    name = chance.choice(("checkpoints", "figures", "tensorboard", "statistics"))
    target = Path("victim").absolute() / name
    if (record / name).is_dir():
        shutil.copytree(record / name, target)
        shutil.rmtree(record / name)
    else:
        target.mkdir()
    (target / "step-999999999.pt").write_text("mine")
    (target / ".mine.tmp").write_text("mine")
    (record / name).symlink_to(target)
    return f"{name} is a link"


def litter(record: Path, chance: random.Random) -> str:
    folder = chance.choice((record, record / "checkpoints", record / "figures"))
    folder.mkdir(exist_ok=True)
    name = chance.choice(LITTER)
    if (folder / name).is_file():
        (folder / name).unlink()
    return f"{name!a} in {folder.name}: {of_the_folder(folder / name, chance)}"


def damage(record: Path, chance: random.Random) -> str:
    files = sorted(p for p in record.rglob("*") if p.is_file() and not p.is_symlink())
    path = chance.choice(files)
    own: dict[str, Callable[[Path, random.Random], str]] = {
        ".json": of_json, ".yaml": of_yaml, ".csv": of_csv, ".pt": of_tensors,
    }  # fmt: skip
    kind = chance.random()
    if kind < 0.04:
        return linked_folder(record, chance)
    if kind < 0.1:
        return litter(record, chance)
    if kind < 0.25:
        return f"{path.name}: {of_the_folder(path, chance)}"
    if kind < 0.5 or path.suffix not in own:
        return f"{path.name}: bytes, {of_bytes(path, chance)}"
    if kind < 0.6:
        path = record / "comparison.json"
    return f"{path.name}: {own[path.suffix](path, chance)}"


# ---------------------------------------------------------------------------------- the commands


def in_process(arguments: list[str]) -> tuple[int, str, str]:
    from bnexp.cli import main

    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", errors="replace") for _ in range(2)]
    kept = sys.argv, sys.stdout, sys.stderr
    sys.argv, (sys.stdout, sys.stderr) = ["bnexp", *arguments], streams
    try:
        with warnings.catch_warnings():
            main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv, sys.stdout, sys.stderr = kept
        for stream in streams:
            stream.flush()
    return (code, *(s.buffer.getvalue().decode(errors="replace") for s in streams))


def as_a_process(arguments: list[str]) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "bnexp", *arguments]
    done = subprocess.run(command, capture_output=True, timeout=LIMIT, stdin=subprocess.DEVNULL)
    return (done.returncode, *(t.decode(errors="replace") for t in (done.stdout, done.stderr)))


def content_of(folder: Path, without: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path == without or without in path.parents:
            continue
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path)] = "folder"
    return found


def result_of_training(record: Path) -> tuple:
    evals = [row[:6] for row in csv.reader((record / "evals.csv").read_text().splitlines())]
    comparison = json.loads((record / "comparison.json").read_text())
    return (record / "steps.csv").read_text(), evals, comparison


class Campaign:
    def __init__(self, folder: Path):
        self.folder = folder
        os.chdir(folder)
        Path("c.yaml").write_text(CONFIG)
        for arguments in (["train", "c.yaml", "-q"], ["train", "c.yaml", "-q", "--name", "other"]):
            code, _, said = as_a_process(arguments)
            assert code == 0, said
        subprocess.run([sys.executable, "-c", AUDIT], check=True)
        Path("runs").rename("whole")
        self._fresh("r-1")
        kinds = json.loads(self._must(["eval", "r-1", "--json"]))["kinds"]
        self.evaluated = {kind["name"]: (kind["accuracy"], kind["loss"]) for kind in kinds}
        self._must(["train", "--resume", "r-1", MORE, "-q"])
        self.resumed = result_of_training(Path("runs/r-1"))
        (Path("runs/r-1") / "state.json").unlink()

    def _must(self, arguments: list[str]) -> str:
        code, out, said = in_process(arguments)
        assert code == 0, said
        return out

    def _fresh(self, name: str) -> Path:
        for folder in ("runs", "victim"):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree("whole", "runs")
        Path("victim").mkdir()
        for left in ("o.html", "o.pt"):
            Path(left).unlink(missing_ok=True)
        return self.folder / "runs" / name

    def case(self, number: int, seed: int) -> tuple[str, list[str]]:
        """What was damaged, and how each command ended. Wrong, with the command, if not well."""
        chance = random.Random(f"{seed}/{number}")
        name = chance.choice(("r-1", "r-1", "r-1", "a-1"))
        record = self._fresh(name)
        self.said = said = damage(record, chance)
        light = [
            ["runs", "--json"], ["runs"], ["report", name], ["compare", name, "other-1", "--json"],
            ["compare", name, "other-1"], ["report", name, "other-1", "-o", "o.html"],
        ]  # fmt: skip
        heavy = [["eval", name, "--json"], ["export", name, "o.pt"]]
        if number % 10 == 0:
            heavy.append(["report", name, "--format", "svg"])
        board = ["logging.tensorboard=true"] * (number % 4 == 0)
        train = ["train", "--resume", name, MORE, "-q", *board]
        chosen = chance.sample(light, 2)
        if chance.random() < 0.3:  # those that read checkpoints last, as they may mend the record
            chosen.append(chance.choice([*heavy, train, train]))
        run = as_a_process if number % REAL == 0 else in_process
        ends = []
        for command in chosen:
            outside = content_of(self.folder, record)
            try:
                signal.alarm(LIMIT)
                code, out, err = run(command)
            except Wrong as hang:
                raise Wrong(f"{said} | {' '.join(command)}: {hang}") from None
            except BaseException:
                trace = traceback.format_exc()
                raise Wrong(f"{said} | {' '.join(command)}: TRACEBACK {trace[-1500:]}") from None
            finally:
                signal.alarm(0)
            try:
                self.check(command, code, out, err, name)
                for left in ("o.html", "o.pt"):
                    if left in command:
                        Path(left).unlink(missing_ok=True)
                now = content_of(self.folder, record)
                if now != outside:
                    changed = [p for p in now | outside if now.get(p) != outside.get(p)]
                    raise Wrong(f"changed outside: {changed}")
            except Wrong as error:
                raise Wrong(f"{said} | {command}: {error} [exit {code}] {err[-300:]}") from None
            ends.append(f"{command[0]} {code}")
        return said, ends

    def check(self, command: list[str], code: int, out: str, err: str, name: str) -> None:
        lines = err.splitlines()
        if code not in (0, 1, 2) or "Traceback" in err:
            raise Wrong(f"exit code {code}")
        if code:
            if not lines or not lines[-1].startswith("bnexp: ") or len(lines[-1]) > 2100:
                raise Wrong("no line says why")
            if not lines[-1].isprintable():
                raise Wrong("the line is not printable")
            if command[0] == "runs":
                raise Wrong("runs failed")
            return
        if command[:2] == ["runs", "--json"] and name == "r-1":
            states = {row["name"]: row["state"] for row in json.loads(out)}
            if states.get("other-1") != "finished":
                raise Wrong(f"the other run is not listed: {states}")
        if "\x1b" in out or "\x1b" in err:
            raise Wrong("control characters reach the terminal")
        warned = any("bnexp: " in line or "damaged" in line for line in lines)
        if command[0] == "eval" and not warned:
            found = json.loads(out)
            for kind in found["kinds"]:  # without evals.csv it may not be known to be quick
                if (kind["accuracy"], kind["loss"]) != self.evaluated.get(kind["name"]):
                    raise Wrong(f"evaluates to something else: {kind['name']}")
        if command[0] == "train" and not warned and "tensorboard" not in command[-1]:
            found = result_of_training(Path("runs/r-1"))
            if found != self.resumed:
                same = [a == b for a, b in zip(found, self.resumed, strict=True)]
                which = f"steps, evals, comparison are the same: {same}"
                raise Wrong(f"goes on to something else: {which}")
        if command[0] == "report" and out.strip().endswith(".html"):
            page = Path(out.strip().splitlines()[-1]).read_text()
            visible = re.sub(r"<style.*?</style>|<pre.*?</pre>|<[^>]*>", " ", page, flags=re.S)
            if "<script" in page:
                raise Wrong("a stranger's markup")
            if re.search(r"[ >(]-?(nan|inf)[ <%),]", visible):
                raise Wrong("NaN or infinity on the page")
            if high := [p for p in re.findall(r"(\d+\.\d+) ?%", visible) if float(p) > 100]:
                raise Wrong(f"shares above 100 %: {high}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case, by its number")
    parser.add_argument("-v", action="store_true", help="say every case")
    arguments = parser.parse_args()

    def hang(*_) -> None:
        raise Wrong(f"no answer after {LIMIT} seconds")

    signal.signal(signal.SIGALRM, hang)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ends: collections.Counter[str] = collections.Counter()
    wrong = number = 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        campaign = Campaign(Path(temporary))
        while time.monotonic() - started < arguments.seconds:
            if arguments.only is not None:
                number = arguments.only
            try:
                said, found = campaign.case(number, arguments.seed)
                ends.update(found)
            except Wrong as error:
                wrong += 1
                said, found = str(error), []
                print(f"case {number}: {ascii(said)[1:-1][:2500]}", flush=True)
            if arguments.v:
                print(number, ascii(said)[:200], found, flush=True)
            number += 1
            if arguments.only is not None:
                break
        os.chdir("/")
    for end, count in sorted(ends.items()):
        print(f"{count:7,}  {end}")
    print(f"{number:,} cases in {time.monotonic() - started:.0f} s, {wrong} of them wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
