"""Virtual tokens: what peft gives, and what each sample gives by itself without any machinery."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import wraps
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    RobertaConfig,
    T5Config,
    ViTConfig,
    WhisperConfig,
)

from surgery.calls.prompts import Call, calls_of
from surgery.calls.virtual import Prompt, batched, prompt_of
from surgery.errors import SurgeryError

untyped: Any = torch  # whose types are not complete
hf: Any = peft
models: Any = transformers

HIDDEN, VOCABULARY, VIRTUAL = 24, 61, 5
TOKENS = torch.tensor(
    [[7, 31, 5, 44, 23, 12, 58], [9, 18, 27, 36, 45, 0, 0], [53, 3, 41, 29, 17, 6, 11]]
)
LENGTHS = (7, 5, 7)
MASK = (TOKENS != 0).long()
TYPES = (TOKENS > 30).long()
# The same, with padding on the left.
LEFT = torch.stack([row.roll(7 - n) for row, n in zip(TOKENS, LENGTHS, strict=True)])

BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "num_labels": 3,
}
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_head": 2,
    "n_layer": 2,
    "n_positions": 40,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "d_ff": 44,
    "d_kv": 12,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": None,
}
CONFIGS: Mapping[str, Callable[[], Any]] = {
    "Bert": lambda: BertConfig(**BERT),
    "Roberta": lambda: RobertaConfig(**BERT, pad_token_id=0),
    "Llama": lambda: LlamaConfig(**LLAMA),
    "GPT2": lambda: GPT2Config(**GPT2),
    "T5": lambda: T5Config(**T5),
}


def made(name: str) -> Any:
    """A small model by its class, with weights that let every token matter."""
    config = next(make for start, make in CONFIGS.items() if name.startswith(start))()
    if "QuestionAnswering" in name:
        config.num_labels = 2
    untyped.manual_seed(0)
    return enlarged(getattr(models, name)(config).eval().double())


def enlarged(model: Any) -> Any:
    """A model in which small weights are larger."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6 if parameter.std() < 0.1 else 1)
    return model


def drawn(tokens: int = VIRTUAL, seed: int = 1) -> Tensor:
    """So many virtual tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)


def before(tokens: Tensor | None) -> Prompt | None:
    """A prompt that stands before a text."""
    return None if tokens is None else Prompt(len(tokens), 0, lambda _: (tokens[None], None))


def put(model: Any, prompt: Callable[[], Prompt]) -> Any:
    """A copy of a model of which some classes are others, as those of mounted modules are."""
    copy = deepcopy(model)
    modules = dict(copy.named_modules())
    for path, calls in calls_of(copy).items():
        base: Any = modules[path].__class__
        members = {name: changed(base, name, call, prompt) for name, call in calls.items()}
        modules[path].__class__ = type(base.__name__, (base,), {**members, "surgery_base": base})
    return copy


def changed(base: Any, name: str, call: Call, prompt: Callable[[], Prompt]) -> Any:
    own = getattr(base, name)

    @wraps(own)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(self, own, prompt(), args, kwargs)

    return method


def with_prompt(model: Any, prompt: Prompt | Tensor) -> Any:
    """A copy of a model, with a prompt."""
    known = before(prompt) if isinstance(prompt, Tensor) else prompt
    assert known is not None
    return put(model, lambda: known)


def embedded(model: Any, tokens: Tensor, text: Tensor) -> Tensor:
    """What a model reads by itself for a text [tokens]: [1, n + tokens, hidden]."""
    return torch.cat([tokens, model.get_input_embeddings()(text)])[None].detach()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


# -------------------------------------------------------------------------------- beside peft

# transformers renamed what peft asks for, and gives it positions that peft leaves out.
PEFT = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated", "ignore:Position ids are not supported"
)


@dataclass(frozen=True)
class Case:
    """A model with a head, what peft calls its task, and what it is called with."""

    model: str
    task: str
    inputs: Mapping[str, Tensor]


LABELS = TOKENS.masked_fill(MASK == 0, -100)
TEXT = {"input_ids": TOKENS, "attention_mask": MASK}
CLASSES = torch.tensor([2, 0, 1])
CASES = (
    Case("LlamaForCausalLM", "CAUSAL_LM", {**TEXT, "labels": LABELS}),
    Case("GPT2LMHeadModel", "CAUSAL_LM", {**TEXT, "labels": LABELS}),
    Case(
        "BertForSequenceClassification",
        "SEQ_CLS",
        {**TEXT, "labels": CLASSES, "token_type_ids": TYPES},
    ),
    Case("BertForTokenClassification", "TOKEN_CLS", {**TEXT, "token_type_ids": TYPES}),
    Case("BertForQuestionAnswering", "QUESTION_ANS", TEXT),
    Case("BertModel", "FEATURE_EXTRACTION", TEXT),
    Case("T5ForConditionalGeneration", "SEQ_2_SEQ_LM", {**TEXT, "labels": LABELS}),
    Case("LlamaForSequenceClassification", "SEQ_CLS", {"input_ids": LEFT, "labels": CLASSES}),
)


def beside(model: Any, task: str) -> tuple[Any, Any, Any, Any]:
    """A model with a prompt of ours and one with peft's, and the parameters of both."""
    config = hf.PromptTuningConfig(task_type=task, num_virtual_tokens=VIRTUAL)
    theirs = hf.get_peft_model(deepcopy(model), config).eval()
    weight = theirs.prompt_encoder.default.embedding.weight
    own = weight.detach()[:VIRTUAL].clone().requires_grad_()
    return with_prompt(model, own), theirs, own, weight


@PEFT
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model)
def test_outputs_losses_and_gradients_are_those_of_peft(case: Case) -> None:
    ours, theirs, own, weight = beside(made(case.model), case.task)
    found, expected = ours(**case.inputs), theirs(**case.inputs)
    outputs = [name for name, value in expected.items() if isinstance(value, Tensor)]
    for name in outputs:
        close(found[name], expected[name])
    for output in (found, expected):
        loss: Any = torch.stack([output[name].square().sum() for name in outputs]).sum()
        loss.backward()
    close(own.grad, weight.grad[:VIRTUAL])
    assert own.grad.abs().max() > 1e-3


@PEFT
def test_labels_of_tokens_are_those_of_the_text() -> None:
    """As peft's where labels are -100 for what is virtual, which it does not make so itself."""
    ours, theirs, _, _ = beside(made("BertForTokenClassification"), "TOKEN_CLS")
    labels = TYPES.masked_fill(MASK == 0, -100)
    whole = nn.functional.pad(labels, (VIRTUAL, 0), value=-100)
    close(ours(**TEXT, labels=labels).loss, theirs(**TEXT, labels=whole).loss)


@PEFT
def test_a_span_is_one_of_the_text() -> None:
    """As peft's for a span that is moved, which it does not do itself."""
    ours, theirs, _, _ = beside(made("BertForQuestionAnswering"), "QUESTION_ANS")
    start, end = torch.tensor([1, 0, 3]), torch.tensor([4, -1, 9])
    moved = {"start_positions": start + VIRTUAL, "end_positions": torch.tensor([9, 5, 14])}
    found = ours(**TEXT, start_positions=start, end_positions=end)
    close(found.loss, theirs(**TEXT, **moved).loss)


WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"num_beams": 3},
    {"num_beams": 2, "use_cache": False},
    {"do_sample": True},
)


@PEFT
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(
    ("model", "task"),
    [(CASES[n].model, CASES[n].task) for n in (0, 1, 6)],
    ids=["llama", "gpt2", "t5"],
)
def test_generated_tokens_are_those_of_peft(model: str, task: str, way: dict[str, Any]) -> None:
    ours, theirs, _, _ = beside(made(model), task)
    tokens, mask = (TOKENS, MASK) if task.startswith("SEQ") else (TOKENS[::2], MASK[::2])
    found: list[Tensor] = []
    for one in (ours, theirs):
        untyped.manual_seed(3)
        found.append(one.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=6, **way))
    assert torch.equal(*found)


# --------------------------------------------------------------------------------- generation


def written(model: Any, prefix: Tensor, new: int) -> Tensor:
    """What a model writes by itself after embeddings [1, tokens, hidden], without a cache."""
    tokens: list[Tensor] = []
    for _ in range(new):
        logits = model(inputs_embeds=prefix, use_cache=False).logits
        tokens.append(logits[0, -1].argmax())
        prefix = torch.cat([prefix, model.get_input_embeddings()(tokens[-1])[None, None]], 1)
    return torch.stack(tokens)


def texts() -> list[Tensor]:
    return [row[:n] for row, n in zip(TOKENS, LENGTHS, strict=True)]


GENERATED: tuple[dict[str, Any], ...] = (
    {},
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"cache_implementation": "static", "prefill_chunk_size": 2},
    {"prefill_chunk_size": 3},
)


@pytest.mark.parametrize("way", GENERATED, ids=str)
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_each_text_of_a_padded_batch_goes_on_as_it_does_by_itself(
    name: str, way: dict[str, Any]
) -> None:
    model, tokens = made(name), drawn()
    found = with_prompt(model, tokens).generate(
        input_ids=LEFT, attention_mask=(LEFT != 0).long(), max_new_tokens=6, **way
    )
    for row, text in zip(found, texts(), strict=True):
        assert torch.equal(row[7:], written(model, embedded(model, tokens, text), 6))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_beams_are_those_of_a_longer_text(name: str) -> None:
    model, tokens = made(name), drawn()
    given: dict[str, Any] = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2}
    static = {"cache_implementation": "static"}
    for text in texts():
        expected = model.generate(inputs_embeds=embedded(model, tokens, text), **given)
        for more in ({}, static):
            found = with_prompt(model, tokens).generate(input_ids=text[None], **given, **more)
            assert torch.equal(found[:, len(text) :], expected)


def test_what_drafts_tokens_changes_none() -> None:
    model, tokens, text = made("LlamaForCausalLM"), drawn(), TOKENS[:1]
    assistant = made("LlamaForCausalLM")
    nn.init.normal_(assistant.lm_head.weight)
    adapted = with_prompt(model, tokens)
    expected = written(model, embedded(model, tokens, text[0]), 9)
    for way in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": assistant}):
        found = adapted.generate(
            input_ids=text, attention_mask=torch.ones_like(text), max_new_tokens=9, **way
        )
        assert torch.equal(found[0, 7:], expected)


def test_a_text_goes_on_in_its_cache() -> None:
    model, tokens = made("LlamaForCausalLM"), drawn()
    adapted = with_prompt(model, tokens)
    once = adapted.generate(
        input_ids=TOKENS[:1], max_new_tokens=3, return_dict_in_generate=True, use_cache=True
    )
    more = torch.cat([once.sequences, TOKENS[2:]], 1)
    given: dict[str, Any] = {"attention_mask": torch.ones_like(more), "max_new_tokens": 4}
    found = adapted.generate(input_ids=more, past_key_values=once.past_key_values, **given)
    expected = written(model, embedded(model, tokens, more[0]), 4)
    assert torch.equal(found[0, more.shape[1] :], expected)


def test_embeddings_are_gone_on_from() -> None:
    model, tokens, text = made("GPT2LMHeadModel"), drawn(), TOKENS[0]
    x = model.get_input_embeddings()(text)[None].detach()
    found = with_prompt(model, tokens).generate(inputs_embeds=x, max_new_tokens=5)
    assert torch.equal(found[0], written(model, embedded(model, tokens, text), 5))


def test_tokens_after_a_text_stand_before_what_is_written() -> None:
    model, tokens, text = made("LlamaForCausalLM"), drawn(), TOKENS[0]
    suffix = drawn(3, seed=2)
    both = Prompt(VIRTUAL, 3, lambda _: (tokens[None], suffix[None]))
    adapted = with_prompt(model, both)
    x = torch.cat([embedded(model, tokens, text), suffix[None]], 1)
    for way in ({}, {"cache_implementation": "static"}):
        found = adapted.generate(input_ids=text[None], max_new_tokens=4, **way)
        assert torch.equal(found[0, 7:], written(model, x, 4))
    for way in ({"use_cache": False}, {"prefill_chunk_size": 3}):
        with pytest.raises(SurgeryError, match="E474"):
            adapted.generate(input_ids=text[None], max_new_tokens=4, **way)
    close(adapted(text[None]).logits, model(inputs_embeds=x).logits)


# ------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_a_head_reads_the_last_token_of_each_text(name: str, side: str) -> None:
    model, tokens = made(f"{name}ForSequenceClassification").float(), drawn().float()
    adapted = with_prompt(model, tokens)
    batch = LEFT if side == "left" else TOKENS
    positions = ((batch != 0).cumsum(1) - 1).clamp(min=0)
    given: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True}
    with_eager(adapted)
    for more in [{"position_ids": positions}, *([{}] if side == "right" else [])]:
        found = adapted(batch, attention_mask=(batch != 0).long(), **given, **more)
        for i, text in enumerate(texts()):
            alone = with_eager(model)(inputs_embeds=embedded(model, tokens, text), **given)
            close(found.logits[i], alone.logits[0])
            own = real(len(text), side)
            for mine, theirs in zip(found.hidden_states, alone.hidden_states, strict=True):
                close(mine[i, own], theirs[0])
            for mine, theirs in zip(found.attentions, alone.attentions, strict=True):
                close(mine[i][:, own][:, :, own], theirs[0])


def with_eager(model: Any) -> Any:
    """A model that says what attends to what."""
    model.set_attn_implementation("eager")
    return model


def real(length: int, side: str) -> list[int]:
    """The places of a prompt and a text in a batch that is padded on a side."""
    start = VIRTUAL + (7 - length) * (side == "left")
    return [*range(VIRTUAL), *range(start, start + length)]


def test_a_head_without_padding_reads_the_last_token() -> None:
    model = made("LlamaForSequenceClassification")
    model.config.pad_token_id = None
    tokens = drawn()
    found = with_prompt(model, tokens)(TOKENS[:1], labels=CLASSES[:1])
    expected = model(inputs_embeds=embedded(model, tokens, TOKENS[0]), labels=CLASSES[:1])
    close(found.logits, expected.logits)
    close(found.loss, expected.loss)


# ------------------------------------------------------------------- a prompt for each sample

PROMPTS = (drawn(2, seed=4), None, drawn(VIRTUAL, seed=5))


def each(rows: int = 3) -> Prompt:
    """Two, none and five virtual tokens for three texts, from the last to the first."""
    places = [torch.tensor([2]), torch.tensor([1]), torch.tensor([0])][-rows:]
    return batched([(before(p), i) for p, i in zip(PROMPTS[-rows:], places, strict=True)])


def own_prompt(row: int) -> Tensor:
    tokens = PROMPTS[2 - row]
    return drawn(0) if tokens is None else tokens


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("way", GENERATED, ids=str)
def test_texts_with_their_own_prompts_go_on_as_by_themselves(
    name: str, way: dict[str, Any]
) -> None:
    model = made(name)
    found = put(model, each).generate(
        input_ids=LEFT, attention_mask=(LEFT != 0).long(), max_new_tokens=5, **way
    )
    for i, text in enumerate(texts()):
        expected = written(model, embedded(model, own_prompt(i), text), 5)
        assert torch.equal(found[i, 7:], expected)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_texts_with_their_own_prompts_go_on_without_positions(name: str) -> None:
    model = made(name)
    adapted = put(model, each)
    text, more = TOKENS[:, :3], TOKENS[:, 3:5]
    start = adapted(text, use_cache=True)
    later = adapted(more, past_key_values=start.past_key_values)
    for i in range(3):
        prompt = own_prompt(i)
        x = embedded(model, prompt, torch.cat([text[i], more[i]]))
        expected = model(inputs_embeds=x).logits[0]
        close(start.logits[i, VIRTUAL - len(prompt) :], expected[: len(prompt) + 3])
        close(later.logits[i], expected[len(prompt) + 3 :])


@pytest.mark.parametrize(
    "name",
    [
        "BertForSequenceClassification",
        "RobertaForSequenceClassification",
        "BertForTokenClassification",
    ],
)
def test_an_encoder_gives_each_text_what_it_has_by_itself(name: str) -> None:
    """Where a head reads the first token, that of every text is its own."""
    model = made(name)
    found = put(model, each)(TOKENS, attention_mask=MASK).logits
    for i, text in enumerate(texts()):
        x = embedded(model, own_prompt(i), text)
        expected = model(inputs_embeds=x).logits[0]
        by_token = found[i, : len(expected)] if expected.dim() > 1 else found[i]
        close(by_token, expected)


def test_spans_and_labels_are_those_of_each_text() -> None:
    model = made("BertForQuestionAnswering")
    start, end = torch.tensor([1, 0, 3]), torch.tensor([4, 2, 3])
    found = put(model, each)(TOKENS, attention_mask=MASK, start_positions=start, end_positions=end)
    losses: list[Tensor] = []
    for i, text in enumerate(texts()):
        given = {"start_positions": start[i : i + 1], "end_positions": end[i : i + 1]}
        moved = {name: place + len(own_prompt(i)) for name, place in given.items()}
        alone = model(inputs_embeds=embedded(model, own_prompt(i), text), **moved)
        close(found.start_logits[i, : alone.start_logits.shape[1]], alone.start_logits[0])
        losses.append(alone.start_logits[0].log_softmax(0)[moved["start_positions"][0]])
    mine = found.start_logits.masked_fill(~seen(), -torch.inf).log_softmax(1)
    places = start + torch.tensor([len(own_prompt(i)) for i in range(3)])
    close(mine.gather(1, places[:, None])[:, 0], torch.stack(losses))


def seen() -> Tensor:
    """Which of the tokens of a routed batch, moved to its left, are the texts' own."""
    ends = torch.tensor([len(own_prompt(i)) + n for i, n in enumerate(LENGTHS)])
    return torch.arange(7 + VIRTUAL) < ends[:, None]


def test_a_head_reads_the_last_token_of_texts_with_their_own_prompts() -> None:
    model = made("LlamaForSequenceClassification")
    found = put(model, each)(TOKENS, attention_mask=MASK).logits
    for i, text in enumerate(texts()):
        close(found[i], model(inputs_embeds=embedded(model, own_prompt(i), text)).logits[0])


@pytest.mark.parametrize("mask", [MASK, None], ids=["masked", "whole"])
def test_a_decoder_sees_the_prompts_of_each_text(mask: Tensor | None) -> None:
    model = made("T5ForConditionalGeneration")
    adapted, given = put(model, each), {} if mask is None else {"attention_mask": mask}
    found = adapted(TOKENS, labels=TOKENS, **given).logits
    read = adapted.get_encoder()(TOKENS, **given)
    again = adapted(encoder_outputs=read, labels=TOKENS, **given).logits
    close(again, found)
    for i, text in enumerate(texts()):
        whole = TOKENS[i] if mask is None else text
        x = embedded(model, own_prompt(i), whole)
        close(found[i], model(inputs_embeds=x, labels=TOKENS[i : i + 1]).logits[0])


def test_prompts_are_those_of_their_places() -> None:
    x = torch.zeros(3, 1, HIDDEN, dtype=torch.float64)
    prompt = each()
    assert prompt.counts is not None
    assert torch.equal(prompt.counts, torch.tensor([5, 0, 2]))
    grown = prompt.grow(x)
    for i in range(3):
        assert torch.equal(grown[i, VIRTUAL - len(own_prompt(i)) : VIRTUAL], own_prompt(i))
    alike = batched([(before(drawn()), torch.tensor([1])), (before(drawn()), torch.tensor([0]))])
    assert alike.counts is None


# ------------------------------------------------------------------------ positions and others


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertModel"])
def test_positions_that_are_given_go_on_from_the_prompt(name: str) -> None:
    model, tokens = made(name), drawn()
    adapted = with_prompt(model, tokens)
    positions = torch.arange(7)[None]
    for expected in (adapted(TOKENS), adapted(inputs_embeds=model.get_input_embeddings()(TOKENS))):
        close(adapted(TOKENS, position_ids=positions)[0], expected[0])
    further = adapted(TOKENS, attention_mask=torch.ones_like(MASK), position_ids=positions + 4)[0]
    x = torch.cat([embedded(model, tokens, row) for row in TOKENS])
    close(further, model(inputs_embeds=x, position_ids=torch.arange(4, 16)[None])[0])


def test_labels_are_those_of_texts_with_padding_in_front() -> None:
    model, tokens = made("LlamaForCausalLM"), drawn()
    labels = LEFT.masked_fill(LEFT == 0, -100)
    mask = (LEFT != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = with_prompt(model, tokens)(
        LEFT, attention_mask=mask, position_ids=positions, labels=labels
    )
    losses: list[Tensor] = []
    for i, text in enumerate(texts()):
        logits = model(inputs_embeds=embedded(model, tokens, text)).logits[0]
        close(found.logits[i, -len(text) :], logits[VIRTUAL:])
        losses.append(nn.functional.cross_entropy(logits[VIRTUAL - 1 : -1], text, reduction="none"))
    close(found.loss.double(), torch.cat(losses).mean())


def test_a_function_of_the_whole_is_a_prompt() -> None:
    model, tokens, suffix = made("LlamaForCausalLM"), drawn(), drawn(2, seed=3)
    x = torch.cat([embedded(model, tokens, TOKENS[0]), suffix[None]], 1)

    def grow(x: Tensor) -> Tensor:
        return torch.cat([each.expand(len(x), -1, -1) for each in (tokens, x, suffix)], 1)

    for after in (0, 2):
        prompt = prompt_of(
            lambda x, n=after: grow(x)[:, : VIRTUAL + x.shape[1] + n], VIRTUAL, after
        )
        found = with_prompt(model, prompt)(TOKENS[:1]).logits
        close(found, model(inputs_embeds=x[:, : 12 + after]).logits)


def test_the_logits_that_are_kept_are_those_of_the_text() -> None:
    adapted = with_prompt(made("LlamaForCausalLM"), drawn())
    whole = adapted(TOKENS).logits
    close(adapted(TOKENS, logits_to_keep=torch.tensor([0, 4])).logits, whole[:, [5, 9]])
    close(adapted(TOKENS, logits_to_keep=2).logits, whole[:, -2:])


def test_what_an_image_is_read_as_has_more_tokens() -> None:
    untyped.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": 44, "image_size": 12}
    config = ViTConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, patch_size=4)
    model = models.ViTForImageClassification(config).eval()
    image, tokens = torch.randn(2, 3, 12, 12), drawn().float()
    found = with_prompt(model, tokens)(image, output_hidden_states=True)
    first = model.vit.embeddings(image)
    x = torch.cat([first[:, :1], tokens.expand(2, -1, -1), first[:, 1:]], 1)
    close(found.hidden_states[0], x)
    for layer in model.vit.layers:
        x = layer(x)
    close(found.logits, model.classifier(model.vit.layernorm(x)[:, 0]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_has_the_same_gradients(reentrant: bool) -> None:
    model = made("LlamaForCausalLM").requires_grad_(False)
    gradients: list[Tensor] = []
    for again in (False, True):
        tokens = drawn().requires_grad_()
        adapted = with_prompt(model, tokens).train()
        if again:
            adapted.activation_checkpointing_enable({"use_reentrant": reentrant})
        adapted(TOKENS, attention_mask=MASK, labels=LABELS).loss.backward()
        assert tokens.grad is not None
        gradients.append(tokens.grad)
    close(*gradients)


def test_a_compiled_call_is_one_graph() -> None:
    adapted = with_prompt(made("LlamaForCausalLM"), drawn())
    compiled = untyped.compile(adapted, backend="eager", fullgraph=True)
    given: dict[str, Any] = {"attention_mask": MASK, "labels": LABELS, "use_cache": False}
    close(compiled(TOKENS, **given).logits, adapted(TOKENS, **given).logits)


def test_no_virtual_tokens_change_nothing() -> None:
    model = made("LlamaForCausalLM")
    adapted = with_prompt(model, Prompt(0, 0, lambda _: (None, None)))
    assert torch.equal(adapted(TOKENS).logits, model(TOKENS).logits)
    given: dict[str, Any] = {"input_ids": TOKENS[:1], "max_new_tokens": 3}
    assert torch.equal(adapted.generate(**given), model.generate(**given))


def test_a_model_without_attention_has_them_in_its_state() -> None:
    given: dict[str, Any] = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "state_size": 4}
    config = MambaConfig(**given, vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=None)
    untyped.manual_seed(0)
    model = enlarged(models.MambaForCausalLM(config).eval())
    found = put(model, each).generate(
        input_ids=LEFT, attention_mask=(LEFT != 0).long(), max_new_tokens=4
    )
    for i, text in enumerate(texts()):
        x = embedded(model, own_prompt(i).float(), text)
        assert torch.equal(found[i, 7:], written(model, x, 4))


def windowed() -> Any:
    """A model of which one layer looks back no further than four tokens."""
    layers = ["sliding_attention", "full_attention"]
    given: dict[str, Any] = {**LLAMA, "head_dim": 12, "sliding_window": 4, "layer_types": layers}
    config = Gemma2Config(**given)
    untyped.manual_seed(0)
    return enlarged(models.Gemma2ForCausalLM(config).eval())


@torch.no_grad()
def test_a_window_is_that_of_a_text_without_padding() -> None:
    model, tokens = windowed(), drawn().float()
    mask = (LEFT != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    adapted = with_prompt(model, tokens)
    first = adapted(LEFT, attention_mask=mask, position_ids=positions, use_cache=True)
    more = TOKENS[:, :2]
    later = adapted(
        more,
        attention_mask=torch.cat([mask, torch.ones_like(more)], 1),
        position_ids=positions[:, -1:] + torch.tensor([1, 2]),
        past_key_values=first.past_key_values,
    )
    for i, text in enumerate(texts()):
        x = embedded(model, tokens, torch.cat([text, more[i]]))
        expected = model(inputs_embeds=x).logits[0, VIRTUAL:]
        close(first.logits[i, -len(text) :], expected[:-2])
        close(later.logits[i], expected[-2:])


@pytest.mark.parametrize("way", GENERATED, ids=str)
def test_a_window_counts_virtual_tokens(way: dict[str, Any]) -> None:
    model, tokens = windowed(), drawn().float()
    if way.get("prefill_chunk_size") == 2:  # of which one is padding alone
        given = {"input_ids": LEFT, "attention_mask": (LEFT != 0).long(), "max_new_tokens": 5}
        refused("E474", lambda: with_prompt(model, tokens).generate(**given, **way))
        return
    found = with_prompt(model, tokens).generate(
        input_ids=LEFT, attention_mask=(LEFT != 0).long(), max_new_tokens=5, **way
    )
    for row, text in zip(found, texts(), strict=True):
        assert torch.equal(row[7:], written(model, embedded(model, tokens, text), 5))


@torch.no_grad()
def test_a_step_with_a_cache_of_a_fixed_size_is_one_graph() -> None:
    model, tokens, text = made("LlamaForCausalLM"), drawn(), TOKENS[0]
    adapted = with_prompt(model, tokens)
    expected = written(model, embedded(model, tokens, text), 3)
    forward = untyped.compile(adapted.__class__.forward, backend="eager", fullgraph=True)
    cache = models.StaticCache(config=model.config, max_cache_len=20)
    mask = torch.ones(1, 7, dtype=torch.long)
    logits = adapted(text[None], attention_mask=mask, past_key_values=cache).logits
    found: list[Tensor] = []
    for length in (8, 9, 10):
        found.append(logits[0, -1].argmax())
        inputs = adapted.prepare_inputs_for_generation(
            found[-1][None, None],
            past_key_values=cache,
            attention_mask=torch.ones(1, length, dtype=torch.long),
            position_ids=torch.tensor([[length - 1]]),
            next_sequence_length=1,
        )
        logits = forward(adapted, **inputs).logits
    assert torch.equal(torch.stack(found), expected)


# ----------------------------------------------------------------------------------- refusals


def refused(code: str, call: Callable[[], object]) -> None:
    with pytest.raises(SurgeryError) as raised:
        call()
    assert [d.code for d in raised.value.diagnostics] == [code]


def test_a_model_without_a_place_is_refused() -> None:
    refused("E470", lambda: calls_of(nn.Linear(2, 3)))
    whisper: dict[str, Any] = {"d_model": 12, "encoder_layers": 1, "decoder_layers": 1}
    heads: dict[str, Any] = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = WhisperConfig(**whisper, **heads, vocab_size=31, pad_token_id=0)
    refused("E470", lambda: calls_of(models.WhisperModel(config)))
    refused("E470", lambda: with_prompt(made("LlamaForCausalLM"), drawn())())


def test_what_cannot_grow_is_refused() -> None:
    adapted = with_prompt(made("LlamaForCausalLM"), drawn())
    square = torch.ones(3, 1, 7, 7)
    refused("E471", lambda: adapted(TOKENS, attention_mask=square))
    refused("E471", lambda: adapted(TOKENS, attention_mask=torch.ones(3, 12)))
    refused("E471", lambda: adapted(TOKENS, position_ids=torch.arange(12)[None]))
    refused("E472", lambda: adapted(TOKENS[None]))
    refused("E472", lambda: adapted(TOKENS, pixel_values=torch.ones(3, 2)))
    refused("E472", lambda: adapted(TOKENS, other_ids=TYPES))
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    refused("E472", lambda: adapted(TOKENS[:1], position_ids=packed))
    head = with_prompt(made("LlamaForSequenceClassification"), drawn())
    refused("E471", lambda: head(TOKENS, attention_mask=square))
    refused("E471", lambda: head(TOKENS, attention_mask=torch.ones(3, 9)))
    refused("E472", lambda: head(TOKENS[None]))
    seq2seq = with_prompt(made("T5ForConditionalGeneration"), drawn())
    read = seq2seq.get_encoder()(TOKENS)
    short = torch.ones(3, 6)
    refused("E471", lambda: seq2seq(encoder_outputs=read, attention_mask=short, labels=TOKENS))


def test_unequal_prompts_are_refused_where_positions_are_fixed() -> None:
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=44,
        decoder_ffn_dim=44,
        max_position_embeddings=40,
    )
    bart = models.BartModel(config).eval().double()
    refused("E473", lambda: put(bart, each)(TOKENS))
    refused("E473", lambda: put(made("LlamaForCausalLM"), each)(TOKENS[:2]))
    tokens = drawn()
    found = with_prompt(bart, tokens)(TOKENS, attention_mask=MASK).last_hidden_state
    for i, text in enumerate(texts()):
        given = {"decoder_input_ids": shifted(TOKENS[i : i + 1])}
        alone = bart(inputs_embeds=embedded(bart, tokens, text), **given)
        close(found[i], alone.last_hidden_state[0])


def shifted(tokens: Tensor) -> Tensor:
    """What a decoder reads, of what it is to write."""
    return torch.cat([tokens.new_tensor([[2]]), tokens[:, :-1]], 1)


def test_a_cache_without_the_prompt_is_refused() -> None:
    model = made("LlamaForCausalLM")
    adapted = with_prompt(model, drawn())
    bare = model(TOKENS, use_cache=True).past_key_values
    refused("E474", lambda: adapted(TOKENS, past_key_values=bare))
    with torch.no_grad():
        held = adapted(TOKENS, use_cache=True).past_key_values
    other = with_prompt(model, drawn(3))
    refused("E474", lambda: other(TOKENS, past_key_values=deepcopy(held)))
    refused("E474", lambda: adapted(TOKENS, cache_params=bare))
    wrong = torch.ones(3, 13)
    refused("E471", lambda: adapted(TOKENS, past_key_values=held, attention_mask=wrong))
    held.reset()
    held.crop(0)
    close(adapted(TOKENS, past_key_values=held).logits, adapted(TOKENS).logits)
