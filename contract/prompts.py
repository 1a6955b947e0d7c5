"""Text to token ids: a model's tokenizer and chat template, the same for gateway and worker.

The gateway counts with it (an over-long prompt is refused before it is accepted), the courier
encodes with it. It reads `tokenizer.json` with the `tokenizers` library and renders chat templates
in a Jinja sandbox itself: `transformers` would bring torch (245 MB, 4 s) into every gateway.

Template environment as `transformers` documents it for chat templates: sandboxed and immutable,
trim_blocks, lstrip_blocks, loop controls, `raise_exception`, `strftime_now`, a `tojson` that leaves
non-ASCII and HTML characters alone, and the special tokens as variables.

Called by: gateway/jobs (render, count), worker/intake (render, encode), worker/text (tokenizer).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from headrace.contract.errors import ChatTemplateRefused, ConfigurationError

#: Special tokens of tokenizer_config.json that templates may name.
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


@dataclass(frozen=True, slots=True)
class Prompts:
    """Tokenizer and chat template of one model folder."""

    tokenizer: Tokenizer
    template: jinja2.Template | None
    special_tokens: dict[str, str]
    stop_token_ids: tuple[int, ...]  # ends of an answer, from generation_config and tokenizer

    @classmethod
    def load(cls, folder: str | Path) -> Prompts:
        """Read a `transformers` folder; raise ConfigurationError if it has no tokenizer.json."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigurationError(
                f"{folder} has no tokenizer.json; headrace reads no other kind of tokenizer: "
                "save the model again with `transformers` (tokenizer.save_pretrained)"
            )
        tokenizer = Tokenizer.from_file(str(path))
        config = _read_json(folder / "tokenizer_config.json")
        special = {name: _token_text(config.get(name)) for name in _SPECIAL}
        special_tokens = {name: text for name, text in special.items() if text is not None}
        source = _template_source(folder, config)
        stop: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            ids = _read_json(folder / name).get("eos_token_id")
            stop.update(
                cast("list[int]", ids)
                if isinstance(ids, list)
                else [ids]
                if ids is not None
                else []
            )
        eos = special_tokens.get("eos_token")
        eos_id = None if eos is None else tokenizer.token_to_id(eos)
        if eos_id is not None:
            stop.add(eos_id)
        return cls(
            tokenizer=tokenizer,
            template=None if source is None else _environment().from_string(source),
            special_tokens=special_tokens,
            stop_token_ids=tuple(sorted(stop)),
        )

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """Render the messages with the model's chat template, ready for the answer to begin."""
        if self.template is None:
            raise ChatTemplateRefused(
                "messages were sent; the model has no chat template: send `prompt` instead"
            )
        try:
            return self.template.render(
                messages=list(messages), add_generation_prompt=True, **self.special_tokens
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, OverflowError) as error:
            raise ChatTemplateRefused(
                f"the model's chat template refuses these messages ({error}): "
                "correct their roles or order"
            ) from None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids; with special tokens for a bare prompt, without after `render`."""
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def count(self, text: str, *, add_special_tokens: bool) -> int:
        return len(self.encode(text, add_special_tokens=add_special_tokens))

    def prompt_ids(
        self,
        *,
        prompt: str | None,
        prompt_token_ids: Sequence[int] | None,
        messages: Sequence[dict[str, Any]] | None,
    ) -> list[int]:
        """Return the token ids of a job's input, whichever of its three forms it has."""
        if prompt_token_ids is not None:
            return list(prompt_token_ids)
        if messages is not None:
            return self.encode(self.render(messages), add_special_tokens=False)
        return self.encode(prompt or "", add_special_tokens=True)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, OSError) as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error}): correct or replace it"
        ) from None


def _token_text(token: Any) -> str | None:
    """Return a special token's text: it stands there as a string or as {"content": ...}."""
    return cast("dict[str, str]", token).get("content") if isinstance(token, dict) else token


def _template_source(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t["name"]: t["template"] for t in cast("list[dict[str, str]]", template)}
        return named.get("default")
    return template


class _GenerationTag(Extension):
    """Accept `{% generation %}...{% endgeneration %}`, which marks text for training only."""

    tags = {"generation"}  # noqa: RUF012  jinja declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    environment: Any = ImmutableSandboxedEnvironment(  # its annotations are partial
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    environment.filters["tojson"] = tojson
    return environment
