"""What a page is made of: sections that answer a question each, out of a few kinds of block."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A paragraph; a `lead` is set larger, a `note` smaller, a `heading` divides a section."""

    text: str
    role: Literal["body", "lead", "note", "heading"] = "body"
    type: Literal["text"] = field(default="text", init=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of text. Rows in `marked` stand out; a `headline` is set larger.

    `align` holds a letter for each column: `l` left, `r` right, `n` left and never broken, `b` left
    and broken after commas. Raises ValueError for a row that does not have a cell for each column.
    """

    head: tuple[str, ...]
    align: str
    rows: tuple[tuple[str, ...], ...]
    marked: tuple[int, ...] = ()
    role: Literal["body", "headline"] = "body"
    type: Literal["table"] = field(default="table", init=False)

    def __post_init__(self) -> None:
        for row in (self.head, *self.rows):
            if len(row) != len(self.align):
                raise ValueError(f"a row has {len(row)} cells for {len(self.align)} columns")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A figure: an SVG element as text, trusted as it is, and a caption that is not."""

    svg: str
    caption: str
    type: Literal["drawing"] = field(default="drawing", init=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Commands:
    """Lines for a shell."""

    lines: tuple[str, ...]
    type: Literal["commands"] = field(default="commands", init=False)


Block = Text | Table | Drawing | Commands


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A question and the blocks that answer it; `anchor` is its address on the page."""

    question: str
    anchor: str
    blocks: tuple[Block, ...]
