"""Bundles: the directory with everything one model needs at run time."""

from diagd.bundle.bundle import Bundle, cache_directory, read_manifest, seal
from diagd.bundle.manifest import Form, Manifest

__all__ = ["Bundle", "Form", "Manifest", "cache_directory", "read_manifest", "seal"]
