"""What stands between the wrapper and the model, and acts on its adapters through the runtime."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

import surgery
from surgery.allocation import Allocation, allocate
from surgery.compat.peft.config import PeftConfig
from surgery.compat.peft.putting import (
    configs_of,
    forget_configs,
    known,
    put_on,
    refuse_option,
    set_trained,
    together,
)
from surgery.compat.peft.status import LayerStatus, ModelStatus, layer_status, model_status
from surgery.compat.peft.weighted import add_weighted
from surgery.runtime import Compiled
from surgery.state import require_state, state_of

BASE = "__base__"
"""How a sample of a batch says that it has no adapter."""


class BaseTuner(nn.Module):
    """A model with adapters: peft's `LoraModel` and the like, for every method."""

    model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        """Around a model that has its adapters, or gets them."""
        super().__init__()
        self.model = model
        self._resting: tuple[str, ...] = ()
        self._allocation: Allocation | None = None

    def __getattr__(self, name: str) -> Any:
        """What the model has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    @property
    def compiled(self) -> Compiled:
        """The handle of the model. Raises StateError (E401) if it has no adapter any more."""
        return surgery.of(self.model)

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configs by the names of the adapters."""
        return configs_of(self.model)

    # ------------------------------------------------------------------------------- running

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """As `plain`, with what a budget adds to the loss."""
        return self._regularised(self.plain(*args, adapter_names=adapter_names, **kwargs))

    def plain(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's own forward; `adapter_names` are an adapter for each sample."""
        if adapter_names is None:
            return self.model(*args, **kwargs)
        with self.chosen(adapter_names):
            return self.model(*args, **kwargs)

    def generate(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """The model's own `generate`; `adapter_names` as for a forward."""
        model: Any = self.model
        with self.chosen(adapter_names):
            return model.generate(*args, **kwargs)

    @contextmanager
    def chosen(self, names: Sequence[str] | None) -> Generator[None]:
        """Let each sample of a batch have its own adapter; `__base__` for none."""
        if names is None:
            yield
            return
        with self.compiled.route([None if name == BASE else name for name in names]):
            yield

    @contextmanager
    def disabled(self) -> Generator[None]:
        """Let the base alone be live in this thread."""
        with self.compiled.using(None):
            yield

    # ---------------------------------------------------------------------------- which is live

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that are live, or that would be if they were enabled."""
        state = state_of(self.model)
        if state is None:
            return []
        return [*(state.live.adapters or self._resting)]

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the one that is, or the names of all."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Let adapters be live, the sum of several, and trained, and no others.

        Raises StateError (E402, E411), ArtifactError (E562).
        """
        names = known(self.model, [adapter_name] if isinstance(adapter_name, str) else adapter_name)
        self.compiled.activate(together(self.model, names) or None)
        self._resting = ()
        every = require_state(self.model).adapters
        set_trained(self.model, every.keys() - set(names), False)
        set_trained(self.model, names, not inference_mode)

    def set_requires_grad(
        self, adapter_names: str | Iterable[str], requires_grad: bool = True
    ) -> None:
        """Let adapters be trained, or not, whichever are live. Raises StateError (E411)."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        set_trained(self.model, known(self.model, names), requires_grad)

    def disable_adapter_layers(self) -> None:
        """Let the base alone be live for all threads, until the adapters are enabled."""
        names = tuple(self.active_adapters)
        self.compiled.activate(None)
        self._resting = names

    def enable_adapter_layers(self) -> None:
        """Let those be live again that were."""
        if self._resting:
            self.compiled.activate(together(self.model, self._resting))
            self._resting = ()

    # ---------------------------------------------------------------------------- come and go

    def add_adapter(
        self, adapter_name: str, peft_config: PeftConfig, autocast_adapter_dtype: bool = True
    ) -> None:
        """Put another adapter beside those that are there; it is not live yet, nor trained.

        Raises as `putting.put_on` does.
        """
        first = state_of(self.model) is None
        put_on(self.model, peft_config, adapter_name, autocast=autocast_adapter_dtype)
        if not first:
            set_trained(self.model, (adapter_name,), False)
        self.peft_config[adapter_name] = peft_config

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Put an adapter made of others beside them; it is not live yet, nor trained.

        svd_full_matrices, svd_driver: have no effect. `svd_clamp` is refused (E561). Raises as
        `surgery.composing.compose_on`.
        """
        del svd_full_matrices, svd_driver
        if svd_clamp is not None:
            refuse_option("svd_clamp", svd_clamp, "leave it out")
        add_weighted(
            self.model,
            adapters,
            weights,
            adapter_name,
            combination_type,
            svd_rank,
            density,
            majority_sign_method,
        )

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off; if it is live the first of the others is.

        Raises StateError: E402 if it is merged, E411 if there is none of that name.
        """
        known(self.model, (adapter_name,))
        live = tuple(self.active_adapters)
        compiled = self.compiled
        if adapter_name in live and not compiled.merged:
            rest = [n for n in live if n != adapter_name]
            rest = rest or [n for n in compiled.adapters if n != adapter_name][:1]
            resting = bool(self._resting)
            compiled.activate(None if resting else together(self.model, rest) or None)
            self._resting = tuple(rest) if resting else ()
        compiled.delete(adapter_name)
        self.peft_config.pop(adapter_name, None)
        if self._allocation is not None and self._allocation.adapter.name == adapter_name:
            self._allocation = None  # one that comes under the same name has a budget of its own

    # --------------------------------------------------------------------------------- merging

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Put what is live into the weights; `unmerge_adapter` takes it out, to the bit.

        adapter_names: these, made live first. safe_merge: refuse weights that are no numbers
        (E430). Raises StateError as `Inverse.merge` does, ArtifactError (E562).
        """
        self._merge(adapter_names, safe_merge, keep=True)

    def _merge(self, names: Sequence[str] | None, safe: bool, *, keep: bool) -> None:
        compiled = self.compiled
        before = compiled.live
        if names is not None:
            compiled.activate(together(self.model, known(self.model, names)) or None)
        try:
            compiled.inverse.merge(undo="exact" if keep else "none", allow_nonfinite=not safe)
        except BaseException:
            if not compiled.merged:
                compiled.activate(before)
            raise

    def unmerge_adapter(self) -> None:
        """Take what is merged out of the weights. Raises StateError as `Inverse.unmerge` does."""
        self.compiled.inverse.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> nn.Module:
        """The model with what is live in its weights, and without adapters.

        progressbar: has no effect. Other arguments, and what is raised, as for `merge_adapter`.
        """
        del progressbar
        if not self.compiled.merged:
            self._merge(adapter_names, safe_merge, keep=False)
        elif adapter_names is not None:
            refuse_option("adapter_names", adapter_names, "unmerge_adapter() first")
        return self._unload(keep_merge=True)

    def unload(self) -> nn.Module:
        """The model without adapters, as it was."""
        return self._unload(keep_merge=False)

    def _unload(self, *, keep_merge: bool) -> nn.Module:
        model = self.compiled.inverse.unload(keep_merge=keep_merge)
        forget_configs(model)
        return model

    # --------------------------------------------------------------------------------- budgets

    def update_and_allocate(self, global_step: int) -> None:
        """Take away what falls out of a budget that shrinks, after the step of an optimizer.

        Raises StateError (E423) for an adapter that has none.
        """
        self._budget().step(global_step)

    def _budget(self) -> Allocation:
        name, *_ = self.active_adapters
        if self._allocation is None or self._allocation.adapter.name != name:
            fields = self.peft_config[name].to_dict()
            given = {n: fields[n] for n in _SCHEDULE if fields.get(n) is not None}
            if "total_step" not in given:
                hint = "say it in the config: how many steps the training has"
                refuse_option("total_step", fields.get("total_step"), hint)
            self._allocation = allocate(self.compiled, adapter=name, **given)
        return self._allocation

    def _regularised(self, outputs: Any) -> Any:
        """The loss with what keeps the directions of such an adapter apart."""
        loss = cast(object, getattr(outputs, "loss", None))
        if not isinstance(loss, Tensor):
            return outputs
        names = self.active_adapters
        config = self.peft_config.get(names[0]) if len(names) == 1 else None
        if config is None or "orth_reg_weight" not in vars(config):
            return outputs
        outputs.loss = loss + self._budget().loss()
        return outputs

    # ---------------------------------------------------------------------------------- status

    def get_layer_status(self) -> list[LayerStatus]:
        """Every site with its adapters."""
        return layer_status(self.model)

    def get_model_status(self) -> ModelStatus:
        """The adapters of the whole model."""
        return model_status(self.model)


_SCHEDULE = (
    "total_step",
    "target_r",
    "tinit",
    "tfinal",
    "deltaT",
    "beta1",
    "beta2",
    "orth_reg_weight",
)
