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
    lines = read(path).splitlines()
    first = request.get("line") or 1
    if not isinstance(first, int) or first < 1:
        raise ValueError("line must be an integer from 1 on")
    return numbered(lines, first, first + LONGEST_VIEW - 1)


def replace(path, old, new):
    text = read(path)
    count = text.count(old) if old else 0
    if count != 1:
        raise ValueError(f"old stands {count} times in {path}; it must stand there exactly once")
    begin = text[: text.index(old)].count("\n") + 1
    write(path, text.replace(old, new))
    return shown(path, begin, begin + new.count("\n"))


def insert(path, line, new):
    lines = read(path).splitlines(keepends=True)
    if not isinstance(line, int) or not 0 <= line <= len(lines):
        raise ValueError(f"line must be an integer from 0 to {len(lines)}; the text comes behind that line")
    added = new.splitlines(keepends=True)
    if added and not added[-1].endswith("\n"):
        added[-1] += "\n"
    write(path, "".join(lines[:line] + added + lines[line:]))
    return shown(path, line + 1, line + len(added))


def shown(path, first, last):
    return f"{path} is changed:\n" + numbered(read(path).splitlines(), max(1, first - AROUND), last + AROUND)


def numbered(lines, first, last):
    text = "\n".join(f"{first + place:6}\t{line}" for place, line in enumerate(lines[first - 1 : last]))
    return text + (f"\n[{len(lines) - last} further lines]" if len(lines) > last else "")


def wanted(request, name):
    if not isinstance(request.get(name), str):
        raise ValueError(f"{request.get('action')} needs the parameter {name}, a string")
    return request[name]


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def write(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    main()
