"""Prompts: the student's, and the teacher's, which is the same text with blocks inserted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from selftaught.data.config import DataConfig
from selftaught.data.split import Dataset
from selftaught.errors import UserError
from selftaught.records import Message, Problem, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private-use characters stand around each inserted block while a template runs, so that the rest can be compared.
OPEN, CLOSE = "\ue000", "\ue001"
SEAM_OPEN, SEAM_CLOSE = "[[+ ", " +]]"


class Renderer:
    """Makes token ids of problems; each prompt is tokenised once and whole.

    A block (what the teacher alone may see) ends the user's turn in a chat, and stands between the question part
    and the answer part in a completion. An empty block inserts nothing: the prompt is then the student's own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, shots: Sequence[Problem]) -> None:
        """Raises UserError for template "chat" without a chat template, and for shots that cannot be shown."""
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if config.template == "chat" and not has_template:
            raise UserError(
                "data.template: 'chat', but the model's tokenizer has no chat template; use 'completion', "
                "or a model that was trained on chats"
            )
        self.chat = has_template if config.template == "auto" else config.template == "chat"
        self.shots = tuple(shots)
        self._tokenizer = tokenizer
        self.config = config
        self._kept: dict[str, int] = {}
        for shot in self.shots:
            _shown(shot)

    def prompt(self, problem: Problem) -> Prompt:
        """The student's prompt. Raises UserError where it is over `max_prompt_length`, also without any shot."""
        kept = self._fit(problem)
        if kept is None:
            raise UserError(self._too_long(problem))
        return Prompt(self._ids(self._text(problem, kept)))

    def privileged(
        self, problem: Problem, block: str, shot_blocks: Sequence[str], thinking: bool | None = None
    ) -> Prompt:
        """`prompt(problem)` with `block` in the query and `shot_blocks[i]` in shot i; not bound by `max_prompt_length`.

        `thinking` is another `enable_thinking` than the student's; None: the same.
        Raises UserError where the chat template changes anything else when a block is inserted.
        """
        marked, inserted = self._marked(problem, block, shot_blocks, thinking)
        return Prompt(self._ids(_swap(marked, inserted, "", "")))

    def has_thinking_switch(self, problem: Problem) -> bool:
        """Whether the prompt depends on `enable_thinking`."""
        return self.chat and self._text(problem, 0, (), True) != self._text(problem, 0, (), False)

    def seam(
        self, problem: Problem, block: str, shot_blocks: Sequence[str], thinking: bool | None = None
    ) -> str:
        """The teacher's prompt as text, the tokenizer's own special tokens included, insertions in [[+ +]]."""
        marked, inserted = self._marked(problem, block, shot_blocks, thinking)
        text = _swap(marked, inserted, "", "")
        decoded = str(self._tokenizer.decode(list(self._ids(text)), skip_special_tokens=False))
        added = decoded[: -len(text)] if decoded.endswith(text) else ""
        return added + _swap(marked, inserted, SEAM_OPEN, SEAM_CLOSE)

    def cut(self, text: str, max_tokens: int) -> tuple[str, int]:
        """The first `max_tokens` tokens of `text`, and how many were cut away (0: `text` is returned as it is)."""
        fast = bool(self._tokenizer.is_fast)
        coded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        ids: list[int] = coded["input_ids"]
        if len(ids) <= max_tokens:
            return text, 0
        if fast:
            end = coded["offset_mapping"][max_tokens - 1][1] if max_tokens else 0
            return text[:end], len(ids) - max_tokens
        return str(self._tokenizer.decode(ids[:max_tokens])).rstrip("\ufffd"), len(ids) - max_tokens

    def fits(self, problem: Problem) -> bool:
        """Whether the student's prompt can be made within `max_prompt_length`."""
        return self._fit(problem) is not None

    def counts(self) -> dict[str, int]:
        """So far, each problem once: prompts that lost shots, and shots lost in all."""
        lost = [len(self.shots) - kept for kept in self._kept.values()]
        return {"prompts_trimmed": sum(cut > 0 for cut in lost), "shots_trimmed": sum(lost)}

    def _fit(self, problem: Problem) -> int | None:
        """How many shots the prompt keeps (the first ones); None: it is too long whatever is left out."""
        limit = self.config.max_prompt_length
        if limit is None:
            return len(self.shots)
        if problem.id not in self._kept:
            fewest = 0 if self.config.on_overflow == "trim" else len(self.shots)
            for kept in range(len(self.shots), fewest - 1, -1):
                if len(self._ids(self._text(problem, kept))) <= limit:
                    self._kept[problem.id] = kept
                    break
            else:
                return None
        return self._kept[problem.id]

    def _too_long(self, problem: Problem) -> str:
        shots = 0 if self.config.on_overflow == "trim" else len(self.shots)
        length = len(self._ids(self._text(problem, shots)))
        start = " ".join(_preview(problem).split())[:60]
        without = " without any shot" if shots < len(self.shots) else ""
        return (
            f"data.max_prompt_length: the prompt of problem {problem.id} ({start!r}) has {length} tokens{without}, "
            f"the limit is {self.config.max_prompt_length}; raise it, or set data.on_overflow to 'drop' to leave such "
            "problems out"
        )

    def _marked(
        self, problem: Problem, block: str, shot_blocks: Sequence[str], thinking: bool | None
    ) -> tuple[str, list[str]]:
        """The privileged text with its insertions, in order, OPEN and CLOSE around each.

        What is outside of them equals the student's text under that `thinking`, or UserError is raised.
        """
        assert len(shot_blocks) == len(self.shots), "one block per shot"
        kept = self._fit(problem)
        if kept is None:
            raise UserError(self._too_long(problem))
        inserted = [self._insertion(text) for text in (*shot_blocks[:kept], block)]
        marked = self._text(problem, kept, inserted, thinking)
        outside = marked
        for text in inserted:
            outside = outside.replace(text, "", 1)
        if outside != self._text(problem, kept, (), thinking):
            raise UserError(
                "data.template: the chat template changes the prompt elsewhere when a privilege is inserted, so the "
                "student and the teacher would differ by more than it; use template: completion, or mend the template"
            )
        return marked, inserted

    def _insertion(self, block: str) -> str:
        """What is inserted for `block`, between OPEN and CLOSE; "" for a blank block."""
        clean = block.strip("\n")
        if not clean.strip():
            return ""
        return OPEN + (f"\n\n{clean}" if self.chat else f"{clean}\n") + CLOSE

    def _text(
        self, problem: Problem, kept: int, inserted: Sequence[str] = (), thinking: bool | None = None
    ) -> str:
        """The prompt's text with the first `kept` shots; `inserted` holds theirs and, last, the query's insertion."""
        *shot_insertions, insertion = inserted or [""] * (kept + 1)
        pairs = list(zip(self.shots[:kept], shot_insertions, strict=True))
        if self.chat:
            return self._chat(problem, insertion, pairs, self.config.thinking if thinking is None else thinking)
        return self._completion(problem, insertion, pairs)

    def _completion(self, problem: Problem, insertion: str, shots: Sequence[tuple[Problem, str]]) -> str:
        def asked(one: Problem, extra: str) -> str:
            return self.config.question.replace("{question}", _question(one)) + extra + self.config.answer

        before = f"{self.config.system_prompt}\n\n" if self.config.system_prompt else ""
        shown = "".join(f"{asked(shot, extra)} {_shown(shot)}\n\n" for shot, extra in shots)
        return before + shown + asked(problem, insertion)

    def _chat(
        self, problem: Problem, insertion: str, shots: Sequence[tuple[Problem, str]], thinking: bool | None
    ) -> str:
        messages = _messages(problem, insertion)
        system = [messages.pop(0)] if messages[0]["role"] == "system" else []
        if not system and self.config.system_prompt is not None:
            system = [{"role": "system", "content": self.config.system_prompt}]
        shown: list[Message] = []
        for shot, extra in shots:
            turns = [message for message in _messages(shot, extra) if message["role"] != "system"]
            shown += [*turns, {"role": "assistant", "content": _shown(shot)}]
        switch: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(message) for message in (*system, *shown, *messages)],
                    tokenize=False,
                    add_generation_prompt=True,
                    **switch,
                )
            )
        except Exception as error:  # templates raise whatever they like, e.g. for a system message they do not take
            raise UserError(f"data.template: the chat template refuses problem {problem.id}: {error}") from error

    def _ids(self, text: str) -> tuple[int, ...]:
        # A chat template writes its special tokens itself; a plain text gets the tokenizer's.
        ids: list[int] = self._tokenizer(text, add_special_tokens=not self.chat, verbose=False)["input_ids"]
        if not self.chat and ids and ids[-1] == self._tokenizer.eos_token_id and len(ids) > 1:
            end = str(self._tokenizer.eos_token)
            ids = ids if text.endswith(end) else ids[:-1]  # some tokenizers close every text; a prompt must stay open
        return tuple(ids)


def fit(dataset: Dataset, renderer: Renderer, *, say: Callable[[str], None]) -> Dataset:
    """`dataset` with prompts within `max_prompt_length`; what is dropped or trimmed is counted and said.

    `on_overflow: drop` leaves problems out that are too long; otherwise such a problem is a UserError that names it.
    """
    left_out = 0
    kept: dict[str, tuple[Problem, ...]] = {}
    for name in ("train", "heldout"):
        problems: tuple[Problem, ...] = getattr(dataset, name)
        kept[name] = tuple(problem for problem in problems if renderer.fits(problem))
        left_out += len(problems) - len(kept[name])
        if renderer.config.on_overflow != "drop" and len(kept[name]) < len(problems):
            renderer.prompt(next(problem for problem in problems if not renderer.fits(problem)))
    if not kept["train"] or (dataset.heldout and not kept["heldout"]):
        raise UserError("data.max_prompt_length: every training or held-out problem is over it; raise it")
    notes = []
    if left_out:
        notes.append(f"data: {left_out} problems left out, their prompts are over max_prompt_length")
    trimmed = renderer.counts()
    if trimmed["shots_trimmed"]:
        lost = f"{trimmed['prompts_trimmed']} prompts lost {trimmed['shots_trimmed']} shots in all"
        notes.append(f"data: {lost}, they are over max_prompt_length")
    for line in notes:
        say(line)
    return replace(dataset, train=kept["train"], heldout=kept["heldout"], notes=(*dataset.notes, *notes))


def _swap(marked: str, inserted: Sequence[str], before: str, after: str) -> str:
    """`marked` with `before` and `after` in place of the marks around each insertion."""
    for text in filter(None, inserted):
        marked = marked.replace(text, f"{before}{text[len(OPEN) : -len(CLOSE)]}{after}", 1)
    return marked


def _question(problem: Problem) -> str:
    """The problem as one text. Raises UserError for a conversation, which only a chat template can show."""
    if isinstance(problem.prompt, str):
        return problem.prompt
    if [message["role"] for message in problem.prompt] == ["user"]:
        return problem.prompt[0]["content"]
    raise UserError(
        f"data.template: problem {problem.id} is a conversation of {len(problem.prompt)} messages, which needs a chat "
        "template; use a chat model, or give plain questions"
    )


def _shown(shot: Problem) -> str:
    """What a shot answers: its working where it has one."""
    shown = shot.solution or shot.answer
    if shown is None:
        raise UserError(f"data.shots: example {shot.id} has neither solution nor answer to show; set data.shots to 0")
    return shown


def _messages(problem: Problem, insertion: str) -> list[Message]:
    """The problem as chat messages, with `insertion` at the end of the last user turn."""
    if isinstance(problem.prompt, str):
        messages: list[Message] = [{"role": "user", "content": problem.prompt}]
    else:
        messages = list(problem.prompt)
    last = max(index for index, message in enumerate(messages) if message["role"] == "user")
    content = messages[last]["content"]
    # Before the trailing blanks: a template that strips contents then strips the same from both prompts.
    body = content.rstrip()
    messages[last] = {**messages[last], "content": body + insertion + content[len(body) :]}
    return messages


def _preview(problem: Problem) -> str:
    return problem.prompt if isinstance(problem.prompt, str) else problem.prompt[-1]["content"]
