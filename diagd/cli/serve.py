"""``diagd serve``: a bundle behind a port, for players or for the clients of a release."""

from __future__ import annotations

import sys
from contextlib import closing, suppress
from typing import Literal

from rich.console import Console

from diagd.bundle import Bundle
from diagd.cli import terminal
from diagd.cli.generate import encode_text
from diagd.cli.options import Verb
from diagd.cluster.fleet import RayFleet
from diagd.cluster.workers import EngineOptions
from diagd.options import File, checked, flag, positional, setting
from diagd.play.opening import GameOptions
from diagd.play.server import Address
from diagd.play.service import Service, opened_tables, serve
from diagd.play.site import Public, page_address
from diagd.play.table import LocalFleet
from diagd.runtime.options import SessionOptions, TextOptions
from diagd.serve.dreamer import Dreamer
from diagd.serve.wham import DreamServer, Wham

EXAMPLES = """examples:
  diagd serve crafter-3m.diagd --sessions 4 --fps 10
  diagd serve crafter-3m.diagd --sessions 4 --set state=worlds/
  diagd serve crafter-3m.diagd --sessions 8 --cluster 10.0.0.1:6379 --set gpus=0.5
  diagd serve wham.diagd --protocol wham
  diagd serve wham.diagd --protocol wham --port 5001 --set backend=cuda

Players see the page of diagd play, each a world of their own, all decoded in the same passes. Who comes when
all seats are taken, or when one more would take the rate from the others, waits in turn. /health, /ready and
/metrics (OpenMetrics) are for those who look after it; SIGTERM lets players finish. With --set state=FOLDER a
server that is started again, whatever ended the one before, has the same address and its players' worlds.

--cluster has worlds played by engines on the nodes of a Ray cluster (the bundle in the same place on each);
this process stays in front. A world whose engine or node is lost goes on at another one, to the token.

--protocol wham answers the jobs of WHAM's released server (/new_job, /get_job_results, /cancel_job), so that
its Demonstrator dreams on this machine: several continuations of a few pictures and actions, which the model
goes on acting in.

It listens on this machine alone; that protocol knows no password, so --host elsewhere lets in whoever gets
there. Ctrl-C ends it.
"""


@checked
class ServeOptions:
    """What is served, and where."""

    bundle: File = positional("made by diagd-export")
    protocol: Literal["play", "wham"] = flag("of the clients: play (the page, default) or wham", "play")
    service: Service = Service()
    host: str = flag("address to listen on", "127.0.0.1", min_length=1)
    port: int = flag("0 for any that is free", 5000, ge=0, le=65535)
    max_jobs: int = setting("of wham: jobs that may wait", 30, ge=1, le=10_000)
    max_steps: int = setting("of wham: frames of a job at most", 10, ge=1, le=10_000)
    lifespan: int = setting("of wham: seconds that results nobody fetches are kept for", 600, ge=1)
    seed: int | None = setting(
        "of wham: of the first job, later ones in order (default: any)", None, ge=0, lt=1 << 53
    )
    public: Public = setting("addresses of a proxy, tunnel or container that lead here; prints the first", ())
    session: SessionOptions = SessionOptions()
    condition: TextOptions = TextOptions()
    nodes: EngineOptions = EngineOptions()


def run(options: ServeOptions) -> None:
    """Serve until interrupted."""
    (_play if options.protocol == "play" else _dream)(options)


def _play(options: ServeOptions) -> None:
    console, service = terminal.console(), options.service
    address = Address(options.host, options.port, options.public)
    warn(console, address)

    def started(name: str, url: str) -> None:
        where = "" if options.nodes.cluster is None else " on each engine"
        console.print(f"{name}, {service.sessions} worlds{where}: {url}\nCtrl-C ends it.", soft_wrap=True)
        sys.stdout.flush()

    text = options.condition.embeddings(Bundle.open(options.bundle).manifest, encode_text)
    games = GameOptions(session=options.session, text=text)
    if options.nodes.cluster is None:
        with opened_tables(options.bundle, games, service) as tables:
            serve(tables[0].game.bundle, LocalFleet(tables), service, address, started)
    else:
        bundle = Bundle.open(options.bundle)
        serve(bundle, RayFleet(bundle, games, service, options.nodes), service, address, started)


def warn(console: Console, address: Address) -> None:
    """Say what an address that others can reach lets them do."""
    if not address.is_local:
        console.print(f"warning: whoever reaches {address.host} and knows the address below can play; no TLS")


def _dream(options: ServeOptions) -> None:
    console, bundle = terminal.console(), Bundle.open(options.bundle)
    pixels, session = options.session.pixels(bundle), options.session.open(bundle)
    with closing(Dreamer(session, pixels, options.max_jobs, options.lifespan)) as dreamer:
        wham = Wham(bundle.manifest, pixels, session.window, options.max_steps, options.seed)
        place = options.host, options.port
        with DreamServer(place, wham, dreamer, options.public) as server, suppress(KeyboardInterrupt):
            if not Address(options.host).is_local:
                console.print(
                    f"warning: whoever reaches {options.host} can order dreams; no password, no TLS"
                )
            url = page_address(options.host, server.server_port, options.public)
            console.print(f"{bundle.manifest.name}: {url}\nCtrl-C ends it.", soft_wrap=True)
            sys.stdout.flush()
            dreamer.start()
            server.serve_forever()


VERB = Verb(ServeOptions, run, EXAMPLES)
