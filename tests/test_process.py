"""Noising processes against diffusers' own schedulers, the importance gain against Gaussians."""

import math
from statistics import NormalDist
from typing import ClassVar

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from fastpref import Diffusion, Draws, FlowMatching, add_noise, oracle
from fastpref.pairs.dataset import Batch, Pair
from fastpref.process import Process, from_config
from fastpref.run.parts import preparer

SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD15 = SCALED | {"_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "steps_offset": 1}
SDXL = SCALED | {
    "_class_name": "EulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}
SD21 = SCALED | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
COGVIDEOX = SCALED | {
    "_class_name": "CogVideoXDDIMScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0,
    "timestep_spacing": "trailing",
}
WAN = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
}


def draws_of(n: int, seed: int = 11, index: int = 0) -> Draws:
    return Draws(seed, torch.arange(n) * 1_000_003, torch.full((n,), index))


def normals(draws: Draws, shape: torch.Size) -> Tensor:
    """eps [2B, ...] as add_noise draws it."""
    b = len(draws.pair_id)
    return add_noise(torch.zeros(shape), draws, torch.zeros(b), torch.ones(b))


def ks(x: Tensor, cdf: Tensor) -> float:
    """sqrt(n) sup |F_n - F|, where cdf is F at the sorted x: above 1.95 once in a thousand."""
    n = len(x)
    return ((torch.arange(1, n + 1) / n) - cdf).abs().max().item() * math.sqrt(n)


# --- Against diffusers ---


@pytest.mark.parametrize(
    ("config", "scheduler"),
    [
        (SD15, diffusers.DDPMScheduler),
        (SDXL, diffusers.DDPMScheduler),
        (SD21, diffusers.DDPMScheduler),
        (SD15 | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, None),
        (SD15 | {"beta_schedule": "squaredcos_cap_v2"}, diffusers.DDPMScheduler),
        (SD15 | {"beta_schedule": "linear"}, diffusers.DDPMScheduler),
        (SD15 | {"trained_betas": [0.01, 0.02, 0.03] * 20}, diffusers.DDPMScheduler),
        ({"_class_name": "DDPMScheduler"}, diffusers.DDPMScheduler),
        (COGVIDEOX, diffusers.CogVideoXDDIMScheduler),
        (COGVIDEOX | {"snr_shift_scale": 1.0}, diffusers.CogVideoXDDIMScheduler),
        (COGVIDEOX | {"rescale_betas_zero_snr": False}, diffusers.CogVideoXDDIMScheduler),
        ({"_class_name": "CogVideoXDPMScheduler"}, diffusers.CogVideoXDPMScheduler),
    ],
)
def test_ddpm_is_the_schedulers(config, scheduler):
    """x_t, t and both regression targets are those of the model's own scheduler."""
    theirs = (scheduler or diffusers.DDPMScheduler).from_config(config)
    process = from_config(config)
    assert isinstance(process, Diffusion)
    ours = process.alphas_cumprod
    assert ours.dtype == torch.float64 and len(ours) == len(theirs.alphas_cumprod)
    single = theirs.alphas_cumprod.dtype == torch.float32
    rtol, atol = (5e-5, 1e-7) if single else (1e-12, 1e-15)
    torch.testing.assert_close(ours, theirs.alphas_cumprod.double(), rtol=rtol, atol=atol)

    draws = draws_of(32)
    x0 = torch.randn(64, 3, 5)
    x_t, t, target = process.noise(x0, draws)
    assert t.dtype == torch.float32 and torch.equal(t, t.long().float())
    assert torch.equal(t[:32], t[32:]) and len(t.unique()) > 5
    eps = normals(draws, x0.shape)
    expected = theirs.add_noise(x0, eps, t.long())
    torch.testing.assert_close(x_t, expected, rtol=1e-4, atol=1e-4)
    y = oracle.mix(x0, eps[:32].flatten(1), target.q, target.p)
    if process.prediction_type == "epsilon":
        assert torch.equal(y, eps)
    else:
        velocity = theirs.get_velocity(x0, eps, t.long())
        torch.testing.assert_close(y, velocity, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(process.level(draws).repeat(2), t.double() / len(ours))


def test_cogvideox_ends_in_pure_noise():
    process = from_config(COGVIDEOX)
    assert process.alphas_cumprod[-1] == 0 and (process.alphas_cumprod[:-1] > 0).all()
    last = process.replace(timestep_range=(0.999, 1.0))
    x0 = torch.randn(2, 4)
    x_t, t, target = last.noise(x0, draws_of(1))
    eps = normals(draws_of(1), x0.shape)
    assert t.tolist() == [999, 999] and torch.equal(x_t, eps)
    assert (target.p.item(), target.q.item()) == (0, -1)  # v = -x0


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_the_schedulers(shift):
    """sigma, t and x_t of FlowMatchEulerDiscreteScheduler at its own timesteps."""
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift}
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    process = from_config(config)
    assert process == FlowMatching(shift=shift) or process.shift == shift

    draws = draws_of(8)
    x0 = torch.randn(16, 3, 5)
    x_t, t, target = process.noise(x0, draws)
    eps = normals(draws, x0.shape)
    sigma = process.level(draws)
    # Both know a grid of 1000 times; a draw falls between two of them.
    u, plain = process.replace(shift=1.0).level(draws), diffusers.FlowMatchEulerDiscreteScheduler()
    shifted = np.interp(u, plain.sigmas.flip(0), theirs.sigmas.flip(0))
    torch.testing.assert_close(sigma, torch.from_numpy(shifted), rtol=0, atol=1e-5)
    torch.testing.assert_close(t, (1000 * sigma).float().repeat(2), rtol=0, atol=0)
    # Put our times among theirs, so that their formula is used at them.
    theirs.timesteps, theirs.sigmas = t[:8], sigma.float()
    expected = torch.cat(
        [theirs.scale_noise(x, t[:8], e) for x, e in zip(x0.chunk(2), eps.chunk(2), strict=True)]
    )
    torch.testing.assert_close(x_t, expected, rtol=1e-6, atol=1e-6)
    y = oracle.mix(x0, eps[:8].flatten(1), target.q, target.p)
    torch.testing.assert_close(y, eps - x0, rtol=0, atol=0)


# --- Times ---


@pytest.mark.parametrize("window", [(0.0, 1.0), (0.35, 1.0), (0.1, 0.4)])
@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_flow_times(kind, window):
    """u uniform or logit-normal, shifted; a window conditions the distribution of sigma."""
    n, shift, mean, std = 20_000, 3.0, 0.3, 0.8
    process = FlowMatching(
        shift=shift, time_sampling=kind, logit_mean=mean, logit_std=std, timestep_range=window
    )
    sigma = process.level(draws_of(n)).sort().values
    assert sigma[0] >= window[0] and sigma[-1] <= window[1]

    def cdf(sigma: float) -> float:
        u = sigma / (shift - (shift - 1) * sigma)
        if kind == "uniform" or u in (0, 1):
            return u
        return NormalDist(mean, std).cdf(math.log(u / (1 - u)))

    lo, hi = map(cdf, window)
    expected = torch.tensor([(cdf(s) - lo) / (hi - lo) for s in sigma.tolist()])
    assert ks(sigma, expected) < 1.95


@pytest.mark.parametrize("shift", [1e-30, 1.0, 3.0, 1e30])
def test_a_window_that_ends_at_one_is_exact_for_any_shift(shift):
    process = FlowMatching(shift=shift)
    assert process._window() == (0.0, 1.0)
    level = process.level(draws_of(100))
    assert level.isfinite().all() and level.min() >= 0 and level.max() <= 1


def test_a_window_keeps_the_order_of_the_draws():
    """No rejection: a draw keeps its place in the distribution, so runs stay comparable."""
    for process in (FlowMatching(shift=2.0), from_config(SD15)):
        whole = process.level(draws_of(500))
        part = process.replace(timestep_range=(0.35, 0.8)).level(draws_of(500))
        tie = 1e-3 if isinstance(process, Diffusion) else 0.0  # t is an integer
        assert (part[whole.argsort()].diff() >= -tie - 1e-12).all()


@pytest.mark.parametrize(
    ("window", "first", "last"),
    [
        ((0.0, 1.0), 0, 999),
        ((0.35, 1.0), 350, 999),
        ((0.0, 0.057), 0, 56),
        ((0.3, 0.3011), 300, 301),
    ],
)
def test_diffusion_times(window, first, last):
    """t is uniform on the integers with t / T in [lo, hi)."""
    n = 20_000
    process = from_config(SD15).replace(timestep_range=window)
    t = (process.level(draws_of(n)) * 1000).round().long()
    assert t.min() == first and t.max() == last
    counts = torch.bincount(t - first, minlength=last - first + 1).double()
    cells = len(counts)
    chi2 = ((counts - n / cells).square() / (n / cells)).sum().item()
    assert abs(chi2 - (cells - 1)) < 5 * math.sqrt(2 * cells)


def test_strata():
    """K draws of a pair fall one into each K-th of the distribution, in the pair's own order."""
    strata = 8
    process = FlowMatching(strata=strata)
    levels = torch.stack([process.level(draws_of(400, index=k)) for k in range(strata)])
    cells = (levels * strata).long()
    assert torch.equal(cells.sort(0).values, torch.arange(strata)[:, None].expand(-1, 400))
    offsets = torch.bincount(cells[0], minlength=strata)
    assert offsets.min() > 20  # 50 expected
    assert torch.equal((cells[0] + 3) % strata, cells[3])
    within = (levels * strata - cells).flatten().sort().values
    assert ks(within, within) < 1.95 and not torch.equal(
        levels[0], process.level(draws_of(400, 12))
    )
    again = process.level(draws_of(400, index=strata + 2))
    assert torch.equal((again * strata).long(), cells[2]) and not torch.equal(again, levels[2])


def test_noise_is_a_function_of_the_pair():
    """A pair gets the same x_t, t and target coefficients alone and in a batch."""
    for process in (FlowMatching(shift=3.0, time_sampling="logit_normal"), from_config(COGVIDEOX)):
        draws, x0 = draws_of(5), torch.randn(10, 2, 3).bfloat16()
        x_t, t, target = process.noise(x0, draws)
        assert x_t.dtype == torch.bfloat16 and target.p.dtype == torch.float32
        alone = Draws(draws.seed, draws.pair_id[[3]], draws.index[[3]])
        x_one, t_one, target_one = process.noise(x0[[3, 8]], alone)
        assert torch.equal(x_one, x_t[[3, 8]]) and torch.equal(t_one, t[[3, 8]])
        assert target_one.p == target.p[3] and target_one.q == target.q[3]
        assert torch.equal(process.gain(alone), process.gain(draws)[[3]])


# --- What else is drawn ---


class Empty:
    """A set whose prompts are 1, and the empty one 0."""

    empty_cond: ClassVar = {"text": torch.zeros(1)}

    def __getitem__(self, i: int) -> Pair:
        return Pair(torch.zeros(1), torch.zeros(1), {"text": torch.ones(1)}, 1.0, i, "")


def dropped(n: int, epoch: int, chance: float) -> tuple[Tensor, Draws]:
    """([n] bool: which pairs have the empty prompt in an epoch, their draws)"""
    prepare = preparer(
        Empty(), torch.device("cpu"), torch.float32,
        seed=11, draws_per_pair=None, prompt_dropout=chance,
    )  # fmt: skip
    ids, text = draws_of(n).pair_id, {"text": torch.ones(2 * n, 1)}
    batch, draws = prepare(epoch, Batch(torch.zeros(2 * n, 1), text, torch.ones(n), ids, [""] * n))
    winners, losers = (batch.cond["text"][:, 0] == 0).chunk(2)
    assert torch.equal(winners, losers)
    return winners, draws


def test_which_prompts_are_dropped_depends_on_nothing_else_that_is_drawn():
    """Times, noise and samples of the posterior are spread over the dropped as over all pairs."""
    n, chance = 40_000, 0.25
    empty, draws = dropped(n, 1, chance)
    count = int(empty.sum())
    assert abs(count - chance * n) < 5 * math.sqrt(n * chance * (1 - chance))
    levels = FlowMatching().level(draws)[empty].sort().values
    assert ks(levels, levels) < 1.95
    strata = FlowMatching(strata=4).level(draws)[empty].sort().values
    assert ks(strata, strata) < 1.95
    for domain in (oracle.NOISE, oracle.POSTERIOR, oracle.SPO):
        x = oracle.normal(11, draws.pair_id, draws.index, 2, domain)[empty]
        assert abs(x.mean()) < 5 / math.sqrt(2 * count), domain
        assert abs(x.square().mean() - 1) < 5 * math.sqrt(2 / (2 * count)), domain
    other, _ = dropped(n, 2, chance)
    assert abs(int((other & empty).sum()) - chance * count) < 5 * math.sqrt(chance * count)
    assert not dropped(100, 1, 0.0)[0].any()


def test_times_and_dropped_prompts_never_change():
    """Written down once: a reference cache of one version must hold in the next."""
    draws = draws_of(6, index=3)
    expected = [0.8499514693, 0.5005399319, 0.9474122571, 0.6712968635, 0.7969171517, 0.8278264867]
    assert FlowMatching().level(draws).tolist() == pytest.approx(expected, abs=1e-9)
    expected = [0.4624878673, 0.3751349830, 0.7368530643, 0.9178242159, 0.4492292879, 0.7069566217]
    assert FlowMatching(strata=4).level(draws).tolist() == pytest.approx(expected, abs=1e-9)
    assert dropped(20, 3, 0.25)[0].nonzero().flatten().tolist() == [0, 3, 19]


# --- The importance gain ---


def step_down(process: Process, level: float) -> tuple[float, float, float, float]:
    """(a_t, s_t, a_r, s_r) of the reverse step of one grid cell, written out again."""
    if isinstance(process, FlowMatching):
        k, n = process.shift, process.importance_steps
        u = level / (k - (k - 1) * level)
        v = max(u - 1 / n, 1e-3)
        r = k * v / (1 + (k - 1) * v)
        return 1 - level, level, 1 - r, r
    t = round(level * 1000)
    r = max(t - round(1000 / process.importance_steps), 0)
    bar_t, bar_r = (process.alphas_cumprod[i].item() for i in (t, r))
    return bar_t**0.5, (1 - bar_t) ** 0.5, bar_r**0.5, (1 - bar_r) ** 0.5


def clean_and_noise(kind: str, x_t: Tensor, pred: Tensor, a: float, s: float) -> Tensor:
    """x0-hat of a prediction."""
    if kind == "epsilon":
        return (x_t - s * pred) / a
    if kind == "v_prediction":
        return a * x_t - s * pred
    return pred if kind == "sample" else x_t - s * pred


PROCESSES = {
    "epsilon": from_config(SD15),
    "epsilon-coarse": from_config(SD15).replace(importance_steps=5),
    "v_prediction": from_config(COGVIDEOX),
    "sample": from_config(COGVIDEOX | {"prediction_type": "sample"}),
    "flow": FlowMatching(),
    "flow-shifted": FlowMatching(shift=5.0, importance_steps=7),
}


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("level", [0.021, 0.1, 0.35, 0.7, 0.999])
def test_gain_against_two_gaussians(name, level):
    """log p(x_r|x_t)/q(x_r|x_t,x0) under q: mean -g |residual|^2 / 2, variance g |residual|^2."""
    torch.manual_seed(3)
    pinned = PROCESSES[name].replace(timestep_range=(level, min(level + 1e-3, 1.0)))
    draws, dim = draws_of(1), 3
    at = pinned.level(draws).item()
    gain = pinned.gain(draws).item()
    a_t, s_t, a_r, s_r = step_down(pinned, at)
    kind = name.split("-")[0]
    x0, eps, residual = torch.randn(3, dim, dtype=torch.float64)
    residual *= 0.5 / math.sqrt(gain)  # so that log w is of order 1
    x_t = a_t * x0 + s_t * eps
    y = {
        "epsilon": eps,
        "v_prediction": a_t * eps - s_t * x0,
        "sample": x0,
        "flow": eps - x0,
    }[kind]
    # The posterior of x_r between x_t and x0, r < t, by Bayes.
    forward = a_t / a_r
    forward_var = s_t**2 - forward**2 * s_r**2
    var = forward_var * s_r**2 / s_t**2

    def mean(x0: Tensor) -> Tensor:
        return forward * s_r**2 / s_t**2 * x_t + a_r * forward_var / s_t**2 * x0

    x0_hat = clean_and_noise(kind, x_t, y - residual, a_t, s_t)
    x_r = mean(x0) + math.sqrt(var) * torch.randn(100_000, dim, dtype=torch.float64)
    log_w = ((x_r - mean(x0)).square() - (x_r - mean(x0_hat)).square()).sum(1) / (2 * var)
    size = gain * residual.square().sum().item()
    assert abs(log_w.mean().item() + size / 2) < 5 * math.sqrt(size / 100_000)
    assert log_w.var().item() == pytest.approx(size, rel=0.03)
    # And exactly: the divergence of the two Gaussians.
    exact = (mean(x0) - mean(x0_hat)).square().sum().item() / (2 * var)
    assert exact == pytest.approx(size / 2, rel=1e-6)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_gain_is_finite_and_never_negative(name, steps):
    """At every time, both ends included; 1e30, and so weight 0, where no step is left."""
    process = PROCESSES[name].replace(importance_steps=steps)
    if isinstance(process, Diffusion):
        for t in [*range(0, 1000, 37), 998, 999]:
            one = process.replace(timestep_range=(t / 1000, (t + 1) / 1000))
            gain = one.gain(draws_of(1)).item()
            assert (gain == 1e30) if t == 0 else (0 <= gain < 1e30)
        return
    level, gain = process.level(draws_of(5000)), process.gain(draws_of(5000))
    assert gain.isfinite().all() and (gain >= 0).all() and level.min() < 1e-2
    clean = process.replace(timestep_range=(0.0, 1e-4)).gain(draws_of(100))
    assert (clean == 1e30).all()
    assert oracle.importance(torch.full((100,), 0.1, dtype=torch.float64), clean).max() == 0
    noisy = process.replace(timestep_range=(1 - 1e-6, 1.0)).gain(draws_of(100))
    assert noisy.isfinite().all() and (noisy >= 0).all()


@pytest.mark.parametrize(("shift", "crossing"), [(1.0, 0.114), (5.0, 0.30)])
def test_where_the_mask_sets_in(shift, crossing):
    """At mse 0.5 and N = 50 the weight falls below 0.9 near this sigma, and below it only."""
    process = FlowMatching(shift=shift)
    sigma = process.level(draws_of(20_000))
    wbar = oracle.importance(torch.full_like(sigma, 0.5), process.gain(draws_of(20_000)))
    masked = wbar < 0.9
    assert sigma[masked].max().item() == pytest.approx(crossing, abs=0.003)
    # Steps end at u = 1e-3: just above it they are too short to weigh anything.
    kept = sigma[~masked & (sigma > 1.3e-3 * shift)]
    assert kept.min() > sigma[masked].max()


@pytest.mark.parametrize("strata", [None, 8])
@pytest.mark.parametrize("window", [(0.0, 1.0), (0.0, 0.1), (0.35, 0.8)])
@pytest.mark.parametrize("kind", ["uniform", "logit_normal", "diffusion"])
def test_unmasked_times_keep_their_distribution(kind, window, strata):
    """None is masked, and a function of the level has the mean that it has over those of all draws
    where a step is left: a masked loss's is the old one over 1 - f, f here 1 to 10 %.
    """
    if kind == "diffusion":
        table = torch.linspace(0.99, 0.2, 100, dtype=torch.float64)
        process = Diffusion(alphas_cumprod=table, importance_steps=20)
    else:
        process = FlowMatching(time_sampling=kind, logit_mean=-3.0, logit_std=1.5, shift=1.5)
    process = process.replace(timestep_range=window, strata=strata)
    part, n = process.unmasked(), 50_000
    assert (part.timestep_range == window) == (window[0] > 0.3)
    every, left = process.times(draws_of(n)), part.times(draws_of(n))
    kept = every.gain < 1e30
    assert (left.gain < 1e30).all() and left.level.max() <= window[1]
    if window[0] == 0:
        assert 0 < (~kept).sum() < 0.2 * n
    sample, expected = left.level, every.level[kept]
    for power in (0.5, 1, 2):
        a, b = sample**power, expected**power
        noise = math.sqrt(a.var() / len(a) + b.var() / len(b))
        assert abs(a.mean() - b.mean()) < 4.5 * noise
    if kind == "diffusion":
        cells = (left.level * 100).round().long().unique()
        assert torch.equal(cells, (every.level[kept] * 100).round().long().unique())
    # Draws stay draws: in the same order as before, alone as in a batch.
    tie = 0.01 if kind == "diffusion" else 0.0  # t is an integer
    assert (left.level[every.level.argsort()].diff() >= -tie - 1e-12).all()
    one = Draws(11, draws_of(n).pair_id[[7]], draws_of(n).index[[7]])
    assert torch.equal(part.level(one), left.level[[7]])


def test_unmasked_timesteps_are_equally_likely():
    table = torch.linspace(0.99, 0.2, 10, dtype=torch.float64)
    process = Diffusion(alphas_cumprod=table, importance_steps=5)
    counts = torch.bincount((process.unmasked().level(draws_of(90_000)) * 10).round().long())
    assert counts[0] == 0 and len(counts) == 10
    assert ((counts[1:] - 10_000).abs() < 4.5 * math.sqrt(10_000)).all()
    last = process.replace(timestep_range=(0.0, 0.2)).unmasked()
    assert (last.level(draws_of(100)) == 0.1).all()
