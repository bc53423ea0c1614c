"""Processes and scheduler configs that cannot be, and the kinds that are refused."""

import diffusers
import pytest
import torch
from test_process import COGVIDEOX, SCALED, SD15, WAN

from fastpref import Diffusion, FlowMatching
from fastpref.process import DDPM_KIND, from_config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: FlowMatching(timestep_range=(0.5, 0.5)),
            r"timestep_range must be \(lo, hi\) with",
        ),
        (lambda: FlowMatching(timestep_range=(-0.1, 1)), r"timestep_range .* got \(-0.1, 1\)"),
        (lambda: FlowMatching(importance_steps=0), "importance_steps must be >= 1, got 0"),
        (lambda: FlowMatching(strata=0), r"strata \(draws per pair\) must be >= 1, got 0"),
        (lambda: FlowMatching(shift=0.0), "shift must be finite and > 0, got 0.0"),
        (
            lambda: FlowMatching(time_sampling="beta"),
            "time_sampling must be uniform or logit_normal",
        ),
        (lambda: FlowMatching(logit_std=0.0), "logit_std must be > 0 and finite, and"),
        (
            lambda: FlowMatching(
                time_sampling="logit_normal", logit_std=0.1, timestep_range=(0.99, 1.0)
            ),
            "is almost never drawn with logit_mean=0.0, logit_std=0.1",
        ),
        (
            lambda: from_config(WAN | {"use_dynamic_shifting": True}),
            "use_dynamic_shifting=True is not supported",
        ),
        (
            lambda: from_config(COGVIDEOX | {"prediction_type": "epsilon"}),
            "prediction_type epsilon is undefined at zero terminal SNR",
        ),
        (
            lambda: from_config(SD15 | {"prediction_type": "x"}),
            "prediction_type must be one of epsilon, v_prediction, sample, got 'x'",
        ),
        (
            lambda: from_config(SD15 | {"beta_schedule": "sigmoid"}),
            "beta_schedule must be linear, scaled_linear or squaredcos_cap_v2, got 'sigmoid'",
        ),
        (
            lambda: from_config(SD15).replace(importance_steps=1001),
            "importance_steps must be <= 1000, the training timesteps, got 1001",
        ),
        (
            lambda: from_config(SD15).replace(timestep_range=(0.1001, 0.1002)),
            "holds none of 1000 timesteps",
        ),
        (
            lambda: from_config(SD15).replace(timestep_range=(0.0, 0.001)).unmasked(),
            r"timestep_range \(0.0, 0.001\) holds only times with importance weight 0, expected "
            "some above 0.001: widen it",
        ),
        (
            lambda: FlowMatching(shift=3.0, timestep_range=(0.0, 0.002)).unmasked(),
            "holds only times with importance weight 0, expected some above 0.00299401",
        ),
        (
            lambda: Diffusion(alphas_cumprod=torch.tensor([1.5])),
            r"alphas_cumprod must be \[T\] with 0 <= abar < 1, got \[1\]",
        ),
    ],
)
def test_one_line_errors(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["EDMEuler", "EDMDPMSolverMultistep", "ScoreSdeVe", "KarrasVe", "IPNDM", "UnCLIP"]
)
def test_schedulers_that_noise_otherwise_are_refused(name):
    with pytest.raises(ValueError, match=f"_class_name {name}Scheduler noises in a way that is"):
        from_config(SCALED | {"_class_name": f"{name}Scheduler"})


@pytest.mark.parametrize("name", DDPM_KIND)
def test_schedulers_of_ddpms_kind_have_its_alphas(name):
    config = {"beta_start": 0.001, "beta_end": 0.015, "num_train_timesteps": 1000}
    needs = {"LMSDiscreteScheduler": "scipy", "DPMSolverSDEScheduler": "torchsde"}
    pytest.importorskip(needs.get(name, "torch"))
    theirs = getattr(diffusers, name)(beta_schedule="scaled_linear", **config)
    process = from_config(dict(theirs.config) | {"_class_name": name})
    torch.testing.assert_close(
        process.alphas_cumprod.float(), theirs.alphas_cumprod.float(), rtol=1e-4, atol=0
    )
