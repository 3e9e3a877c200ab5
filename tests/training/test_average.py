"""average.py: the model that is judged follows the one that trains."""

import torch
from torch import nn

from training.steps import averaged, update_average


def test_the_average_is_the_weighted_sum_of_what_it_saw():
    model, seen = nn.Linear(3, 2), []
    average = averaged(model, 0.9)
    start = average.weight.clone()
    for _ in range(4):
        with torch.no_grad():
            model.weight.normal_()
        seen.append(model.weight.detach().clone())
        update_average(average, model, 0.9)
    expected = 0.9**4 * start + sum(0.1 * 0.9 ** (3 - i) * weight for i, weight in enumerate(seen))
    assert torch.allclose(average.weight, expected) and not average.training


def test_without_an_average_the_model_itself_is_judged():
    model = nn.Linear(3, 2)
    assert averaged(model, 0.0) is model
