"""Writes README.md's table of methods from what the methods say of themselves.

`python docs/methods.py --check` fails where the table is another. An option is shown with its
default; the cost is counted (`dist_adv.methods.cost`).
"""

import sys
from pathlib import Path

from dist_adv.attacks.threat import Linf
from dist_adv.methods import MethodOptions
from dist_adv.methods.cost import cost_of
from dist_adv.methods.registry import own_methods
from dist_adv.text import pixels

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- methods: made by docs/methods.py -->\n", "<!-- end of methods -->\n"


def option(key: str, value: object) -> str:
    if value is None:
        return f"`{key}: null`"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    text = str(list(value)) if isinstance(value, tuple) else text
    return f"`{key}: {pixels(value) if key == 'alpha' else text}`"


def table() -> str:
    rows = []
    for name, method in own_methods().items():
        options = method.Options()
        own = options.model_dump(exclude=set(MethodOptions.model_fields))
        shown = ", ".join(option(key, value) for key, value in own.items())
        cost = cost_of(options, Linf(8 / 255))
        rows.append((cost.against_natural, f"`{name}`", method.about, shown))
    lines = [
        f"| {name} | {about} | {shown} | {cost:.3g} |\n"
        for cost, name, about, shown in sorted(rows)
    ]
    return "".join(["| method | trains | options | cost |\n", "|---|---|---|---|\n", *lines])


def main() -> None:
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    made = before + BEGIN + table() + END + after
    if "--check" in sys.argv:
        sys.exit(made != text)
    README.write_text(made)


if __name__ == "__main__":
    main()
