"""``diagd web``: a bundle as a page that any host serves."""

from __future__ import annotations

import sys
from contextlib import suppress

from diagd.bundle import Bundle
from diagd.cli import terminal
from diagd.cli.options import Verb
from diagd.options import File, checked, flag, positional, setting
from diagd.play.opening import SHIPPED
from diagd.progress import Progress
from diagd.web.folder import runtime_files, server, write_page

EXAMPLES = """examples:
  diagd web crafter-3m.diagd --output page --serve
  diagd web --output page --runtime onnxruntime-web-1.30.0.tgz

The folder is static: copy it to any host. What hosts should send, and what a browser loads: docs/web.md.
"""


@checked
class WebOptions:
    """What becomes a page, and where."""

    output: File = flag("folder of the page: absent, empty or an earlier page")
    bundle: File | None = positional("default: crafter-3m, which comes with diagd", None)
    precision: str | None = flag(
        "of the step graph (default: int8-dynamic, or for WebGPU int8-weight, if it is there)", None
    )
    runtime: File | None = flag("archive or folder of onnxruntime-web (default: fetched once from npm)", None)
    webgpu: bool = flag("decode on the GPU in browsers that can", False)
    serve: bool = flag("serve the page to this machine's browsers", False)
    port: int = flag("of --serve; 0 for any", 8766, ge=0, le=65535)
    window: int | None = setting("frames that a token may see (default: the model's context)", None)


def run(options: WebOptions) -> None:
    """Write the page, and serve it where that is asked for."""
    console = terminal.console()
    bundle = Bundle.open(options.bundle or SHIPPED)
    page = write_page(
        bundle,
        options.output,
        lambda: runtime_files(options.runtime, Progress(console)),
        precision=options.precision,
        window=options.window,
        webgpu=options.webgpu,
        progress=Progress(console),
    )
    console.print(
        f"{bundle.manifest.name} {page.precision}: {page.path}, a browser loads {page.download / 1e6:.2f} MB"
    )
    if options.serve:
        with server(options.output, options.port) as serving, suppress(KeyboardInterrupt):
            sys.stdout.write(f"http://127.0.0.1:{serving.server_port}/\nCtrl-C ends it.\n")
            sys.stdout.flush()
            serving.serve_forever()


VERB = Verb(WebOptions, run, EXAMPLES)
