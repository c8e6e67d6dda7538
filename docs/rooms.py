"""Draw the rooms of dist_adv from its imports, and put them into docs/design.md.

`python docs/rooms.py` writes them; `--check` exits with 1 where what is written is another house.
An arrow is an import; what follows from other arrows is left out.
"""

import ast
import sys
import tomllib
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
DESIGN = ROOT / "docs" / "design.md"
START, END = "<!-- rooms: made by docs/rooms.py -->\n", "<!-- end of rooms -->\n"


def layers() -> list[list[str]]:
    """The rooms from the top, as the contract in pyproject.toml has them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    rows = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    return [[room.strip() for room in row.split(":")] for row in rows if row != "__main__"]


def imports(rooms: list[str]) -> dict[str, set[str]]:
    """Which rooms each room imports from."""
    graph = grimp.build_graph("dist_adv")
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for module in graph.modules:
        room = f"{module}.".split(".")[1]
        for imported in graph.find_modules_directly_imported_by(module):
            other = f"{imported}.".split(".")[1]
            if room in found and other in found and other != room:
                found[room].add(other)
    return found


def reachable(room: str, arrows: dict[str, set[str]]) -> set[str]:
    found = set(arrows[room])
    for other in arrows[room]:
        found |= reachable(other, arrows)
    return found


def picture(rows: list[list[str]], arrows: dict[str, set[str]]) -> str:
    """A Mermaid diagram; of the arrows those that follow from no others."""
    lines = ["```mermaid", "flowchart TD"]
    for room in (room for row in rows for room in row):
        implied = set().union(*(reachable(other, arrows) for other in arrows[room]))
        lines += [f"  {room} --> {other}" for other in sorted(arrows[room] - implied)]
    return "\n".join([*lines, "```", ""])


def purpose(room: str) -> str:
    """The first line of the room's own description."""
    place = ROOT / "dist_adv" / room
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return (ast.get_docstring(ast.parse(file.read_text())) or "").splitlines()[0]


def table(rows: list[list[str]]) -> str:
    lines = ["| room | what is in it |", "|---|---|"]
    for room in (room for row in rows for room in row):
        name = f"{room}/" if (ROOT / "dist_adv" / room).is_dir() else f"{room}.py"
        lines.append(f"| `{name}` | {purpose(room)} |")
    return "\n".join([*lines, ""])


def main() -> int:
    rows = layers()
    arrows = imports([room for row in rows for room in row])
    before, rest = DESIGN.read_text().split(START)
    old, after = rest.split(END)
    new = f"{table(rows)}\n{picture(rows, arrows)}"
    if "--check" in sys.argv:
        return int(old != new)
    DESIGN.write_text(f"{before}{START}{new}{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
