"""Ten thousand configs and overrides, most of them broken, each answered or read as it is typed.

    python tests/campaigns/configs.py [--count 10000] [--seed 0]

Some minutes on one core. Every case must end within LIMIT seconds of processor time in a `Config`
or in one printable line of bounded length, and what is read must be what was written:
  * written: a random config, spelled in many ways (block, flow, quotes, leading zeros, anchors,
    merge keys), must come back with the values it was made of;
  * overridden: an override changes the one key it names, to what an independent reading of the
    text says, or is refused;
  * mutated: a shipped config with characters, lines and YAML's odd corners thrown in; where PyYAML
    reads it too, both agree but for what YAML 1.1 is known to misread;
  * heavy: long, deep and entangled input.
A config that was read is also written, read again and compared. One case in five hundred goes
through the command line, which must end with 0 or 2. Exit code 1 if anything else happens.
"""

from __future__ import annotations

import argparse
import collections
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import yaml

from bnexp.config import load_config
from bnexp.dotted import dotted
from bnexp.errors import UserError

LIMIT = 2.0
HANG = 60
SHIPPED = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
BASE = "data: {name: digits}\nmodel: {name: mlp}\ntraining: {steps: 10}\n"

TEXTS = (
    "a", "no", "null", "~", "010", "1e3", "1:30", "0x10", "2024-01-01", "a b", "a #b", "#a", "a: b",
    "[a", "{a}", "*a", "&a", "!a", "%a", "@a", "`a", "- a", "? a", "a\\b", "a'b", "a''", "<<", "=",
    "é", "日本", "\u2028", "\udcff", "\x7f", "x" * 300, ".inf", "true", "1_0", "'q'", '"q"', "a,b",
)  # fmt: skip
NUMBERS = (
    "0", "1", "7", "010", "0010", "+5", "-1", "1e3", "1E3", "1e-2", "1.0e+2", "0.5", ".5", "5.",
    "0x10", "0o17", "0b11", "1_000", "1:30", "1:30.5", "08", "1,000", "1 000", ".inf", "-.INF",
    ".nan", "nan", "inf", "1e400", "9" * 30, "9" * 400, "9" * 5000, "1" + ":59" * 50, "0.1.2",
    "--1", "1-", "٣", "１", "yes", "null", "", "'5'", '"1e3"', "1e3e3", "1.5", "2147483648", "5 #x",
)  # fmt: skip
FRAGMENTS = (
    "&a ", "*a", "<<: *a", "<<: [*a, *a]", "!!int ", "!!python/object:os.system ", "!x ", "- ",
    "? ", ": ", "\n", "\r\n", "\t", "\0", "\ufeff", "\x85", "\u2028", "'", '"', "\\", "|\n", ">-\n",
    "%YAML 1.1\n", "---\n", "...\n", "#", "[", "]", "{", "}", ",", "010", "1:30", "0x1F", "yes",
    "~", "null", "=", "1e3", "{a: b}", "@", "`", "\U0001f600", '"\\uD800"', '"\\UFFFFFFFF"', "  ",
    "!!binary aGk=", "&a [*a]",
)  # fmt: skip


class Wrong(Exception):
    pass


# ------------------------------------------------------------------------------------ the cases


def written(random: random.Random) -> tuple[str, list[str], dict[str, Any]]:
    """A config in some spelling, and the values it was made of."""
    wanted = {
        "seed": random.randrange(2**32),
        "name": random.choice(("010", "1e3", "a.b", "no", "2024-01-01", "x-1")),
        "data.root": "/" + random.choice([t for t in TEXTS if "/" not in t]),
        "data.augment.flip": random.choice((True, False)),
        "training.steps": random.randrange(1, 2**31),
        "training.batch_size": random.randrange(1, 4096),
        "training.optimizer.lr": random.choice((0.1, 1e-2, 5e-05, 1.0, random.random() + 1e-9)),
        "statistics.decay": random.random(),
    }
    decays = {f"{prefix}{n}": random.random() for n in range(3) for prefix in ("e-0.", "10")}
    tree: dict[str, Any] = {"model": {"name": "mlp"}}
    for key, value in wanted.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    tree["data"]["name"] = "digits"
    anchored = random.random() < 0.5
    lines = []
    for i, (name, decay) in enumerate(decays.items()):
        own = f"rule: ema, debias: true, decay: {spelled(decay, random)}"
        if anchored and i:
            own = f"decay: {spelled(decay, random)}, <<: [*first, {{debias: false, window: 3}}]"
            own = own.replace(", window: 3", "")
        lines.append(f"    {name}: {'&first ' * (anchored and not i)}{{{own}}}")
        wanted[f"statistics.estimators.{name}.decay"] = decay
        wanted[f"statistics.estimators.{name}.debias"] = True
    text = block(tree, random)
    text = re.sub(r"(?m)^statistics:.*\n((  .*\n)*)", "", text)
    text += f"statistics:\n  decay: {spelled(tree['statistics']['decay'], random)}\n  estimators:\n"
    text += "\n".join(lines) + "\n"
    if random.random() < 0.2:
        text = "\ufeff" + text.replace("\n", "\r\n")
    return text, [], wanted


def spelled(value: Any, random: random.Random) -> str:
    if isinstance(value, bool):
        return random.choice(("true", "yes", "On") if value else ("false", "no", "OFF"))
    if isinstance(value, int):
        return random.choice((f"{value}", f"+{value}", f"0{value}", f"000{value}"))
    if isinstance(value, float):
        exact = f"{value:.17e}"
        return random.choice(
            (repr(value), exact, exact.replace("e", "E"), f"0{value!r}", f"+{value!r}")
        )
    plain = (
        re.fullmatch(r"[\w./][\w./ -]*", value) and value.strip() == value and value.isprintable()
    )
    single = value.isprintable() and "'" + value.replace("'", "''") + "'"
    escaped = "".join(
        c if 32 <= ord(c) < 127 and c not in '"\\' else f"\\U{ord(c):08X}" for c in value
    )
    return random.choice([s for s in (plain and value, single, f'"{escaped}"') if s])


def block(tree: dict[str, Any], random: random.Random, indent: str = "") -> str:
    text = ""
    for key, value in random.sample(list(tree.items()), len(tree)):
        if isinstance(value, dict) and (random.random() < 0.5 or not indent):
            text += f"{indent}{key}:\n{block(value, random, indent + '  ')}"
        elif isinstance(value, dict):
            inner = ", ".join(f"{k}: {spelled(v, random)}" for k, v in value.items())
            text += f"{indent}{key}: {{{inner}}}\n"
        else:
            text += f"{indent}{key}: {spelled(value, random)}{random.choice(('', ' # c'))}\n"
    return text


KEYS = {
    "seed": int, "training.steps": int, "training.batch_size": int, "test.every": int,
    "training.optimizer.lr": float, "statistics.decay": float, "checkpoints.every_seconds": float,
    "training.epochs": float, "name": str, "data.root": Path, "model.name": str, "device": str,
    "statistics.recompute.memory": str, "data.name": str, "data.augment.flip": bool,
}  # fmt: skip
LENGTH = {"training.steps", "training.epochs"}


def overridden(random: random.Random) -> tuple[str, list[str], dict[str, Any]]:
    key = random.choice(list(KEYS))
    text = random.choice(NUMBERS + TEXTS)
    if random.random() < 0.3:
        text += random.choice(NUMBERS + TEXTS)
    wanted: dict[str, Any] = {"*": key}
    if KEYS[key] in (str, Path):
        if text[:1] not in ("'", '"') and text not in ("", "null"):
            wanted[key] = text
    elif KEYS[key] is not bool:
        plain = re.sub(r" #.*", "", text).strip().strip("'\"").replace("_", "")
        pattern = r"[-+]?\d+" if KEYS[key] is int else r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
        number = re.fullmatch(pattern, plain, re.ASCII)
        if not {"'", '"'} & {*text}:
            wanted[key] = KEYS[key](plain) if number and len(plain) < 300 else "refused or null"
    return BASE, [f"{key}={text}"], wanted


def mutated(random: random.Random) -> tuple[str, list[str], dict[str, Any]]:
    text = random.choice(SHIPPED).read_text()
    for _ in range(random.randrange(1, 6)):
        at, kind = random.randrange(len(text) + 1), random.random()
        lines = text.splitlines(keepends=True)
        if kind < 0.4:
            text = text[:at] + random.choice(FRAGMENTS + TEXTS) + text[at:]
        elif kind < 0.55:
            text = text[:at] + text[at + random.randrange(1, 40) :]
        elif kind < 0.65:
            text = (
                text[:at]
                + chr(random.choice((0, 9, 13, 0x7F, 0xFEFF, 0xFFFE, 0x1F600)))
                + text[at:]
            )
        elif kind < 0.8:
            values = list(re.finditer(r"(?<=: )[^\s,}{]+", text))
            if values:
                value = random.choice(values)
                new = random.choice(NUMBERS + TEXTS)
                text = text[: value.start()] + new + text[value.end() :]
        elif kind < 0.9:
            text = "".join(
                [*lines[: len(lines) // 2], random.choice(lines), *lines[len(lines) // 2 :]]
            )
        else:
            random.shuffle(lines)
            text = "".join(lines)
    return text, [], {}


def bomb(form: str, innermost: str) -> str:
    inner = [innermost] + [", ".join([f"*a{i}"] * 9) for i in range(30)]
    return "\n".join(f"a{i}: &a{i} {form.format(text)}" for i, text in enumerate(inner))


def heavy(random: random.Random) -> tuple[str, list[str], dict[str, Any]]:
    size = random.choice((300, 5_000, 60_000))
    kinds = [
        "name: " + "[" * size + "]" * size,
        "name: " + "{a: " * size,
        "- " * size,
        "? " * size,
        "\n".join(" " * i + "a:" for i in range(min(size, 700))),
        "name: " + "x" * size,
        "x" * size + ": 1",
        "seed: 1" + ":59" * size,
        "seed: " + "9" * size,
        "test: {statistics: [" + "batch, " * size + "]}",
        "statistics: {estimators: {" + ", ".join(f"{i}: {{rule: ema}}" for i in range(size)) + "}}",
        bomb("[{}]", "xx"),
        bomb("{{<<: [{}]}}", "{x: y}"),
        "statistics: {recompute: {memory: " + "9" * size + "x}}",
        "&a " * size,
        "!" + "x" * size + " 1",
        "*" + "x" * size,
        "%TAG ! " + "x" * size + "\n---\n1",
        'name: "' + "\\x00" * size + '"',
        "name: |\n" + " x\n" * size,
        "#" * size,
        "data: {root: " + "/a" * size + "}",
    ]  # fmt: skip
    text = random.choice(kinds)
    if random.random() < 0.5:
        return BASE + text, [], {}
    key = random.choice([*KEYS, "a." * size + "a", "training.optimizer", "x" * size])
    return BASE, [f"{key}={text.partition(': ')[2] or text}"], {}


# ------------------------------------------------------------------------------------ the checks


def check(text: str, overrides: list[str], wanted: dict[str, Any], folder: Path) -> str:
    path = folder / "case.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        config = load_config(path, overrides)
    except UserError as error:
        message = str(error)
        if not message.isprintable() or len(message) > 2000:
            raise Wrong(
                f"the answer is not one line of bounded length: {message[:300]!r}"
            ) from None
        if wanted and not overrides:
            raise Wrong(f"refused: {message}") from None
        return "refused"
    again = folder / "again.yaml"
    again.write_text(config.to_yaml())
    if load_config(again) != config:
        raise Wrong("written and read again, it is another config")
    found = dotted(config.model_dump(mode="json"))
    if overrides and "*" in wanted:
        compare_override(found, wanted, folder)
    elif wanted:
        for key, value in wanted.items():
            if found[key] != value or type(found[key]) is not type(value):
                raise Wrong(f"{key}: {value!r} was written, {found[key]!r} read")
    elif not overrides:
        compare_with_pyyaml(text, found)
    return "read"


def compare_override(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    key = wanted["*"]
    path = folder / "case.yaml"
    path.write_text(BASE)
    before = dotted(load_config(path).model_dump(mode="json"))
    allowed = LENGTH if key in LENGTH else {key}
    if others := [k for k in found | before if found.get(k) != before.get(k) and k not in allowed]:
        raise Wrong(f"the override of {key} changed {others}")
    if key not in wanted or found[key] is None:
        return
    value = wanted[key]
    if KEYS[key] is Path:
        value = str(Path(value).expanduser().absolute())
    if found[key] != value:
        raise Wrong(f"{key}: {value!r} was typed, {found[key]!r} read")


MISREAD = re.compile(r"[-+]?(0[0-9_]+|0b[01_]+|0x[0-9a-fA-F_]+|[0-9_]+(:[0-5]?[0-9])+(\.[0-9_]*)?)")


def compare_with_pyyaml(text: str, found: dict[str, Any]) -> None:
    """Where PyYAML reads a text, a number or a constant, so do we; YAML 1.1's own numbers aside."""
    try:
        tree = yaml.safe_load(text)
        leaves = dotted(tree)
    except Exception:
        return
    scalars = {event.value for event in yaml.parse(text) if isinstance(event, yaml.ScalarEvent)}
    if "<<" in scalars or any(MISREAD.fullmatch(scalar) for scalar in scalars):
        return
    for key, value in leaves.items():
        there = found.get(key)
        if key == "data.root" or isinstance(there, dict | list | tuple) or key not in found:
            continue
        if isinstance(there, bool) and isinstance(value, str | int):
            continue
        if isinstance(there, str) and not isinstance(value, str):
            continue  # a text by the schema
        if isinstance(there, int | float) and isinstance(value, str):
            value = float(value)
        if there != value:
            raise Wrong(f"{key}: PyYAML reads {value!r}, we {there!r}")


def through_the_command_line(text: str, overrides: list[str], folder: Path) -> str:
    path = folder / "case.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    command = [sys.executable, "-m", "bnexp", "config", str(path), *overrides]
    try:
        done = subprocess.run(command, capture_output=True, timeout=HANG)
    except (ValueError, OSError):  # a NUL, or longer than the system's arguments may be
        return "no command"
    lines = done.stderr.decode(errors="replace").splitlines()
    if done.returncode not in (0, 2) or len(lines) != (done.returncode == 2):
        raise Wrong(f"exit code {done.returncode}: {lines[-3:]}")
    return "command"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    def hang(*_) -> None:
        raise Wrong(f"no answer after {HANG} seconds")

    signal.signal(signal.SIGALRM, hang)
    kinds = {written: 3, overridden: 3, mutated: 3, heavy: 1}
    outcomes: collections.Counter[str] = collections.Counter()
    wrong, slowest, started = 0, (0.0, ""), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(arguments.count):
            chance = random.Random(f"{arguments.seed}/{number}")
            (kind,) = chance.choices(list(kinds), list(kinds.values()))
            case = kind(chance)
            signal.alarm(HANG)
            began = time.process_time()
            try:
                outcome = check(*case, Path(temporary))
                took = time.process_time() - began
                slowest = max(slowest, (took, f"case {number}, {kind.__name__}"))
                if took > LIMIT:
                    raise Wrong(f"took {took:.1f} s")
                if number % 500 == 0:
                    outcomes[through_the_command_line(*case[:2], Path(temporary))] += 1
            except Wrong as error:
                outcome = "WRONG"
                report(number, kind, case, str(error))
            except Exception:
                outcome = "TRACEBACK"
                report(number, kind, case, traceback.format_exc())
            finally:
                signal.alarm(0)
            wrong += outcome.isupper()
            outcomes[f"{kind.__name__}: {outcome}"] += 1
            if "-v" in sys.argv:
                print(
                    number,
                    kind.__name__,
                    round(time.process_time() - began, 2),
                    outcome,
                    flush=True,
                )
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:7,}  {outcome}")
    print(
        f"{arguments.count:,} cases in {time.monotonic() - started:.0f} s, {wrong} of them wrong; "
        f"the slowest took {slowest[0]:.2f} s ({slowest[1]})"
    )
    return 1 if wrong else 0


def report(number: int, kind, case: tuple, what: str) -> None:
    print(f"case {number} ({kind.__name__}): {what}")
    print(f"  {ascii(case[0])[:600]}\n  {ascii(case[1])[:300]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
