"""Examples of what cleaning dropped and changed: prepare.py --show-dropped N and --show-changed N.

Each part of the input keeps N of each kind, by name, for its work file. They are printed at the end.
"""

import difflib
import re

WIDTH = 100  # characters of a line that are printed of a change


def keep_dropped(examples, name, text, show):
    """Keep the first `show` texts under a name."""
    texts = examples.setdefault(name, [])
    if len(texts) < show:
        texts.append(text)


def print_dropped(results, show):
    """Print up to `show` texts that each operator dropped of each source."""
    for name, texts in gathered(result["dropped"] for result in results).items():
        for text in texts[:show]:
            print(f"{name} dropped {text!r}")


def keep_changed(examples, name, before, after, show):
    """Keep the `show` changes under a name that make a text shorter by most: [characters less, before, after]."""
    if len(before) <= len(after):
        return
    changes = examples.setdefault(name, [])
    changes.append([len(before) - len(after), before, after])
    if len(changes) > show:
        changes.remove(min(changes, key=lambda change: change[0]))


def print_changed(results, show):
    """Print the up to `show` largest deletions by each mapper of each source, as a diff of sentences."""
    for name, changes in gathered(result["changed"] for result in results).items():
        for characters, before, after in sorted(changes, key=lambda change: -change[0])[:show]:
            print(f"{name} removed {characters:,} of {len(before):,} characters:")
            lines = difflib.unified_diff(sentences(before), sentences(after), lineterm="", n=1)
            for line in list(lines)[2:]:
                print("    " + (line if len(line) <= WIDTH else line[:WIDTH] + " ..."))


def sentences(text):
    """The sentences and lines of a text; a line end is shown as \\n."""
    return [part.removesuffix("\n") for part in re.split(r"(?<=[。！？\n])", text.replace("\n", "\\n\n")) if part]


def gathered(dicts):
    """Dicts of lists -> one dict, the lists of each name joined."""
    joined = {}
    for examples in dicts:
        for name, items in examples.items():
            joined.setdefault(name, []).extend(items)
    return joined
