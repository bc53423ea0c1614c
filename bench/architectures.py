"""The architectures that steps are timed on, true ones with random weights, and what they cost."""

from dataclasses import dataclass
from typing import Any

from fastpref.models import published

PEAK = 989e12  # dense bf16 FLOP/s of an H100 or H200 SXM, what MFU is measured against


@dataclass(frozen=True, kw_only=True)
class Architecture(published.Architecture):
    """A transformer whose FLOPs are counted.

    layers, dim, ffn: of the blocks. crosses: text comes in by cross-attention (else it stands in
    the sequence). small: shapes where launches take the time.
    """

    layers: int
    dim: int
    ffn: int
    crosses: bool
    small: tuple[str, ...] = ("17x256x256", "1x480x832")

    def tokens(self, shape: str) -> int:
        _, *sizes = self.latent(shape)
        video = 1
        for size, patch in zip(sizes, self.patch, strict=True):
            video *= size // patch
        return video if self.crosses else video + self.text[0]

    def forward_flops(self, shape: str) -> tuple[float, float]:
        """(products with weights, attention) of one sample's forward.

        Per block on n tokens of width d: projections 8 n d^2, feed-forward 4 n d ffn, scores and
        values 4 n^2 d; cross-attention to m tokens 4 n d^2 + 4 m d^2 and 4 n m d.
        """
        n, d, m = self.tokens(shape), self.dim, self.text[0]
        products = 8 * n * d**2 + 4 * n * d * self.ffn
        attention = 4.0 * n**2 * d
        if self.crosses:
            products += 4 * n * d**2 + 4 * m * d**2
            attention += 4 * n * m * d
        return float(self.layers * products), self.layers * attention

    def pair_flops(self, shape: str, *, online: bool) -> float:
        """Useful FLOPs of a pair's training step with adapters, nothing recomputed.

        Backward: the products once more (towards the activations), attention 2.5 times its forward
        (five products for two). online: the reference's two forwards as well.
        """
        products, attention = self.forward_flops(shape)
        forward = products + attention
        return 2 * (forward + products + 2.5 * attention) + (2 * forward if online else 0.0)


def _counted(known: published.Architecture, **other: Any) -> Architecture:
    c = known.config
    dim = c["num_attention_heads"] * c["attention_head_dim"]
    return Architecture(
        **vars(known), layers=c["num_layers"], dim=dim, ffn=c.get("ffn_dim", 4 * dim),
        crosses=known.family != "cogvideox", **other,
    )  # fmt: skip


ARCHITECTURES = {
    name: _counted(published.PUBLISHED[name]) for name in ("wan", "cogvideox-2b", "cogvideox-5b")
}
ARCHITECTURES["toy"] = _counted(published.PUBLISHED["toy"], small=("8x12x12",))
# What a CPU gets: the same blocks, few and narrow.
ARCHITECTURES["tiny"] = _counted(
    published._wan(4, 32, 512, 4, (16, 64), shape="9x128x128", config={"rope_max_seq_len": 64}),
    small=("1x64x64",),
)
