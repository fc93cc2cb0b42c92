"""The edit tool, as it runs in the box: a request in JSON on standard input, what the policy is shown on standard
output. The standard library alone; the text of this file is what is run."""

import json
import os
import sys

LONGEST_VIEW = 2000
AROUND = 4


def main():
    request = json.load(sys.stdin)
    try:
        sys.stdout.write(edit(request))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        sys.stdout.write(f"Error: {error}")
        sys.exit(1)


def edit(request):
    action, path = request.get("action"), request.get("path")
    if not isinstance(path, str) or not path:
        raise ValueError("edit needs the parameter path, a string")
    if action == "view":
        return view(path, request)
    if action == "create":
        text = wanted(request, "text")
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        write(path, text)
        return f"{path} is written, {len(text.splitlines())} lines."
    if action == "replace":
        return replace(path, wanted(request, "old"), wanted(request, "text"))
    if action == "insert":
        return insert(path, request.get("line"), wanted(request, "text"))
    raise ValueError(f"there is no action {action!r}; take view, create, replace or insert")


def view(path, request):
    if os.path.isdir(path):
        return "\n".join(sorted(name + "/" * os.path.isdir(os.path.join(path, name)) for name in os.listdir(path)))
    lines = lines_of(read(path)[0])
    first = request.get("line") or 1
    if not isinstance(first, int) or first < 1:
        raise ValueError("line must be an integer from 1 on")
    return numbered(lines, first, first + LONGEST_VIEW - 1)


def replace(path, old, new):
    text, ending = read(path)
    count = text.count(old) if old else 0
    if count != 1:
        raise ValueError(f"old stands {count} times in {path}; it must stand there exactly once")
    begin = text[: text.index(old)].count("\n") + 1
    write(path, text.replace(old, new), ending)
    return shown(path, begin, begin + new.count("\n"))


def insert(path, line, new):
    text, ending = read(path)
    lines, added = lines_of(text), lines_of(new)
    if not isinstance(line, int) or not 0 <= line <= len(lines):
        raise ValueError(f"line must be an integer from 0 to {len(lines)}; the text comes behind that line")
    ends = text.endswith("\n") or line == len(lines)
    write(path, "\n".join(lines[:line] + added + lines[line:]) + "\n" * ends, ending)
    return shown(path, line + 1, line + len(added))


def shown(path, first, last):
    return f"{path} is changed:\n" + numbered(lines_of(read(path)[0]), max(1, first - AROUND), last + AROUND)


def numbered(lines, first, last):
    text = "\n".join(f"{first + place:6}\t{line}" for place, line in enumerate(lines[first - 1 : last]))
    return text + (f"\n[{len(lines) - last} further lines]" if len(lines) > last else "")


def wanted(request, name):
    if not isinstance(request.get(name), str):
        raise ValueError(f"{request.get('action')} needs the parameter {name}, a string")
    return request[name]


def lines_of(text):
    """As an interpreter counts them."""
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def read(path):
    """The text with \\n behind each line, and what stands there in the file."""
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
    if text.count("\r\n") < max(1, text.count("\n")):
        return text, "\n"
    return text.replace("\r\n", "\n"), "\r\n"


def write(path, text, ending="\n"):
    if ending == "\r\n":
        text = text.replace("\r\n", "\n").replace("\n", "\r\n")
    content = text.encode()  # before the file is emptied: what cannot be written changes nothing
    with open(path, "wb") as file:
        file.write(content)


if __name__ == "__main__":
    main()
