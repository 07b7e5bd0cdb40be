"""Captions of clips: what is asked, who answers, and which window an answer belongs to."""
