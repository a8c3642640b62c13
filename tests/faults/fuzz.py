"""python tests/faults/fuzz.py --count 10000: mutated options and manifests end in a ValueError or are read, never else.

Nothing is written by it but the mutated file itself: the folder around it is compared before and after.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from onestep.best import kept_in, read_best
from onestep.checkpoint import latest_checkpoint, load_checkpoint, read_weights, save_checkpoint, tell_changed_caches
from onestep.config import TrainConfig, flat, load_config, resolve
from onestep.data.pairs import noted
from onestep.data.shards import Shards
from onestep.log import keep_rows
from onestep.manifest import STATE
from onestep.objectives.dmd2 import DMD2Config

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../../x", "/etc/passwd"]),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=8), each, max_size=3),
    max_leaves=6,
)


class Subject:
    """A file that is mutated, and what reads it. `text` is a sound one, `read` may raise ValueError alone."""

    def __init__(
        self, path: Path, read: Callable[[], object], dump: Callable[[Any], str] = json.dumps, signed: bool = False
    ):
        self.path, self.read, self.dump, self.signed = path, read, dump, signed
        self.content = path.read_bytes()

    def tree(self) -> Any:
        return yaml.safe_load(self.content)

    def write(self, tree: Any) -> None:
        """A changed tree; a manifest is signed again, so that what it says is looked at."""
        if self.signed and isinstance(tree, dict):
            tree = {key: value for key, value in tree.items() if key != "check"}
            tree["check"] = hashlib.sha256(json.dumps(tree).encode()).hexdigest()
        self.path.write_text(self.dump(tree), encoding="utf-8", errors="surrogatepass")


def subjects(root: Path) -> list[Subject]:
    """One of each kind of file, in folders below `root`."""
    run, network = root / "run", torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    checkpoint = save_checkpoint(run / "checkpoints", 3, {"average": network}, {"all": optimizer}, 1, {"pairs": "1"})
    best, shards = run / "checkpoints/best", Shards.build(root, "x", {"a": 1}, 4, lambda a, b: {"x": torch.arange(a, b)}, 2)
    best.mkdir()
    kept = {"step": 1, "metric": "fd", "value": 1.5, "count": 2, "protocol": "p", "file": "a.safetensors", "sha256": "0"}
    (best / STATE).write_text(json.dumps(kept))
    (run / "note.json").write_text(json.dumps({"weights": "0"}))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "lr": 0.1}))
    (run / "config.yaml").write_text(yaml.safe_dump(flat(TrainConfig(), DMD2Config())))

    def resume() -> None:
        latest_checkpoint(run / "checkpoints", aloud=False)
        load_checkpoint(checkpoint, {"average": network}, {"all": optimizer})
        read_weights(checkpoint, "average")
        tell_changed_caches(checkpoint, {"pairs": "1"})

    return [
        Subject(run / "config.yaml", lambda: resolve(DMD2Config, {}, load_config(run), {}), yaml.safe_dump),
        Subject(checkpoint / STATE, resume),
        Subject(checkpoint / STATE, resume, signed=True),
        Subject(best / STATE, lambda: (kept_in(best), read_best(run))),
        Subject(shards.folder / "index.json", lambda: Shards(shards.folder)),
        Subject(run / "note.json", lambda: noted(run / "note.json")),
        Subject(run / "metrics.jsonl", lambda: keep_rows(run / "metrics.jsonl", 5)),
    ]


def snapshot(root: Path, but: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file() and path != but}


def mutated(data: Any, subject: Subject) -> None:
    """Write a mutation of a subject's file: of its bytes, or of what they mean."""
    if data.draw(st.booleans(), "of bytes"):
        content = bytearray(subject.content)
        for _ in range(data.draw(st.integers(1, 4), "changes")):
            place = data.draw(st.integers(0, max(0, len(content) - 1)), "place")
            end = data.draw(st.sampled_from([place, place + 1, place + 7, len(content)]), "end")
            content[place:end] = data.draw(
                st.binary(max_size=4) | st.sampled_from([b"[" * 9999, b"!!python/name:os.x "]), "new"
            )
        subject.path.write_bytes(content)
        return
    tree = subject.tree()
    node, parent, key = tree, None, None
    while isinstance(node, dict | list) and len(node) and (parent is None or data.draw(st.booleans(), "deeper")):
        parent = node
        key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else list(range(len(node)))), "key")
        node = node[key]
    if data.draw(st.booleans(), "removed"):
        del parent[key]
    else:
        parent[key] = data.draw(VALUES, "value")
    subject.write(tree)


def fuzz(count: int, root: Path, number: int = 0) -> int:
    """Read `count` mutations, of all kinds of files alike many; returns how many were refused.

    Raises what a reader raises other than ValueError, and AssertionError where reading has written something.
    """
    found = subjects(root)
    refused = 0
    for subject in found:
        before = snapshot(root, subject.path)
        refused += refusals(subject, -(-count // len(found)), number)
        subject.path.write_bytes(subject.content)
        assert snapshot(root, subject.path) == before, f"reading {subject.path} has written something"
    return refused


def refusals(subject: Subject, count: int, number: int) -> int:
    """How many of `count` mutations of a file are refused."""
    refused = [0]

    @seed(number)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def reads(data: Any) -> None:
        mutated(data, subject)
        try:
            subject.read()
        except ValueError as error:
            assert str(error) and "Traceback" not in str(error)
            refused[0] += 1

    reads()
    return refused[0]


def main() -> int:
    reader = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    reader.add_argument("--count", type=int, default=10000)
    reader.add_argument("--seed", type=int, default=0)
    asked = reader.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        refused = fuzz(asked.count, Path(folder), asked.seed)
    print(f"{asked.count} mutations, {refused} refused with a line, the others read")
    return 0


if __name__ == "__main__":
    sys.exit(main())
