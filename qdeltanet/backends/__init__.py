"""Backends: where integers are multiplied. Looked up by name; entries answer (available, reason)."""

from .registry import available_backends, backend_names, backend_status, get_backend

__all__ = ["available_backends", "backend_names", "backend_status", "get_backend"]
