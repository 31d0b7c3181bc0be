"""Backends: where integers are multiplied. Looked up by name; entries answer (available, reason)."""

from .registry import AUTO, available_backends, backend_names, backend_status, check_device, get_backend

__all__ = ["AUTO", "available_backends", "backend_names", "backend_status", "check_device", "get_backend"]
