"""Noising processes in one file, since flow matching and diffusion share base, draws and config.

Draws, targets, importance gain; the tables of a scheduler's config stand in schedule.py.

A process turns draws into noise levels: x_t = a x0 + s eps, and the network predicts
y = p eps + q x0.
Everything is a pure function of the draws (seed, pair id, index), computed where the draws are,
without a synchronisation: on the CPU a batch's few numbers cost less than their launches on a GPU
would, and `noise` takes them to the latents' device in one copy. Tables and times are float64.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from .loss import oracle
from .loss.functional import Draws, Target, add_noise
from .schedule import alphas_cumprod, timesteps

# Finite, since inf times an error of 0 is NaN.
MASKED = 1e30  # the gain where no reverse step is left: wbar = exp(-g e / 2) is 0
# 1 / 1000 is where diffusers' flow grids end; at 0 the gain of a step would be infinite.
LAST_STEP = 1e-3  # flow: where reverse steps end, a time before the shift


class Times(NamedTuple):
    """What draws say of time, each [B] float64: x_t = a x0 + s eps, y = p eps + q x0."""

    level: Tensor  # noise level in [0, 1]: sigma (flow), t / T (diffusion)
    t: Tensor  # what the network is fed
    a: Tensor
    s: Tensor
    p: Tensor
    q: Tensor
    gain: Tensor  # the importance gain of one reverse step

    def to(self, device: torch.device | str) -> "Times":
        """The same on `device`, in one copy."""
        if self.level.device == torch.device(device):
            return self
        return Times(*torch.stack(self).to(device, non_blocking=True))


def estimates(x_t: Tensor, pred: Tensor, a: Any, s: Any, p: Any, q: Any) -> tuple[Tensor, Tensor]:
    """(x0-hat, eps-hat) of a prediction: the solution of x_t = a x0 + s eps, pred = p eps + q x0.

    a, s, p, q: numbers, or tensors that broadcast over x_t.
    """
    determinant = p * a - s * q
    return (p * x_t - s * pred) / determinant, (a * pred - q * x_t) / determinant


# eq=False: tensors in fields have no single answer to ==.
@dataclass(frozen=True, kw_only=True, eq=False)
class Process(ABC):
    """What both processes share.

    timestep_range: the window (lo, hi) on the noise level that times are drawn from (flow: sigma;
        diffusion: t / T), realised by restricting the draw, so draws stay draws.
    importance_steps: N, the importance gain is that of one step of a grid of N steps from t itself.
    strata: K draws per pair, stratified: draw k takes stratum (k + an offset of the pair) mod K.
    Raises ValueError on values out of range.
    """

    timestep_range: tuple[float, float] = (0.0, 1.0)
    importance_steps: int = 50
    strata: int | None = None

    def __post_init__(self) -> None:
        lo, hi = self.timestep_range
        if not 0 <= lo < hi <= 1:
            raise ValueError(
                f"timestep_range must be (lo, hi) with 0 <= lo < hi <= 1, got ({lo}, {hi})"
            )
        if self.importance_steps < 1:
            raise ValueError(f"importance_steps must be >= 1, got {self.importance_steps}")
        if self.strata is not None and self.strata < 1:
            raise ValueError(f"strata (draws per pair) must be >= 1, got {self.strata}")

    def replace(self, **changes: Any) -> Self:
        """The same process with other settings, e.g. `replace(timestep_range=(0.35, 1.0))`."""
        return replace(self, **changes)

    @abstractmethod
    def _masked_below(self) -> float:
        """The noise level below which no reverse step is left (flow: nor at it)."""

    def unmasked(self) -> Self:
        """The same process, its window cut where no reverse step is left: t = 0, flow u <= 1e-3.

        There the importance weight is 0 whatever the network says: a pair drawn there costs a step
        and teaches nothing. The other times keep their distribution, so a masked loss has the same
        mean but for a factor 1 / (1 - f), f the share of the draws that was masked. Strata divide
        what is left; a draw keeps its place in the distribution.
        Raises ValueError where the window holds no other times.
        """
        lo, hi = self.timestep_range
        lo = max(lo, self._masked_below())
        if not lo < hi:
            raise ValueError(
                f"timestep_range {self.timestep_range} holds only times with importance weight 0, "
                f"expected some above {lo:g}: widen it"
            )
        return self.replace(timestep_range=(lo, hi))

    def _uniform(self, draws: Draws) -> Tensor:
        """[B] float64 in (0, 1): each draw's place in the distribution of times."""
        u = oracle.uniform(draws.seed, draws.pair_id, draws.index, oracle.TIMESTEP)
        if self.strata is None:
            return u
        # The offset: without it all pairs of an epoch would be in one stratum.
        # Word group 1 of draw 0: numbers that no time uses, one offset per pair.
        zero, group = torch.zeros_like(draws.index), draws.pair_id.new_ones(1)
        offset = oracle.words(draws.seed, draws.pair_id, zero, group, oracle.TIMESTEP)[0][:, 0]
        return ((draws.index + offset) % self.strata + u) / self.strata

    @abstractmethod
    def coefficients(self, t: Tensor) -> Tensor:
        """a, s, p and q at times t [N] as the network is fed them: [4, N] float64."""

    @abstractmethod
    def times(self, draws: Draws) -> Times:
        """The draws' times and what follows from them, on the draws' device."""

    def level(self, draws: Draws) -> Tensor:
        """The noise level, [B] float64: sigma in [0, 1] (flow), t / T in [0, 1) (diffusion)."""
        return self.times(draws).level

    def gain(self, draws: Draws) -> Tensor:
        """The importance gain g of one reverse step, [B] float64, finite and >= 0; see `times`."""
        return self.times(draws).gain

    def noise(
        self, x0: Tensor, draws: Draws, times: Times | None = None
    ) -> tuple[Tensor, Tensor, Target]:
        """(x_t like x0, t [rows] float32 for the network, `Target`); x0 [2B, ...] or [B, ...].

        times: `times(draws)`, where the caller has them.
        """
        times = (self.times(draws) if times is None else times).to(x0.device)
        draws = draws.to(x0.device)
        a, s, t, p, q = (v.float() for v in (times.a, times.s, times.t, times.p, times.q))
        x_t = add_noise(x0, draws, a, s)
        return x_t, t.repeat(x0.shape[0] // t.shape[0]), Target(x0.detach(), draws, p, q)


@dataclass(frozen=True, kw_only=True, eq=False)
class FlowMatching(Process):
    """Rectified flow (Wan, SD3, FLUX): x_t = (1 - sigma) x0 + sigma eps, predicting eps - x0.

    sigma = shift u / (1 + (shift - 1) u), u uniform or logit-normal (logit_mean, logit_std). The
    network is fed num_train_timesteps * sigma, a float.
    Raises ValueError on values out of range.
    """

    shift: float = 1.0
    time_sampling: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"shift must be finite and > 0, got {self.shift}")
        if self.time_sampling not in ("uniform", "logit_normal"):
            raise ValueError(
                f"time_sampling must be uniform or logit_normal, got {self.time_sampling!r}"
            )
        if not (0 < self.logit_std < math.inf and -20 <= self.logit_mean <= 20):
            raise ValueError(
                "logit_std must be > 0 and finite, and logit_mean from -20 to 20, got"
                f" {self.logit_std} and {self.logit_mean}"
            )
        lo, hi = self._window()
        if hi - lo < 1e-6:
            raise ValueError(
                f"timestep_range {self.timestep_range} is almost never drawn with"
                f" logit_mean={self.logit_mean}, logit_std={self.logit_std}: widen it"
            )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """From a scheduler_config.json: `flow_shift` or `shift`, `num_train_timesteps`.

        Raises ValueError where the shift depends on the resolution (`use_dynamic_shifting`).
        """
        for key in ("use_dynamic_shifting", "shift_terminal", "invert_sigmas"):
            if config.get(key):
                raise ValueError(f"scheduler config: {key}={config[key]!r} is not supported")
        return cls(
            shift=float(config.get("flow_shift", config.get("shift", 1.0))),
            num_train_timesteps=timesteps(config),
        )

    def _masked_below(self) -> float:
        return self.shifted(LAST_STEP)

    def shifted(self, u: Any) -> Any:
        return self.shift * u / (1 + (self.shift - 1) * u)

    def _window(self) -> tuple[float, float]:
        """timestep_range as probabilities of the distribution of u."""
        window = [s / (self.shift * (1 - s) + s) for s in self.timestep_range]
        if self.time_sampling == "logit_normal":
            normal = NormalDist(self.logit_mean, self.logit_std)
            window = [normal.cdf(math.log(u / (1 - u))) if 0 < u < 1 else u for u in window]
        return window[0], window[1]

    def _unshifted(self, draws: Draws) -> Tensor:
        """u, [B] float64: the time before the shift."""
        lo, hi = self._window()
        u = lo + (hi - lo) * self._uniform(draws)
        if self.time_sampling == "logit_normal":
            u = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u))
        return u

    def coefficients(self, t: Tensor) -> Tensor:
        """1 - sigma, sigma, 1, -1 at sigma = t / num_train_timesteps."""
        s = t.double() / self.num_train_timesteps
        one = torch.ones_like(s)
        return torch.stack((1 - s, s, one, -one))

    def times(self, draws: Draws) -> Times:
        """sigma of every draw, and t = num_train_timesteps sigma.

        gain: s^2 (SNR_r - SNR_s), SNR = ((1 - sigma) / sigma)^2, from sigma = s to
        r = shift(max(u - 1/N, 1e-3)); 1e30 where r >= s. arXiv 2505.21893 in posterior form:
        log w = -g D e / 2 + noise for one reverse step.
        """
        u = self._unshifted(draws)
        s = self.shifted(u)
        r = self.shifted((u - 1 / self.importance_steps).clamp(min=LAST_STEP))
        gain = s.square() * (((1 - r) / r).square() - ((1 - s) / s).square())
        one = torch.ones_like(s)
        return Times(
            level=s,
            t=self.num_train_timesteps * s,
            a=1 - s,
            s=s,
            p=one,
            q=-one,
            gain=torch.where(r < s, gain, MASKED),
        )


PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True, kw_only=True, eq=False)
class Diffusion(Process):
    """DDPM (Stable Diffusion, CogVideoX): a = sqrt(abar_t), s = sqrt(1 - abar_t), t = floor(u T).

    alphas_cumprod: abar [T] float64. prediction_type: epsilon (y = eps), v_prediction
    (y = a eps - s x0) or sample (y = x0). The network is fed the integer t (as a float32 tensor).
    Raises ValueError on values out of range, and for epsilon where abar = 0 (zero terminal SNR).
    """

    alphas_cumprod: Tensor
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    # init=False: `replace` begins with an empty one, since gains hang on importance_steps.
    _on_device: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        abar = torch.as_tensor(self.alphas_cumprod, dtype=torch.float64).cpu()
        object.__setattr__(self, "alphas_cumprod", abar)
        if abar.dim() != 1 or not len(abar) or not ((abar >= 0) & (abar < 1)).all():
            within = f" in [{abar.min():.6g}, {abar.max():.6g}]" if abar.numel() else ""
            raise ValueError(
                f"alphas_cumprod must be [T] with 0 <= abar < 1, got {list(abar.shape)}{within}"
            )
        if self.prediction_type not in PREDICTIONS:
            raise ValueError(
                f"prediction_type must be one of {', '.join(PREDICTIONS)},"
                f" got {self.prediction_type!r}"
            )
        if self.prediction_type == "epsilon" and abar.min() == 0:
            raise ValueError(
                "prediction_type epsilon is undefined at zero terminal SNR (abar = 0):"
                " expected v_prediction or sample"
            )
        if self.importance_steps > len(abar):
            raise ValueError(
                f"importance_steps must be <= {len(abar)}, the training timesteps,"
                f" got {self.importance_steps}"
            )
        first, last = self._window()
        if first > last:
            raise ValueError(
                f"timestep_range {self.timestep_range} holds none of {len(abar)} timesteps"
            )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """From a scheduler_config.json: betas, SNR shift, zero terminal SNR, prediction type.

        Keys: num_train_timesteps, beta_schedule, beta_start, beta_end, trained_betas,
        snr_shift_scale, rescale_betas_zero_snr, prediction_type. Raises ValueError on an unknown
        beta_schedule.
        """
        return cls(
            alphas_cumprod=alphas_cumprod(config),
            prediction_type=config.get("prediction_type", "epsilon"),
        )

    def _window(self) -> tuple[int, int]:
        """timestep_range as the first and the last timestep: t / T in [lo, hi)."""
        total = len(self.alphas_cumprod)
        # 0.28 * 100 is 28.000000000000004: without the 1e-9 timestep 28 would be left out.
        lo, hi = (math.ceil(level * total - 1e-9) for level in self.timestep_range)
        return lo, hi - 1

    def _masked_below(self) -> float:
        return 1 / len(self.alphas_cumprod)

    def _timestep(self, draws: Draws) -> Tensor:
        first, last = self._window()
        t = first + (self._uniform(draws) * (last - first + 1)).floor().long()
        # A stratum's last place, (K - 1 + u) / K, can round to 1.
        return t.clamp(max=last)

    def _tables(self, device: torch.device) -> Tensor:
        """`Times` of every t, [7, T] float64, made once per device."""
        if device not in self._on_device:
            abar = self.alphas_cumprod
            a, s = abar.sqrt(), (1 - abar).sqrt()
            zero, one = torch.zeros_like(a), torch.ones_like(a)
            p, q = {
                "epsilon": (one, zero),
                "v_prediction": (a, -s),
                "sample": (zero, one),
            }[self.prediction_type]
            t = torch.arange(len(abar))
            r = (t - round(len(abar) / self.importance_steps)).clamp(min=0)
            snr = abar / (1 - abar)
            gain = {
                "epsilon": snr[r] / snr - 1,
                "v_prediction": (1 - abar) * (snr[r] - snr),
                "sample": snr[r] - snr,
            }[self.prediction_type]
            gain = torch.where(r < t, gain, MASKED)
            tables = torch.stack((t.double() / len(abar), t.double(), a, s, p, q, gain))
            self._on_device[device] = tables.to(device)
        return self._on_device[device]

    def coefficients(self, t: Tensor) -> Tensor:
        """Of the timesteps, integers: rows of the table."""
        return self._tables(t.device)[2:6, t.long()]

    def times(self, draws: Draws) -> Times:
        """The timestep t of every draw, an integer.

        gain, SNR = (a/s)^2: epsilon: SNR_r / SNR_t - 1; v_prediction: s_t^2 (SNR_r - SNR_t);
        sample: SNR_r - SNR_t; from t to r = max(t - round(T/N), 0), 1e30 at t = 0. arXiv 2505.21893
        in posterior form: log w = -g D e / 2 + noise.
        """
        t = self._timestep(draws)
        return Times(*self._tables(t.device)[:, t])


# The schedulers of diffusers whose noise is DDPM's, by betas; others (EDM, VE, consistency, ...)
# noise otherwise, or have fields of the same names that they do not use.
DDPM_KIND = (
    *("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler"),
    *("DDIMInverseScheduler", "PNDMScheduler", "LCMScheduler", "TCDScheduler", "RePaintScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LMSDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler"),
    *("DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "DEISMultistepScheduler"),
    *("SASolverScheduler", "UniPCMultistepScheduler"),
    *("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
)


def from_config(config: dict[str, Any]) -> FlowMatching | Diffusion:
    """The process of a diffusers scheduler_config.json: flow matching if it says so, else DDPM.

    Raises ValueError where its class is named and of neither kind.
    """
    name = config.get("_class_name", "DDPMScheduler")
    flow = (
        "FlowMatch" in str(name)
        or config.get("use_flow_sigmas")
        or config.get("prediction_type") == "flow_prediction"
    )
    if not flow and name not in DDPM_KIND:
        raise ValueError(
            f"scheduler config: _class_name {name} noises in a way that is not supported; "
            "expected a flow-matching scheduler or one of DDPM's kind (DDIMScheduler, ...): use "
            "another model"
        )
    return (FlowMatching if flow else Diffusion).from_config(config)
