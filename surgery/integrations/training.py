"""Training adapters: checkpoints that hold them and not the base, and what is trained.

It is for loops of one's own as for the trainers of a library.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from surgery.artifact import CONFIG, FILES, MAPPING, SPEC
from surgery.digests import check_base
from surgery.errors import Report, refuse
from surgery.grouping import groups
from surgery.manifest import Manifest
from surgery.model.holder import base_parameters
from surgery.runtime import Compiled
from surgery.state import require_state
from surgery.store import read_json
from surgery.swapping import differences, loaded_plan
from surgery.trainable import trainable

# ------------------------------------------------------------------------------- checkpoints


def save_adapters(model: nn.Module, folder: str | Path) -> tuple[Path, ...]:
    """Write what training changes to a folder; gives the folder of each adapter.

    One adapter is saved in the folder itself, each of several in a sub-folder of its name: those
    that are trained, or all of them where none is. Raises what `Compiled.save` does.
    """
    compiled, folder = Compiled(model), Path(folder)
    names = trainable(model) or compiled.adapters
    if len(names) == 1:
        compiled.save(folder, names[0])
        return (folder,)
    for name in names:
        compiled.save(folder / name, name)
    for name in FILES:  # of one alone, which would count for all there is
        (folder / name).unlink(missing_ok=True)
    return tuple(folder / name for name in names)


def saved_adapters(folder: str | Path) -> Mapping[str, Path]:
    """The folders of the adapters that a checkpoint holds, by the adapters' names.

    Raises ArtifactError: E512 and E514 for a file that is not whole.
    """
    folder = Path(folder)
    if _is_own(folder):
        return {_manifest(folder).adapter: folder}
    below = sorted(folder.iterdir()) if folder.is_dir() else []
    return {one.name: one for one in below if _is_own(one) and _manifest(one).adapter == one.name}


def _is_own(folder: Path) -> bool:
    return (folder / MAPPING).is_file() and (folder / SPEC).is_file()


def load_adapters(model: nn.Module, folder: str | Path) -> None:
    """Give a model's adapters the weights of a checkpoint, in place: parameters stay the same.

    Raises, with nothing changed: ArtifactError for a folder that is not whole, E570 for one that
    has no adapter or others than the model, E522 for another base; StateError (E439) for another
    kind of adapter.
    """
    compiled, found = Compiled(model), saved_adapters(folder)
    if not found:
        refuse("E570", f"{folder} holds no adapter", hint=_what_else(Path(folder)))
    _check_names(compiled, found, Path(folder))
    for name, one in found.items():
        _check_fits(model, name, one)
    before = {name: {k: t.clone() for k, t in compiled.parameters(name).items()} for name in found}
    try:
        for name, one in found.items():
            compiled.hotswap(name, one)
    except BaseException:
        for name, tensors in before.items():
            compiled.hotswap(name, tensors)
        raise


def _check_fits(model: nn.Module, name: str, folder: Path) -> None:
    """Whether a folder has weights for an adapter of a model, made on its base."""
    sites = {site.path: site for site in require_state(model).adapters[name].sites}
    dtype = next((site.form.dtype for site in sites.values()), None)
    plan, loaded = loaded_plan(folder, model, dtype, name)
    differences(sites, plan, str(folder)).stop()
    check_base(sites.values(), loaded.base, str(folder))


def _manifest(folder: Path) -> Manifest:
    return Manifest(folder / MAPPING, read_json(folder / MAPPING))


def _what_else(folder: Path) -> str:
    if not folder.is_dir():
        return "give the folder of a checkpoint, such as `checkpoint-500` in the output folder"
    if (folder / CONFIG).is_file():
        return "it is peft's, whose optimizer has another order: attach it, and begin anew"
    return "it was written for another model, or by a trainer that saves none"


def _check_names(compiled: Compiled, found: Mapping[str, Path], folder: Path) -> None:
    report = Report()
    known, trained = compiled.adapters, trainable(compiled.model)
    for name in sorted(found.keys() - {*known}):
        hint = f"the model has {', '.join(f'`{n}`' for n in known)}; rename() one, or attach this"
        report.error("E570", f"{folder} has an adapter `{name}`, and the model has none", hint=hint)
    for name in (n for n in trained if n not in found):
        hint = "go on from a checkpoint of the same adapters, or freeze this one"
        report.error("E570", f"{folder} lacks the adapter `{name}`, which is trained", hint=hint)
    report.stop()


# --------------------------------------------------------------------------------- training


def check_trained(model: nn.Module) -> None:
    """Whether training changes what is live, and nothing that a checkpoint would not hold.

    Raises StateError: E402 while an adapter is merged, E450 where nothing that is live requires
    gradients; ArtifactError (E571) for parameters of the base that do.
    """
    state, report = require_state(model), Report()
    if state.is_merged:
        refuse("E402", f"`{state.live}` is merged", hint="unmerge() first")
    base = [name for name, p in base_parameters(model).items() if p.requires_grad]
    for name in base[:_SHOWN]:
        report.error(
            "E571",
            f"`{name}` of the base would be trained, and no checkpoint would hold it",
            hint=f"say `train {name}` in the spec, or requires_grad_(False)",
        )
    if len(base) > _SHOWN:
        message = f"{len(base) - _SHOWN} more parameters of the base would be trained"
        report.error("E571", message, hint="let the base's parameters require no gradients")
    report.stop()
    groups(model, 1.0)  # E450 where all are frozen
    if not {*trainable(model)} & {*state.live.adapters}:
        names = " and ".join(f"`{name}`" for name in trainable(model))
        live = f"`{state.live}`" if state.live else "the base alone"
        message = f"{live} is live, and {names} would be trained: no gradient would reach it"
        refuse("E450", message, hint=f"activate({trainable(model)[0]!r}) before training")


_SHOWN = 3


def split_by_rate(optimizer: Any, model: nn.Module, lr: float) -> None:
    """Let each parameter have the learning rate that its method or its statement says.

    optimizer: over the parameters of a model's adapters, of which all were given `lr`. Its groups
    are split, and are otherwise as they were.
    """
    rates = {id(p): group["lr"] for group in groups(model, lr) for p in group["params"]}
    if set(rates.values()) <= {lr}:
        return
    split: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        own = [(rates.get(id(p), lr), p) for p in group["params"]]
        for rate in dict.fromkeys(rate for rate, _ in own):
            split.append({**group, "params": [p for r, p in own if r == rate], "lr": rate})
    optimizer.param_groups[:] = split


__all__ = ["check_trained", "load_adapters", "save_adapters", "saved_adapters", "split_by_rate"]
