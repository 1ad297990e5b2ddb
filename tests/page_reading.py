"""Reading a page back: its elements, its data, and the values of the trace that it must show."""

import json
from html.parser import HTMLParser

import tiny

import npllm

EMPTY = {"meta", "link", "br", "img", "input", "hr"}  # elements without an end


class Elements(HTMLParser):
    """Every element of a page, with its attributes and the text in it, in the order of the page."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.found, self._open = [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "attributes": dict(attributes), "text": ""}
        self.found.append(element)
        if tag not in EMPTY:
            self._open.append(element)

    def handle_endtag(self, tag):
        while self._open and self._open.pop()["tag"] != tag:
            pass

    def handle_data(self, text):
        for element in self._open:
            element["text"] += text

    def named(self, tag, **attributes):
        """The elements of a tag with these attributes."""
        return [
            x
            for x in self.found
            if x["tag"] == tag and attributes.items() <= x["attributes"].items()
        ]


def data_of(html):
    """The numbers in a page, read from its data block."""
    (block,) = Elements(html).named("script", type="application/json")
    return json.loads(block["text"])


def tiny_model(folder):
    """A tiny model with a tokenizer, on the definitions."""
    tiny.write_folder(folder, tokenizer=tiny.byte_level(), settings=tiny.SETTINGS, vocab_size=272)
    return npllm.load(folder, ops="reference")
