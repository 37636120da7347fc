"""Names are a bijection, layouts turn back, and a config says all of an adapter or why not."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from surgery.check import resolve
from surgery.errors import ArtifactError, DefinitionError, PlanError, SurgeryError
from surgery.language.library import Library
from surgery.language.parse import parse
from surgery.mapping import ForeignConfig, Reason, StateDictMapping, mapping_of, peft_config
from surgery.mapping.paths import at_start, exactly, member, override
from surgery.plan import plan
from surgery.planned import Plan


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(6, 8), "k": nn.Linear(8, 6, bias=False)})
            for _ in range(3)
        )
        self.conv = nn.Conv2d(3, 4, (2, 5))
        self.grouped = nn.Conv2d(6, 4, 3, groups=2)
        self.dilated = nn.Conv2d(3, 4, 3, dilation=2)


def planned(spec: str, model: nn.Module | None = None) -> Plan:
    return plan(resolve(parse(spec), Library.standard()), model or Net())


def tensors_of(mapping: StateDictMapping) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {r.adapted: torch.randn(r.shape, generator=generator) for r in mapping.rows}


SPECS = (
    "match /q|k/ apply lora(r=2)",
    "match /embed|conv/ apply lora(r=2)",
    "match /q|conv/ apply dora(r=3)",
    'match q apply ia3() match /k|conv/ apply ia3(side="in")',
    "match /q|k/ apply vera(r=5)",
    "match k apply oft(block_size=4)",
    "match /q|k/ apply bone(r=5)",
    "match q apply bat(r=2)",
)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("form", ["native", "peft"])
def test_there_and_back_is_where_it_was(spec: str, form: str) -> None:
    mapping = mapping_of(planned(spec), Net())
    tensors = {**Net().state_dict(), **tensors_of(mapping)}
    renamed = mapping.rename(tensors, to=form)
    assert len(renamed) == len(tensors)
    back = mapping.rename(renamed, source=form, to="adapted")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[n], t) for n, t in tensors.items())
    across = mapping.rename(mapping.rename(tensors, to="native"), source="native", to=form)
    assert all(torch.equal(across[n], t) for n, t in renamed.items())


@pytest.mark.parametrize("spec", SPECS)
def test_json_brings_it_back(spec: str) -> None:
    mapping = mapping_of(planned(spec), Net())
    assert StateDictMapping.from_json(mapping.to_json()) == mapping


@given(st.text(max_size=30) | st.sampled_from(['{"rows": [{}], "base": []}', '{"rows": 3}']))
@settings(deadline=None)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="E514"):
        StateDictMapping.from_json(text)


def test_names() -> None:
    mapping = mapping_of(planned("match /q/ in layers[1:2] apply vera(r=5)"), Net())
    assert [(r.adapted, r.native, r.key("peft")) for r in mapping.rows] == [
        (
            "layers.1.q.surgery.default.d",
            "layers.1.q.d",
            "base_model.model.layers.1.q.vera_lambda_d",
        ),
        (
            "layers.1.q.surgery.default.g",
            "layers.1.q.g",
            "base_model.model.layers.1.q.vera_lambda_b",
        ),
        ("surgery.default.shared.vera.A", "shared.vera.A", "base_model.vera_A"),
        ("surgery.default.shared.vera.B", "shared.vera.B", "base_model.vera_B"),
    ]


def test_the_root_can_be_a_site() -> None:
    spec = "match /.*/ apply lora(r=2)"
    mapping = mapping_of(planned(spec, nn.Linear(3, 5)), nn.Linear(3, 5))
    assert [(r.adapted, r.native, r.key("peft")) for r in mapping.rows] == [
        ("surgery.default.A", "A", "base_model.model.lora_A.weight"),
        ("surgery.default.B", "B", "base_model.model.lora_B.weight"),
    ]


def test_groups_of_shared_parameters_are_numbered() -> None:
    spec = "match q apply vera(r=5) match k apply vera(r=7)"
    mapping = mapping_of(planned(spec), Net())
    shared = [r.native for r in mapping.rows if not r.site]
    assert shared == ["shared.vera.A", "shared.vera.B", "shared.vera_2.A", "shared.vera_2.B"]


def test_adapters_have_mappings_of_their_own() -> None:
    spec = "adapter one { match q apply lora(r=2) } adapter two { match q apply lora(r=3) }"
    mapping = mapping_of(planned(spec), Net())
    tensors = tensors_of(mapping)
    for name, rank in (("one", 2), ("two", 3)):
        renamed = mapping.rename(tensors, to="peft", adapter=name)
        assert len(renamed) == 6
        assert renamed["base_model.model.layers.0.q.lora_A.weight"].shape == (rank, 6)
        assert mapping.of_adapter(name).rename(tensors_of(mapping.of_adapter(name)), to="peft")
        back = mapping.rename(renamed, source="peft", to="adapted", adapter=name)
        assert back.keys() == {n for n in tensors if f".{name}." in n}


def test_unknown_tensors_are_refused_with_the_nearest() -> None:
    mapping = mapping_of(planned("match q apply lora(r=2)"), Net())
    wrong = {"layers.0.q.surgery.default.C": torch.ones(2)}
    with pytest.raises(ArtifactError, match=r"E518(.|\n)*nearest is `layers\.0\.q\.surgery"):
        mapping.rename(wrong)


def test_what_a_format_has_no_key_for_is_refused() -> None:
    mapping = mapping_of(planned("match grouped apply lora(r=2)"), Net())
    with pytest.raises(ArtifactError, match="has no key in peft"):
        mapping.rename(tensors_of(mapping))


OWN = "method own() on matrix {{ train {name}[out] = 0; W' = {name} * rows(W) + W }} "


def test_a_parameter_named_like_one_of_the_site_gets_another_name() -> None:
    spec = OWN.format(name="weight") + "match q apply own()"
    mapping = mapping_of(planned(spec), Net())
    assert mapping.rows[0].adapted == "layers.0.q.surgery.default.weight"
    assert mapping.rows[0].native == "layers.0.q.weight_"


def test_two_tensors_of_one_name_are_refused() -> None:
    mapping = mapping_of(planned("match q apply lora(r=2)"), Net())
    with pytest.raises(PlanError, match=r"E320.*would be `layers\.0\.q\.A`"):
        StateDictMapping(mapping.rows, ("layers.0.q.A",))


# ------------------------------------------------------------------------------------ configs


def config_of(spec: str) -> ForeignConfig:
    config = peft_config(planned(spec), "default")
    assert isinstance(config, ForeignConfig), config
    return config


def reason_of(spec: str) -> str:
    reason = peft_config(planned(spec), "default")
    assert isinstance(reason, Reason)
    return reason.text


def test_sites_are_listed_by_their_whole_paths() -> None:
    values = config_of("match q in layers[0:2] apply lora(r=2)").values
    assert values["target_modules"] == ["layers.0.q", "layers.1.q"]
    assert values["rank_pattern"] == {}


def test_a_path_that_could_be_an_ending_is_written_as_a_regex() -> None:
    assert config_of("match /conv|embed/ apply lora(r=2)").values["target_modules"] == "embed|conv"


def test_each_site_may_have_its_rank() -> None:
    values = config_of("match /q|k/ apply lora(r = 2 + layer // 2, alpha = 4)").values
    assert values["r"] == 2
    assert values["rank_pattern"] == {r"^(?:layers\.2\.q|layers\.2\.k)": 3}
    assert values["alpha_pattern"] == {}


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_ranks_and_alphas_are_read_back(data: st.DataObject) -> None:
    parts: list[str] = []
    for layer in range(3):
        for name in ("q", "k"):
            rank, alpha = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
            parts.append(f"match {name} in layers[{layer}] apply lora(r={rank}, alpha={alpha})")
    # `peft_config` reads back what it wrote and compares, so a config is the proof.
    assert config_of(" ".join(parts)).values["peft_type"] == "LORA"


def test_bone_is_written_as_its_heir() -> None:
    values = config_of("match q apply bone(r=3)").values
    assert (values["peft_type"], values["init_weights"]) == ("MISS", True)
    values = config_of("match q apply bat(r=2)").values
    assert (values["peft_type"], values["init_weights"]) == ("MISS", "bat")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("match q apply lora() match k apply bone(r=2)", "one method an adapter"),
        (OWN.format(name="v") + "match q apply own()", "does not know `own`"),
        (
            "method lora(r: int = 2) on matrix { train v[out] = 0; W' = W + v * rows(W) } "
            "match q apply lora()",
            "does not know `lora` as it is defined here",
        ),
        ("match q apply vera(r=3) match k apply vera(r=4)", "`r` is one for all sites"),
        ("match grouped apply lora(r=2)", "no tensor for A of lora on `grouped`"),
        ("match dilated apply dora(r=2)", "no tensor for A of dora on `dilated`"),
        ("match /embed/ apply hra(r=2)", "no tensor for u of hra on `embed`"),
        (
            "match /embed|q/ apply lora(r=2, dropout=0.5)",
            "cannot say dropout = 0.5 at `embed` (embedding); it means 0.0 there",
        ),
        (
            "match q apply lora(r=2, dropout=0.5) match k apply lora(r=2)",
            "`lora_dropout` is one for all sites, and here it is 0.5 at `layers.0.q` and 0 at",
        ),
        ("match k apply miss(r=2, mini_r=3)", ""),
        ('match q apply ia3() match grouped apply ia3(side="in")', "no tensor for l of ia3"),
    ],
)
def test_what_one_config_cannot_say_has_a_reason(spec: str, reason: str) -> None:
    if reason:
        assert reason in reason_of(spec)
    else:
        assert config_of(spec)


def test_a_users_method_has_formats_with_the_same_rights() -> None:
    spec = (
        OWN.format(name="v")
        + 'format peft own { config peft_type = "OWN" tensor v = "own_v" as "o -> 1 o" } '
        + "match q apply own()"
    )
    assert config_of(spec).values == {"peft_type": "OWN"}
    row = mapping_of(planned(spec)).rows[0]
    assert row.key("peft") == "base_model.model.layers.0.q.own_v"
    assert row.file_shape("peft") == (1, 8)


def test_a_layout_that_does_not_fit_is_reported_where_it_stands() -> None:
    spec = (
        OWN.format(name="v")
        + 'format peft own { tensor v = "v" as "a b -> b a" } match q apply own()'
    )
    with pytest.raises(DefinitionError, match="E124"):
        mapping_of(planned(spec))


def test_a_field_with_an_unknown_name_is_reported() -> None:
    spec = (
        OWN.format(name="v")
        + 'format peft own { config x = nothing tensor v = "v" } match q apply own()'
    )
    with pytest.raises(SurgeryError, match="unknown name `nothing`"):
        peft_config(planned(spec), "default")


# ------------------------------------------------------------------------------------- paths

PATTERNS = (
    "q",
    "k|q",
    r"layers\.1\..*",
    r"layers\.[01]\.q",
    r".*\.k",
    r"^layers\.2\.q",
    r"q$",
    "l",
)
PATHS = [f"layers.{i}.{n}" for i in range(3) for n in "qk"] + ["q", "layersx1.q", "l"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("path", PATHS)
def test_patterns_mean_what_they_do_in_the_other_library(pattern: str, path: str) -> None:
    taken = re.match(rf"(.*\.)?({pattern})$", path) is not None
    assert (override(path, {pattern: 1}) == 1) is taken
    assert member(path, pattern) is (re.fullmatch(pattern, path) is not None)


@given(st.lists(st.text("ab.-_0| ", min_size=1, max_size=6), min_size=1, max_size=4))
@settings(deadline=None)
def test_written_paths_take_themselves_and_nothing_else(paths: list[str]) -> None:
    for path in [*paths, "a", "x.a", paths[0] + "b", "b." + paths[0]]:
        assert member(path, exactly(paths)) is (path in paths)
        assert (override(path, {at_start(paths): 1}) == 1) is (path in paths)


def test_an_ending_in_a_list_needs_no_dot() -> None:
    assert member("layers.0.fc", ["fc"])
    assert member("layers.0.xfc", ["fc"])
    assert not member("layers.0.fc", ["q"])
    assert not member("layers.0.fc", None)
