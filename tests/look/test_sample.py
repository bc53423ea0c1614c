"""Samples, and the clips of `fastpref sample`, against the pipelines' own from the same noise; what
is said of schedulers that cannot be used.
"""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from commands import BASE
from families import FAMILIES, PROMPTS, Case, generators, ours, run, size_of, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastpref.cli import main
from fastpref.look.sample import sample, starting_noise
from fastpref.look.validation import draw_sheet
from fastpref.mesh import Mesh
from fastpref.models import toy
from fastpref.models.folder import scheduler_of
from fastpref.pairs.media import Sampling, decode

SEEDS = [5, 6]
STEPS = 4
GUIDANCE = 4.0

# Beside those that the tiny folders come with: Wan UniPC, CogVideoX 2B DDIM and 5B DPM, SD1.5 PNDM,
# SDXL Euler. DPM and the ancestral one add noise; Heun and KDPM2 call the model twice a step; TCD
# adds noise unless the pipeline's eta of 0 is passed.
CLIP = {"clip_sample": False}
OTHERS = [
    ("wan", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("wan", "DPMSolverMultistepScheduler", {"flow_shift": 3.0}),
    ("wan", "FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ("cogvideox-2b", "CogVideoXDPMScheduler", {}),
    ("cogvideox-5b", "CogVideoXDDIMScheduler", {}),
    ("sd15", "DDIMScheduler", CLIP),
    ("sd15", "DDIMScheduler", {"clip_sample": True, "steps_offset": 0}),  # mended by the pipeline
    ("sd15", "DDPMScheduler", CLIP),
    ("sd15", "DPMSolverMultistepScheduler", {}),
    ("sd15", "EulerAncestralDiscreteScheduler", {}),
    ("sd15", "TCDScheduler", {}),
    ("sdxl", "EulerAncestralDiscreteScheduler", {}),
    ("sdxl", "KDPM2DiscreteScheduler", {}),
    ("sdxl", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
]


def with_scheduler(case: Case, folder: Path, kind: str, **changes: Any) -> Case:
    """A copy of the family's folder that holds another scheduler."""
    shutil.copytree(case.path, folder)
    kind = getattr(diffusers, kind)
    kind.from_config({**case.config, **changes}).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", kind.__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return Case(case.name, case.family, folder)


def drawn(case: Case, steps: int, guidance: float) -> Tensor:
    """Our latents of the first prompts."""
    cond, negative = case.cond(PROMPTS[: len(SEEDS)]), None
    if guidance != 1:
        negative = case.cond([""] * len(SEEDS))
    shape = case.latents.shape[1:]
    how = {"steps": steps, "seeds": SEEDS, "guidance_scale": guidance, "negative": negative}
    return sample(case.model, case.module, case.scheduler, cond, shape, **how)


def expected(case: Case, steps: int, guidance: float, output_type: str = "latent") -> Any:
    """The pipeline's, as from_pretrained gives it."""
    noise = starting_noise(case.latents.shape[1:], SEEDS)
    own = {"generator": generators(SEEDS), "guidance_scale": guidance}
    return run(case, case.pipe(), noise, steps, output_type=output_type, **own)


def read(clip: Path) -> Tensor:
    return decode(clip.read_bytes(), Sampling()).frames


def check(case: Case, guidance: float, steps: int = STEPS) -> None:
    latents, theirs = drawn(case, steps, guidance), ours(case, expected(case, steps, guidance))
    assert latents.shape == theirs.shape and latents.dtype == torch.float32
    assert (latents[0] - latents[1]).abs().mean() > 0.1
    if guidance == 1 or case.family.name == "wan":
        assert torch.equal(latents, theirs)
    else:  # these pipelines run prompt and negative in one batch, whose sums round otherwise
        assert (latents - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert torch.equal(latents, drawn(case, steps, guidance))  # whatever its scheduler remembers


@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
@pytest.mark.parametrize("name", FAMILIES)
def test_samples_are_the_pipelines(name, guidance):
    check(tiny(name), guidance)


@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
@pytest.mark.parametrize(("name", "kind", "changes"), OTHERS)
def test_samples_with_another_scheduler_in_the_folder(name, kind, changes, guidance, tmp_path):
    check(with_scheduler(tiny(name), tmp_path / "model", kind, **changes), guidance)


def test_steps_begin_with_the_first_of_equal_timesteps(tmp_path):
    """UniPC cuts its timesteps to integers; a step that looks for its own takes the second."""
    kind = "UniPCMultistepScheduler"
    case = with_scheduler(tiny("wan"), tmp_path / "model", kind, flow_shift=60.0)
    case.scheduler.set_timesteps(20)
    assert case.scheduler.timesteps[0] == case.scheduler.timesteps[1]
    check(case, 1.0, steps=20)


@pytest.mark.parametrize("name", FAMILIES)
def test_clips_of_the_command_are_the_pipelines(name, tmp_path):
    case = tiny(name)
    flags = {"family": case.family.name, "model": case.path, "output_dir": tmp_path / "clips"}
    flags |= {"num_frames": 1} | size_of(case) | {"steps": STEPS, "seed": SEEDS[0]}
    flags |= {"guidance_scale": GUIDANCE, "device": "cpu"}
    given = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    assert main(["sample", *given, "--prompts", *PROMPTS[: len(SEEDS)]]) == 0
    clips = [read(tmp_path / "clips" / f"{seed:04d}.mp4") for seed in SEEDS]
    theirs = np.asarray(expected(case, STEPS, GUIDANCE, "np"))
    theirs = torch.from_numpy(theirs * 255).round().int().view(2, *clips[0].shape)
    off = (torch.stack(clips).int() - theirs).abs()
    # Prompts are embedded together with the empty one: a value between two grey levels may tip.
    assert off.max() <= 1 and (off > 0).float().mean() < 1e-3
    assert theirs.float().std() > 10


class Same:
    """A family without a model: what it predicts is the latents themselves."""

    @staticmethod
    def predict(model, noisy, t, cond):
        return noisy


class Empty(torch.nn.Module):
    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))


def same(scheduler: Any, seeds: list[int], steps: int = STEPS) -> Tensor:
    return sample(Empty(), Same, scheduler, {}, (3, 4, 4), steps=steps, seeds=seeds)


def test_a_row_and_its_noise_are_those_of_its_seed():
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    before = torch.get_rng_state()
    together = same(scheduler, [1, 2, 3])
    assert torch.equal(together[1:2], same(scheduler, [2]))
    assert torch.equal(together.flip(0), same(scheduler, [3, 2, 1]))
    assert torch.equal(torch.get_rng_state(), before)  # a run's own draws go on as without clips


# ---- whose scheduler


def test_a_familys_own_scheduler_comes_before_the_folders():
    own = object()
    assert scheduler_of(SimpleNamespace(scheduler=own), BASE) is own
    for pipe in ({}, None, SimpleNamespace(scheduler=None)):
        assert type(scheduler_of(pipe, BASE)) is diffusers.FlowMatchEulerDiscreteScheduler
    assert type(scheduler_of(toy.pipeline(BASE), BASE)) is toy.Euler


def test_model_index_names_the_class_as_for_the_pipeline(tmp_path):
    """Of a config that was written by another class, the shared values."""
    case = with_scheduler(tiny("sd15"), tmp_path / "model", "DDIMScheduler", **CLIP)
    config = {**case.config, "_class_name": "PNDMScheduler"}
    (case.path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert type(case.scheduler) is type(case.pipe().scheduler) is diffusers.DDIMScheduler
    assert type(scheduler_of(None, case.path)) is diffusers.PNDMScheduler


def test_a_family_of_ones_own_samples_with_the_folders_scheduler(tmp_path, monkeypatch):
    code = "from types import SimpleNamespace\nfrom fastpref.models.toy import *\n"
    code += "def pipeline(path, dtype): return SimpleNamespace(dtype=dtype)\n"
    (tmp_path / "my_pkg_sampled").mkdir()
    (tmp_path / "my_pkg_sampled" / "mine.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    given = ["--model", str(BASE), "--prompts", "a red disc", "--num_frames", "8", "--device"]
    given += ["cpu", "--height", "12", "--width", "12", "--steps", "3", "--output_dir"]
    for name in ("toy", "my_pkg_sampled.mine"):
        assert main(["sample", "--family", name, *given, str(tmp_path / name)]) == 0
    pipe = toy.pipeline(BASE)
    cond = {k: v[None] for k, v in toy.encode_text(pipe, ["a red disc"])[0].items()}
    folders = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(BASE, subfolder="scheduler")
    for name, scheduler in (("toy", pipe.scheduler), ("my_pkg_sampled.mine", folders)):
        how = {"steps": 3, "seeds": [0]}
        (latent,) = sample(toy.load(BASE), toy, scheduler, cond, (3, 8, 12, 12), **how)
        clip = read(tmp_path / name / "0000.mp4")
        assert torch.equal(clip, toy.decode(pipe, latent)), name


# ---- mistakes


@pytest.mark.parametrize(
    ("kind", "steps", "says"),
    [
        ("PNDMScheduler", 1001, "expected 1 to 1000 steps"),
        ("PNDMScheduler", 0, "expected 1 to 1000 steps"),
        ("PNDMScheduler", 1000, "index 1000 is out of bounds"),
        ("LCMScheduler", 60, "The combination of .* 50 x 1.0 is smaller"),
        ("RePaintScheduler", 2, ".* missing 2 required"),
        ("DDIMInverseScheduler", 2, "expected a scheduler that goes from noise to clean latents"),
        ("KarrasVeScheduler", 2, ""),
    ],
)
def test_what_a_scheduler_cannot_do(kind, steps, says):
    scheduler = getattr(diffusers, kind)(**({"steps_offset": 1} if kind[0] == "P" else {}))
    with pytest.raises(ValueError, match=f"^sample: {kind}, {steps} steps: {says}"):
        same(scheduler, [1], steps)


def test_eulers_steps_have_a_limit_too():
    with pytest.raises(ValueError, match="sample: Euler, 1001 steps: expected 1 to 1000 steps"):
        same(toy.pipeline(BASE).scheduler, [1], 1001)


def test_a_scheduler_that_needs_a_package(tmp_path, monkeypatch):
    where = "diffusers.schedulers.scheduling_euler_discrete.is_scipy_available"
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.register_to_config(use_beta_sigmas=True)
    scheduler.save_pretrained(tmp_path / "scheduler")
    monkeypatch.setattr(where, lambda: False)
    with pytest.raises(ValueError, match=r"EulerDiscreteScheduler cannot be read .* install scipy"):
        scheduler_of(None, tmp_path)


def said(case: Case, capsys: Any, tmp_path: Path, steps: int = 2) -> str:
    flags = {"family": case.family.name, "model": case.path, "output_dir": tmp_path / "clips"}
    flags |= {"num_frames": 1} | size_of(case) | {"steps": steps, "device": "cpu"}
    given = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    assert main(["sample", *given, "--prompts", "a fox"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]  # before it: transformers' progress
    assert line.startswith("fastpref sample: ")
    return line


def test_mistakes_of_a_folder_are_one_line(tmp_path, capsys):
    case = with_scheduler(tiny("sd15"), tmp_path / "model", "DDIMScheduler", **CLIP)
    assert "sample: DDIMScheduler, 1001 steps: expected 1 to" in said(case, capsys, tmp_path, 1001)

    index = case.path / "model_index.json"
    before = index.read_text()
    index.write_text(before.replace('"DDIMScheduler"', '"NoSuchScheduler"'))
    assert "scheduler expected a class of diffusers" in said(case, capsys, tmp_path)
    index.write_text(before)

    shutil.rmtree(case.path / "scheduler")
    assert "model/scheduler: scheduler_config.json cannot be read" in said(case, capsys, tmp_path)


# ---- what is not finite, and what fits no memory


def broken(case: Case, folder: Path, file: str, tensor: str) -> Case:
    """A copy of the family's folder with one NaN in a tensor."""
    shutil.copytree(case.path, folder)
    tensors = load_file(folder / file)
    (name,) = (name for name in tensors if name.endswith(tensor))
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return Case(case.name, case.family, folder)


MODEL = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("name", "file", "tensor", "says"),
    [
        ("wan", f"transformer/{MODEL}", "proj_out.bias", "step 1 of 2: 'a fox'"),
        ("cogvideox-5b", f"transformer/{MODEL}", "proj_out.bias", "step 1 of 2: 'a fox'"),
        ("sd15", f"unet/{MODEL}", "conv_out.bias", "step 1 of 3: 'a fox'"),  # PNDM's own
        ("wan", f"vae/{MODEL}", "decoder.conv_out.bias", "'a fox': decode: the VAE made NaN"),
        ("sdxl", f"vae/{MODEL}", "decoder.conv_out.bias", "'a fox': decode: the VAE made NaN"),
        ("sd15", "text_encoder/model.safetensors", "final_layer_norm.bias",
         "the prompts' embeddings: 'a fox'"),
    ],
)  # fmt: skip
def test_what_is_not_finite_is_no_clip(name, file, tensor, says, tmp_path, capsys):
    case = broken(tiny(name), tmp_path / "model", file, tensor)
    line = said(case, capsys, tmp_path)
    assert line.startswith(f"fastpref sample: sample: {says}") and "look at" in line
    assert not list((tmp_path / "clips").glob("*.mp4"))


def test_a_row_that_is_not_finite_is_named():
    """And the model trains again as before."""

    class Bad:
        @staticmethod
        def predict(model, noisy, t, cond):
            return torch.where(torch.arange(3).view(3, 1, 1, 1) == 1, torch.inf, noisy)

    model = Empty().train()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    for names, named in ((None, "8"), (["a", "b", "c"], "'b'")):
        how = {"steps": 2, "seeds": [7, 8, 9], "names": names}
        says = rf"^sample: step 1 of 2: {named}: expected finite values, .*\(1 of 3 so\)"
        with pytest.raises(ValueError, match=says):
            sample(model, Bad, scheduler, {}, (3, 4, 4), **how)
        assert model.training


def test_validation_clips_that_are_not_finite(tmp_path, capsys):
    """Of the base they end the run; of a policy they are left out, and it trains on."""
    prompts = SimpleNamespace(prompts=["a fox"])

    def clips(*_):
        raise ValueError("not finite")

    prompts.clips = clips
    given = (prompts, Empty(), (3, 4, 4), 2, Mesh())
    with pytest.raises(ValueError, match="not finite"):
        draw_sheet(tmp_path, 0, *given)
    draw_sheet(tmp_path, 20, *given)
    assert "warning: step 20: no validation clips: not finite\n" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [Path.unlink, lambda p: p.write_bytes(p.read_bytes()[:-9])])
def test_the_base_s_clips_of_a_run_cannot_be_read(damage, tmp_path, capsys):
    prompts = SimpleNamespace(prompts=["a fox"])
    prompts.clips = lambda *_: [torch.zeros(2, 8, 8, 3, dtype=torch.uint8)]
    given = (prompts, Empty(), (3, 4, 4), 2, Mesh())
    draw_sheet(tmp_path, 0, *given)
    damage(tmp_path / "base.safetensors")
    draw_sheet(tmp_path, 20, *given)
    said = capsys.readouterr().err
    assert "step 20: no validation clips: " in said and "the base's clips cannot be read" in said


@pytest.mark.parametrize("size", [(9999, 9996, 9996), (1, 9996, 9996)])
def test_what_fits_no_memory_is_one_line(size, tmp_path, capsys, monkeypatch):
    """Before anything is made of that size; and where it turns out as it is made."""
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096}.get(name, 2**16))
    names = ("num_frames", "height", "width")
    given = [part for n, v in zip(names, size, strict=True) for part in (f"--{n}", str(v))]
    given += ["--family", "toy", "--model", str(BASE), "--output_dir", str(tmp_path / "clips")]
    assert main(["sample", *given, "--prompts", "a fox"]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "GB of pixels, and 0.268 GB of memory are there: lower" in line
    assert not (tmp_path / "clips").exists()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError("Unable to allocate 5 GiB"),
    ],
)
def test_what_runs_out_of_memory_is_one_line(error, tmp_path, capsys, monkeypatch):
    def predict(*_):
        raise error

    monkeypatch.setattr(toy, "predict", predict)
    monkeypatch.setattr("fastpref.run.belong.check", lambda *_: None)
    given = ["--num_frames", "8", "--height", "12", "--width", "12", "--device", "cpu"]
    given += ["--family", "toy", "--model", str(BASE), "--output_dir", str(tmp_path / "clips")]
    assert main(["sample", *given, "--prompts", "a fox"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fastpref sample: out of memory for 8x12x12 x 1: lower --num_frames, ")
    assert str(error) in line
