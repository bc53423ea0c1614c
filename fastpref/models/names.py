"""What tools call a model's layers in the keys of their adapters, each by its exact name."""

from __future__ import annotations

import re

from torch import nn

# (diffusers' name, the original code's), replaced in this order. Of the original code are the names
# that ComfyUI, musubi-tuner and DiffSynth write.
WAN = (
    ("attn1.to_out.0", "self_attn.o"),
    ("attn1.to_", "self_attn."),
    ("attn2.to_out.0", "cross_attn.o"),
    ("attn2.to_", "cross_attn."),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
)
COGVIDEOX = (  # as ComfyUI's own model has them
    ("transformer_blocks.", "blocks."),
    ("attn1.to_out.0", "attn_out"),
    ("attn1.to_", ""),
    ("ff.net.0.proj", "ff_proj"),
    ("ff.net.2", "ff_out"),
    ("time_embedding.linear", "time_embedding_linear"),
)
UNET = (
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_out", "out.2"),
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
)
RESNET = (
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)

DOTTED = ("", "transformer.", "unet.", "diffusion_model.", "model.diffusion_model.")
FLAT = ("lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_")

# x.lora_A.weight (PEFT: .lora_A.default.weight), x.lora_down.weight, x.lora.down.weight, and the
# x_lora.down and x.lora_linear_layer.down of diffusers' beginnings.
TENSOR = re.compile(
    r"(.+)[._]lora(?:_linear_layer)?[._](A|B|down|up)(?:\.(?!weight|bias)[^.]+)?\.(weight|bias)"
)
PARTS = {"A.weight": "A", "down.weight": "A", "B.weight": "B", "up.weight": "B", "B.bias": "bias"}
# What is no plain LoRA, by a part of its keys.
OTHERS = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr",
    "oft_": "OFT", "boft_": "BOFT", "ia3_": "IA3", "vera_": "VeRA", "lora_E": "AdaLoRA",
    "lora_mid": "LoCon with a middle", "lora_embedding": "LoRA of an embedding",
    "modules_to_save": "a whole layer",
}  # fmt: skip
DIFFERENCES = (".diff", ".diff_b", ".w_norm", ".b_norm", ".set_weight")
TEXT_ENCODERS = ("text_encoder", "lora_te", "base_model.model.text_model", "te1.", "te2.")


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that an adapter may be on, by name: linear ones and convolutions."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def originals(model: nn.Module) -> dict[str, str]:
    """`{layer: its name in the original code}`; {} for a model whose names are not known here."""
    kind = type(model).__name__
    if kind == "UNet2DConditionModel":
        blocks = _unet_blocks(model)
        return {name: _unet_name(name, blocks) for name in layers(model)}
    table = {"WanTransformer3DModel": WAN, "CogVideoXTransformer3DModel": COGVIDEOX}.get(kind)
    return {name: _replaced(name, table) for name in layers(model)} if table else {}


def spellings(model: nn.Module) -> dict[str, str]:
    """`{what a key calls a layer: the layer}`: dotted (diffusers, PEFT, ComfyUI) or flat (kohya),
    each with diffusers' name or the original one. What could be two layers is left out.
    """
    found: dict[str, str | None] = {}
    original = originals(model)
    for layer in layers(model):
        for name in {layer, original.get(layer, layer)}:
            # diffusers' old attention processors named to_out.0 without its number.
            for dotted in {name, name.removesuffix(".0") if name.endswith("to_out.0") else name}:
                words = [prefix + dotted for prefix in DOTTED]
                words += [f"base_model.model.{word}" for word in words]
                words += [prefix + dotted.replace(".", "_") for prefix in FLAT]
                for word in words:
                    found[word] = layer if found.get(word, layer) == layer else None
    return {word: layer for word, layer in found.items() if layer}


def place(key: str, words: dict[str, str], model: str) -> tuple[str, str]:
    """What a tensor of an adapter is: its layer, and `A`, `B`, `bias` or `alpha`. words:
    `spellings` of the model whose class is `model`.

    Raises:
        ValueError: a key that is not read, with what it seems to be.
    """
    plain = key.replace(".processor.", ".")
    if match := TENSOR.fullmatch(plain):
        word, part = match[1], PARTS.get(f"{match[2]}.{match[3]}")
    else:
        word, part = plain.removesuffix(".alpha"), "alpha" if plain.endswith(".alpha") else None
    if word in words and part:
        return words[word], part
    if key.startswith(TEXT_ENCODERS):
        raise ValueError(f"{key!r:.100} is of a text encoder: only adapters of {model} are read")
    for name, kind in OTHERS.items():
        if f".{name}" in key:
            raise ValueError(f"{key!r:.100} is of {kind}: only plain LoRA is read")
    if key.endswith(DIFFERENCES):
        raise ValueError(f"{key!r:.100} is a difference of whole weights: only plain LoRA is read")
    raise ValueError(
        f"{key!r:.100} is of no layer of {model} in the key forms of diffusers (transformer. or "
        "unet.), PEFT (base_model.model.), kohya (lora_unet_) and ComfyUI (diffusion_model.): is "
        "it another model's adapter?"
    )


def _replaced(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for ours, theirs in table:
        name = name.replace(ours, theirs)
    return name


def _unet_blocks(unet: nn.Module) -> dict[str, str]:
    """`{"down_blocks.0.resnets.0": "input_blocks.1.0", ...}`: the original counts through."""
    found, count = {}, 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            found[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{count}.0"
            found[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{count}.1"
            count += 1
        if block.downsamplers:
            found[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
            count += 1
    count = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            found[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{count}.0"
            found[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{count}.1"
            count += 1
        last = 2 if getattr(block, "attentions", None) else 1
        found[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{count - 1}.{last}.conv"
    return found


def _unet_name(name: str, blocks: dict[str, str]) -> str:
    if ".resnets." in name:
        name = _replaced(name, RESNET)
    name = _replaced(name, UNET)
    parts = name.split(".")
    for length in (5, 4):  # samplers' names are the longer ones
        if block := blocks.get(".".join(parts[:length])):
            return ".".join([block, *parts[length:]])
    return name
