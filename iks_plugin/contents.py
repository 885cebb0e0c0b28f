"""What is in a compact file: a table of its tensors, totals, and whether their checksums are right."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from . import container
from .container import FileInfo
from .entries import ALIAS, SPARSE, Entry
from .errors import IksError
from .table import table


@dataclass(frozen=True)
class Contents:
    """A compact file's own words, its entries, and the names of those whose checksum is wrong."""

    path: str
    size: int
    info: FileInfo
    entries: tuple[Entry, ...]
    damaged: tuple[str, ...]

    @property
    def dense_size(self) -> int:
        """Bytes of all tensors in memory."""
        return sum(entry.dense_nbytes for entry in self.entries)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers, ready for json."""
        return {
            "path": self.path,
            "size": self.size,
            "dense_size": self.dense_size,
            **asdict(self.info),
            "entries": [{**entry.to_json(), "bytes": entry.nbytes, "zeros": entry.zeros} for entry in self.entries],
            "damaged": list(self.damaged),
        }

    def __str__(self) -> str:
        header = ("tensor", "kind", "shape", "type", "zeros", "bytes", "of dense", "checksum")
        rows = [self._cells(entry) for entry in self.entries]
        sparse = [entry for entry in self.entries if entry.kind == SPARSE]
        weights, zeros = sum(entry.numel for entry in sparse), sum(entry.zeros for entry in sparse)
        target = self.info.target_sparsity
        goal = "" if target is None else f", made sparse for a target of {target:.2%}"
        lines = [
            f"{self.path}: written by iks-plugin {self.info.plugin_version}, values in {self.info.value_dtype}",
            f"model: {self.info.model_class or 'a bare state dict'}{goal}",
            "",
            table(header, rows, right={4, 5, 6}),
            "",
        ]
        if sparse:
            lines.append(f"sparse weights ({len(sparse)}): {zeros:,} of {weights:,} are zero, {zeros / weights:.2%}")
        ratio = f", {self.dense_size / self.size:.1f} times smaller" if self.size < self.dense_size else ""
        lines.append(f"file: {self.size:,} bytes; its tensors take {self.dense_size:,} when dense{ratio}")
        right = len(self.entries) - len(self.damaged)
        lines.append(f"checksums: {right} of {len(self.entries)} are right")
        return "\n".join(lines)

    def _cells(self, entry: Entry) -> tuple[str, ...]:
        stored = entry.dtype if entry.stored in (None, entry.dtype) else f"{entry.dtype} as {entry.stored}"
        share = entry.nbytes / entry.dense_nbytes if entry.dense_nbytes else 0.0
        return (
            entry.name,
            f"same as {entry.alias_of}" if entry.kind == ALIAS else entry.kind,
            "x".join(map(str, entry.shape)) or "scalar",
            stored,
            f"{entry.zeros / entry.numel:.2%}" if entry.kind == SPARSE and entry.numel else "",
            f"{entry.nbytes:,}",
            f"{share:.1%}" if entry.dense_nbytes else "",
            "WRONG" if entry.name in self.damaged else "right",
        )


def inspect(path: str | os.PathLike[str]) -> Contents:
    """Read what the compact file at `path` says of itself, and check the checksum of every tensor.

    Raises:
        IksError: there is no such file, it is no compact file, or its index is damaged.
    """
    with container.opened(path) as file:
        damaged = []
        for entry in file.entries:
            try:
                file.check(entry)
            except IksError:
                damaged.append(entry.name)
        return Contents(os.fspath(path), file.size, file.info, file.entries, tuple(damaged))
