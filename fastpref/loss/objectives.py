"""The seven objectives as frozen, validated settings, and the beta conventions."""

import difflib
import sys
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack
from torch.compiler import is_dynamo_compiling

COMBINE = ("max", "min", "mean")  # the place is the number csrc reads
PLACEMENTS = ("ratio", "loss")  # likewise
BETA_CONVENTIONS = ("half_mean", "mean", "half_sum", "sum")

_RANGES = {
    "beta": ("> 0", lambda x: x > 0),
    # From 0.5 on these two have the least loss at a margin of 0 or below: nothing is preferred.
    "label_smoothing": (">= 0 and < 0.5", lambda x: 0 <= x < 0.5),
    "alpha": ("> 0 and < 0.5", lambda x: 0 < x < 0.5),
    "clip": ("> 0 and < 1", lambda x: 0 < x < 1),
    "mask_threshold": ("> 0 and <= 1", lambda x: 0 < x <= 1),
    "sft_weight": (">= 0", lambda x: x >= 0),
    "safeguard": (">= 0 and < 1", lambda x: 0 <= x < 1),
}
_CHOICES = {"combine": COMBINE, "placement": PLACEMENTS}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What all objectives share; e, r are the policy's and the reference's mean squared errors.

    d = e - r, the margin m = -(beta/2) (d_w - d_l), and a pair's loss weight (L + sft_weight e_w).
    beta (> 0) is in the `half_mean` convention and has no default; sft_weight >= 0.

    safeguard: mu in [0, 1) scales the loser's gradient, not the loss, by one lambda a pair, so that
    to first order the winner's error does not rise. With residuals R = pred - y and
    c = dL/de of winner and loser, where c_l < 0 and <R_w, R_l> > 0,
        lambda = min(1, (1 - mu) min(1, c_w / -c_l) <R_w, R_w> / <R_w, R_l>),
    else 1: so also beyond dmpo's and ipo's optimum, where the loser's gradient helps the winner.
    Diffusion-SDPO (arXiv 2511.03317) has it without the c, which are equal but for sft_weight
    (c_w is larger then) and dpo_cm at placement ratio, and one lambda for a batch.
    Raises ValueError or TypeError, naming the option, what was expected and what came.
    """

    name: ClassVar[str]
    needs_gain: ClassVar[bool] = False  # takes a gain [B]: g of the importance weight, or k of SPO
    has_importance: ClassVar[bool] = False  # the gain makes an importance weight per member
    has_zeros: ClassVar[bool] = False  # L's gradient is exactly 0 on whole ranges of errors

    beta: float
    sft_weight: float = 0.0
    safeguard: float | None = None

    def __post_init__(self) -> None:
        for option in (field.name for field in fields(self)):
            value = getattr(self, option)
            if option == "safeguard" and value is None:
                continue
            if option in _RANGES:
                expected, valid = _RANGES[option]
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise TypeError(
                        f"{self.name}: {option} must be a number {expected}, got {value!r}"
                    )
                # Not math.isfinite, which raises OverflowError on an int beyond a float.
                if not (abs(value) <= sys.float_info.max and valid(value)):
                    raise ValueError(
                        f"{self.name}: {option} must be finite and {expected}, got {value}"
                    )
            elif value not in _CHOICES.get(option, [value]):
                expected = ", ".join(_CHOICES[option])
                raise ValueError(f"{self.name}: {option} must be one of {expected}, got {value!r}")
            elif option == "inverse_weight" and not isinstance(value, bool):
                raise TypeError(f"{self.name}: inverse_weight must be true or false, got {value!r}")

    @property
    def number(self) -> int:
        """The objective's number in the kernels: its place in OBJECTIVES."""
        return list(OBJECTIVES).index(self.name)

    def hyper(self) -> tuple[float, ...]:
        """The ten numbers the kernels read, as `Hyper` in csrc/objectives.h; 0 where unused."""
        return (
            float(self.beta),
            float(getattr(self, "label_smoothing", 0.0)),
            float(getattr(self, "alpha", 0.0)),
            float(getattr(self, "clip", 0.0)),
            float(getattr(self, "mask_threshold", 0.0)),
            float(COMBINE.index(getattr(self, "combine", "max"))),
            float(getattr(self, "inverse_weight", False)),
            float(self.sft_weight),
            float(PLACEMENTS.index(getattr(self, "placement", "ratio"))),
            float(self.safeguard or 0.0),
        )

    def hyper_tensor(self, device: torch.device) -> Tensor:
        """`hyper()` as a float64 tensor [10], made once per (objective, device)."""
        # The name of a type is a string made anew at every look, which the CPU can do without.
        if device != _CPU and device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())  # whatever it is called
        watched = is_dynamo_compiling() or _len_torch_dispatch_stack()
        if watched or _are_functorch_transforms_active():  # it is traced, fake or wrapped
            # Past the cache: kept there it would spoil every later loss of this objective.
            return _hyper_tensor.__wrapped__(self, device)
        return _hyper_tensor(self, device)


_CPU = torch.device("cpu")


# Not kept by the objective, whose copies and pickles would then carry tensors.
@lru_cache(maxsize=256)
def _hyper_tensor(objective: Objective, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it may later be saved for a backward
        return torch.tensor(objective.hyper(), dtype=torch.float64, device=device)


@dataclass(frozen=True, kw_only=True)
class DPO(Objective):
    """L = -(1-s) log sigma(m) - s log sigma(-m), s = label_smoothing in [0, 0.5).

    Diffusion-DPO, arXiv 2311.12908; for flow models Flow-DPO, arXiv 2501.13918.
    """

    name: ClassVar[str] = "dpo"
    label_smoothing: float = 0.0


@dataclass(frozen=True, kw_only=True)
class IPO(Objective):
    """L = ((d_l - d_w) - 1/(2 beta))^2: identity preference optimisation (arXiv 2310.12036)."""

    name: ClassVar[str] = "ipo"


@dataclass(frozen=True, kw_only=True)
class Hinge(Objective):
    """L = max(0, 1 - m): the hinge of SLiC (arXiv 2305.10425)."""

    name: ClassVar[str] = "hinge"
    has_zeros: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class DMPO(Objective):
    """L = sigma(m) [log sigma(m) - log(1-alpha)] + sigma(-m) [log sigma(-m) - log alpha].

    alpha in (0, 0.5). The Bernoulli KL with its arguments swapped (arXiv 2507.07510): the margin
    has its optimum at logit(1-alpha), and very wrong pairs are ignored.
    """

    name: ClassVar[str] = "dmpo"
    alpha: float = 0.01


@dataclass(frozen=True, kw_only=True)
class DPOCM(Objective):
    """DPO at m = -(beta/2) (M_w c_w d_w - M_l c_l d_l), and L = 0 where both members are masked.

    wbar = exp(-g e / 2) detached, c = clip(wbar, 1-clip, 1+clip), M = [wbar >= mask_threshold];
    clip in (0, 1), mask_threshold in (0, 1]. So with placement ratio, the default; with placement
    loss it is (M_w c_w + M_l c_l) / 2 times DPO's loss. DPO-C&M of arXiv 2505.21893: the ratio, the
    clip range and the threshold are the authors', the form of the loss is ours.
    """

    name: ClassVar[str] = "dpo_cm"
    needs_gain: ClassVar[bool] = True
    has_importance: ClassVar[bool] = True
    has_zeros: ClassVar[bool] = True
    label_smoothing: float = 0.0
    clip: float = 0.1
    mask_threshold: float = 0.9
    placement: Literal["ratio", "loss"] = "ratio"


@dataclass(frozen=True, kw_only=True)
class SDPO(Objective):
    """M c times DPO's loss: one weight for the pair, wbar = combine(wbar_w, wbar_l).

    wbar, M and c as in DPOCM; combine in {max, min, mean}; inverse_weight takes 1/c for c. So with
    placement loss, the default; with placement ratio it is M times DPO's loss at c m. SDPO, now
    SIPO (arXiv 2505.21893): the ratio, the clip range and the threshold are the authors', the form
    of the loss is ours.
    """

    name: ClassVar[str] = "sdpo"
    needs_gain: ClassVar[bool] = True
    has_importance: ClassVar[bool] = True
    has_zeros: ClassVar[bool] = True
    label_smoothing: float = 0.0
    clip: float = 0.1
    mask_threshold: float = 0.9
    combine: Literal["max", "min", "mean"] = "max"
    inverse_weight: bool = False
    placement: Literal["ratio", "loss"] = "loss"


@dataclass(frozen=True, kw_only=True)
class SPO(Objective):
    """L = -log sigma(m), m = beta (clamp(rho_w) - clamp(rho_l)), rho = -(k/2) d, k the gain.

    The clamp is to [log(1-clip), log(1+clip)]. Step-aware preference optimisation
    (arXiv 2406.04314); the official settings are beta 10, clip 0.1.
    """

    name: ClassVar[str] = "spo"
    needs_gain: ClassVar[bool] = True
    has_zeros: ClassVar[bool] = True
    clip: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.safeguard is not None:
            raise ValueError(
                "spo: safeguard has no effect, expected None: its two errors are of one prediction,"
                f" not of noise, got {self.safeguard!r}"
            )


OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls for cls in (DPO, IPO, Hinge, DMPO, DPOCM, SDPO, SPO)
}


def convert_beta(beta: float, convention: str = "half_mean", elements: int | None = None) -> float:
    """Turn a beta of another convention into ours; elements is D, those of one sample's latents.

    half_mean (DiffusionDPO's -(b/2) mean) times 1, mean (-b mean) times 2, half_sum (-(b/2) sum)
    times D, sum (-b sum, as the papers write it) times 2D.
    Raises ValueError on an unknown convention, or a sum without elements.
    """
    if convention not in BETA_CONVENTIONS:
        raise ValueError(
            f"beta_convention must be one of {', '.join(BETA_CONVENTIONS)}, got {convention!r}"
        )
    factor = 1.0 if convention.startswith("half") else 2.0
    if convention.endswith("sum"):
        if type(elements) is not int or elements < 1:
            raise ValueError(
                f"beta_convention {convention!r} needs elements, the number of elements of one"
                f" sample, an integer >= 1, got {elements!r}"
            )
        factor *= elements
    return factor * beta


def objective(
    name: str, *, beta_convention: str | None = None, elements: int | None = None, **hyper
) -> Objective:
    """The objective of that name: dpo, ipo, hinge, dmpo, dpo_cm, sdpo or spo.

    hyper: its options (see the classes); beta is required. beta_convention (None: ours, half_mean)
    converts beta, see `convert_beta`; IPO and SPO have their own scale and refuse one.
    Raises ValueError or TypeError on an unknown name or option, and on values out of range.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {name!r}")
    cls = OBJECTIVES[name]
    options = [field.name for field in fields(cls)]
    for option in hyper:
        if option not in options:
            near = difflib.get_close_matches(option, options, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"{name} has no option {option!r}, only {', '.join(options)}{hint}")
    if hyper.get("beta") is None:
        raise TypeError(f"{name} needs beta: it has no default (see the recipes in the README)")
    if beta_convention is not None:
        if cls in (IPO, SPO):
            raise ValueError(
                f"{name} has its own scale of beta: beta_convention has no meaning for it,"
                f" got {beta_convention!r}"
            )
        cls(**hyper)  # beta must be a valid number before it is converted
        hyper["beta"] = convert_beta(hyper["beta"], beta_convention, elements)
    return cls(**hyper)
