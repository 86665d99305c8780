"""Editing methods, a file each: frozen dataclasses whose fields are their settings and whose call does the work."""

from masafusion_lab.methods.blended import Blended
from masafusion_lab.methods.diffedit import DiffEdit, SdeDiffEdit
from masafusion_lab.methods.edit_friendly import NoiseMaps
from masafusion_lab.methods.embctrl import EmbCtrl
from masafusion_lab.methods.glide import Glide
from masafusion_lab.methods.instruct import Hive, InstructPix2Pix
from masafusion_lab.methods.masactrl import MasaCtrl
from masafusion_lab.methods.masafusion import MaSaFusion
from masafusion_lab.methods.masafusion_no_adapter import MaSaFusionNoAdapter
from masafusion_lab.methods.plain import Plain, Reconstruction
from masafusion_lab.methods.plug_and_play import PlugAndPlay
from masafusion_lab.methods.prompt_to_prompt import PromptToPrompt
from masafusion_lab.methods.protocol import Method, Needs, Source
from masafusion_lab.methods.replay import Replay
from masafusion_lab.methods.sdedit import SDEdit
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
    "replay": Replay,
    "sdedit": SDEdit,
    "diffedit": DiffEdit,
    "sde_diffedit": SdeDiffEdit,
    "blended": Blended,
    "glide": Glide,
    "instruct_pix2pix": InstructPix2Pix,
    "hive": Hive,
    "edit_friendly": NoiseMaps,
}
"""Name, as in `method.name=...`, to class."""

__all__ = ["METHODS", "MaSaFusion", "Method", "Needs", "Plain", "Reconstruction", "Source"]
