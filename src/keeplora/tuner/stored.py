"""What a learner leaves in its ledger and reads again when it needs it: U's pieces, and factors whose sum it holds."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from keeplora.errors import LedgerError
from keeplora.math import Subspace
from keeplora.tuner.adapter import Factors


class StoredTensors(Mapping[str, Tensor]):
    """The tensors ``KIND/NAME`` of a safetensors file by NAME, read one at a time and never held.

    Raises:
        LedgerError: the file is gone or no longer readable.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self._path, self._prefix = path, f"{kind}/"
        self._file: safe_open | None = None
        with self._open() as file:
            keys = [key for key in list(file.keys()) if key.startswith(self._prefix)]
            self._shapes = {key.removeprefix(self._prefix): tuple(file.get_slice(key).get_shape()) for key in keys}

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._shapes[name]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._shapes:
            raise KeyError(name)
        with self._open() as file:
            try:
                found = file.get_tensor(self._prefix + name)
            except SafetensorError as error:
                raise LedgerError(f"{self._path} was changed while it was in use ({error}); restore it") from None
        if tuple(found.shape) != self._shapes[name]:
            raise LedgerError(f"{self._path} was changed while it was in use: {name} has another shape; restore it")
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._shapes  # a Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """The file stays open inside, for many tensors of it."""
        with self._open() as self._file:
            try:
                yield
            finally:
                self._file = None

    def _open(self) -> contextlib.AbstractContextManager[safe_open]:
        if self._file is not None:
            return contextlib.nullcontext(self._file)
        try:
            return safe_open(self._path, framework="pt")
        except (FileNotFoundError, SafetensorError, OSError) as error:
            raise LedgerError(
                f"{self._path} cannot be read ({error}): the learner goes on from its ledger, which must stay where it is"
            ) from None


MOST_OPEN = 128
"""Files that `opened` holds at a time: systems allow a process some hundreds."""


@contextlib.contextmanager
def opened(groups: Iterable[object]) -> Iterator[None]:
    """Those of ``groups`` that are stored are opened once, and not for each tensor; the first `MOST_OPEN` of them."""
    with contextlib.ExitStack() as stack:
        for group in itertools.islice((g for g in groups if isinstance(g, StoredTensors)), MOST_OPEN):
            stack.enter_context(group.opened())
        yield


class StoredStart(Mapping[str, Subspace]):
    """The pieces of U₀ in a ledger's ``base.safetensors``, read one at a time and never held."""

    def __init__(self, path: Path) -> None:
        self._columns, self._complements = StoredTensors(path, "basis"), StoredTensors(path, "complement")

    def __getitem__(self, name: str) -> Subspace:
        if name in self._complements:
            return Subspace(self._complements[name], True)
        return Subspace.of(self._columns[name])

    def __contains__(self, name: object) -> bool:
        return name in self._columns or name in self._complements

    def __iter__(self) -> Iterator[str]:
        yield from self._columns
        yield from self._complements

    def __len__(self) -> int:
        return len(self._columns) + len(self._complements)

    def dims(self) -> dict[str, tuple[int, int]]:
        """(in, p) per layer, from the file's header alone."""
        found = {}
        for name in self:
            n, c = (self._complements if name in self._complements else self._columns).shape(name)
            found[name] = (n, n - c if name in self._complements else c)
        return found


class StoredFactors(Factors):
    """A task's A and B of one layer, read from its tensors' file each time that they are asked for.

    Args:
        A, B: the file's tensors of that kind. name: the layer. s: the scale, which the record tells.
    """

    def __init__(self, A: StoredTensors, B: StoredTensors, name: str, s: float) -> None:
        for key, value in (("_A", A), ("_B", B), ("_name", name), ("s", s)):
            object.__setattr__(self, key, value)  # a frozen dataclass

    @property
    def A(self) -> Tensor:  # type: ignore[override]
        return self._tensors("_A")[self._layer]

    @property
    def B(self) -> Tensor:  # type: ignore[override]
        return self._tensors("_B")[self._layer]

    def numel(self) -> int:
        """Entries of A and B; nothing is read."""
        shapes = [self._tensors(kind).shape(self._layer) for kind in ("_A", "_B")]
        return sum(rows * columns for rows, columns in shapes)

    @property
    def _layer(self) -> str:
        return str(self.__dict__["_name"])

    def _tensors(self, kind: str) -> StoredTensors:
        found = self.__dict__[kind]
        assert isinstance(found, StoredTensors)
        return found
