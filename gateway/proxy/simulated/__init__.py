"""The built-in upstream of test keys, the demo, the tests and the benchmarks.

Deterministic and faithful to OpenAI's wire format, with speeds and faults that a request may ask for in its `simulate`
object (`Directive` lists them). `respond` is the pure core: a request's bytes to a `Script`; `SimulatedUpstream` plays
scripts in this process, `serve_simulated` behind a socket, as does `python -m gateway.proxy.simulated --port N`.
"""

from gateway.proxy.simulated.request import Directive
from gateway.proxy.simulated.respond import respond, simulate
from gateway.proxy.simulated.script import Cut, Hang, Script, Send, Step, Wait
from gateway.proxy.simulated.server import SimulatedServer, serve_simulated
from gateway.proxy.simulated.upstream import SimulatedUpstream

__all__ = [
    "Cut",
    "Directive",
    "Hang",
    "Script",
    "Send",
    "SimulatedServer",
    "SimulatedUpstream",
    "Step",
    "Wait",
    "respond",
    "serve_simulated",
    "simulate",
]
