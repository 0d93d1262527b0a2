"""Write the columns of a sweep's tables into `docs/studies.md`: ``python docs/studies_schema.py``."""

import re
from pathlib import Path

from tracedensity.files import replace_file
from tracedensity.study.table import SCHEMA, TABLES

PAGE = Path(__file__).with_name("studies.md")
BEGIN, END = "<!-- columns: written by docs/studies_schema.py -->", "<!-- end of columns -->"


def columns() -> str:
    """The columns as Markdown."""
    lines = [f"These are the columns of version {SCHEMA}; a file says in its metadata which it has."]
    for name, known in TABLES.items():
        lines += ["", f"### `{name}`", "", "| column | type | |", "|---|---|---|"]
        lines += [f"| `{column.name}` | {column.type} | {column.about} |" for column in known]
    return "\n".join(lines)


if __name__ == "__main__":
    text = PAGE.read_text()
    found = re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}\n{columns()}\n{END}", text, flags=re.S)
    replace_file(PAGE, found)
