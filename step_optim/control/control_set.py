"""ControlSet: the prompts, with their responses, on which movement is measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from step_optim.control.chats import Chats, check_arguments
from step_optim.control.conversations import labels_of, read_conversations, with_answers
from step_optim.control.files import read_record, write_record
from step_optim.control.given_batches import GivenBatches, batches_and_rows
from step_optim.control.ids import checked_ids, rows_of_ids, shortened
from step_optim.control.pairs import Pairs
from step_optim.control.progress import Progress
from step_optim.control.resampling import check_model, device_of, draw_responses
from step_optim.control.saved_batches import is_batches, read_batches
from step_optim.control.slices import Slices as Slices
from step_optim.control.slices import by_text
from step_optim.control.slices import checked_slices as checked_slices
from step_optim.control.standard import as_prompts, standard_prompts
from step_optim.control.texts import Texts


class ControlSet(Pairs):
    """Prompts with teacher-forced or sampled responses, in named slices.

    Build it with `standard`, `from_messages`, `from_texts` or `from_ids`; with
    `from_batches` for models that are no causal language models of texts. It
    is immutable; `resample`, `split`, `select`, `to` and ``+`` return new ones.

    >>> control = ControlSet.from_ids([[1, 2], [3]], [[4], [5, 6]], slices={"a": [0], "b": [1]})
    >>> len(control), control.response_tokens
    (2, 3)
    """

    @classmethod
    def standard(
        cls,
        model: Any,
        tokenizer: Any,
        size: int | None = None,
        slices: Sequence[str] | None = None,
        *,
        part: str = "control",
        max_new_tokens: int = 32,
        seed: int = 0,
        progress: Progress = None,
        **generate: Any,
    ) -> ControlSet:
        """Build a control set from the prompts of this package, with the model's own responses.

        There are 50 prompts in each of eight slices: story, fact, math, code,
        format, advice, translation and refusals (what a well-behaved assistant
        declines). They are cut into three parts that share no prompt: 16 of a
        slice to audit ("control"), 24 to steer by ("pool"), 10 to see how far
        the budgets hold elsewhere ("held_out").

        Responses are drawn as in `resample`, one by one, so they take as long
        as the model needs for them. A later call draws from the model as it is
        then: `save` what a run is to be continued with.

        Args:
            model: a Hugging Face causal language model with ``generate``; the
                tensors are put where its first parameter lives.
            tokenizer: the model's. If it has a chat template, each prompt is
                the one message of a user; otherwise it is plain text.
            size: how many prompts in all, spread evenly over the slices. If
                None, 5 of each slice, and 12 of each for the pool.
            slices: names of some of the eight; if None, all of them.
            part: "control", "pool" or "held_out".
            max_new_tokens: longest response; an end-of-sequence token ends it
                earlier and is kept, also where it is all of the response.
            seed: of the draw.
            progress: as for `resample`.
            **generate: as for `resample`, ``temperature`` too.

        Raises:
            TypeError: a tokenizer that is not callable, a model without
                ``generate``, or an argument in another form.
            ValueError: an unknown slice or part; a size below one prompt a
                slice, or beyond what there is; what `resample` refuses.
        """
        check_model(model)
        chosen = standard_prompts(size, slices, part)
        texts = [text for prompts in chosen.values() for text in prompts]
        labels = [name for name, prompts in chosen.items() for _ in prompts]
        prompts = Texts(tokenizer, as_prompts(tokenizer, texts)).prompt_ids()
        return cls._drawn(
            model, prompts, labels, max_new_tokens=max_new_tokens, seed=seed, progress=progress, **generate
        )

    @classmethod
    def from_messages(
        cls,
        tokenizer: Any,
        conversations: Any,
        responses: Iterable[str] | None = None,
        *,
        model: Any = None,
        slices: Slices | None = None,
        tools: Sequence[Any] | None = None,
        end_of_turn: bool = True,
        max_response_tokens: int | None = None,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        progress: Progress = None,
        device: torch.device | str | None = None,
        **generate: Any,
    ) -> ControlSet:
        """Build a control set from conversations, written by the tokenizer's chat template.

        The response is the assistant's message at the end of a conversation;
        or one of ``responses``; or drawn from ``model``. It begins where the
        template tells the assistant to begin, and is read as the template
        writes it. Where the template writes an answer elsewhere than it tells
        the assistant to (some put a "thinking" mark there), or does not write
        where it ends, it is read as plain text.

        Args:
            tokenizer: a Hugging Face tokenizer or processor with a chat template.
            conversations: lists of messages, dicts of "role" and "content" (a
                text, or parts of type text) as transformers has them, system
                prompts and tool calls too. Or records: mappings with
                "messages" (or "conversation", "conversations"; or "prompt",
                a list of messages), perhaps the answer as "completion" or
                "response", "slice" and "tools". Or a data set of records. Or
                the path of a JSON or JSON Lines file of any of these.
            responses: texts, one for each conversation.
            model: to draw the responses from, as in `resample`.
            slices: as for `from_ids`. If None, what the records name as "slice".
            tools: that the assistant may call, for ``apply_chat_template``.
            end_of_turn: whether a given response ends with the token that the
                template writes after an answer (the end of the sequence, if it
                writes none). A drawn one keeps what ended it.
            max_response_tokens: cut longer given responses here, their end too.
            max_new_tokens: longest drawn response, 32 by default.
            seed: of the draw, 0 by default.
            progress: of the draw, as for `resample`.
            device: where the tensors live. If None, the model's device, or the CPU.
            **generate: of the draw, as for `resample`, ``temperature`` too.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError: conversations, messages or responses in another form;
                arguments of a draw without a model.
            ValueError: as for `from_ids`; a conversation with no response or
                two, with other content than text, or that the template
                refuses; the message names it. Or arguments that a draw does not have.
        """
        asked = {
            name: value for name, value in (("max_new_tokens", max_new_tokens), ("seed", seed)) if value is not None
        }
        check_arguments(model, end_of_turn, max_response_tokens, asked | generate)
        read = read_conversations(conversations, tools=tools)
        read = with_answers(read, responses, drawn=model is not None)
        labels = labels_of(read) if slices is None else slices
        chats = Chats(tokenizer, read)
        if model is None:
            answers = shortened(chats.response_ids(end=end_of_turn), max_response_tokens)
            return cls.from_ids(chats.prompt_ids(), answers, labels, device=device)
        draw = {"max_new_tokens": 32, "seed": 0} | asked | generate
        return cls._drawn(model, chats.prompt_ids(), labels, device=device, progress=progress, **draw)

    @classmethod
    def from_texts(
        cls,
        tokenizer: Any,
        prompts: Iterable[Any],
        responses: Iterable[str],
        slices: Slices | Mapping[str, Sequence[Any]] | None = None,
        *,
        end_of_turn: bool = False,
        max_response_tokens: int | None = None,
        device: torch.device | str | None = None,
    ) -> ControlSet:
        """Build a control set from texts.

        Args:
            tokenizer: a Hugging Face tokenizer or processor, or any callable
                ``tokenizer(text, add_special_tokens=bool)["input_ids"]``.
            prompts: texts, or lists of chat messages
                (``[{"role": "user", "content": ...}]``), which go through the
                tokenizer's chat template with the generation prompt added.
                Special tokens that the tokenizer puts before a text stay;
                what it appends (``</s>``) is left out, as at generation.
            responses: texts, tokenized without special tokens.
            slices: as for `from_ids`; prompts may also be named by their own
                texts, ``{"math": ["What is 2+2?"]}``.
            end_of_turn: whether a response ends with the token that ends it,
                so that stopping earlier or later is movement, too: the one
                that the template writes after an answer, and for plain texts
                the tokenizer's ``eos_token_id``.
            max_response_tokens: cut longer responses here, their end too.
            device: where the tensors live; the model's device. If None, the CPU.

        Raises:
            TypeError: one text, or one conversation, in the place of a list
                of them; or anything else that is no text.
            ValueError: as for `from_ids`; or a slice names a text that is no
                prompt; or no token ends a response and one was asked for.
        """
        texts = Texts(tokenizer, prompts, responses)
        return cls.from_ids(
            texts.prompt_ids(),
            shortened(texts.response_ids(end=end_of_turn), max_response_tokens),
            by_text(slices, texts.prompts),
            device=device,
        )

    @classmethod
    def from_ids(
        cls,
        prompts: Iterable[Sequence[int] | Tensor] | Mapping[str, Any],
        responses: Iterable[Sequence[int] | Tensor] | Mapping[str, Any],
        slices: Slices | None = None,
        *,
        vocab_size: int | None = None,
        device: torch.device | str | None = None,
    ) -> ControlSet:
        """Build a control set from token ids.

        Args:
            prompts: C lists of ids; each needs a token, since the first
                response token is predicted from the last prompt token. Or
                what a tokenizer made of C texts; padding is left out.
            responses: C lists of ids, at least one token each; or likewise.
            slices: prompt indices, or a boolean mask [C], by slice name; or
                C labels, the slice of each prompt.
            vocab_size: to refuse ids outside the vocabulary now; `TokenKL`
                checks them against its model anyway.
            device: where the tensors live; the model's device. If None, that
                of the first tensor given, and the CPU for plain lists.

        Raises:
            TypeError: prompts, responses or slices in another form.
            ValueError: an empty set or slice, a prompt or response without
                tokens, ids or indices out of range; the message names the prompt.
        """
        prompt_rows, response_rows = rows_of_ids(prompts, "prompts"), rows_of_ids(responses, "responses")
        count = len(prompt_rows)
        if count != len(response_rows):
            raise ValueError(f"{count} prompts but {len(response_rows)} responses; give one response a prompt")
        if not count:
            raise ValueError("the control set is empty; give at least one prompt with its response")
        if device is None:
            device = next((ids.device for ids in prompt_rows + response_rows if isinstance(ids, Tensor)), "cpu")
        control = cls(
            tuple(checked_ids(ids, f"prompt {i}", device) for i, ids in enumerate(prompt_rows)),
            tuple(checked_ids(ids, f"the response of prompt {i}", device) for i, ids in enumerate(response_rows)),
            checked_slices(slices, count),
        )
        if vocab_size is not None:
            control.check_vocabulary(vocab_size)
        return control

    @classmethod
    def from_batches(
        cls, batches: Iterable[Mapping[str, Any]], slices: Slices | None = None, *, shift: bool | None = None
    ) -> ControlBatches:
        """Build a control set from batches as a processor or a collator makes them, for whatever the model takes.

        Each row of a batch is an example, a "prompt" of the control set; its
        measured tokens are the positions whose label is not -100. Batches stay
        whole: `select`, `split` and draws from a pool evaluate every batch that
        holds one of their examples. One example a batch makes them cheap.

        Args:
            batches: mappings of tensors, which are copied: ``input_ids``,
                ``pixel_values``, ... as in ``model(**batch)``, and ``labels``
                [B, T]. Decoder inputs are made of these, if there are none.
            slices: as for `from_ids`; rows are numbered in the batches' order.
            shift: whether the logits at position t predict the label at t + 1,
                as in decoder-only models. False if they belong to the label at
                t (encoder-decoders, masked language models, token
                classifiers). None lets `TokenKL` find out from the model.

        Raises:
            TypeError: no list of mappings of tensors.
            ValueError: no batch; labels that are missing, of another shape, that
                measure nothing in a row, or that nothing predicts; tensors of
                other numbers of rows. The message names the batch and the row.

        >>> ids = torch.tensor([[5, 6, 7], [5, 8, 9]])
        >>> labels = torch.tensor([[-100, -100, 7], [-100, 8, 9]])
        >>> ControlSet.from_batches([{"input_ids": ids, "labels": labels}], slices={"a": [0], "b": [1]})
        ControlBatches(1 batches, 2 examples, 3 measured positions, slices={'a': 1, 'b': 1}, device='cpu')
        """
        given, rows = batches_and_rows(batches, shift)
        return ControlBatches.of(given, rows, checked_slices(slices, len(rows)), shift)

    @classmethod
    def _drawn(
        cls, model: Any, prompts: list[list[int]], slices: Slices | None, *, device: Any = None, **draw: Any
    ) -> ControlSet:
        """Prompts with responses of the model, on its device; everything else is checked before the long draw."""
        checked_slices(slices, len(prompts))
        ids = [checked_ids(row, f"prompt {i}", device_of(model)) for i, row in enumerate(prompts)]
        return cls.from_ids(ids, draw_responses(model, ids, **draw), slices, device=device)

    def save(self, path: str | Path) -> None:
        """Write it as one JSON file."""
        record = {
            "prompts": [ids.tolist() for ids in self.prompts],
            "responses": [ids.tolist() for ids in self.responses],
            "slices": {name: list(members) for name, members in self.slices.items()},
        }
        write_record(path, record)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str | None = None) -> ControlSet:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no control set; the message says what it lacks.
        """
        if is_batches(path):
            return ControlBatches.of(**read_batches(path, device))
        record = read_record(path)
        try:
            return cls.from_ids(record["prompts"], record["responses"], record["slices"], device=device)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no valid control set: {error}") from error

    def resample(
        self,
        model: Any,
        *,
        max_new_tokens: int = 32,
        temperature: float = 1.0,
        seed: int = 0,
        progress: Progress = None,
        **generate: Any,
    ) -> ControlSet:
        """Draw fresh responses from the current policy.

        Movement is then measured where the policy goes now, not where a fixed
        text once went. The training's random streams are left alone. A
        `TokenKL` on the new set starts a new reference and a new pi_ref.

        Args:
            model: a Hugging Face model with ``generate``.
            max_new_tokens: longest response; an end-of-sequence token ends it
                earlier and is kept.
            temperature: of the sampling.
            seed: of the draw.
            progress: None shows a bar on a terminal, True everywhere, False
                nowhere; or a function of (done, total), called after each prompt.
            **generate: further arguments of ``model.generate``. What they do
                not say is plain sampling from the policy: the options in the
                model's own ``generation_config`` have no effect, but for the
                end-of-sequence tokens.

        Raises:
            TypeError: a model without ``generate``, or with an encoder.
            ValueError: an argument out of range, or one that makes several
                sequences, or another prompt.
        """
        responses = draw_responses(
            model,
            self.prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            progress=progress,
            **generate,
        )
        return ControlSet.from_ids(self.prompts, responses, self.slices, device=self.device)


class ControlBatches(GivenBatches, ControlSet):
    """A control set of batches as a processor or a collator makes them; see `ControlSet.from_batches`."""
