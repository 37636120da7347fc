"""What is wrong with a method at a site of some shape, and what is right though it looks odd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.errors import PlanError, SurgeryError


class Net(nn.Module):
    """A layer of 6 features, and a convolution in three groups."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(6, 15, bias=False)
        self.c = nn.Conv2d(6, 12, (3, 2), groups=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(self.c(x).mean((-1, -2))[..., :6])


def adapted(signature: str, body: str, site: str = "q") -> surgery.Compiled:
    text = f"method m({signature}) on matrix {{ {body} }} match {site} apply m()"
    return surgery.compile(text, Net())


@pytest.mark.parametrize(
    ("signature", "body", "said"),
    [
        ("r: int = 20", "W' = W + concat(W[:r], W[r:])", "out - 20 = -5 is not a whole size"),
        ("r: int = 4", "train A[out / r, in] = 0 W' = W", "out/4 = 3.75 is not a whole size"),
        (
            "r: int = 4",
            'W\' = W + reduce(W, "(q a) c -> ", "sum", a = r)',
            "out/4 = 3.75 is not a whole size",
        ),
        ("", "train A[in - 7] = 0 W' = W", "in - 7 = -1 is not a whole size"),
        ("", "W' = W * sqrt(in - 100)", "sqrt(in - 100) = nan is no number"),
        ("", "W' = W * in**in**in", "is no number"),
        ("", "train A[out, in] = sqrt(in - 9) W' = W + A", "sqrt(in - 9) = nan is no number"),
        ("", "W' = W @ drop(in)", "in = 6 is no part that can be dropped"),
    ],
)
def test_what_has_no_value_at_a_site_is_refused_before_anything_is_done(
    signature: str, body: str, said: str
) -> None:
    with pytest.raises(SurgeryError) as caught:
        adapted(signature, body)
    (one,) = caught.value.diagnostics
    assert one.code == "E301"
    assert said in one.message


def test_a_draw_that_is_impossible_at_a_site_is_refused() -> None:
    with pytest.raises(SurgeryError, match="std = -94 is below 0"):
        adapted("", "train A[out, in] ~ normal(std = in - 100) W' = W + A")


def test_the_nearest_arguments_that_fit_are_offered() -> None:
    with pytest.raises(PlanError, match="r=3 or 5"):
        adapted(
            "r: int = 4", 'train A[out / r, in] = 0 W\' = W + repeat(A, "q c -> (q a) c", a = r)'
        )


HALF = "W' = W let half = r / 2 if half > 4"


@pytest.mark.parametrize(
    ("signature", "body", "offered"),
    [
        ("r: int = 20, s: int = 3", "W' = W + concat(W[:r], W[r:])", "fit: r=13 or 14"),
        ("r: int = 999999", "W' = W + concat(W[:r], W[r:])", "fit: r=13 or 14"),
        # What an argument decides has other equations for each of its values.
        ("r: int = 20", "if r > 9 { train A[out - r] = 0 } W' = W", "fit: r=13 or 14"),
        (
            "r: int = 30",
            f"{HALF} {{ train A[out - r - r] = 0 }} else {{ train A[in / r] = 0 }}",
            "fit: r=3 or 6",
        ),
        ("r: int = 4", "train A[out / 7, in / r] = 0 W' = W", "make out/7 whole"),
    ],
)
def test_what_is_offered_is_the_nearest_and_fits(signature: str, body: str, offered: str) -> None:
    with pytest.raises(PlanError, match=offered):
        adapted(signature, body)


def test_an_absent_bias_begins_as_zero() -> None:
    compiled = adapted("", "train s[out] = b W' = W b' = b + s")
    (parameter,) = [p for n, p in compiled.model.named_parameters() if n.endswith(".s")]
    assert torch.equal(parameter, torch.zeros(15))


@pytest.mark.parametrize(
    "body",
    [
        "train u[out] = 1 W' = householder(u) @ W",
        "train A[out, out] ~ normal() W' = A @ W @ diag(colnorm(W))",
        "train A[out, 3] ~ normal() train B[3, out] ~ normal() W' = W + A @ B @ W",
    ],
)
def test_rows_are_mixed_as_a_matrix_where_the_layer_reads_group_by_group(body: str) -> None:
    compiled = adapted("", body, "c")
    x = torch.randn(2, 6, 5, 7)
    layer = compiled.model.get_submodule("c")
    before = layer(x)
    compiled.inverse.merge()
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-4)


def test_outputs_are_not_mixed_across_groups_by_an_equation_of_activations() -> None:
    with pytest.raises(PlanError, match="group by group"):
        adapted("", "train A[out, out] ~ normal() y' = y @ A", "c")


@pytest.mark.parametrize("operator", ["inverse(A + eye(in))", "cayley(A - transpose(A))"])
def test_a_factorisation_runs_in_sixteen_bits_too(operator: str) -> None:
    model = Net().to(torch.bfloat16)
    text = f"method m() on matrix {{ train A[in, in] = 0 W' = W @ {operator} }} match q apply m()"
    compiled = surgery.compile(text, model, dtype=torch.bfloat16)
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    assert compiled.model.get_submodule("q")(x).dtype == torch.bfloat16
