"""Tests; a package, so that the processes that a test starts can import its helpers."""
