"""Sessions over an engine that is named instead of chosen."""

from __future__ import annotations

from diagd.bundle import Bundle, Form
from diagd.engines.cuda.engine import DeviceEngine
from diagd.engines.engine import Engine
from diagd.engines.fixed import FixedEngine
from diagd.engines.modern import ModernEngine
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.portable import PortableEngine
from diagd.engines.prefix import MAX_WIDTH, PrefixEngine
from diagd.errors import UsageError, unknown
from diagd.runtime.session import Session, token_places
from diagd.runtime.text import TextReader
from diagd.schedule import slots_needed


def forms_of(bundle: Bundle) -> list[Form]:
    """Forms of the bundle's step graphs, each once."""
    return list(dict.fromkeys(graph.form for graph in bundle.manifest.graphs))


def form_of(engine: Engine) -> Form:
    """The form of the step graph that an engine runs."""
    return engine.form if isinstance(engine, (FixedEngine, DeviceEngine)) else Form.PREFIX


def find_form(bundle: Bundle, name: str) -> Form:
    """The form called ``name``.

    Raises:
        UsageError: the bundle has no graph in it.
    """
    there = {form.value: form for form in forms_of(bundle)}
    if name not in there:
        raise unknown(f"engine of {bundle.path}", name, there)
    return there[name]


def check_window(bundle: Bundle, window: int | None) -> int:
    """Frames that a token may see; the model's context where None is given.

    Raises:
        UsageError: it does not fit the model.
    """
    frames = bundle.manifest.context.frames
    if window is not None and not 2 <= window <= frames:
        raise UsageError(f"window {window} is outside 2..{frames}, the context of {bundle.manifest.name}")
    return window or frames


def open_engine(bundle: Bundle, form: Form, window: int, cpu: CpuOptions) -> Engine:
    """The engine of a form on ONNX Runtime's CPU provider.

    Raises:
        UsageError: the window does not fit the model.
    """
    layout, window = bundle.manifest.layout, check_window(bundle, window)
    places = token_places(layout, window).size
    if form is Form.PREFIX:
        return PrefixEngine(bundle, slots_needed(layout, window, MAX_WIDTH), places, cpu)
    fixed = {Form.MODERN: ModernEngine, Form.PORTABLE: PortableEngine}
    return fixed[form](bundle, places, cpu)


def session_over(bundle: Bundle, engine: Engine, window: int, cpu: CpuOptions) -> Session:
    """A session over an engine that is there already."""
    manifest = bundle.manifest
    text = TextReader(bundle, manifest.text, cpu) if manifest.text else None
    return Session(manifest, engine, window, text=text)
