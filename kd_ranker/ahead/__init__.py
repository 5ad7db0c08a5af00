"""A config's programs, compiled for chips that are not here: bytes, copies and cycles."""
