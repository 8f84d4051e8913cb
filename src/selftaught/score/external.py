"""A teacher that is another model: what a recipe says of it, and whether its token ids mean what the student's mean."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field

from selftaught.errors import UserError
from selftaught.records import Section

PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))  # bytes that byte-level tokenizers write as they are
HIDDEN = (byte for byte in range(256) if byte not in PRINTABLE)
BYTE_OF = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(HIDDEN)}
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's name of a single byte


class TeacherConfig(Section):
    """The other model under which views with `external` weights are scored. It is never trained and never saved."""

    model: str = Field(description="a folder, a Hub name, or `quickstart`; its tokenizer must be the student's")
    dtype: Literal["float32", "bfloat16"] | None = Field(None, description="of its weights; null: the student's")
    layout: Literal["auto", "shared", "plain"] = Field("auto", description="as score.layout, for this model")


@contextmanager
def about_teacher() -> Iterator[None]:
    """Faults of loading a model name the recipe's field `teacher`, where they would name the student's."""
    try:
        yield
    except UserError as error:
        text = str(error)
        if text.startswith("score.layout"):
            raise UserError(text.replace("score.", "teacher.", 1)) from error
        raise type(error)(f"teacher.{text}" if text.startswith("model") else text) from error  # Unreachable stays so


def id_bytes(tokenizer: Any) -> dict[int, bytes]:
    """The bytes that each token id stands for, added and special tokens included.

    Two tokenizers with equal tables read the same response ids as the same text, whatever their merges.
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    byte_level = decoder is not None and b"ByteLevel" in decoder.__getstate__()
    return {i: token.encode() if token in added else _bytes(token, byte_level)
            for token, i in tokenizer.get_vocab().items()}


def _bytes(token: str, byte_level: bool) -> bytes:
    if byte_level:
        return bytes(BYTE_OF[c] for c in token) if BYTE_OF.keys() >= set(token) else token.encode()
    single = BYTE_PIECE.fullmatch(token)
    return bytes.fromhex(single[1]) if single else token.replace("\u2581", " ").encode()


def shared_rows(student: Mapping[int, bytes], teacher: Mapping[int, bytes], rows: int, teacher_rows: int) -> int:
    """The number of vocabulary rows, from row 0, on which student and external teacher are compared.

    `student` and `teacher` are the tables of `id_bytes`; `rows` and `teacher_rows` what their heads have. Heads are
    padded beyond the tokenizer to round numbers. The support is every row below the end of either head and below the
    first id that is a token to the teacher alone; both heads are cut there, and normalised over what is left. The cut
    holds for the student's sampler as well as for its scorer: so the two stay one distribution, no response holds a
    token that the teacher cannot score, and no divergence meets mass on one side where the other has none. A row that
    is cut from the student carries no token and gets no gradient; weight decay alone, where there is any, moves it.

    Raises:
        UserError: an id that does not mean the same bytes to both (the first is named), or a token of the student's
            for which the teacher has no row.
    """
    used = sorted(i for i in student if i < rows)
    differ = [i for i in used if student[i] != teacher.get(i)]
    if differ:
        raise UserError(f"its tokenizer is not the student's: token id {differ[0]} is {_shown(student, differ[0])} to "
                        f"the student and {_shown(teacher, differ[0])} to the teacher, and so for {len(differ)} of "
                        f"{len(used)} ids; choose a teacher of the student's own family")
    alone = min((i for i in teacher if i not in student), default=teacher_rows)
    end = min(rows, teacher_rows, alone)
    needed = next((i for i in used if i >= end), None)
    if needed is None:
        return end
    if alone < teacher_rows:
        raise UserError(f"its tokenizer is not the student's: token id {alone} is {_shown(teacher, alone)} to the "
                        f"teacher and no token to the student, among ids that are (up to {used[-1]}); choose a teacher "
                        "of the student's own family")
    raise UserError(f"its vocabulary has {teacher_rows} rows, none for token id {needed}, which is "
                    f"{_shown(student, needed)}; choose a teacher that has every token of the student's")


def _shown(table: Mapping[int, bytes], token_id: int) -> str:
    return repr(table[token_id].decode("utf-8", "backslashreplace")) if token_id in table else "no token"


def digest(model: Any, *, trained: bool = True) -> str:
    """SHA-256 of the parameters as they are held, names and types included (about a second for every 2 GB).

    With `trained` False, of the frozen ones alone.
    """
    found = hashlib.sha256()
    for name, value in model.named_parameters():
        if value.requires_grad and not trained:
            continue
        found.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
