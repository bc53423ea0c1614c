"""A sampler's steps against diffusers' DDIM, and their marginals against the forward process."""

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, UniPCMultistepScheduler

from fastpref import FlowMatching
from fastpref.process import Diffusion, estimates, from_config
from fastpref.spo.grid import network_times, steps

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD |= {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
COG = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
COG |= {"set_alpha_to_one": True}


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_steps_are_ddims(prediction, eta):
    theirs = DDIMScheduler(**SD, prediction_type=prediction)
    theirs.set_timesteps(20)
    config = {**theirs.config, "_class_name": "DDIMScheduler"}
    process = from_config(config)
    mine = steps(process, network_times(process, config, 20), eta=eta)
    assert [step.t for step in mine] == theirs.timesteps.tolist() and mine[-1].r == 0
    x, pred, z = (normals(2, 4, 8, 8, seed=i) for i in range(3))
    for step in mine:
        out = theirs.step(pred, int(step.t), x, eta=eta, variance_noise=z)
        torch.testing.assert_close(step.take(x, pred, z), out.prev_sample, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(
            step.clean(x, pred), out.pred_original_sample, rtol=1e-5, atol=1e-4
        )


def test_steps_of_zero_terminal_snr_are_cogvideoxs():
    theirs = CogVideoXDDIMScheduler(**COG, prediction_type="v_prediction")
    theirs.set_timesteps(10)
    config = {**theirs.config, "_class_name": "CogVideoXDDIMScheduler"}
    process = from_config(config)
    mine = steps(process, network_times(process, config, 10), eta=0.0)
    assert [step.t for step in mine] == theirs.timesteps.tolist() and mine[0].t == 999
    x, pred = normals(1, 4, 2, 4, 4), normals(1, 4, 2, 4, 4, seed=1)
    for step in mine[:-1]:  # the last ends at timestep 0 here, and beyond it there
        out = theirs.step(pred, int(step.t), x).prev_sample
        torch.testing.assert_close(step.take(x, pred, None), out, rtol=1e-4, atol=1e-4)
    noisy = steps(process, network_times(process, config, 10))
    assert all(step.sigma > 0 and step.gain > 0 for step in noisy), "the zero-SNR end included"


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_times_are_unipcs_and_its_deterministic_step_is_eulers(shift):
    theirs = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    theirs.set_timesteps(12)
    process = FlowMatching(shift=shift)
    times = network_times(process, {}, 12)
    torch.testing.assert_close(torch.tensor(times) / 1000, theirs.sigmas.float(), rtol=0, atol=1e-3)
    x, v = normals(1, 3, 4, 4), normals(1, 3, 4, 4, seed=1)
    for step in steps(process, times, eta=0.0):
        euler = x + (step.r - step.t) / 1000 * v
        torch.testing.assert_close(step.take(x, v, None), euler, rtol=1e-9, atol=1e-9)


def processes():
    yield "flow", FlowMatching(shift=2.0), {}
    for prediction in ("epsilon", "v_prediction"):
        config = {**SD, "_class_name": "DDIMScheduler", "prediction_type": prediction}
        yield prediction, from_config(config), config
    config = {**COG, "_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction"}
    yield "zero-snr", from_config(config), config


@pytest.mark.parametrize("window", [None, (2, 6)])
@pytest.mark.parametrize("case", [*processes()], ids=lambda case: case[0])
def test_marginals_are_the_forward_processs(case, window):
    """With the exact prediction of a known x0, x_r is a_r x0 + s_r eps after every step, whether it
    is stochastic or not.
    """
    _, process, config = case
    times = network_times(process, config, 8)
    grid = steps(process, times, window=window)
    mixes = process.coefficients(torch.tensor(times)).T.tolist()
    x0, count = 1.7, 200_000
    a, s, *_ = mixes[0]
    x = a * x0 + s * normals(count)
    for i, step in enumerate(grid):
        a, s, p, q = mixes[i]
        pred = p * (x - a * x0) / s + q * x0
        assert step.sigma == 0 if window and not window[0] <= i < window[1] else step.sigma >= 0
        x = step.take(x, pred, normals(count, seed=i + 1))
        a_r, s_r, *_ = mixes[i + 1]
        assert x.mean().item() == pytest.approx(a_r * x0, abs=0.012)
        assert x.std().item() == pytest.approx(s_r, abs=0.008)


def test_a_candidates_implied_prediction_and_gain_say_its_log_probability():
    """log N(x_r; mean(pred), sigma^2) per dimension is -(k/2) (pred - y)^2 but for a constant."""
    for _, process, config in processes():
        for step in steps(process, network_times(process, config, 10)):
            if not step.sigma:
                continue
            x, pred, other, z = (normals(64, seed=i) for i in range(4))
            x_r, y = step.take(x, pred, z), step.implied(pred, z)
            torch.testing.assert_close(step.take(x, y, None), x_r, rtol=1e-6, atol=1e-6)
            for said in (pred, other):
                mean = step.take(x, said, None)
                log = torch.distributions.Normal(mean, step.sigma).log_prob(x_r)
                constant = torch.distributions.Normal(0.0, step.sigma).log_prob(torch.zeros(()))
                error = -0.5 * step.gain * (said - y).square() + constant
                torch.testing.assert_close(log, error, rtol=1e-5, atol=1e-5)


def test_the_last_step_without_an_offset_has_no_noise():
    config = {**SD, "steps_offset": 0, "_class_name": "DDIMScheduler"}
    process = from_config(config)
    assert isinstance(process, Diffusion)
    assert steps(process, network_times(process, config, 20))[-1].sigma == 0
    trailing = steps(process, network_times(process, config, 20, "trailing"))
    assert trailing[-1].sigma > 0 and trailing[0].t == 999


def test_a_window_beyond_the_steps_is_refused():
    times = network_times(FlowMatching(), {}, 6)
    assert steps(FlowMatching(), times, window=(2, 6))[5].sigma == 0
    with pytest.raises(ValueError, match="sde_window: expected at most 6 steps, got 9"):
        steps(FlowMatching(), times, window=(2, 9))


def test_more_steps_than_timesteps_are_refused():
    with pytest.raises(ValueError, match="sampling_steps: expected 1 to 1000, got 1001"):
        network_times(FlowMatching(), {}, 1001)


def test_estimates_solve_for_x0_and_eps():
    for _, process, _ in processes():
        x0, eps = normals(5), normals(5, seed=1)
        for a, s, p, q in process.coefficients(torch.tensor([10.0, 500.0, 990.0])).T.tolist():
            found = estimates(a * x0 + s * eps, p * eps + q * x0, a, s, p, q)
            for mine, true in zip(found, (x0, eps), strict=True):
                torch.testing.assert_close(mine, true)
