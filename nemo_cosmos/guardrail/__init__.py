"""Guards before and after generation. They fail closed: a guard that cannot judge counts as an objection."""

from nemo_cosmos.guardrail.runner import PROMPT_GUARDS, VIDEO_GUARDS, PostGuard, PreGuard
from nemo_cosmos.guardrail.verdict import Verdict, is_safe

__all__ = ["PROMPT_GUARDS", "VIDEO_GUARDS", "PostGuard", "PreGuard", "Verdict", "is_safe"]
