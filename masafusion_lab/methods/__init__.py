"""Editing methods, a file each: frozen dataclasses whose fields are their settings and whose call does the work."""

from masafusion_lab.methods.masafusion import MaSaFusion
from masafusion_lab.methods.plain import Plain, Reconstruction
from masafusion_lab.methods.protocol import Method, Shareable, Source

METHODS: dict[str, type] = {"masafusion": MaSaFusion, "plain": Plain, "reconstruction": Reconstruction}
"""Name, as in `method.name=...`, to class."""

__all__ = ["METHODS", "MaSaFusion", "Method", "Plain", "Reconstruction", "Shareable", "Source"]
