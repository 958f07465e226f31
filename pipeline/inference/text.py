"""Text for the terminal."""


def printable(text: str) -> str:
    """With `?` for control characters: names that come from files could control the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
