"""Boundary rules, and what becomes of their answers: sampling, ranking, budgets."""

from __future__ import annotations

import math

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from llava_drip.tokens import Packing
from llava_drip.towers.boundaries import (
    NO_PLACE,
    expected_boundaries,
    gumbel_sigmoid,
    gumbel_topk,
    most_probable,
    most_probable_of_batch,
    shifted_to_expect,
    tokens_for_budget,
    unlimited,
)
from llava_drip.towers.cutting import Question
from llava_drip.towers.rules import RULES, EntropyBoundaries, GumbelBoundaries, SimilarityBoundaries, UniformBoundaries

RAGGED = Packing((5, 1, 9, 3), torch.device("cpu"))


def random_logits(seed: int = 0) -> Tensor:
    """[4, 9] for images of 5, 1, 9 and 3 tokens."""
    logits = torch.randn(18, generator=torch.Generator().manual_seed(seed))
    logits[[4, 5, 14, 17]] = NO_PLACE
    return RAGGED.pad(logits, NO_PLACE)


def test_most_probable_against_sorting():
    logits = torch.tensor([[0.1, 0.9, 0.5, 0.9], [0.0, 0.0, 0.0, 0.0], [4.0, 3.0, 2.0, 1.0]])
    chosen = most_probable(logits, torch.tensor([2, 3, 0]))
    assert chosen.tolist() == [[False, True, False, True], [True, True, True, False], [False] * 4]


def test_no_place_is_never_chosen():
    chosen = most_probable(random_logits(), torch.tensor([99, 99, 3, 99]))
    assert chosen.sum(1).tolist() == [4, 0, 3, 2]


def test_the_batch_shares_its_budget():
    logits = random_logits()
    chosen = most_probable_of_batch(logits, torch.tensor([1, 0, 4, 1]))
    assert chosen.sum() == 6 and logits[chosen].min() > logits[~chosen & (logits > NO_PLACE)].max()


def test_tokens_for_budget():
    compression = torch.tensor([1.0, 4.0, 10.0, 1000.0])
    assert tokens_for_budget(compression, 64).tolist() == [64, 16, 6, 1]


def test_eval_spends_the_expected_number_of_boundaries():
    logits = torch.randn(16, 63, generator=torch.Generator().manual_seed(0)) - 3  # all but a few below 0
    expected = torch.sigmoid(logits).sum(1)
    assert (unlimited(logits) - expected).abs().max() <= 0.5
    generator = torch.Generator().manual_seed(0)
    draws = [gumbel_sigmoid(logits, torch.rand(16, 63, generator=generator))[0].sum(1).float() for _ in range(400)]
    torch.testing.assert_close(torch.stack(draws).mean(0), expected, atol=0.6, rtol=0)


def test_a_sample_is_drawn_where_it_exceeds_one_half():
    torch.manual_seed(0)
    logits = torch.zeros(4, 1000, requires_grad=True)
    drawn, soft = gumbel_sigmoid(logits, torch.rand(4, 1000))
    assert torch.equal(drawn, soft > 0.5) and ((soft >= 0) & (soft <= 1)).all()
    assert drawn.float().mean() == pytest.approx(0.5, abs=0.05)
    soft.sum().backward()
    assert (logits.grad >= 0).all() and (logits.grad > 0).float().mean() > 0.99  # fp32 saturates at the far ends


def test_topk_draws_the_number_asked_for_by_chance():
    logits = torch.tensor([[3.0, 0.0, -3.0, NO_PLACE]]).repeat(2000, 1).requires_grad_()
    drawn, soft = gumbel_topk(logits, torch.rand(2000, 4), torch.tensor([1]).expand(2000))
    assert (drawn.sum(1) == 1).all()
    share = drawn.float().mean(0)
    assert share[0] > 0.8 and 0.01 < share[1] < 0.2 and share[2] < share[1] and share[3] == 0
    places = soft[:, :3]
    assert ((places > 0.5) == drawn[:, :3]).all() and (soft[:, 3] == 0).all()
    soft.sum().backward()
    assert torch.isfinite(logits.grad).all() and (logits.grad[:, :3] >= 0).all() and (logits.grad[:, 1] > 0).any()
    for count in (0, 9):  # none, and more than there are places
        drawn, soft = gumbel_topk(logits, torch.rand(2000, 4), torch.tensor([count]).expand(2000))
        assert (drawn.sum(1) == min(count, 3)).all() and soft.isfinite().all()


def test_no_nan_where_there_is_no_place():
    logits = random_logits().requires_grad_()
    drawn, soft = gumbel_sigmoid(shifted_to_expect(logits, torch.tensor([2, 0, 3, 1])), torch.rand(4, 9))
    assert not drawn[1].any() and torch.isfinite(soft).all()
    soft.square().sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_shifted_logits_expect_what_was_asked(spread):
    logits = (spread * random_logits()).masked_fill(random_logits() == NO_PLACE, NO_PLACE)
    asked = torch.tensor([3, 0, 2, 1])
    expected = expected_boundaries(shifted_to_expect(logits, asked))
    torch.testing.assert_close(expected, asked.float(), atol=0.011, rtol=0)


def test_the_shift_leaves_no_gradient_towards_more_boundaries():
    logits = torch.randn(2, 7, requires_grad=True)
    torch.sigmoid(shifted_to_expect(logits, torch.tensor([3, 2]))).sum().backward()
    assert logits.grad.abs().max() < 1e-5, "what they sum to is fixed"
    logits.grad = None
    torch.sigmoid(shifted_to_expect(logits, torch.tensor([3, 2])))[:, 0].sum().backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all(), (
        "one place is raised at the cost of the others"
    )


def test_the_shifts_gradient_is_that_of_finite_differences():
    logits, asked = torch.randn(1, 5, dtype=torch.float64), torch.tensor([2])
    weight = torch.randn(1, 5, dtype=torch.float64)
    twin = logits.clone().requires_grad_()
    (torch.sigmoid(shifted_to_expect(twin, asked)) * weight).sum().backward()
    for i in range(5):
        step = torch.zeros_like(logits)
        step[0, i] = 1e-4
        ends = [(torch.sigmoid(shifted_to_expect(logits + s * step, asked)) * weight).sum() for s in (1, -1)]
        assert ((ends[0] - ends[1]) / 2e-4).item() == pytest.approx(twin.grad[0, i].item(), abs=1e-3)


# the rules


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_rule_answers_about_each_image_by_itself(name):
    torch.manual_seed(0)
    rule = RULES[name](64, 4.0).eval()
    x, content = torch.randn(18, 64), torch.randn(18, 64)
    together = Question.ask(rule, x, content, RAGGED)
    start = 0
    for image, n in enumerate(RAGGED.lengths):
        part = slice(start, start + n)
        alone = Question.ask(rule, x[part], content[part], Packing((n,), x.device))
        torch.testing.assert_close(alone.logits[0], together.logits[image, :n], atol=1e-5, rtol=1e-5)
        start += n


@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize("asked", [[2, 0, 4, 1], [0, 0, 0, 0], [9, 9, 9, 9]])
def test_budgets_are_met_exactly(name, asked):
    torch.manual_seed(0)
    question = Question.ask(RULES[name](64, 4.0).eval(), torch.randn(18, 64), torch.randn(18, 64), RAGGED)
    cut = question.decided(torch.tensor(asked), "image")
    counts = [part.sum().item() for part in cut.ends.split(RAGGED.lengths)]
    assert counts == [min(a + 1, n) for a, n in zip(asked, RAGGED.lengths)]
    assert cut.ends[[4, 5, 14, 17]].all(), "an image's last token ends a segment"


def test_likeness_makes_no_boundary():
    """Two runs of equal patches: the place between them is the most probable, by every rule that learns from the task."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(1, 64).expand(6, 64), torch.randn(1, 64).expand(4, 64)])
    for rule in (GumbelBoundaries(64, 4.0), SimilarityBoundaries(64, 4.0)):
        logits = Question.ask(rule, x, x, Packing((10,), x.device)).logits[0, :9]
        assert logits.argmax() == 5 and logits.max() > logits.sort().values[-2] + 0.1


def test_uniform_cuts_are_even():
    rule, packing = UniformBoundaries(8, 4.0), Packing((50, 50), torch.device("cpu"))
    question = Question.ask(rule, torch.zeros(100, 8), torch.zeros(100, 8), packing)
    for asked, expected in ((None, [12, 12]), (torch.tensor([6, 0]), [7, 1])):
        ends = question.decided(asked, "batch").ends.split(packing.lengths)
        assert [row.sum().item() for row in ends] == expected
        for row in ends:
            sizes = torch.cat([torch.tensor([-1]), row.nonzero()[:, 0]]).diff()
            assert sizes.max() - sizes.min() <= 1


# entropy spikes


def entropy_rule(dim: int = 64) -> EntropyBoundaries:
    torch.manual_seed(0)
    return EntropyBoundaries(dim, 4.0)


def test_the_head_sees_nothing_that_comes_later():
    rule, x = entropy_rule(), torch.randn(12, 64)
    changed = x.clone()
    changed[7:] = torch.randn(5, 64)
    packing = Packing((12,), x.device)
    before, after = (rule._predict(rule.norm(t), packing) for t in (x, changed))
    torch.testing.assert_close(before[:7], after[:7])
    assert (before[7] - after[7]).abs().max() > 1e-3


def test_the_spike_is_entropy_above_the_left_neighbours():
    rule = entropy_rule()
    entropy = torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0])
    spike = rule._spike(entropy, Packing((5,), entropy.device))
    assert spike.tolist() == [1 - 3, 3 - 1, 2 - 3, 5 - 3, 4 - 5]


def test_the_head_learns_what_comes_next_and_disturbs_nothing():
    """Patches in a fixed cycle of four: the next is certain, until now and then the cycle starts anew."""
    rule, generator = entropy_rule(), torch.Generator().manual_seed(1)
    kinds = torch.randn(4, 64, generator=generator)
    optimizer = torch.optim.AdamW(rule.parameters(), lr=3e-3)
    losses = []
    for _ in range(120):
        phase = torch.randint(0, 4, (16, 1), generator=generator) + torch.arange(16)
        content = kinds[phase.flatten() % 4].requires_grad_()
        logits, loss = rule(content, content, Packing((16,) * 16, content.device))
        assert not logits.requires_grad and loss.shape == (16,)
        optimizer.zero_grad()
        loss.mean().backward()
        assert content.grad is None, "the embeddings hear nothing of it"
        optimizer.step()
        losses.append(loss.mean().item())
    assert losses[-1] < 0.1 * losses[0]


def test_the_threshold_meets_the_rate():
    rule = entropy_rule().train()
    packing = Packing((64,) * 32, torch.device("cpu"))
    assert rule.num_batches_tracked == 0
    for _ in range(5):
        x = torch.randn(2048, 64)
        rule(x, x, packing)
    rule.eval()
    x = torch.randn(2048, 64)
    cut = Question.ask(rule, x, x, packing).decided(None, "image")
    assert cut.ends.float().mean() == pytest.approx(0.25, abs=0.04)


def test_an_untrained_threshold_gives_the_target_rate():
    rule, packing = entropy_rule().eval(), Packing((64, 64), torch.device("cpu"))
    x = torch.randn(128, 64)
    assert Question.ask(rule, x, x, packing).decided(None, "image").ends.sum() == 32


def trained_entropy_rule() -> EntropyBoundaries:
    rule = entropy_rule().train()
    for _ in range(5):
        x = torch.randn(2048, 64)
        rule(x, x, Packing((64,) * 32, x.device))
    return rule


def test_averaged_weights_have_a_threshold():
    """timm's average of weights begins before the first batch."""
    rule, packing = entropy_rule().train(), Packing((64,) * 32, torch.device("cpu"))
    average = ModelEmaV3(rule, decay=0.5)
    for _ in range(20):
        x = torch.randn(2048, 64)
        rule(x, x, packing)
        average.update(rule)
    assert average.module.num_batches_tracked == 20
    assert average.module.threshold == pytest.approx(float(rule.threshold), abs=0.1 * float(rule.spread))
    x = torch.randn(2048, 64)
    cut = Question.ask(average.module.eval(), x, x, packing).decided(None, "image")
    assert cut.ends.float().mean() == pytest.approx(0.25, abs=0.05)


def test_thresholds_of_former_versions_load():
    """They had no count of batches, and a nan before the first."""
    for trained in (True, False):
        former = trained_entropy_rule() if trained else entropy_rule()
        state = former.state_dict()
        del state["num_batches_tracked"]
        if not trained:
            state["threshold"] = torch.tensor(math.nan)
        rule = trained_entropy_rule()
        rule.load_state_dict(state)
        torch.testing.assert_close(rule.threshold, former.threshold)
        assert bool(rule.num_batches_tracked) == trained
        x, packing = torch.randn(128, 64), Packing((64, 64), torch.device("cpu"))
        ends = [Question.ask(r.eval(), x, x, packing).decided(None, "image").ends for r in (rule, former)]
        assert torch.equal(*ends)
