"""`python -m obsdag.dashboards`: makes what is generated in dashboards/ anew. Needs the development packages."""

from __future__ import annotations

from obsdag.dashboards import folder
from obsdag.dashboards.generate import generated

for name, text in generated(folder()).items():
    path = folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(path)  # noqa: T201
