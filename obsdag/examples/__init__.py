"""Examples that run. `census`: a census of the Python files below a folder, which `obsdag demo` shows at work."""

__all__: list[str] = []
