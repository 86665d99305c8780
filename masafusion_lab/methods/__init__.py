"""Editing methods, a file each: frozen dataclasses whose fields are their settings and whose call does the work."""

from masafusion_lab.methods.embctrl import EmbCtrl
from masafusion_lab.methods.masactrl import MasaCtrl
from masafusion_lab.methods.masafusion import MaSaFusion
from masafusion_lab.methods.masafusion_no_adapter import MaSaFusionNoAdapter
from masafusion_lab.methods.plain import Plain, Reconstruction
from masafusion_lab.methods.plug_and_play import PlugAndPlay
from masafusion_lab.methods.prompt_to_prompt import PromptToPrompt
from masafusion_lab.methods.protocol import Method, Source
from masafusion_lab.methods.t2i_only import T2IOnly

METHODS: dict[str, type] = {
    "masafusion": MaSaFusion,
    "masafusion_no_adapter": MaSaFusionNoAdapter,
    "embctrl": EmbCtrl,
    "prompt_to_prompt": PromptToPrompt,
    "plug_and_play": PlugAndPlay,
    "masactrl": MasaCtrl,
    "t2i_only": T2IOnly,
    "plain": Plain,
    "reconstruction": Reconstruction,
}
"""Name, as in `method.name=...`, to class."""

__all__ = [
    "METHODS",
    "EmbCtrl",
    "MaSaFusion",
    "MaSaFusionNoAdapter",
    "MasaCtrl",
    "Method",
    "Plain",
    "PlugAndPlay",
    "PromptToPrompt",
    "Reconstruction",
    "Source",
    "T2IOnly",
]
