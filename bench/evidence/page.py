"""bench/EVIDENCE.md, made of the rows in bench/results: `python -m bench.evidence --page`"""

from __future__ import annotations

from pathlib import Path

from bench.evidence import rows
from bench.evidence.pictures import PICTURES, draw
from bench.evidence.results import Results
from bench.evidence.tables import markdown
from fastpref.files import write_atomic

BENCH = Path(__file__).parents[1]
PAGE = BENCH / "EVIDENCE.md"
HEAD = """\
# What of the papers' claims shows

`python -m bench.evidence` trains every objective and the controls over a grid of betas and seeds,
on the same pairs and the same draws of noise and time, chooses each one's beta on one set of
prompts and judges it on another. This page is made from the rows in `bench/results`
(`python -m bench.evidence --page`), its verdicts by rule (`bench/evidence/claims.py`).

Claims are of DPO-C&M and SDPO (arXiv 2505.21893), DMPO (2507.07510), SPO (2406.04314) and
Diffusion-SDPO's safeguard (2511.03317), as their abstracts and reviews have them; the full texts of
the first two were not available to us, and the losses tried here are our reading of them (README,
"Objectives").
"""
WORLDS = {
    "toy": """\
## toy

The demo's world: a Wan transformer of {parameters:,} parameters makes clips of a coloured disc, 8
frames of 12 x 12 pixels; a noisy judge picks the best and the worst of six; adapters of rank 8.
It is a toy: what holds here need not hold at size. Betas are chosen on the prompts of the pairs,
with clips of their own; reported are prompts never trained on, which `fastpref demo` had shown at
betas 1000 and 2000 before; ipo's grid was moved, and the long runs at beta 600 were added, after a
look at one seed. SPO's runs at its three
betas differ, by less than what is shown: in their 16 updates margins stay small, so beta scales the
gradient, and AdamW forgets a gradient's scale.
""",
    "mid": """\
## mid

A Wan transformer of {parameters:,} parameters, pretrained by `python -m
bench.evidence.mid_pretrain` on 16-frame clips of two objects, and a noisy judge. Betas are chosen
on prompts that were never trained on either, other ones than those reported. What holds here need
not hold at size either.
""",
}


def rows_file(world: str) -> Path:
    return BENCH / "results" / f"evidence_{world}.jsonl"


def page(pictures: bool = False) -> str:
    """The page as its rows make it; pictures: draws them too."""
    parts = [HEAD]
    for world, said in WORLDS.items():
        if rows_file(world).exists():
            results = Results(rows.read(rows_file(world)))
            stem = f"evidence_{world}"
            shown = draw(results, BENCH / "results", stem) if pictures else named(stem)
            parts += [
                said.format(parameters=results.base["parameters"]),
                markdown(results, [(text, f"results/{name}") for text, name in shown]),
            ]
    return "\n".join(parts)


def named(stem: str) -> list[tuple[str, str]]:
    return [(said, f"{stem}_{name}.png") for name, (said, _) in PICTURES.items()]


def write() -> None:
    write_atomic(PAGE, page(pictures=True).encode())
    print(PAGE)
