"""The annotation lab in the browser: its server."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import gradio as gr

from masafusion_lab import InputError, interrupt
from masafusion_lab.web.gate import Gate
from masafusion_lab.web.page import TEMPLATES, page
from masafusion_lab.web.studio import Studio

FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
MONO = ["ui-monospace", "DejaVu Sans Mono", "monospace"]


def theme() -> gr.themes.Base:
    """One accent, on which white can be read, and grey text that can be."""
    base = gr.themes.Base(primary_hue="orange", neutral_hue="gray", font=FONT, font_mono=MONO, radius_size="sm")
    return base.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_text_color="white",
        color_accent="*primary_700",
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
    )


def serve(studio: Studio, *, host: str, port: int | None, told: Callable[[str], None]) -> None:
    """Serve the lab until a signal ends it; `told` hears its address. Raises InputError, and Interrupted at the end."""
    launched = launch(studio, host=host, port=port)
    try:
        told(str(launched.local_url))
        while True:
            time.sleep(0.2)
            interrupt.check()
    finally:
        launched.close(verbose=False)
        studio.desk.close()


def launch(studio: Studio, *, host: str = "127.0.0.1", port: int | None = None) -> gr.Blocks:
    """Serve a studio's page from a thread; nothing is asked of the network, and only what it has made is served."""
    shutil.rmtree(studio.served, ignore_errors=True)  # copies, all of them
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(studio.served),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }

    @asynccontextmanager
    async def gated(server: Any) -> AsyncIterator[None]:  # a gate given as middleware lies within Gradio's CORS
        server.middleware_stack = Gate(server.middleware_stack, studio.served, host)
        yield

    demo = page(studio)
    demo.queue(default_concurrency_limit=4, max_size=100)
    try:
        demo.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            allowed_paths=[],
            max_file_size=0,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            run_history=False,
            footer_links=[],
            css_paths=TEMPLATES / "app.css",
            theme=theme(),
            app_kwargs={"lifespan": gated},
        )
    except OSError as error:
        place = f"--port {port}" if port else "--port"
        raise InputError(f"{place}: cannot be served at {host} ({error}); take another") from None
    return demo
