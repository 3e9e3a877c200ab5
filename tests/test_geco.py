"""The controller on a problem whose answer is known, and under windup."""

import math

import pytest
import torch

from geco import GECO

# minimise x^2 + y^2 subject to (x - 2)^2 + (y - 1)^2 <= 1: the point of a disc that is nearest to the origin
CENTRE = torch.tensor([2.0, 1.0])
OPTIMUM = CENTRE * (1 - 1 / math.sqrt(5))
LAMBDA = math.sqrt(5) - 1  # from 2 x = lambda 2 (2 - x) at the optimum


def descend(geco, start, steps=4000, lr=0.02):
    z, path = torch.tensor(start, requires_grad=True), []
    for _ in range(steps):
        loss = ((z - CENTRE) ** 2).sum()
        geco.update(loss.item())
        (gradient,) = torch.autograd.grad(geco.objective(loss, (z**2).sum()), z)
        z = (z - lr * gradient).detach().requires_grad_()
        path.append((z.detach().clone(), geco.lam))
    return path


# outside the disc, in its middle, far away; too lax and too strict at first
@pytest.mark.parametrize("start, lambda_init", [([0.0, 0.0], 10.0), ([2.0, 1.0], 0.01), ([5.0, -3.0], 10.0)])
def test_lands_on_the_constrained_optimum_and_stays(start, lambda_init):
    path = descend(GECO(target=1.0, scale=1.0, rate=0.02, alpha=0.9, lambda_init=lambda_init), start)
    for z, lam in path[-500:]:  # not merely passing through
        assert torch.allclose(z, OPTIMUM, atol=1e-3)
        assert lam == pytest.approx(LAMBDA, rel=1e-2)


def test_a_constraint_that_does_not_bind_is_let_go():
    path = descend(GECO(target=100.0, scale=1.0, rate=0.02), [2.0, 1.0])
    z, lam = path[-1]
    assert z.norm() < 0.01 and lam == 1e-3


def steps_to_come_down(cap):
    """After 500 updates far above target, how many updates below it until lambda is back under 1?"""
    geco = GECO(target=1.0, scale=0.01, rate=0.02, lambda_max=cap)
    for _ in range(500):
        geco.update(3.0)
    for step in range(1, 5000):
        if geco.update(0.995) < 1:  # below target by half a unit: no loss can be far below
            return step
    return math.inf


def test_the_cap_stops_windup():
    assert steps_to_come_down(cap=10.0) < 300 < 900 < steps_to_come_down(cap=1e9)


def test_the_clip_makes_lambda_fall_as_fast_as_it_rises():
    up, down = (GECO(1.0, scale=0.01, rate=0.01, alpha=0.0) for _ in range(2))
    assert up.update(1e6) * down.update(0.0) == pytest.approx(1.0)


def test_a_mean_above_the_target_raises_lambda_though_most_batches_lie_below():
    geco = GECO(target=0.001, scale=0.001, rate=0.03)
    for i in range(100):  # one batch in four has a wrong sum
        geco.update(0.02 if i % 4 == 0 else 0.0)
    assert geco.lam > 2


def test_state_goes_on_exactly():
    losses = [1.0 + 0.01 * math.sin(i) for i in range(50)]
    whole = GECO(1.0, 0.01, 0.01)
    expected = [whole.update(loss) for loss in losses]
    first, second = GECO(1.0, 0.01, 0.01), GECO(0.0, 0.01, 0.01)
    for loss in losses[:20]:
        first.update(loss)
    second.load_state_dict(first.state_dict())
    assert [second.update(loss) for loss in losses[20:]] == expected[20:]


def test_objective_is_the_lagrangian():
    geco = GECO(target=0.5, scale=1.0, rate=0.01, lambda_init=2.0)
    assert geco.objective(torch.tensor(0.75), torch.tensor(0.1)).item() == pytest.approx(0.1 + 2 * 0.25)


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"rate": -1.0}, {"alpha": 1.0},
                                   {"lambda_init": 20.0, "lambda_max": 10.0}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="GECO needs"):
        GECO(1.0, **{"scale": 0.01, "rate": 0.01} | wrong)


def test_nan_is_no_loss_that_meets_a_target():
    geco = GECO(target=1.0, scale=0.1, rate=0.1)
    with pytest.raises(ValueError, match="NaN"):
        geco.update(math.nan)
    assert geco.violation == 0.0
