"""The networks that metrics look through: CLIP, DINO, LPIPS and the picture-book world's judge, loaded in one place.

What a network is shown is made here, with Pillow, so that it is the same wherever the metric is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from masafusion_lab import InputError
from masafusion_lab.hub import PICTUREBOOK, Files, check_weights, find, one_line, sha256
from masafusion_lab.loading import quiet, weights

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class View:
    """How a network is shown a picture: its short side of `side` pixels, the middle `crop` of it (0: as many as the
    network's own), then (x - mean) / std."""

    side: int = 0
    crop: int = 0
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    how: Image.Resampling = Image.Resampling.BICUBIC

    def __call__(self, picture: Tensor, own: int) -> Tensor:
        """The network's input (1, 3, h, w) of a picture (3, H, W) in [0, 1] with 8-bit levels."""
        shown, crop = _short_side(picture, self.side or own, self.how), self.crop or own
        top, left = (round((side - crop) / 2) for side in shown.shape[-2:])
        return self.normal(shown[:, top : top + crop, left : left + crop])[None]

    def normal(self, x: Tensor) -> Tensor:
        """(x - mean) / std, of levels of any scale."""
        return (x - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


def _short_side(picture: Tensor, side: int, how: Image.Resampling) -> Tensor:
    height, width = picture.shape[-2:]
    short = min(height, width)
    size = int(side * width / short), int(side * height / short)
    levels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
    resized = np.array(Image.fromarray(levels).resize(size, how), np.float32) / 255
    return torch.from_numpy(resized.transpose(2, 0, 1).copy())


VIEWS: dict[str, View] = {
    "clip": View(224, 224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "dino": View(256, 224, *IMAGENET),
    "structure": View(224, 224, *IMAGENET),
    "picturebook": View(how=Image.Resampling.BILINEAR),
}
"""OpenAI's of CLIP; MagicBrush's of DINO; PIE-Bench's of its structure distance; the picture-book world's own."""


class Networks:
    """The encoders of a protocol (see metrics.Encoders), each loaded when first asked for.

    `places`: of clip, dino, judge, lpips those that are wanted, each a folder, a hub id, or picturebook/PART; `views`:
    what "clip", "dino" and "keys" are shown, as in VIEWS. One that cannot be had is an InputError at every call.
    """

    def __init__(self, places: Mapping[str, str], views: Mapping[str, str], device: torch.device | str = "cpu") -> None:
        self.places, self.views, self.device = places, {name: VIEWS[view] for name, view in views.items()}, device
        self._found: dict[str, Any] = {}

    def facts(self) -> dict[str, str]:
        """What each network is, or why there is none."""
        said = {}
        for name in self.places:
            try:
                said[name] = sha256(self._get(name)[0])
            except InputError as error:
                said[name] = f"n/a: {error}"
        return said

    @torch.no_grad()
    def clip(self, picture: Tensor) -> Tensor:
        """CLIP's embedding (d,) of a picture."""
        model, _ = self._get("clip")
        pixels = self.views["clip"](picture, model.config.vision_config.image_size)
        return model.get_image_features(pixel_values=pixels.to(self.device)).pooler_output[0].cpu()

    @torch.no_grad()
    def text(self, words: str) -> Tensor:
        """CLIP's embedding (d,) of a text; what is beyond its length is not read."""
        model, tokenizer = self._get("clip")
        length = model.config.text_config.max_position_embeddings
        ids = tokenizer(
            [words], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return model.get_text_features(input_ids=ids.to(self.device)).pooler_output[0].cpu()

    @torch.no_grad()
    def dino(self, picture: Tensor) -> Tensor:
        """DINO's class token (d,)."""
        model, _ = self._get("dino")
        pixels = self.views["dino"](picture, model.config.image_size).to(self.device)
        return model(pixels, interpolate_pos_encoding=True).last_hidden_state[0, 0].cpu()

    @torch.no_grad()
    def keys(self, picture: Tensor) -> Tensor:
        """The keys (tokens, d) of DINO's last layer, its heads side by side; levels are taken as they are given."""
        (model, _), view = self._get("dino"), self.views["keys"]
        side, short = view.side or model.config.image_size, min(picture.shape[-2:])
        sides = [int(side * long / short) for long in picture.shape[-2:]]
        shown = F.interpolate(picture[None], sides, mode="bilinear")[0]  # as the torchvision 0.13 of PIE-Bench's script
        layer = [module for name, module in model.named_modules() if name.endswith((".k_proj", ".key"))][-1]
        seen: list[Tensor] = []
        hook = layer.register_forward_hook(lambda module, given, out: seen.append(out))
        try:
            model(view.normal(shown)[None].to(self.device), interpolate_pos_encoding=True)
        finally:
            hook.remove()
        return seen[0].flatten(0, -2).cpu()

    @torch.no_grad()
    def lpips(self, a: Tensor, b: Tensor) -> Tensor:
        """The learned perceptual distance of two pictures, a scalar."""
        network, _ = self._get("lpips")
        return network((2 * a[None] - 1).to(self.device), (2 * b[None] - 1).to(self.device)).cpu()

    def done(self, picture: Tensor, drawn: Any) -> Tensor:
        """Whether the judge finds an edit of the picture-book world done, 0 or 1."""
        from masafusion_lab.picturebook.judge import done

        if drawn is None:
            raise InputError("the judge knows edits of the picture-book world alone")
        judge, _ = self._get("judge")
        return done(judge(picture[None].to(self.device)), drawn)[0].float().cpu()

    def _get(self, name: str) -> tuple[Any, Any]:
        """The network and its tokenizer, or the InputError that was raised for it before."""
        if name not in self._found:
            try:
                network, tokenizer = LOAD[name](self.places[name])
                self._found[name] = network.requires_grad_(False).eval().to(self.device), tokenizer
            except InputError as error:
                self._found[name] = error
        if isinstance(self._found[name], InputError):
            raise InputError(str(self._found[name]))
        return self._found[name]


def _pretrained(cls: str, place: str, tokenizer: str = "", **options: Any) -> tuple[Any, Any]:
    """A network of a folder, hub id or picturebook/PART, in float32, with its tokenizer if one is named."""
    import transformers

    built_in = PICTUREBOOK / place.removeprefix("picturebook/")
    if place.startswith("picturebook/") and not built_in.is_dir():
        raise InputError(f"{place}: this installation's built-in model has no {built_in.name}")
    name, what = str(built_in) if place.startswith("picturebook/") else place, f"encoder {place}"
    root, fetch = find(name, "config.json", what)
    file = fetch("model.safetensors") or fetch("pytorch_model.bin")
    if file is None:
        raise InputError(f"{what}: has no model.safetensors; half a copy, or no {cls}")
    check_weights(file)  # a pickle by torch's weights-only reader
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
            fetch(name)
    files = Files(root, (file,), safe=file.suffix == ".safetensors")
    with quiet():
        network = weights(getattr(transformers, cls), files, torch.float32, **options)
        try:
            return network, getattr(transformers, tokenizer).from_pretrained(
                root, local_files_only=True
            ) if tokenizer else None
        except Exception as error:  # whatever a library raises
            raise InputError(f"{what}: its tokenizer cannot be read: {one_line(error)}") from None


def _judge(place: str) -> tuple[Any, None]:
    from masafusion_lab.picturebook.judge import Judge

    return Judge.load(None if place == "picturebook/judge" else place), None


def _lpips(place: str) -> tuple[Any, None]:
    """torchmetrics' LPIPS, of the backbone `place` ("squeeze", as PIE-Bench takes it)."""
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity(net_type=place), None  # type: ignore[arg-type]
    except Exception as error:  # no torchvision, a broken one, or no network for its weights
        raise InputError(f"LPIPS: its backbone cannot be had: {one_line(error)}") from None


LOAD: dict[str, Callable[[str], tuple[Any, Any]]] = {
    "clip": lambda place: _pretrained("CLIPModel", place, "CLIPTokenizer"),
    "dino": lambda place: _pretrained("ViTModel", place, add_pooling_layer=False),
    "judge": _judge,
    "lpips": _lpips,
}
"""Name to what loads it from its place."""
