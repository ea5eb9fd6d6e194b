"""The losses from logits to number: finite everywhere, blind to padding, and with the gradient that finite differences find."""
import math

import pytest
import torch

from catto.loss import (FORMS, calibration_gradient, calibration_loss, catto_loss, dpo_loss,
                        sequence_calibration_loss)
from catto.surrogate import TokenProbs, correctness_surrogate, token_probs

VOCAB = 6
every_form = pytest.mark.parametrize("form", FORMS)
both_targets = pytest.mark.parametrize("preferred", [True, False])
detached_or_not = pytest.mark.parametrize("detach", [True, False])


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def draw(generator, batch, length, dtype=torch.float64):
    logits = 2 * torch.randn(batch, length, VOCAB, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(VOCAB, (batch, length), generator=generator)


# One token per row: label far ahead, far behind, tied with its competitor, all tied, and competitors tied.
EXTREME = [[1e4, -1e4, 0, 0], [-1e4, 1e4, 0, 0], [1e4, 1e4, -1e4, 0], [1e4] * 4, [-1e4] * 4, [0, 1e4, 1e4, -1e4]]


@every_form
@both_targets
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_finite_at_extreme_logits(form, preferred, dtype):
    logits = torch.tensor([EXTREME], dtype=dtype, requires_grad=True)
    probs = token_probs(logits, torch.zeros(1, len(EXTREME), dtype=torch.int64))
    mask = torch.ones(1, len(EXTREME))
    logps = probs.log_prob.sum(-1)
    still = torch.zeros_like(logps)
    loss = catto_loss(logps, still, still, still, probs, probs, mask, mask, form=form)
    loss = loss + sequence_calibration_loss(probs, mask, preferred, form)
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all()
    assert calibration_gradient(probs, form, preferred).isfinite().all()


def test_bce_still_pushes_back_where_the_confidence_rounds_to_one():
    """A rejected answer of confidence 1 in float32: the clamp of the value must not have cut the gradient."""
    logits = torch.tensor([[[20.0, 0.0, 0.0]]], requires_grad=True)
    probs = token_probs(logits, torch.zeros(1, 1, dtype=torch.int64))
    assert probs.confidence.item() == 1
    sequence_calibration_loss(probs, torch.ones(1, 1), preferred=False, form="bce", detach_surrogate=True).backward()
    assert logits.grad[0, 0, 1] < 0


@every_form
@detached_or_not
@pytest.mark.parametrize("how", ["mask", "ignored label"])
def test_left_out_tokens_get_exactly_no_gradient(generator, form, detach, how):
    logits, labels = draw(generator, 3, 5, torch.float32)
    keep = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
    if how == "ignored label":
        labels = labels.masked_fill(~keep, -100)
        logits[~keep] = math.nan  # what an ignored position holds must not matter
    logits.requires_grad_()
    loss = sequence_calibration_loss(token_probs(logits, labels), keep, form=form, detach_surrogate=detach)
    loss.sum().backward()
    assert loss[2] == 0 and loss.isfinite().all()
    assert (logits.grad[~keep] == 0).all()
    assert (logits.grad[keep].abs().sum(-1) > 0).all()


@every_form
@both_targets
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("width", [1, 7])
def test_padding_side_and_length_change_nothing(generator, form, preferred, side, width):
    logits, labels = draw(generator, 4, 5, torch.float32)
    mask = torch.ones(4, 5)
    fill = 100 * torch.randn(4, width, VOCAB, generator=generator), torch.zeros(4, width, dtype=torch.int64), torch.zeros(4, width)
    body = logits, labels, mask
    padded = [torch.cat(pair if side == "left" else pair[::-1], 1) for pair in zip(fill, body)]

    def loss_and_gradient(logits, labels, mask):
        logits = logits.clone().requires_grad_()
        loss = sequence_calibration_loss(token_probs(logits, labels), mask, preferred, form)
        return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]

    loss, gradient = loss_and_gradient(*body)
    padded_loss, padded_gradient = loss_and_gradient(*padded)
    inner = padded_gradient[:, width:] if side == "left" else padded_gradient[:, :5]
    assert (padded_loss - loss).abs().max() <= 1e-6
    assert (inner - gradient).abs().max() <= 1e-6


@every_form
@both_targets
@detached_or_not
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_gradient_against_finite_differences(generator, form, preferred, detach, scale):
    """Central differences in float64. A detached target is frozen at the starting point: differences cannot see a detach."""
    logits, labels = draw(generator, 2, 3)
    mask = torch.tensor([[1, 1, 1], [1, 0, 1]])
    start = token_probs(logits, labels)
    frozen = correctness_surrogate(start.log_prob.exp(), start.competitor, scale)

    def value(x):
        probs = token_probs(x, labels)
        target = frozen if detach else correctness_surrogate(probs.log_prob.exp(), probs.competitor, scale)
        per_token = calibration_loss(probs.confidence, target if preferred else 1 - target, form)
        return ((per_token * mask).sum(-1) / mask.sum(-1)).sum()

    numerical, h = torch.zeros_like(logits), 1e-6
    for place in range(logits.numel()):
        nudge = torch.zeros(logits.numel(), dtype=logits.dtype)
        nudge[place] = h
        nudge = nudge.view_as(logits)
        numerical.view(-1)[place] = (value(logits + nudge) - value(logits - nudge)) / (2 * h)

    x = logits.clone().requires_grad_()
    probs = token_probs(x, labels)
    (gradient,) = torch.autograd.grad(sequence_calibration_loss(probs, mask, preferred, form, detach, scale).sum(), x)
    assert gradient.abs().max() > 1e-3 and torch.allclose(gradient, numerical, rtol=1e-6, atol=1e-8)

    # The closed form that training logs is the same gradient, per token and not averaged.
    rivals = logits.scatter(-1, labels[..., None], -math.inf).argmax(-1)
    pair = torch.stack([labels, rivals], -1)
    per_token = (gradient * mask.sum(-1)[:, None, None]).gather(-1, pair).abs().amax(-1)
    ours = calibration_gradient(probs, form, preferred, detach, scale)
    assert torch.allclose(per_token, ours * mask, rtol=1e-9, atol=1e-12)


def test_batch_order_and_split_change_nothing(generator):
    """Four pairs at once, one at a time, and in another order: the same losses and the same gradient."""
    (chosen, chosen_labels), (rejected, rejected_labels) = draw(generator, 4, 5), draw(generator, 4, 8)
    masks = torch.arange(5) < torch.tensor([[5], [1], [3], [2]]), torch.arange(8) < torch.tensor([[2], [8], [0], [5]])
    ref = -10 * torch.rand(2, 4, generator=generator, dtype=torch.float64)

    def losses(index):
        probs = [token_probs(x[index], y[index]) for x, y in ((chosen, chosen_labels), (rejected, rejected_labels))]
        kept = [mask[index] for mask in masks]
        logps = [torch.where(m, p.log_prob, 0.0).sum(-1) for p, m in zip(probs, kept)]
        return catto_loss(*logps, ref[0, index], ref[1, index], *probs, *kept)

    together = losses([0, 1, 2, 3])
    assert torch.allclose(torch.cat([losses([i]) for i in range(4)]), together, rtol=0, atol=1e-12)
    assert torch.allclose(losses([2, 0, 3, 1]), together[[2, 0, 3, 1]], rtol=0, atol=1e-12)


def test_weight_zero_is_dpo_in_value_and_gradient(generator):
    logits, labels = draw(generator, 2, 4, torch.float32)
    ref = torch.tensor([-9.0, -7.0])

    def step(loss_of):
        x = logits.clone().requires_grad_()
        probs = token_probs(x, labels)
        loss = loss_of(probs, (probs.log_prob.sum(-1), -probs.log_prob.mean(-1), ref, ref))
        return loss, torch.autograd.grad(loss.mean(), x)[0]

    mask = torch.ones(2, 4)
    ours = step(lambda probs, logps: catto_loss(*logps, probs, probs, mask, mask, weight=0.0))
    dpo = step(lambda probs, logps: dpo_loss(*logps))
    assert torch.equal(ours[0], dpo[0]) and torch.equal(ours[1], dpo[1])


def test_token_probs_takes_any_leading_shape(generator):
    """The same numbers for one token, a sequence and a batch; an all-ignored batch is 0 and stays in the graph."""
    logits, labels = draw(generator, 2, 3)
    batch = token_probs(logits, labels)
    assert all(torch.equal(a[0, 1], b) for a, b in zip(batch, token_probs(logits[0, 1], labels[0, 1])))
    assert all(torch.equal(a[1], b) for a, b in zip(batch, token_probs(logits[1], labels[1])))
    logits.requires_grad_()
    empty = token_probs(logits, torch.full_like(labels, -100))
    assert isinstance(empty, TokenProbs) and not any(x.any() for x in empty)
    (gradient,) = torch.autograd.grad(sum(x.sum() for x in empty), logits)
    assert (gradient == 0).all()
