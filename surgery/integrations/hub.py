"""Adapters on the hub of Hugging Face: the card that says what one is, and sending it there."""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, cast

from torch import nn

from surgery.artifact import SaveReport, spec_text
from surgery.distributed import on_first
from surgery.errors import refuse
from surgery.integrations.factories import said
from surgery.integrations.pretrained import CARD, base_name, module_of, save_pretrained
from surgery.integrations.transformers import HUB_ID
from surgery.mapping import Reason, peft_config
from surgery.model.layers import base_class
from surgery.planned import Plan
from surgery.report import shown_bytes
from surgery.runtime import Compiled
from surgery.state import require_state
from surgery.store import text_writer, write_atomic
from surgery.switching import chosen

# huggingface_hub is imported when it is first needed, and what it gives is `Any` here.

LIBRARY, PEFT = "model-surgery", "peft"
_INSTALL = "pip install 'model-surgery[models]'"
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True, slots=True)
class Pushed:
    """What `push_to_hub` did. url: where it is seen; report: as for `Compiled.save`."""

    url: str
    report: SaveReport


def push_to_hub(
    model: Compiled | nn.Module,
    repo_id: str,
    adapter: str | None = None,
    *,
    base: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    config: Mapping[str, object] | None = None,
    api: Any = None,
    **metadata: object,
) -> Pushed:
    """Send an adapter with its card to a repository of the hub, which is made if need be.

    It is what `save_pretrained` writes, and the card as README.md. All of it is written to a
    folder that is gone afterwards, before the hub is asked for anything.

    adapter, base, config: as for `save_pretrained`. private, token, revision, commit_message,
    create_pr: as for the hub. api: a `huggingface_hub.HfApi` to be used. metadata: as for `card`.
    Raises ArtifactError: E525 without huggingface_hub, E576 where the hub refuses; StateError: E411
    for an unknown adapter, E416 where several are live.
    """
    hub = api or _library().HfApi(token=token)
    module = module_of(model)
    name = chosen(require_state(module), adapter).name
    made = {"repo_id": repo_id, "private": private}
    commit = {
        "commit_message": commit_message or f"Upload the adapter `{name}`",
        "create_pr": create_pr,
        "revision": revision,
    }
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept) / "adapter"

        def send() -> str:
            text = _card(module, name, not report.peft, repo_id, base, metadata)
            write_atomic(folder / CARD, text_writer(text))
            return _sent(hub, folder, token, made, commit)

        report = save_pretrained(module, folder, name, base=base, config=config)
        url = on_first(module, send)
    return Pushed(url, replace(report, files=tuple(Path(p.name) for p in report.files)))


def _sent(
    hub: Any,
    folder: Path,
    token: str | bool | None,
    made: Mapping[str, object],
    commit: Mapping[str, object],
) -> str:
    """Send a folder to a repository; where it is seen then. Raises ArtifactError (E576)."""
    try:
        where = hub.create_repo(**made, token=token, exist_ok=True).repo_id
        found = hub.upload_folder(repo_id=where, folder_path=str(folder), token=token, **commit)
    except Exception as error:  # the hub's errors, and those of its transport
        hint = "is the token one that may write there? `hf auth login` keeps one"
        refuse("E576", f"the hub did not take `{made['repo_id']}`: {said(error)}", hint=hint)
    return str(getattr(found, "pr_url", None) or getattr(found, "commit_url", found))


def card(
    model: Compiled | nn.Module,
    adapter: str | None = None,
    *,
    repo_id: str = "",
    base: str | None = None,
    **metadata: object,
) -> str:
    """The text of a model card: an adapter's spec, its equations, where it is, how to load it.

    repo_id: the repository that it is for. base: a hub id in place of what the model was loaded
    from; a folder is not named in public. metadata: what `huggingface_hub.ModelCardData` knows
    besides, such as `license` or `datasets`; `tags` are added to its own. Raises StateError (E411,
    E416) as `Compiled.save` does; ArtifactError (E525) without huggingface_hub.
    """
    module = module_of(model)
    one = chosen(require_state(module), adapter)
    readable = not isinstance(peft_config(one.plan, one.name, module), Reason)
    return _card(module, one.name, readable, repo_id, base, metadata)


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        refuse("E525", "the hub is reached by huggingface_hub", hint=_INSTALL)
    return huggingface_hub


# ------------------------------------------------------------------------------------ the card


def _card(
    model: nn.Module,
    name: str,
    readable: bool,
    repo_id: str,
    base: str | None,
    metadata: Mapping[str, object],
) -> str:
    """readable: whether peft reads the folder as well."""
    whole = chosen(require_state(model), name).plan
    plan = replace(
        whole,
        sites=tuple(s for s in whole.sites if s.adapter == name),
        shared=tuple(s for s in whole.shared if s.adapter == name),
        diagnostics=(),
    )
    public = base_name(model) if base is None else base
    public = public if HUB_ID.fullmatch(public) and not os.path.exists(public) else ""
    lines = [
        f"# {repo_id or name}",
        "",
        *_introduced(plan, model, public),
        "",
        *_loading(repo_id or "owner/name", public, readable),
        "",
        *_fenced("## The spec", _spec(plan, name)),
        "",
        *_fenced("## The equations", "\n".join(dict.fromkeys(_equations(plan)))),
        "",
        "## The sites",
        "",
        *_sites(plan),
    ]
    return f"---\n{_metadata(plan, public, readable, metadata)}\n---\n\n" + "\n".join(lines) + "\n"


def _metadata(plan: Plan, base: str, readable: bool, given: Mapping[str, object]) -> str:
    methods = (link.method.name for site in plan.sites for link in site.form.links)
    tags = [LIBRARY, "adapter", *methods, *_tags(given)]
    stated = {
        "base_model": base or None,
        "base_model_relation": "adapter" if base else None,
        "library_name": PEFT if readable else LIBRARY,
        **given,
        "tags": [*dict.fromkeys(tags)],
    }
    data = _library().ModelCardData(**{n: v for n, v in stated.items() if v is not None})
    return cast(str, data.to_yaml())


def _tags(given: Mapping[str, object]) -> list[str]:
    stated = cast("str | list[str]", given.get("tags") or [])
    return [stated] if isinstance(stated, str) else [*stated]


def _introduced(plan: Plan, model: nn.Module, base: str) -> Iterator[str]:
    """What it is in a sentence or two."""
    on = f"[{base}](https://huggingface.co/{base})" if base else f"a {base_class(model).__name__}"
    yield (
        f"An adapter for {on}, without the model itself: {plan.trainable:,} trained numbers at "
        f"{len(plan.sites):,} sites, {shown_bytes(plan.bytes)}."
    )
    share = plan.trainable / plan.base_count if plan.base_count else 0
    yield f"The model has {plan.base_count:,} parameters; {share:.3%} of that is trained."


def _loading(repo_id: str, base: str, readable: bool) -> Iterator[str]:
    given = "" if base else ", base=…"  # the model that it was made on
    yield from ("## How to load it", "", "```sh", _INSTALL, "```", "", "```python")
    yield from ("from surgery.integrations.models import from_pretrained", "")
    yield f'compiled = from_pretrained("{repo_id}"{given})'
    yield from ("model = compiled.model", "```")
    if not base:
        yield from ("", "`base` is the folder or the hub id of the model that it was made on.")
    if readable:
        yield from ("", "It is a folder of peft's as well:", "", "```python")
        yield from ("from peft import PeftModel", "")
        yield from (f'model = PeftModel.from_pretrained(model, "{repo_id}")', "```")


def _spec(plan: Plan, name: str) -> str:
    """Its methods and statements, without the comment that the file of a folder begins with."""
    first, _, text = spec_text(plan, name, lambda method: ()).partition("\n")
    return text if first.startswith("#") else f"{first}\n{text}"


def _fenced(title: str, text: str) -> Iterator[str]:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    yield from (title, "", f"{fence}text", text.strip(), fence)


def _equations(plan: Plan) -> Iterator[str]:
    for site in plan.sites:
        yield f"{site.form.named}: {site.form.equation}"


def _sites(plan: Plan) -> Iterator[str]:
    """A table; of sites that differ by a number in their path alone, a row for all of them."""
    rows: Counter[tuple[str, ...]] = Counter()
    for site in plan.sites:
        form = site.form
        trained = sum(prod(form.stored[p.name]) for p in form.parameters if p.trained)
        path = _NUMBER.sub("*", site.path) or "(the model itself)"
        size = " × ".join(map(str, (form.sizes.fan_out, form.sizes.fan_in)))
        rows[path, form.kind.name, size, form.call, f"{trained:,}"] += 1
    yield "| site | number | kind | out × in | method | trained at each |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for (path, kind, size, call, trained), count in rows.items():
        yield f"| `{path}` | {count} | {kind} | {size} | `{_escaped(call)}` | {trained} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


__all__ = ["Pushed", "card", "push_to_hub"]
