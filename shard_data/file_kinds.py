"""Describes a file by its first bytes, for messages about a file that is not what its name says."""

import re

HEAD = 4096  # bytes that are enough to recognize a kind
POINTERS = ((b"version https://git-lfs", "a Git LFS pointer"), (b".git/annex/", "a git-annex pointer"))
KINDS = (
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"\x80", "a pickle"),
)


def describe_kind(head: bytes) -> str:
    """What a file that starts with these bytes is: "an empty file", "a ZIP archive", "a web page titled ..."."""
    if not head:
        return "an empty file"
    start = head[:HEAD].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
        title = re.search(rb"<title[^>]*>([^<]{1,200})", head[:HEAD], re.IGNORECASE)
        return f"a web page titled {' '.join(title[1].decode(errors='replace').split())!r}" if title else "a web page"
    for sign, kind in POINTERS:
        if sign in start:
            return f"{kind}, not the content (fetch it with its tool)"
    for sign, kind in KINDS:
        if head.startswith(sign):
            return kind
    return f"data that begins with {head[:8].hex(' ')}"
