"""What obsdag tells about itself: metrics, traces and logs, all made from the facts of `obsdag.core.observer`."""

__all__: list[str] = []
