"""Real text as tokens: bytes of files, one stream, one global order of samples for every layout."""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from planner.layout import Layout
from profiles.errors import InvalidInputError, UnsupportedError

VOCAB = 256
"""Token ids are bytes."""
SEPARATOR = b"\0"
"""Stands between documents; text has no such byte, and a file that does is skipped as binary."""
STANDARD_LIBRARY_BYTES = 8_000_000
STANDARD_LIBRARY = "Python standard library"
_PROBE_BYTES = 8192
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStream:
    """All tokens, document behind document; `name` says in words where they come from."""

    name: str
    tokens: Bytes

    def digest(self) -> str:
        """Return the SHA-256 of the tokens, in hexadecimal."""
        return hashlib.sha256(self.tokens.data).hexdigest()

    def num_samples(self, seq_len: int) -> int:
        """Return how many windows of `seq_len` inputs, each with its targets, do not overlap."""
        return (len(self.tokens) - 1) // seq_len


def load_stream(path: Path | None) -> TokenStream:
    """Return the text of `path`, a file or a folder, or of Python's standard library for None.

    A folder is read recursively in sorted order; hidden and binary files are left out. Raises
    InvalidInputError where there is nothing to read.
    """
    try:
        return _standard_library() if path is None else _stream(path)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InvalidInputError(
            [f"{error.filename or path}: {reason}; name text files that can be read"]
        ) from None


def _stream(path: Path) -> TokenStream:
    if path.is_file():
        if _is_binary(path):
            raise InvalidInputError(
                [f"{path}: a binary file; name a text file or a folder of them"]
            )
        return TokenStream(name=str(path), tokens=_mapped(path))
    if not path.is_dir():
        raise InvalidInputError([f"{path}: is not there; name a text file or a folder of them"])
    documents = [file.read_bytes() for file in _files(path) if not _is_binary(file)]
    if not any(documents):
        raise InvalidInputError([f"{path}: holds no text; name a folder with text files in it"])
    return TokenStream(name=str(path), tokens=_joined(documents))


def check_stream(stream: TokenStream, vocab: int, seq_len: int) -> None:
    """Raise unless a model of `vocab` words can learn from `stream` in windows of `seq_len`.

    UnsupportedError for a vocabulary that bytes do not fit in, InvalidInputError for a text
    without a single window.
    """
    if vocab < VOCAB:
        raise UnsupportedError(
            f"model.vocab is {vocab}; text is read as bytes, which need at least {VOCAB}"
        )
    if stream.num_samples(seq_len) < 1:
        raise InvalidInputError(
            [
                f"{stream.name}: {len(stream.tokens)} bytes of text; one sample of "
                f"workload.seq_len {seq_len} needs {seq_len + 1}; name a longer text"
            ]
        )


def sample_numbers(layout: Layout, step: int, dp_index: int) -> range:
    """Return the global numbers of the samples of one data-parallel rank in `step`, in order.

    The samples of a step are the same in every layout; a rank has the micro-batches of its
    consecutive share.
    """
    share = layout.micro_batch * layout.num_microbatches
    first = step * layout.global_batch + dp_index * share
    return range(first, first + share)


class SampleOrder:
    """The windows of a stream in an order drawn anew for every pass from (seed, pass)."""

    def __init__(self, stream: TokenStream, seq_len: int, seed: int) -> None:
        self._tokens, self._seq_len, self._seed = stream.tokens, seq_len, seed
        self._num_samples = stream.num_samples(seq_len)
        self._orders: dict[int, npt.NDArray[np.int64]] = {}
        self._window = np.arange(seq_len + 1)

    def windows(self, numbers: range) -> npt.NDArray[np.int64]:
        """Return tokens [len(numbers), S + 1]: inputs are [:, :-1], next-byte targets [:, 1:]."""
        starts = np.array([self._start(number) for number in numbers])
        return self._tokens[starts[:, None] + self._window].astype(np.int64)

    def _start(self, number: int) -> int:
        epoch, index = divmod(number, self._num_samples)
        if epoch not in self._orders:
            generator = np.random.default_rng([self._seed, epoch])
            # A step may reach over the end of a pass, hence two orders and no more.
            last = {key: order for key, order in self._orders.items() if key == epoch - 1}
            self._orders = last | {epoch: generator.permutation(self._num_samples)}
        return int(self._orders[epoch][index]) * self._seq_len


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file():
            yield path


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return SEPARATOR in file.read(_PROBE_BYTES)


def _mapped(path: Path) -> Bytes:
    if not path.stat().st_size:
        raise InvalidInputError([f"{path}: is empty; name a text file or a folder of them"])
    return np.memmap(path, dtype=np.uint8, mode="r")


def _joined(documents: list[bytes]) -> Bytes:
    return np.frombuffer(SEPARATOR.join(documents), dtype=np.uint8)


def _standard_library() -> TokenStream:
    folder = Path(sysconfig.get_paths()["stdlib"])
    documents: list[bytes] = []
    size = 0
    for path in sorted(folder.rglob("*.py")):
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(folder).parts) and path.is_file():
            documents.append(path.read_bytes())
            size += len(documents[-1])
            if size >= STANDARD_LIBRARY_BYTES:
                break
    return TokenStream(name=STANDARD_LIBRARY, tokens=_joined(documents))
