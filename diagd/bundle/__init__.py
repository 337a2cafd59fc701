"""Bundles: the directory with everything one model needs at run time."""

from diagd.bundle.bundle import Bundle, atomic_bundle, read_manifest, seal
from diagd.bundle.cache import cache_directory
from diagd.bundle.manifest import Form, Manifest

__all__ = ["Bundle", "Form", "Manifest", "atomic_bundle", "cache_directory", "read_manifest", "seal"]
