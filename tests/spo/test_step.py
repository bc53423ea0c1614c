"""The step's loss and gradient against Gaussian log-probabilities, in float64, on real models."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.distributions import Normal
from torch.nn.functional import logsigmoid

import fastpref
from bench.spo import apart
from fastpref.process import from_config
from fastpref.spo import telemetry
from fastpref.spo.grid import network_times, steps
from fastpref.spo.resampler import Transition
from fastpref.spo.step import collate, step_loss
from fastpref.step import reference
from fastpref.step.guidance import guided

SPO = fastpref.objective("spo", beta=10.0, clip=0.1)
CONFIG = {
    **{"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "steps_offset": 1},
    **{"beta_start": 0.00085, "beta_end": 0.012},
}
WIDE = fastpref.objective("spo", beta=3.0, clip=0.9)


def grid(name):
    if name in ("toy", "wan"):
        process = fastpref.FlowMatching(shift=3.0)
    else:
        kind = "v_prediction" if name.startswith("cog") else "epsilon"
        process = from_config({**CONFIG, "prediction_type": kind})
    return steps(process, network_times(process, CONFIG, 10))


def transitions(case, grid, apart, count=3):
    """Steps of a sampler whose network said the base's words; the CPU's float64 stays float64."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for i in range(count):
        x, z, moved = (
            torch.randn(2, *case.latents.shape[1:], generator=generator, dtype=torch.float64)
            for _ in range(3)
        )
        x = x if apart else x[:1]
        step = grid[4 + i]
        cond = {
            name: value[i : i + 1].expand(len(x), *value.shape[1:])
            for name, value in case.cond.items()
        }
        with torch.no_grad():
            pred = case.family.predict(case.base, x, torch.full((len(x),), step.t), cond)
        y = step.implied(pred.expand(2, *x.shape[1:]) + 0.02 * moved, z)
        found.append(Transition(4 + i, i, x, y, 0.5))
    return found


def plain(case, objective, grid, pairs, scale, empty):
    """(loss, rho [2, B]) by log-probabilities per dimension and autograd; the gradient is left."""

    def mean(model, step, x, cond):
        t = torch.full((1,), step.t)
        said = case.family.predict(model, x, t, cond)
        if scale != 1:
            none = case.family.predict(model, x, t, empty)
            said = none + scale * (said - none)
        return step.on_x * x + step.on_pred * said

    losses, rhos = [], []
    for pair in pairs:
        step = grid[pair.step]
        cond = {name: value[pair.row : pair.row + 1] for name, value in case.cond.items()}
        rho = []
        for member in range(2):
            x = pair.x[min(member, len(pair.x) - 1)][None]
            x_r = step.on_x * x + step.on_pred * pair.y[member][None]
            log = Normal(mean(case.model, step, x, cond), step.sigma).log_prob(x_r).mean()
            with torch.no_grad():
                ref = Normal(mean(case.base, step, x, cond), step.sigma).log_prob(x_r).mean()
            rho.append(log - ref)
        low, high = math.log(1 - objective.clip), math.log(1 + objective.clip)
        w, l = (torch.clamp(r, low, high) for r in rho)
        losses.append(-logsigmoid(objective.beta * (w - l)))
        rhos.append(torch.stack(rho).detach())
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), torch.stack(rhos, 1)


@pytest.mark.parametrize("scale", [1.0, 5.0], ids=["plain", "guided"])
@pytest.mark.parametrize("apart", [False, True], ids=["shared", "apart"])
@pytest.mark.parametrize("name", ["toy", "wan", "cogvideox-2b", "sd15"])
def test_the_gradient_is_that_of_log_probabilities(name, apart, scale):
    case = tiny.case(name, torch.float64, pairs=3)
    case.cond.update({key: value[:3] for key, value in case.cond.items()})
    empty = {key: torch.zeros_like(value[0]) for key, value in case.cond.items()}
    row = {key: value[None] for key, value in empty.items()}
    sampler = grid(name)
    pairs = transitions(case, sampler, apart)
    predict = guided(case.family.predict, empty, scale)
    batch = collate(pairs, sampler, case.cond, torch.device("cpu"), torch.float64)
    assert batch.level.tolist() == pytest.approx([step.t / 1000 for step in sampler[4:7]])
    for policy, says in (
        reference.of_run(case.model, None, predict, shared=True),
        reference.of_run(case.model, case.base, predict, shared=False),
    ):
        for objective in (SPO, WIDE):
            loss, rho = plain(case, objective, sampler, pairs, scale, row)
            wanted = tiny.gradients(case.parameters)
            out = step_loss(policy, says, batch, objective)
            out.loss.backward()
            # guided predicts in float32
            near = {"rel": 1e-6 if scale == 1 else 2e-4}
            assert out.loss.item() == pytest.approx(loss, **near)
            assert tiny.distance(tiny.gradients(case.parameters), wanted) < 5 * near["rel"]
            said = telemetry.values(out, batch, objective)
            both = torch.stack([said["rewards/chosen"], said["rewards/rejected"]])
            torch.testing.assert_close(both / objective.beta, rho, rtol=1e-3, atol=1e-5)
            low, high = math.log(1 - objective.clip), math.log(1 + objective.clip)
            clamped = ((rho < low) | (rho > high)).double().mean(0)
            assert torch.equal(said["spo/clamped"], clamped)


def test_two_predictions_of_a_shared_x_t_give_the_same():
    case = tiny.case("sd15", torch.float64, pairs=3)
    case.cond.update({key: value[:3] for key, value in case.cond.items()})
    sampler = grid("sd15")
    pairs = transitions(case, sampler, False)
    batch = collate(pairs, sampler, case.cond, torch.device("cpu"), torch.float64)
    policy, says = reference.of_run(case.model, None, case.family.predict, shared=False)
    grads, rows = [], []

    def counted(x, t, cond):
        rows.append(len(x))
        return policy(x, t, cond)

    for each in (batch, apart(batch)):
        step_loss(counted, says, each, WIDE).loss.backward()
        grads.append(tiny.gradients(case.parameters))
    assert rows == [3, 6]
    assert tiny.distance(*grads) < 1e-9


def test_margin_noise_is_that_of_the_first_update(capsys):
    run = SimpleNamespace(step=0, margin_noise=None)
    telemetry.note_margin_noise(run, [torch.tensor([0.01]), torch.tensor([-0.3, 0.2])])
    assert run.margin_noise == pytest.approx(0.3)
    assert "margin noise 0.3 is above 0.05" in capsys.readouterr().err
    run.step = 1
    telemetry.note_margin_noise(run, [torch.tensor([7.0])])
    assert run.margin_noise == pytest.approx(0.3)


def test_policy_and_reference_that_are_one_model_say_ln_2():
    case = tiny.case("toy", torch.float64, pairs=3)
    case.cond.update({key: value[:3] for key, value in case.cond.items()})
    sampler = grid("toy")
    batch = collate(
        transitions(case, sampler, False), sampler, case.cond, torch.device("cpu"), torch.float64
    )
    says = reference.base(case.base, case.family.predict)
    out = step_loss(says, says, batch, SPO)
    assert out.loss.item() == pytest.approx(math.log(2)) and not out.margin.any()
